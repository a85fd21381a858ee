"""Where token items go in the rows of a batch, from their lengths alone.

A piece is what must stand together in a row: one sequence, or a whole pair. A
plan gives each piece its row and its place; nothing here looks at a token. So
all batches of a run can be planned before it begins, and the few shapes that
hold them chosen for the least waste (`batch_shapes`).

Letters: N items of P parts (a prompt and its responses), K pieces, R rows in
use, B rows of a batch, T tokens of a row, S shards into which the rows are
split, C completion tokens of a shard.

Where pieces run on (`Packing.spans_rows`) the rows of a shard are one line, cut
into blocks of T tokens; only the line's end is empty, and attention is told
which blocks look at which.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dpo_jax.data import token_table

Layout = Literal["padded", "packed", "shared"]

# Completion tokens of a shard come in multiples of it: few shapes, small waste.
_WIDTH_MULTIPLE = 128
# Likewise the pairs of rows that see each other.
_SEEN_MULTIPLE = 8
# Beyond the settled shapes, row counts grow by about a fifth.
_GROWTH = 1.2


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
  """B and C of a batch, and the pairs of rows that see each other."""

  rows: int
  width: int
  block_pairs: int = 0


@dataclasses.dataclass(frozen=True)
class Packing:
  """How a batch is laid out; `batch.pack` does it.

  Attributes:
    layout: "padded" (a sequence a row), "packed" (several sequences a row) or
      "shared" (pairs with one copy of their prompt, several a row).
    row_length: T.
    shards: S; every row count is a multiple of it.
    microbatches: M; the batch size is a multiple of it.
    loss_on_prompt: predict the prompt's tokens too (examples only).
    pad_id: the token of padding.
    shapes: those that a batch may take, ascending; the first that holds it is
      taken, and one beyond them only if none does. See `batch_shapes`.
    spans_rows: pieces run on from row to row, for `attention` by "blocks";
      otherwise each lies in one row.
  """

  layout: Layout
  row_length: int
  shards: int
  microbatches: int
  loss_on_prompt: bool
  pad_id: int
  shapes: tuple[Shape, ...] = ()
  spans_rows: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where the pieces of one micro-batch go: K pieces in R rows.

  Where pieces run on, each shard has one row here, its line.

  Attributes:
    item: item of each piece, [K].
    row: its row, [K].
    start: the place of its first token in the row, [K].
    shard: of each row, [R].
    turn: which of its shard's rows a row is, [R].
    rows: how many rows of T tokens it takes at least.
    width: the most completion tokens that a shard has.
    block_pairs: of each shard, which row looks at which, [n, 2]; empty without
      lines.
  """

  item: np.ndarray
  row: np.ndarray
  start: np.ndarray
  shard: np.ndarray
  turn: np.ndarray
  rows: int
  width: int
  block_pairs: tuple[np.ndarray, ...]


def longest_segment(items: Sequence[token_table.Item], layout: Layout) -> int:
  """Tokens of the longest piece: the least row length that will do."""
  lengths = token_table.from_items(items).lengths
  return int(_piece_sizes(lengths, layout)[1].max())


def visible(lengths: np.ndarray, layout: Layout) -> int:
  """Pairs of a query and a key that it sees, itself included, of all items.

  Args:
    lengths: tokens of each part of each item, [N, P].
    layout: how they are laid out; only "shared" has one copy of a prompt.
  """
  prompt, *responses = lengths.astype(np.int64).T
  copies = 1 if layout == "shared" else len(responses)
  total = copies * _triangle(prompt)
  for response in responses:
    total = total + response * prompt + _triangle(response)
  return int(total.sum())


def _triangle(size: np.ndarray) -> np.ndarray:
  return size * (size + 1) // 2


def plans(table: token_table.Table, how: Packing) -> list[Plan]:
  """One plan a micro-batch; items count from 0 in each."""
  if len(table) % how.microbatches:
    raise ValueError(
      f"{len(table)} items do not divide into {how.microbatches} micro-batches"
    )
  item, size = _piece_sizes(table.lengths, how.layout)
  bare = np.flatnonzero(table.lengths[:, 0] == 0)
  if len(bare):
    raise ValueError(
      f"{table.ids[bare[0]]} has an empty prompt: nothing predicts its first"
      " token"
    )
  if not how.spans_rows and (size > how.row_length).any():
    worst = int(np.argmax(size))
    raise ValueError(
      f"{table.ids[item[worst]]} takes {size[worst]} tokens in layout"
      f" {how.layout!r}, but row_length={how.row_length}"
    )
  predicted = size - table.lengths[item, 0]
  if how.loss_on_prompt:
    predicted = size - 1
  share = len(item) // how.microbatches
  items = len(table) // how.microbatches
  return [
    _plan(item[here] - m * items, size[here], predicted[here], how)
    for m in range(how.microbatches)
    for here in (slice(m * share, (m + 1) * share),)
  ]


def dealt(lengths: np.ndarray, how: Packing) -> np.ndarray:
  """The order of a step's items that evens out its micro-batches, [N].

  All micro-batches have the rows of the greatest. Where pieces run on, rows are
  as many as tokens ask for: the longest item goes first, to the micro-batch
  with the fewest tokens of those that are not full. Otherwise, and for one
  micro-batch, items keep the order they came in.

  Args:
    lengths: tokens of each part of each item, [N, P].
    how: the layout.
  """
  count = len(lengths)
  if how.microbatches == 1 or not how.spans_rows or count % how.microbatches:
    return np.arange(count)
  item, size = _piece_sizes(lengths, how.layout)
  size = np.bincount(item, size, minlength=count)
  room = np.full(how.microbatches, count // how.microbatches)
  tokens = np.zeros(how.microbatches)
  of = np.zeros(count, np.int64)
  for longest in np.argsort(-size, kind="stable"):
    of[longest] = np.argmin(np.where(room > 0, tokens, np.inf))
    room[of[longest]] -= 1
    tokens[of[longest]] += size[longest]
  return np.argsort(of, kind="stable")


def _piece_sizes(
  lengths: np.ndarray, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
  """Item and tokens of every piece, both [K], of parts' lengths [N, P]."""
  count, parts = lengths.shape
  if layout == "shared" or parts == 2:
    return np.arange(count), lengths.sum(1)
  size = lengths[:, :1] + lengths[:, 1:]
  return np.repeat(np.arange(count), 2), size.reshape(-1)


def _plan(
  item: np.ndarray, size: np.ndarray, predicted: np.ndarray, how: Packing
) -> Plan:
  """First fit, the longest piece first; then rows are dealt to shards."""
  if how.spans_rows:
    return _lines(item, size, predicted, how)
  if how.layout == "padded":
    row, start = np.arange(len(size)), np.zeros(len(size), np.int64)
  else:
    row, start = _first_fit(size, how.row_length)
  count = int(row.max()) + 1
  by_row = np.bincount(row, predicted, minlength=count).astype(np.int64)
  shard, turn = np.zeros(count, np.int64), np.arange(count)
  if how.shards > 1:
    # Dealt to and fro, the rows with most to predict first.
    place = np.arange(count)
    turn_of, seat = np.divmod(place, how.shards)
    seat = np.where(turn_of % 2, how.shards - 1 - seat, seat)
    order = np.argsort(-by_row, kind="stable")
    shard[order], turn[order] = seat, turn_of
  width = int(np.bincount(shard, by_row, minlength=how.shards).max())
  return Plan(item, row, start, shard, turn, count, width, ())


def _lines(
  item: np.ndarray, size: np.ndarray, predicted: np.ndarray, how: Packing
) -> Plan:
  """Pieces one after the other, in the order they came, a line a shard."""
  line = np.zeros_like(size)
  full = np.zeros(how.shards, np.int64)
  # The longest first, each to the shard with most room.
  for piece in np.argsort(-size, kind="stable"):
    line[piece] = np.argmin(full)
    full[line[piece]] += size[piece]
  start = np.zeros_like(size)
  seen = []
  for shard in range(how.shards):
    here = line == shard
    start[here] = np.cumsum(size[here]) - size[here]
    seen.append(_seen(start[here], size[here], how.row_length))
  shards = np.arange(how.shards)
  return Plan(
    item,
    line,
    start,
    shards,
    np.zeros_like(shards),
    how.shards * -(-int(full.max()) // how.row_length),
    int(np.bincount(line, predicted, minlength=how.shards).max()),
    tuple(seen),
  )


def _seen(start: np.ndarray, size: np.ndarray, length: int) -> np.ndarray:
  """Which row of a line looks at which, itself among them, [n, 2].

  A row must look back to where the first piece begins that is in it.

  Args:
    start: place of each piece, one after the other, [K].
    size: its tokens, [K].
    length: T.
  """
  rows = np.arange(-(-int(size.sum()) // length))
  first = np.searchsorted(start, rows * length, side="right") - 1
  first = start[first] // length
  many = rows - first + 1
  query = np.repeat(rows, many)
  key = np.arange(len(query)) - np.repeat(np.cumsum(many) - many, many)
  return np.stack([query, key + np.repeat(first, many)], 1)


def _first_fit(size: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Row and place of each piece in rows of `length`, both [K]."""
  row, start = np.empty_like(size), np.empty_like(size)
  room = np.full(len(size), length)
  for piece in np.argsort(-size, kind="stable"):
    at = int(np.argmax(room >= size[piece]))
    row[piece], start[piece] = at, length - room[at]
    room[at] -= size[piece]
  return row, start


def shape_of(
  plans: Sequence[Plan], how: Packing, growth: float = _GROWTH
) -> Shape:
  """The first of `how.shapes` that holds all plans, or one beyond them."""
  rows = max(plan.rows for plan in plans)
  width = max(plan.width for plan in plans)
  seen = max((len(x) for plan in plans for x in plan.block_pairs), default=0)
  for shape in how.shapes:
    if (
      rows <= shape.rows and width <= shape.width and seen <= shape.block_pairs
    ):
      return shape
  # Padded rows are as many as the sequences; packed ones vary.
  growth = 1.0 if how.layout == "padded" else growth
  return Shape(
    _rounded(rows, how.shards, growth),
    -(-width // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE,
    -(-seen // _SEEN_MULTIPLE) * _SEEN_MULTIPLE,
  )


def _rounded(rows: int, multiple: int, growth: float) -> int:
  """The least of a short list of row counts that holds `rows`."""
  count = multiple
  while count < rows:
    count = max(count + 1, math.ceil(count * growth))
    count = -(-count // multiple) * multiple
  return count
