"""Packing: rows and offsets of a batch's segments, from their lengths alone.

A segment is what must stay contiguous: one sequence (prompt and response), or
a pair `[prompt | chosen | rejected]` with a shared prompt. Nothing here reads a
token, so that all batches of a run are planned before it begins and the few
shapes that hold them are known (`batch_shapes`).

With `Packing.spans_rows` the rows of a shard are one token stream cut into
blocks of T tokens: segments continue from row to row, only the end of the
stream is padding, and attention gets the pairs of rows that see each other.

Letters: N items of P parts (a prompt and its responses), K segments, B rows of
T tokens, S shards of rows, C completion tokens of a shard.

References:
  Krell et al., Efficient Sequence Packing without Cross-contamination, 2021
  (arXiv 2107.02027): first-fit decreasing.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dpo_jax.data import token_table

Layout = Literal["padded", "packed", "shared"]

# Few shapes for a small waste: C and the number of row pairs are multiples of
# these, and row counts beyond the planned shapes grow by a fifth.
_WIDTH_MULTIPLE = 128
_BLOCK_PAIRS_MULTIPLE = 8
_GROWTH = 1.2


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
  """B and C of a batch, and pairs of rows that see each other in a shard."""

  rows: int
  width: int
  block_pairs: int = 0

  def holds(self, other: "Shape") -> bool:
    return (
      other.rows <= self.rows
      and other.width <= self.width
      and other.block_pairs <= self.block_pairs
    )


@dataclasses.dataclass(frozen=True)
class Packing:
  """Layout and sizes of batches; `batch.pack` applies them.

  Attributes:
    layout: "padded" (a sequence a row), "packed" (several sequences a row) or
      "shared" (pairs with one copy of their prompt, several a row).
    row_length: T.
    shards: S; every row count is a multiple of it.
    microbatches: M; the batch size is a multiple of it.
    loss_on_prompt: predict the prompt's tokens too (examples only).
    pad_id: the token of padding.
    shapes: shapes of the run's batches, ascending. A batch takes the first that
      holds it, or a larger one if none does; see `batch_shapes`.
    spans_rows: segments continue from row to row, for attention="blocks";
      otherwise each stays in one row.
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
  """Offsets of the K segments of one micro-batch.

  Attributes:
    item: item of each segment, from 0 in the micro-batch, [K].
    shard: shard of each segment, [K].
    offset: its first token in the shard's rows, one after the other, [K].
    shape: the least shape that holds the plan.
    block_pairs: with `spans_rows`, each shard's (query row, key row) pairs,
      [n, 2]; else empty.
  """

  item: np.ndarray
  shard: np.ndarray
  offset: np.ndarray
  shape: Shape
  block_pairs: tuple[np.ndarray, ...] = ()


def longest_segment(items: Sequence[token_table.Item], layout: Layout) -> int:
  """Tokens of the longest segment: the least row length that holds all."""
  lengths = token_table.from_items(items).lengths
  return int(_segments(lengths, layout)[1].max())


def visible(lengths: np.ndarray, layout: Layout) -> int:
  """Unmasked (query, key) pairs of attention over all items.

  Args:
    lengths: tokens of each part of each item, [N, P].
    layout: only "shared" has one copy of a prompt.
  """
  prompt, *responses = lengths.astype(np.int64).T
  copies = 1 if layout == "shared" else len(responses)
  total = copies * _causal_pairs(prompt)
  for response in responses:
    total = total + response * prompt + _causal_pairs(response)
  return int(total.sum())


def _causal_pairs(size: np.ndarray) -> np.ndarray:
  return size * (size + 1) // 2


def microbatch_order(lengths: np.ndarray, packing: Packing) -> np.ndarray:
  """The order of a step's items that balances its micro-batches, [N].

  All micro-batches have the rows of the largest. With `spans_rows`, where rows
  follow from token counts, items go longest first to the micro-batch with the
  fewest tokens that is not full. Otherwise the order is unchanged.

  Args:
    lengths: tokens of each part of each item, [N, P].
    packing: the layout.
  """
  count = len(lengths)
  one = packing.microbatches == 1
  if one or not packing.spans_rows or count % packing.microbatches:
    return np.arange(count)
  item, size = _segments(lengths, packing.layout)
  size = np.bincount(item, size, minlength=count)
  room = np.full(packing.microbatches, count // packing.microbatches)
  tokens = np.zeros(packing.microbatches)
  microbatch = np.zeros(count, np.int64)
  for longest in np.argsort(-size, kind="stable"):
    m = np.argmin(np.where(room > 0, tokens, np.inf))
    microbatch[longest] = m
    room[m] -= 1
    tokens[m] += size[longest]
  return np.argsort(microbatch, kind="stable")


def plans(table: token_table.Table, packing: Packing) -> list[Plan]:
  """One plan for each micro-batch of consecutive items.

  Raises:
    ValueError: items do not divide into the micro-batches, a prompt is empty,
      or a segment is longer than its row.
  """
  count = packing.microbatches
  if len(table) % count:
    raise ValueError(
      f"{len(table)} items do not divide into {count} micro-batches"
    )
  item, size = _segments(table.lengths, packing.layout)
  bare = np.flatnonzero(table.lengths[:, 0] == 0)
  if len(bare):
    raise ValueError(
      f"{table.ids[bare[0]]} has an empty prompt: nothing predicts its first"
      " token"
    )
  if not packing.spans_rows and (size > packing.row_length).any():
    worst = int(np.argmax(size))
    raise ValueError(
      f"{table.ids[item[worst]]} takes {size[worst]} tokens in layout"
      f" {packing.layout!r}, but row_length={packing.row_length}"
    )
  prompt = 1 if packing.loss_on_prompt else table.lengths[item, 0]
  predicted = size - prompt
  make = _plan_stream if packing.spans_rows else _plan_rows
  item = item % (len(table) // count)
  return [
    make(*columns, packing)
    for columns in zip(
      *(np.split(column, count) for column in (item, size, predicted)),
      strict=True,
    )
  ]


def _segments(
  lengths: np.ndarray, layout: Layout
) -> tuple[np.ndarray, np.ndarray]:
  """Item and tokens of every segment, both [K], of parts' lengths [N, P]."""
  count, parts = lengths.shape
  if layout == "shared" or parts == 2:
    return np.arange(count), lengths.sum(1)
  size = lengths[:, :1] + lengths[:, 1:]
  return np.repeat(np.arange(count), 2), size.reshape(-1)


def _plan_rows(
  item: np.ndarray, size: np.ndarray, predicted: np.ndarray, packing: Packing
) -> Plan:
  """First-fit-decreasing rows; rows in snake order over the shards."""
  if packing.layout == "padded":
    row, start = np.arange(len(size)), np.zeros(len(size), np.int64)
  else:
    row, start = _first_fit(size, packing.row_length)
  rows = int(row.max()) + 1
  by_row = np.bincount(row, predicted, minlength=rows).astype(np.int64)
  shard, row_in_shard = np.zeros(rows, np.int64), np.arange(rows)
  if packing.shards > 1:
    # The rows with most to predict first, to even out C.
    turn, column = np.divmod(np.arange(rows), packing.shards)
    order = np.argsort(-by_row, kind="stable")
    shard[order] = np.where(turn % 2, packing.shards - 1 - column, column)
    row_in_shard[order] = turn
  width = int(np.bincount(shard, by_row, minlength=packing.shards).max())
  offset = row_in_shard[row] * packing.row_length + start
  return Plan(item, shard[row], offset, Shape(rows, width))


def _first_fit(size: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Row and start of each segment in rows of `length`, both [K]."""
  row, start = np.empty_like(size), np.empty_like(size)
  room = np.full(len(size), length)
  for segment in np.argsort(-size, kind="stable"):
    first = int(np.argmax(room >= size[segment]))
    row[segment], start[segment] = first, length - room[first]
    room[first] -= size[segment]
  return row, start


def _plan_stream(
  item: np.ndarray, size: np.ndarray, predicted: np.ndarray, packing: Packing
) -> Plan:
  """One stream of segments a shard, in their order, without gaps."""
  shard = np.zeros_like(size)
  tokens = np.zeros(packing.shards, np.int64)
  # The longest first, each to the shard with the fewest tokens.
  for segment in np.argsort(-size, kind="stable"):
    shard[segment] = np.argmin(tokens)
    tokens[shard[segment]] += size[segment]
  offset = np.zeros_like(size)
  block_pairs = []
  for s in range(packing.shards):
    here = shard == s
    offset[here] = np.cumsum(size[here]) - size[here]
    block_pairs.append(
      _block_pairs(offset[here], size[here], packing.row_length)
    )
  shape = Shape(
    packing.shards * -(-int(tokens.max()) // packing.row_length),
    int(np.bincount(shard, predicted, minlength=packing.shards).max()),
    max(map(len, block_pairs)),
  )
  return Plan(item, shard, offset, shape, tuple(block_pairs))


def _block_pairs(
  start: np.ndarray, size: np.ndarray, length: int
) -> np.ndarray:
  """(query row, key row) pairs of a shard's stream that attention computes.

  A row sees back to the row in which its first segment begins, [n, 2].

  Args:
    start: first token of each segment in the stream, [K].
    size: its tokens, [K].
    length: T.
  """
  rows = np.arange(-(-int(size.sum()) // length))
  first = np.searchsorted(start, rows * length, side="right") - 1
  first = start[first] // length
  keys = rows - first + 1
  query = np.repeat(rows, keys)
  key = np.arange(len(query)) - np.repeat(np.cumsum(keys) - keys, keys)
  return np.stack([query, key + np.repeat(first, keys)], 1)


def least_shape(plans: Sequence[Plan]) -> Shape:
  """The least shape that holds all micro-batches of a step."""
  return Shape(
    max(plan.shape.rows for plan in plans),
    max(plan.shape.width for plan in plans),
    max(plan.shape.block_pairs for plan in plans),
  )


def shape_of(
  plans: Sequence[Plan], packing: Packing, growth: float = _GROWTH
) -> Shape:
  """The first of `packing.shapes` that holds all plans, or a larger one."""
  least = least_shape(plans)
  for shape in packing.shapes:
    if shape.holds(least):
      return shape
  # Padded rows are as many as the sequences; packed ones vary.
  growth = 1.0 if packing.layout == "padded" else growth
  return Shape(
    _rounded(least.rows, packing.shards, growth),
    -(-least.width // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE,
    -(-least.block_pairs // _BLOCK_PAIRS_MULTIPLE) * _BLOCK_PAIRS_MULTIPLE,
  )


def _rounded(rows: int, multiple: int, growth: float) -> int:
  """The least of a geometric list of row counts that holds `rows`."""
  count = multiple
  while count < rows:
    count = max(count + 1, math.ceil(count * growth))
    count = -(-count // multiple) * multiple
  return count
