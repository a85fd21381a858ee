"""Columns of token items: what is moved, what is shared, what is refused."""

import dataclasses
import hashlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dpo_jax.data import token_table

FIRST = token_table.Pair("a", (5, 6), (7,), (8, 9, 10))
SECOND = token_table.Pair("b", (11,), (12, 13), (14,))


def by_hand():
  return token_table.Table(
    ("a", "b"),
    np.array([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], np.int32),
    np.array([[0, 2, 3], [6, 7, 9]]),
    np.array([[2, 1, 3], [1, 2, 1]]),
  )


def assert_alike(found, wanted):
  """The same ids and arrays, of the same types."""
  assert found.ids == wanted.ids
  for name in ("tokens", "starts", "lengths"):
    a, b = getattr(found, name), getattr(wanted, name)
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape


# --- by hand


def test_from_items_and_from_columns():
  wanted = by_hand()
  found = token_table.from_items([FIRST, SECOND])
  assert_alike(found, wanted)
  columns = [[(5, 6), (11,)], [(7,), (12, 13)], [(8, 9, 10), (14,)]]
  assert_alike(token_table.from_columns(["a", "b"], columns), wanted)
  assert found.tokens.dtype == np.int32
  assert found.starts.dtype == found.lengths.dtype == np.int64
  # A table is not made again.
  assert token_table.from_items(found) is found


def test_a_table_is_a_sequence_of_its_items():
  table = by_hand()
  assert len(table) == 2
  assert table.parts == 3
  assert list(table) == [FIRST, SECOND]
  assert table[-1] == table[np.int64(1)] == SECOND
  # Python's own numbers, which JSON and hashing take.
  assert {type(token) for token in table[0].rejected} == {int}
  assert list(table[1:]) == [SECOND]
  assert list(table[::-1]) == [SECOND, FIRST]
  assert list(table[5:]) == []
  for index in (2, -3):
    with pytest.raises(IndexError, match=f"item {index} of 2"):
      table[index]


def test_examples_are_indexed_as_examples():
  items = [
    token_table.Example("a", (1, 2), (3,)),
    token_table.Example("b", (4,), (5, 6)),
  ]
  table = token_table.from_items(items)
  assert table.parts == 2
  assert list(table) == items
  assert table.starts.tolist() == [[0, 2], [3, 4]]


def test_taking_moves_no_token():
  table = by_hand()
  found = table.take([1, 0, 1])
  assert list(found) == [SECOND, FIRST, SECOND]
  assert found.tokens is table.tokens
  assert found.ids == ("b", "a", "b")
  assert found.starts.tolist() == [[6, 7, 9], [0, 2, 3], [6, 7, 9]]
  assert list(found.take([2])) == [SECOND]
  none = table.take([])
  assert list(none) == []
  assert none.parts == 3
  with pytest.raises(IndexError):
    table.take([2])


def test_pairs_become_examples_of_one_or_both_responses():
  table = by_hand()
  chosen = table.examples("chosen")
  assert list(chosen) == [
    token_table.Example("a", (5, 6), (7,)),
    token_table.Example("b", (11,), (12, 13)),
  ]
  both = table.examples("both")
  assert list(both) == [
    token_table.Example("a", (5, 6), (7,)),
    token_table.Example("a", (5, 6), (8, 9, 10)),
    token_table.Example("b", (11,), (12, 13)),
    token_table.Example("b", (11,), (14,)),
  ]
  assert chosen.tokens is both.tokens is table.tokens
  with pytest.raises(ValueError, match="only a table of pairs"):
    chosen.examples("both")


def test_joining_keeps_the_order_of_tables_and_items():
  table = by_hand()
  # The second one's tokens are not in its items' order, and not all used.
  found = token_table.join([table, table.take([1]), table.take([1, 0])])
  assert list(found) == [FIRST, SECOND, SECOND, SECOND, FIRST]
  assert found.starts.dtype == np.int64
  assert list(token_table.join(iter([table]))) == list(table)


def test_pairs_and_examples_are_not_mixed():
  example = token_table.Example("c", (1,), (2,))
  with pytest.raises(ValueError, match="pairs and examples"):
    token_table.from_items([FIRST, example])


def test_an_empty_table_is_one_of_pairs():
  none = token_table.from_items([])
  assert len(none) == 0
  assert none.parts == 3
  assert none.tokens.dtype == np.int32
  assert list(token_table.join([none, by_hand(), none])) == [FIRST, SECOND]
  assert none.fingerprint() == hashlib.sha256().hexdigest()[:16]
  assert list(none.examples("both")) == []


def test_columns_of_other_lengths_are_refused():
  with pytest.raises(ValueError, match="inhomogeneous"):
    token_table.from_columns(["a"], [[(1,)], [(2,), (3,)], [(4,)]])
  with pytest.raises(ValueError, match="reshape"):
    token_table.from_columns(["a", "b"], [[(1,)], [(2,)], [(3,)]])


def test_a_token_that_no_int32_holds_is_refused():
  with pytest.raises(OverflowError):
    token_table.from_columns(["a"], [[(2**31,)], [(1,)], [(1,)]])


def test_the_fingerprint_is_a_hash_of_ids_and_tokens_with_their_borders():
  def part(*tokens):
    return b"%d:" % len(tokens) + b"".join(
      token.to_bytes(4, "little") for token in tokens
    )

  written = b"1:a" + part(5, 6) + part(7) + part(8, 9, 10)
  written += b"1:b" + part(11) + part(12, 13) + part(14)
  wanted = hashlib.sha256(written).hexdigest()[:16]
  assert by_hand().fingerprint() == wanted


@pytest.mark.parametrize(
  "changed",
  [
    {"id": "c"},
    {"prompt": (5, 7)},
    {"chosen": (8,)},
    {"rejected": (8, 9)},
    # A token on the other side of a border.
    {"prompt": (5,), "chosen": (6, 7)},
    {"chosen": (7, 8), "rejected": (9, 10)},
    {"chosen": FIRST.rejected, "rejected": FIRST.chosen},
  ],
)
def test_the_fingerprint_changes_with_an_item(changed):
  other = dataclasses.replace(FIRST, **changed)
  found = token_table.from_items([other, SECOND]).fingerprint()
  assert found != by_hand().fingerprint()


def test_the_fingerprint_knows_the_order_and_not_where_tokens_lie():
  table = by_hand()
  turned = token_table.from_items([SECOND, FIRST])
  assert turned.fingerprint() != table.fingerprint()
  assert turned.take([1, 0]).fingerprint() == table.fingerprint()
  assert table.take([0]).fingerprint() != table.fingerprint()


def test_read_only_mapped_tokens_will_do(tmp_path):
  table = by_hand()
  table.tokens.tofile(tmp_path / "tokens")
  mapped = np.memmap(tmp_path / "tokens", np.int32, "r")
  again = dataclasses.replace(table, tokens=mapped)
  assert list(again.take([1, 0])) == [SECOND, FIRST]
  assert again.fingerprint() == table.fingerprint()
  assert again.take([1]).tokens is mapped
  assert list(token_table.join([again, table])) == [FIRST, SECOND] * 2


# --- by hypothesis: a table is the list of its items

_ids = st.text(max_size=3)
_part = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
_pairs = st.lists(
  st.builds(token_table.Pair, _ids, _part, _part, _part), max_size=6
)
_examples = st.lists(
  st.builds(token_table.Example, _ids, _part, _part), max_size=6
)


@hypothesis.given(st.one_of(_pairs, _examples))
def test_a_table_gives_its_items_back(items):
  table = token_table.from_items(items)
  assert list(table) == items
  assert [table[i] for i in range(-len(items), 0)] == items
  assert table.lengths.sum() == len(table.tokens)
  # No gaps, no overlaps: parts follow each other.
  ends = (table.starts + table.lengths).reshape(-1)
  np.testing.assert_array_equal(table.starts.reshape(-1)[1:], ends[:-1])


@hypothesis.given(_pairs.filter(bool), st.data())
def test_taking_is_indexing_a_list(items, data):
  table = token_table.from_items(items)
  at = st.integers(-len(items), len(items) - 1)
  first = data.draw(st.lists(at, max_size=8))
  found = table.take(first)
  assert list(found) == [items[i] for i in first]
  assert found.tokens is table.tokens
  cut = data.draw(st.slices(len(items)))
  assert list(table[cut]) == items[cut]
  # A choice of a choice.
  if first:
    second = data.draw(st.lists(st.integers(0, len(first) - 1), max_size=4))
    assert list(found.take(second)) == [items[first[i]] for i in second]


@hypothesis.given(st.lists(_pairs, min_size=1, max_size=4), st.data())
def test_joining_is_adding_lists(lists, data):
  parts = []
  for items in lists:
    table = token_table.from_items(items)
    order = data.draw(st.permutations(range(len(items))))
    # Tokens that lie in another order than the items.
    parts.append(table.take(order))
  wanted = [item for part in parts for item in part]
  found = token_table.join(parts)
  assert list(found) == wanted
  assert found.fingerprint() == token_table.from_items(wanted).fingerprint()
  for responses in ("chosen", "both"):
    examples = []
    for item in wanted:
      examples.append(token_table.Example(item.id, item.prompt, item.chosen))
      if responses == "both":
        examples.append(
          token_table.Example(item.id, item.prompt, item.rejected)
        )
    assert list(found.examples(responses)) == examples


@hypothesis.given(_pairs, _pairs)
def test_fingerprints_are_alike_just_where_items_are(first, second):
  a, b = (token_table.from_items(x).fingerprint() for x in (first, second))
  assert (a == b) == (first == second)


def test_a_mask_is_no_index():
  with pytest.raises(ValueError, match="not by a mask"):
    by_hand().take(np.array([True, False]))
