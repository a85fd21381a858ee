"""Columnar token ids: selection, examples, joining, fingerprints."""

import dataclasses
import hashlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dpo_jax.data import token_table

FIRST = token_table.Pair("a", (5, 6), (7,), (8, 9, 10))
SECOND = token_table.Pair("b", (11,), (12, 13), (14,))
TABLE = token_table.from_items([FIRST, SECOND])


def test_columns_by_hand():
  assert TABLE.ids == ("a", "b")
  assert TABLE.tokens.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
  assert TABLE.starts.tolist() == [[0, 2, 3], [6, 7, 9]]
  assert TABLE.lengths.tolist() == [[2, 1, 3], [1, 2, 1]]
  assert TABLE.tokens.dtype == np.int32
  assert TABLE.starts.dtype == TABLE.lengths.dtype == np.int64
  assert token_table.from_items(TABLE) is TABLE


def test_a_table_is_a_sequence_of_its_items():
  assert (len(TABLE), TABLE.parts) == (2, 3)
  assert list(TABLE) == [FIRST, SECOND]
  assert TABLE[-1] == TABLE[np.int64(1)] == SECOND
  # Python's own numbers, which JSON and hashing take.
  assert {type(token) for token in TABLE[0].rejected} == {int}
  for index in (2, -3):
    with pytest.raises(IndexError, match=f"item {index} of 2"):
      TABLE[index]


def test_an_empty_table_is_one_of_pairs():
  none = token_table.from_items([])
  assert (len(none), none.parts, none.tokens.dtype) == (0, 3, np.int32)
  assert list(token_table.join([none, TABLE, none])) == [FIRST, SECOND]
  assert none.fingerprint() == hashlib.sha256().hexdigest()[:16]
  assert list(none.examples("both")) == []


def test_pairs_and_examples_are_not_mixed():
  example = token_table.Example("c", (1,), (2,))
  for mix in (
    lambda: token_table.from_items([FIRST, example]),
    lambda: token_table.join([TABLE, token_table.from_items([example])]),
  ):
    with pytest.raises(ValueError, match="either pairs or examples"):
      mix()


def test_a_token_that_no_int32_holds_is_refused():
  with pytest.raises(OverflowError):
    token_table.from_items([token_table.Example("a", (2**31,), (1,))])


def test_the_fingerprint_is_a_hash_of_ids_and_tokens_with_their_borders():
  def part(*tokens):
    return b"%d:" % len(tokens) + b"".join(
      token.to_bytes(4, "little") for token in tokens
    )

  written = b"1:a" + part(5, 6) + part(7) + part(8, 9, 10)
  written += b"1:b" + part(11) + part(12, 13) + part(14)
  wanted = hashlib.sha256(written).hexdigest()[:16]
  assert TABLE.fingerprint() == wanted


@pytest.mark.parametrize(
  "changed",
  [
    {"id": "c"},
    {"prompt": (5, 7)},
    {"rejected": (8, 9)},
    # A token on the other side of a border.
    {"prompt": (5,), "chosen": (6, 7)},
    {"chosen": FIRST.rejected, "rejected": FIRST.chosen},
  ],
)
def test_the_fingerprint_changes_with_an_item(changed):
  other = dataclasses.replace(FIRST, **changed)
  found = token_table.from_items([other, SECOND]).fingerprint()
  assert found != TABLE.fingerprint()


# --- a table is the list of its items

_ids = st.text(max_size=3)
_part = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
_pairs = st.lists(
  st.builds(token_table.Pair, _ids, _part, _part, _part), max_size=4
)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.lists(_pairs, min_size=1, max_size=3), st.data())
def test_tables_are_lists(lists, data):
  wanted, tables = [], []
  for items in lists:
    table = token_table.from_items(items)
    assert list(table) == items
    at = st.integers(-len(items), len(items) - 1)
    indices = data.draw(st.lists(at, max_size=5)) if items else []
    tables.append(table.take(indices))
    assert tables[-1].tokens is table.tokens
    wanted += [items[i] for i in indices]
  found = token_table.join(tables)
  assert list(found) == wanted
  assert found.fingerprint() == token_table.from_items(wanted).fingerprint()
  reverse = range(len(wanted))[::-1]
  turned = found.take(reverse).fingerprint() == found.fingerprint()
  assert turned == (wanted == wanted[::-1])
  for responses in ("chosen", "both"):
    examples = []
    for item in wanted:
      examples.append(token_table.Example(item.id, item.prompt, item.chosen))
      if responses == "both":
        rejected = token_table.Example(item.id, item.prompt, item.rejected)
        examples.append(rejected)
    table = found.examples(responses)
    assert list(table) == examples
    assert table.tokens is found.tokens
    if examples:
      assert list(token_table.from_items(examples)) == examples
