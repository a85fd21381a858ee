"""One row into a pair: three forms, what is quarantined, what is malformed."""

import re

import hypothesis
import pytest
from hypothesis import strategies as st
from sourcing import ASSISTANT, GOOD, HUMAN, PROMPT, apart

from dpo_jax.data import preferences


def said(*contents):
  roles = ("user", "assistant")
  return [
    {"role": roles[i % 2], "content": text} for i, text in enumerate(contents)
  ]


def by(role, text):
  return [{"role": role, "content": text}]


def texts(row):
  pair = preferences.parse(row)
  return pair.prompt, pair.chosen, pair.rejected


# --- forms


def test_rows_with_a_label():
  row = {"prompt": "\n\nHuman: a\n\nAssistant:", "completion": " b"}
  found = preferences.labeled(row | {"label": True})
  assert (found.prompt, found.responses) == (row["prompt"], (" b",))
  assert found.label is True
  messages = {
    "prompt": [{"role": "user", "content": "a"}],
    "completion": [{"role": "assistant", "content": "b"}],
    "label": True,
  }
  assert preferences.labeled(messages) == found
  assert preferences.labeled(row | {"label": False}).id != found.id
  for broken, words in (
    ({"label": 1}, "'label' is not true or false"),
    ({"completion": 3, "label": True}, "'completion' is not a string"),
  ):
    with pytest.raises(preferences.Malformed, match=words):
      preferences.labeled(row | broken)
  with pytest.raises(preferences.Quarantined, match="empty completion"):
    preferences.labeled(row | {"completion": " ", "label": True})


def test_all_forms_give_the_same_pair():
  wanted = preferences.Comparison(
    preferences.content_id(PROMPT, " A tool.", " No."),
    PROMPT,
    " A tool.",
    " No.",
  )
  yes, no = said("What is a pen?", "A tool."), said("What is a pen?", "No.")
  for row in (
    GOOD,
    apart(PROMPT, " A tool.", " No."),
    {"chosen": yes, "rejected": no, "score_chosen": 8.5},
    apart("What is a pen?", yes, no),
    apart(yes[:1], yes[1:], no[1:]),
  ):
    assert preferences.parse(row) == wanted


def test_the_prompt_ends_at_the_last_assistant_turn():
  talk = f"{PROMPT} A tool.{HUMAN} For what?{ASSISTANT}"
  wanted = (talk, " Writing.", " Eating.")
  row = {"chosen": talk + " Writing.", "rejected": talk + " Eating."}
  assert texts(row) == wanted
  contents = ("What is a pen?", "A tool.", "For what?")
  row = {
    "chosen": said(*contents, "Writing."),
    "rejected": said(*contents, "Eating."),
  }
  assert texts(row) == wanted


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(TEXT, min_size=1, max_size=5), TEXT, TEXT)
def test_transcripts_and_messages_are_split_where_they_were_joined(
  turns, one, other
):
  if len(turns) % 2 == 0:
    turns = turns[1:]
  marks = (HUMAN, ASSISTANT)
  prompt = "".join(f"{marks[i % 2]} {t}" for i, t in enumerate(turns))
  prompt += ASSISTANT
  row = {"chosen": f"{prompt} {one}", "rejected": f"{prompt} {other}"}
  if not one.strip() or not other.strip() or one == other:
    with pytest.raises(preferences.Quarantined):
      preferences.parse(row)
    return
  hypothesis.assume(ASSISTANT not in f" {one} {other}")
  assert texts(row) == (prompt, f" {one}", f" {other}")
  if all(turn.strip() for turn in turns):
    row = {"chosen": said(*turns, one), "rejected": said(*turns, other)}
    assert texts(row) == (prompt, f" {one}", f" {other}")


def test_ids_depend_on_every_text_and_on_their_borders():
  one = preferences.content_id
  ids = [one("a", "b", "c"), one("ab", "", "c"), one("a", "bc", ""), one("abc")]
  assert len(set(ids)) == 4
  assert all(len(i) == 16 and int(i, 16) >= 0 for i in ids)


def test_fingerprints_depend_on_rows_and_order():
  a, b = (preferences.pair("p", text, " no") for text in (" a", " b"))
  prints = [preferences.fingerprint(rows) for rows in ([a, b], [b, a], [a])]
  assert len(set(prints)) == 3


def test_leaks_count_held_out_rows_by_their_prompt():
  train = [preferences.pair("p", " a", " b"), preferences.pair("p", " c", " d")]
  held_out = [
    preferences.pair(prompt, " a", " b") for prompt in ("p", "p ", "p")
  ]
  assert preferences.leaks(train, held_out) == 2


# --- quarantine

SHORT = f"{PROMPT} A."
LONGER = f"{PROMPT} B.{HUMAN} Why?{ASSISTANT} So."


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"chosen": "A tool.", "rejected": "No."}, "no '\\n\\nAssistant:'"),
    # As long as chosen's prompt: slicing by length would keep it.
    (
      {"chosen": SHORT, "rejected": "x" * len(PROMPT) + " B."},
      "rejected does not share chosen's prompt",
    ),
    (
      {"chosen": SHORT, "rejected": LONGER},
      "rejected has more turns than chosen",
    ),
    (
      {"chosen": LONGER, "rejected": SHORT},
      "rejected does not share chosen's prompt",
    ),
    ({"chosen": PROMPT, "rejected": PROMPT + " B."}, "empty chosen response"),
    ({"chosen": PROMPT + " \n\t", "rejected": PROMPT + " B."}, "empty chosen"),
    ({"chosen": SHORT, "rejected": PROMPT}, "empty rejected response"),
    ({"chosen": SHORT, "rejected": SHORT}, "identical responses"),
    (apart(" ", " A.", " B."), "empty prompt"),
    # Messages.
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
      "user and assistant do not alternate",
    ),
    (
      apart(said("a", "b"), by("user", "b"), by("user", "c")),
      "user and assistant do not alternate",
    ),
    (
      {"chosen": said("a", "b", "c"), "rejected": said("a", "b", "d")},
      "user and assistant do not alternate",
    ),
    (
      apart(said("a"), said("b", "c"), said("d")),
      "a response of several messages",
    ),
    (
      apart(
        [*by("system", "Be good."), *said("a")],
        by("assistant", "b"),
        by("assistant", "c"),
      ),
      "a role that HH's turns do not have",
    ),
    (
      {"chosen": said(f"a{HUMAN} b", "c"), "rejected": said(f"a{HUMAN} b", "")},
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
    ({"chosen": said("a", ""), "rejected": said("a", "d")}, "empty chosen"),
  ],
)
def test_pairs_without_a_preference_are_quarantined(row, reason):
  with pytest.raises(preferences.Quarantined, match=re.escape(reason)):
    preferences.parse(row)


# --- malformed rows


@pytest.mark.parametrize(
  ("row", "words"),
  [
    ([1, 2], "row is not an object: list"),
    (None, "row is not an object: NoneType"),
    ({"rejected": "a"}, "field 'chosen' is missing"),
    ({"chosen": "a"}, "field 'rejected' is missing"),
    ({"prompt": "a", "chosen": "a"}, "field 'rejected' is missing"),
    (GOOD | {"rejected": 3}, "field 'rejected' is not a string but int"),
    (GOOD | {"prompt": None}, "field 'prompt' is not a string but NoneType"),
    # Messages.
    ({"chosen": said("a")}, "field 'rejected' is not a list of messages"),
    (apart([], said("b"), said("c")), "field 'prompt' is not a list of messa"),
    (apart({}, said("b"), said("c")), "field 'prompt' is not a list of messa"),
    (
      {"chosen": ["a"], "rejected": ["b"]},
      "field 'chosen[0]' is not an object",
    ),
    (GOOD | {"chosen": [{}]}, "field 'chosen[0].role' is missing"),
    (
      {"chosen": said("a", [{"type": "text"}]), "rejected": said("b")},
      "field 'chosen[1].content' is not a string but list",
    ),
  ],
)
def test_a_malformed_row_names_its_field(row, words):
  with pytest.raises(preferences.Malformed, match=f"^{re.escape(words)}"):
    preferences.parse(row)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_an_integer_is_neither_a_truth_value_nor_a_float(value):
  with pytest.raises(preferences.Malformed, match=r"'a\.b' is not an integer"):
    preferences.integer({"b": value}, "b", "a.")
