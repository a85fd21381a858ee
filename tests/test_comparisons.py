"""One row into a pair: both forms, what is quarantined, what is malformed."""

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from dpo_jax.data import preferences

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PROMPT = f"{HUMAN} What is a pen?{ASSISTANT}"
GOOD = {"chosen": PROMPT + " A tool.", "rejected": PROMPT + " No."}


# --- forms


def test_both_forms_give_the_same_pair():
  apart = {"prompt": PROMPT, "chosen": " A tool.", "rejected": " No."}
  wanted = preferences.Comparison(
    preferences.content_id(PROMPT, " A tool.", " No."),
    PROMPT,
    " A tool.",
    " No.",
  )
  assert preferences.parse(GOOD) == preferences.parse(apart) == wanted


def test_the_prompt_ends_at_the_last_assistant_turn():
  talk = f"{PROMPT} A tool.{HUMAN} For what?{ASSISTANT}"
  row = {"chosen": talk + " Writing.", "rejected": talk + " Eating."}
  pair = preferences.parse(row)
  assert (pair.prompt, pair.chosen, pair.rejected) == (
    talk,
    " Writing.",
    " Eating.",
  )


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@hypothesis.given(st.lists(TEXT, min_size=1, max_size=4), TEXT, TEXT)
def test_transcripts_come_apart_where_they_were_joined(turns, one, other):
  said = [f"{(HUMAN, ASSISTANT)[i % 2]} {t}" for i, t in enumerate(turns)]
  prompt = "".join(said) + ASSISTANT
  row = {"chosen": f"{prompt} {one}", "rejected": f"{prompt} {other}"}
  if not one.strip() or not other.strip() or one == other:
    with pytest.raises(preferences.Quarantined):
      preferences.parse(row)
    return
  hypothesis.assume(ASSISTANT not in f" {one} {other}")
  pair = preferences.parse(row)
  assert (pair.prompt, pair.chosen, pair.rejected) == (
    prompt,
    f" {one}",
    f" {other}",
  )


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
    preferences.pair("p", " e", " f"),
    preferences.pair("p ", " a", " b"),
    preferences.pair("p", " a", " b"),
  ]
  assert preferences.leaks(train, held_out) == 2


# --- quarantine

OTHER = f"{HUMAN} What is ink?{ASSISTANT}"


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"chosen": "A tool.", "rejected": "No."}, "no '\\n\\nAssistant:'"),
    (
      {"chosen": PROMPT + " A.", "rejected": OTHER + " B."},
      "rejected does not share chosen's prompt",
    ),
    # As long as chosen's prompt: slicing by length would keep it.
    (
      {"chosen": PROMPT + " A.", "rejected": "x" * len(PROMPT) + " B."},
      "rejected does not share chosen's prompt",
    ),
    (
      {
        "chosen": PROMPT + " A.",
        "rejected": f"{PROMPT} B.{HUMAN} Why?{ASSISTANT} So.",
      },
      "rejected goes on for more turns than chosen",
    ),
    (
      {
        "chosen": f"{PROMPT} B.{HUMAN} Why?{ASSISTANT} So.",
        "rejected": PROMPT + " A.",
      },
      "rejected does not share chosen's prompt",
    ),
    ({"chosen": PROMPT, "rejected": PROMPT + " B."}, "empty chosen response"),
    ({"chosen": PROMPT + " \n\t", "rejected": PROMPT + " B."}, "empty chosen"),
    ({"chosen": PROMPT + " A.", "rejected": PROMPT}, "empty rejected response"),
    ({"chosen": PROMPT + " A.", "rejected": PROMPT + " A."}, "identical"),
    ({"prompt": " ", "chosen": " A.", "rejected": " B."}, "empty prompt"),
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
    (GOOD | {"chosen": None}, "field 'chosen' is not a string but NoneType"),
    (GOOD | {"prompt": None}, "field 'prompt' is not a string but NoneType"),
    (GOOD | {"chosen": [{}]}, "field 'chosen' is not a string but list"),
    (GOOD | {"chosen": "a \ud83d"}, "field 'chosen' holds a lone surrogate"),
  ],
)
def test_a_malformed_row_names_its_field(row, words):
  with pytest.raises(preferences.Malformed, match=f"^{re.escape(words)}$"):
    preferences.parse(row)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_an_integer_is_neither_a_truth_value_nor_a_float(value):
  with pytest.raises(preferences.Malformed, match=r"'a\.b' is not an integer"):
    preferences.integer({"b": value}, "b", "a.")
