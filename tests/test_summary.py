"""The table of responses, against counts made by hand."""

import dataclasses

import pytest
import reported

from dpo_jax.sampling import summary


@pytest.mark.parametrize(
  ("text", "share"),
  [
    # Nine words have seven triples: too few to tell.
    ("a " * 9, 1.0),
    # Ten have eight, all of them "a a a".
    ("a " * 10, 1 / 8),
    ("one two three four five six seven eight nine ten", 1.0),
    # "no no yes", "no yes no" and "yes no no" of ten triples.
    ("no no yes " * 4, 3 / 10),
    # Case and line ends: words are what stands between white space.
    ("a\n\nb\tc  " * 4, 3 / 10),
    ("", 1.0),
  ],
)
def test_distinct_trigrams(text, share):
  assert summary.distinct_trigrams(text) == pytest.approx(share)


def test_half_of_the_triples_are_enough():
  # Ten triples, of which five are distinct: the first five, each twice.
  even = "a b c d e a b c d e a b"
  assert summary.distinct_trigrams(even) == 0.5
  assert not summary.loops(even)
  # Eleven, of which the same five.
  assert summary.loops(even + " c")


def row(model, step, temperature, text, tokens, finish, logp):
  return dataclasses.replace(
    reported.response(model, step, temperature, "p", text),
    token_count=tokens,
    finish_reason=finish,
    mean_logp=logp,
  )


def test_a_line_for_each_model_step_and_temperature():
  rows = [
    row("base", None, 1.0, " Yes.", 3, "eos", -0.5),
    row("base", None, 1.0, "  \n", 1, "eos", -2.0),
    row("base", None, 1.0, "a " * 40, 64, "length", -0.1),
    row("base", None, 1.0, " It is\n\n", 12, "turn", -1.0),
    row("base", None, 0.25, " Yes.", 2, "eos", None),
    row("dpo", 100, 0.25, "no no yes " * 9, 27, "length", -0.25),
    row("dpo", 100, 0.25, "no no yes " * 9, 28, "length", -0.75),
  ]
  table = summary.summary(rows)
  head, *lines = summary.lines(table)
  assert head.split("  ")[0] == "model"
  # (3 + 1 + 64 + 12) / 4 = 20; the middle of 3 and 12 is 7.5; the mean of the
  # four log-probs is -0.9.
  assert [line.split() for line in lines] == [
    ["base", "1", "4", "20.0", "7.5", "64", "1", "1", "1", "1", "-0.900"],
    ["base", "0.25", "1", "2.0", "2", "2", "0", "0", "0", "0", "-"],
    [
      "dpo,",
      "step",
      "100",
      "0.25",
      "2",
      "27.5",
      "27.5",
      "28",
      "0",
      "2",
      "2",
      "0",
      "-0.500",
    ],
  ]
  assert table[1].mean_logp is None
  assert table[0].median_tokens == 7.5
  # Columns stand beneath their names.
  assert len({len(line) for line in (head, *lines)}) == 1
