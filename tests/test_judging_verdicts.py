import collections
import json
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from dpo_jax.judging import verdicts

FORMS = {
  "A": [
    "More helpful: A",
    'More helpful: "A"',
    "More helpful: **A**",
    "**More helpful:** A",
    "**More helpful: A**",
    "More helpful: A.",
    "more helpful: a",
    "MORE HELPFUL: (A)",
    "More helpful: [[A]]",
    "More helpful: Response A",
    "More helpful: <A>",
    "More helpful candidate: A",
    "More helpful: A, because it answers the question.",
    "More helpful: A because B wanders off.",
    "More helpful: A (slightly)",
    "More helpful: A. Both are short, though.",
    "Ｍｏｒｅ ｈｅｌｐｆｕｌ：Ａ",
    "More helpful:\u200b A\u200e",
    "Comparison: B is vague. More helpful: A",
    "More helpful: A\n\nI hope this helps!",
    "More helpful: B\nMore helpful: A",
    "More helpful:\nA",
    "Comparison: B is vague.\n\nA",
    "Comparison: B is vague.\n\n**A**",
    "[[A]]",
    "a",
    "Verdict: A",
    "Final answer: A",
    '{"comparison": "B is vague.", "choice": "A"}',
    "The more helpful response is A.",
    "Sorry for the delay.\nMore helpful: A",
    "More harmless: A",
    'Preferred: "A"',
    "More helpful: A\nComparison: B is vague.",
    'The text says "More helpful: B".\nMore helpful: A',
  ],
  "missing": [
    None,
    "",
    " \n ",
    "Comparison: Response A is vague while B",
    "More helpful:",
    "More helpful: C",
    "More helpful: both",
    "More helpful: neither A nor B",
    "More helpful: A or B",
    'More helpful: "A" or "B"',
    "More helpful: A/B",
    "More helpful: A; B",
    "More helpful: A. B",
    "More helpful: A, B",
    "More helpful: A (tie)",
    "More helpful: A? Hard to say",
    "More helpful: a bit of both",
    "More helpful: A bit of both",
    "More helpful: b/a",
    "More helpful: A1",
    "More helpful: A+",
    "More helpful: not A",
    "More helpful: A More helpful: B",
    "Less helpful: A",
    "More helpful: A\nMore helpful: unclear",
    "A and B",
    "A\nComparison: that is all.",
    "<html><body>A gateway failed</body></html>",
    "More helpful: А",  # Cyrillic
  ],
  "refusal": [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, but I can’t assist with that.",
    "Sorry, I cannot compare these.",
    "I cannot help with this request.",
    "I am unable to judge this.",
    "Unfortunately, I can't take part in this.",
    "As an AI model I cannot do so.",
  ],
}


@pytest.mark.parametrize(
  ("letter", "text"),
  [(letter, text) for letter, texts in FORMS.items() for text in texts],
)
def test_form(letter, text):
  assert verdicts.read(text) == letter


def test_forms_of_b_read_like_those_of_a():
  swap = str.maketrans("ABabＡ", "BAbaＢ")
  for text in FORMS["A"][:13] + FORMS["A"][16:18]:
    head, colon, tail = text.rpartition("：" if "：" in text else ":")
    assert verdicts.read(head + colon + tail.translate(swap)) == "B", text


def test_real_judge_outputs(shared):
  """The ties of these files are parse misses, a refusal aside.

  Over the twelve files the parser agrees with every other recorded verdict.
  """
  slots = {"A": "Model", "B": "Chosen"}
  counts = collections.Counter()
  for path in sorted((shared / "seed_results").glob("*.json")):
    for row in json.loads(path.read_text())["results"]:
      assert row["presentation_order"] == "model_first"
      letter = verdicts.read(row["raw_gpt4_response"])
      if row["verdict"] == "Tie":
        counts[letter] += 1
        if letter != "refusal":
          assert row["raw_gpt4_response"].endswith(f'More helpful: "{letter}"')
      else:
        assert slots[letter] == row["verdict"], row["raw_gpt4_response"]
        counts["same"] += 1
  # Counted with grep: 12 files of 150 rows, 13 of them called ties.
  assert counts.pop("same") == 12 * 150 - 13
  assert counts.pop("refusal") == 1
  assert set(counts) == {"A", "B"}
  assert counts.total() == 12


TIES = {
  "tie": [
    "More helpful: tie",
    "More helpful: **Tie**.",
    'Preferred: "tie"',
    "Comparison: both are fine.\n\nTie",
    "More harmless: a tie, because A and B are equal",
    '{"comparison": "x", "choice": "tie"}',
    "Verdict: draw",
    "Ｐｒｅｆｅｒｒｅｄ：ｔｉｅ",
  ],
  "missing": [
    "More helpful: tie or A",
    "More helpful: tie, A is a little better",
    "More helpful: A (tie)",
    "More helpful: tied hands",
    "More helpful: both",
    "It is a tie between A and B.",
  ],
  "A": ["More helpful: A", "Preferred: a", "More harmless: [[A]]"],
}


@pytest.mark.parametrize(
  ("found", "text"),
  [(found, text) for found, texts in TIES.items() for text in texts],
)
def test_a_tie_is_read_only_where_it_is_allowed(found, text):
  assert verdicts.read(text, ties=True) == found
  without = "missing" if found == "tie" else found
  assert verdicts.read(text) == without


@pytest.mark.parametrize(
  "junk",
  ["[", '"', " ", "*\n", "More helpful: ", "A ", "sorry ", "(A", "i'm ", "A\n"],
)
@pytest.mark.parametrize("ties", [False, True])
def test_a_long_reply_of_junk_is_read_in_no_time(junk, ties):
  text = junk * (200_000 // len(junk))
  begin = time.process_time()
  for whole in (text, f"More helpful: {text}", f"{text}\nMore helpful: B"):
    verdicts.read(whole, ties=ties)
    verdicts.read_json(whole, ties=ties)
  assert time.process_time() - begin < 5.0


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
letters = st.sampled_from("AB")


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(text=any_text, letter=letters)
def test_nothing_before_the_last_line_matters(text, letter):
  assert verdicts.read(f"{text}\nMore helpful: {letter}") == letter


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
  before=st.text("\"'*`_([{<“ ", max_size=4),
  after=st.text("\"'*`_)]}>” ", max_size=4),
  letter=st.sampled_from("ABab"),
  noun=st.sampled_from(["", "Response ", "candidate "]),
)
def test_decoration_changes_nothing(before, after, letter, noun):
  text = f"Comparison: x.\nMore helpful: {before}{noun}{letter}{after}"
  assert verdicts.read(text) == letter.upper()


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(text=any_text)
def test_letters_come_from_a_verdict_only(text):
  """Without a label, only a last line that is a bare letter may count."""
  last = ([s for s in text.splitlines() if s.strip()] or [""])[-1]
  hypothesis.assume("helpful" not in text.lower() and ":" not in text)
  hypothesis.assume("：" not in text and "=" not in text)
  hypothesis.assume(not any(c in "aAbB" for c in fold(last)))
  assert verdicts.read(text) in ("missing", "refusal")


def fold(text: str) -> str:
  import unicodedata

  return unicodedata.normalize("NFKC", text)


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
  first=letters, join=st.sampled_from([" or ", "/", " and ", ", "])
)
def test_two_letters_in_one_verdict_are_missing(first, join):
  second = "B" if first == "A" else "A"
  assert verdicts.read(f"More helpful: {first}{join}{second}") == "missing"
