"""TRL's lists of messages into HH's turns, or left out for a reason."""

import hypothesis
import pytest
from hypothesis import strategies as st
from sourcing import ASSISTANT, HUMAN, apart, line, load, texts

from dpo_jax.data import preferences
from dpo_jax.data.sources import messages


@pytest.fixture
def read(tmp_path):
  """Writes rows of a kind to a file and loads it."""

  def of(kind, *rows, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line(row) for row in rows))
    return load(path, kind=kind, **changes)

  return of


def said(*contents):
  roles = ("user", "assistant")
  return [
    {"role": roles[i % 2], "content": text} for i, text in enumerate(contents)
  ]


def test_messages_become_turns(read):
  prompt = said("Hi.", "Hello.", "Why?")
  yes, no = ([{"role": "assistant", "content": text}] for text in ("Yes", "No"))
  loaded = read(
    "pairs",
    apart(prompt, yes, no),
    {"chosen": prompt + yes, "rejected": prompt + no},
    # Another field is no matter.
    {"chosen": prompt + yes, "rejected": prompt + no, "score_chosen": 8.5},
    {"prompt": "Hi.", "chosen": prompt + yes, "rejected": prompt + no},
  )
  turns = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
  assert texts(loaded) == [(turns, " Yes", " No")] * 4


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    (
      {"chosen": said("a", "b"), "rejected": said("c", "d")},
      "rejected does not share chosen's prompt",
    ),
    (
      apart("z", said("a", "b"), said("a", "d")),
      "the prompt is not the first message",
    ),
    (
      apart(said("a"), said("b"), said("c")),
      "user and assistant do not take turns",
    ),
    (
      apart(said("a", "b"), said("b")[:1], said("c")[:1]),
      "user and assistant do not take turns",
    ),
    (
      {"chosen": said("a", "b", "c"), "rejected": said("a", "b", "d")},
      "user and assistant do not take turns",
    ),
    (
      apart(said("a"), said("b", "c"), said("d")),
      "an answer of several messages",
    ),
    (
      apart(
        [{"role": "system", "content": "Be good."}, *said("a")],
        said("", "b")[1:],
        said("", "c")[1:],
      ),
      "a role that HH's turns do not have",
    ),
    (
      {
        "chosen": said(f"a{HUMAN} b", "c"),
        "rejected": said(f"a{HUMAN} b", "d"),
      },
      "a message holds the mark of a turn",
    ),
    (
      {"chosen": said("a", f"c{ASSISTANT}"), "rejected": said("a", "d")},
      "a message holds the mark of a turn",
    ),
    (
      {"chosen": said(" ", "c"), "rejected": said(" ", "d")},
      "empty message in the prompt",
    ),
    (
      {"chosen": said("a", ""), "rejected": said("a", "d")},
      "empty chosen resp",
    ),
    ({"chosen": said("a", "d"), "rejected": said("a", "d")}, "identical"),
  ],
)
def test_messages_that_turns_cannot_say_are_quarantined(read, row, reason):
  good = {"chosen": said("a", "b"), "rejected": said("a", "c")}
  counts = read("pairs", row, good).counts
  (key,) = [key for key in counts if key.startswith("quarantined: ")]
  assert reason in key
  assert counts == {"read": 2, key: 1, "kept": 1}


@pytest.mark.parametrize(
  ("row", "words"),
  [
    ({"chosen": said("a", "b")}, "field 'rejected' is not a list of messages"),
    (apart([], said("b"), said("c")), "'prompt' is not a list of messages"),
    (apart({}, said("b"), said("c")), "'prompt' is not a list of messages"),
    ({"chosen": ["a"], "rejected": ["b"]}, r"'chosen\[0\]' is not an object"),
    (
      {"chosen": [{"role": "user"}], "rejected": said("b")},
      r"field 'chosen\[0\].content' is missing",
    ),
    (
      {"chosen": said("a", [{"type": "text"}]), "rejected": said("b")},
      r"field 'chosen\[1\].content' is not a string but list",
    ),
  ],
)
def test_messages_name_a_bad_field(read, row, words):
  with pytest.raises(ValueError, match=rf"rows.jsonl:1: .*{words}"):
    read("pairs", row)


def test_messages_in_a_file_of_hh_are_malformed(read):
  row = {"chosen": said("a", "b"), "rejected": said("a", "c")}
  with pytest.raises(ValueError, match="'chosen' is not a string but list"):
    read("hh", row)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@hypothesis.given(st.integers(0, 2), st.data())
def test_messages_and_their_transcripts_are_the_same_pair(pairs, data):
  """Joined into HH's transcripts, the messages are read back as they were."""
  words = WORDS.filter(str.strip)
  contents = data.draw(
    st.lists(words, min_size=2 * pairs + 1, max_size=2 * pairs + 1)
  )
  one, other = data.draw(words), data.draw(words)
  hypothesis.assume(one != other)
  row = {"chosen": said(*contents, one), "rejected": said(*contents, other)}
  mark = (HUMAN, ASSISTANT)
  joined = "".join(f"{mark[i % 2]} {text}" for i, text in enumerate(contents))
  wanted = preferences.parse(
    {
      "chosen": f"{joined}{ASSISTANT} {one}",
      "rejected": f"{joined}{ASSISTANT} {other}",
    }
  )
  assert preferences.pair(*messages.texts(row)) == wanted
