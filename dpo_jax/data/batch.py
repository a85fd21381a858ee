"""Batches of token ids: padded, packed, or packed with a shared prompt.

A step holds exactly `batch_size` items in data order under every layout, so
that the layout changes the speed and never the numbers. A segment is what must
stay contiguous: one sequence (prompt and response), or a pair
`[prompt | chosen | rejected]` in which both responses see the prompt and
neither sees the other; `packing_mask` has the mask. `packing` gives each
segment its row and offset; here tokens are copied, in a few array operations.

Letters: M micro-batches, B rows, T tokens of a row, S shards of rows,
C completion tokens of a shard, P pairs of rows, K segments of G parts.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dpo_jax.data import packing as packing_lib
from dpo_jax.data import token_table
from dpo_jax.model.attention import packing_mask

PROMPT, CHOSEN, REJECTED = packing_mask.PROMPT, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One optimizer step's data, int32 but for `reference`.

  Completion tokens are listed by shard and not by row, since rows differ much
  in how many they have; a shard's rows are on one device.

  Attributes:
    tokens: token ids, [M, B, T].
    positions: position in the token's own sequence, [M, B, T].
    segment_ids: number of the token's segment in its row, or, where segments
      span rows, in its shard; from 1, 0 is padding, [M, B, T].
    part_ids: 0 prompt, 1 chosen (or the only response), 2 rejected, [M, B, T].
    dropout_ids: a number for each of the step's tokens that no layout changes,
      0 for padding; copies of a prompt share theirs, [M, B, T].
    source: index, in the shard's rows one after the other, of the hidden state
      that predicts the target, in [0, B / S * T), [M, S, C].
    target: the token to predict, [M, S, C].
    sequence_ids: sequence whose log-prob the target adds to, -1 for padding. In
      a micro-batch of pairs, pair i has sequences 2i (chosen) and 2i + 1;
      [M, S, C].
    reference: log-probs of the targets under the reference, in nats, float32
      [M, S, C]; None where the step computes them.
    block_pairs: where segments span rows, the pairs (query row, key row) that
      attend, counted from the shard's first row, (-1, -1) for none,
      [M, S, P, 2]; else None.
    desirable: of labeled responses, whether the target is of a desirable item,
      [M, S, C]; else None.
  """

  tokens: np.ndarray | jax.Array
  positions: np.ndarray | jax.Array
  segment_ids: np.ndarray | jax.Array
  part_ids: np.ndarray | jax.Array
  dropout_ids: np.ndarray | jax.Array
  source: np.ndarray | jax.Array
  target: np.ndarray | jax.Array
  sequence_ids: np.ndarray | jax.Array
  reference: np.ndarray | jax.Array | None
  block_pairs: np.ndarray | jax.Array | None = None
  desirable: np.ndarray | jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Counts:
  """Ids of a batch's items, and its sizes.

  Attributes:
    ids: of the items, in data order.
    tokens: tokens that are not padding.
    completion_tokens: predicted tokens.
    slots: tokens that the rows can hold; `tokens / slots` is the fill.
    visible: unmasked pairs of a query and a key.
  """

  ids: tuple[str, ...]
  tokens: int
  completion_tokens: int
  slots: int
  visible: int


def pack(
  items: Sequence[token_table.Item],
  packing: packing_lib.Packing,
  reference: np.ndarray | None = None,
) -> tuple[Batch, Counts]:
  """The batch of one step's items.

  Args:
    items: pairs or examples, best as a `token_table.Table`; a multiple of
      `packing.microbatches`.
    packing: the layout.
    reference: log-probs of the table's response tokens, float32, indexed like
      its `tokens`; None leaves the batch without them.

  Raises:
    ValueError: a segment is longer than a row, or the items do not divide into
      the micro-batches.
  """
  table = token_table.from_items(items)
  ids = table.ids
  # Of the first token of each part of each item; 0 is padding.
  dropout_ids = 1 + token_table.contiguous_starts(table.lengths)
  order = packing_lib.microbatch_order(table.lengths, packing)
  table, dropout_ids = table.take(order), dropout_ids[order]
  plans = packing_lib.plans(table, packing)
  shape = packing_lib.shape_of(plans, packing)
  labeled = table.desirable is not None
  batch = _empty(packing, shape, reference is not None, labeled)
  size = len(table) // packing.microbatches
  for m, plan in enumerate(plans):
    items_of = table.take(np.arange(m * size, (m + 1) * size))
    numbers = dropout_ids[m * size : (m + 1) * size]
    _fill(batch, m, items_of, plan, numbers, packing, reference)
  return batch, Counts(
    ids=ids,
    tokens=int(np.count_nonzero(batch.segment_ids)),
    completion_tokens=int(np.count_nonzero(batch.sequence_ids >= 0)),
    slots=batch.segment_ids.size,
    visible=packing_lib.visible(table.lengths, packing.layout),
  )


def shapes(
  packing: packing_lib.Packing,
  with_reference: bool,
  labeled: bool,
  sharding: jax.sharding.Sharding,
) -> list[Batch]:
  """A batch of `jax.ShapeDtypeStruct`s for each of the packing's shapes.

  Args:
    packing: the layout, with its shapes.
    with_reference: whether batches carry the reference's log-probs.
    labeled: whether they carry labels.
    sharding: of the axis after the micro-batches.
  """
  return [
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      _empty(packing, shape, with_reference, labeled),
    )
    for shape in packing.shapes
  ]


def _empty(
  packing: packing_lib.Packing,
  shape: packing_lib.Shape,
  with_reference: bool,
  labeled: bool,
) -> Batch:
  """A batch of padding alone."""
  rows = (packing.microbatches, shape.rows, packing.row_length)
  completions = (packing.microbatches, packing.shards, shape.width)
  block_pairs = (*completions[:2], shape.block_pairs, 2)
  return Batch(
    tokens=np.full(rows, packing.pad_id, np.int32),
    positions=np.zeros(rows, np.int32),
    segment_ids=np.zeros(rows, np.int32),
    part_ids=np.zeros(rows, np.int32),
    dropout_ids=np.zeros(rows, np.int32),
    source=np.zeros(completions, np.int32),
    target=np.zeros(completions, np.int32),
    sequence_ids=np.full(completions, -1, np.int32),
    reference=np.zeros(completions, np.float32) if with_reference else None,
    block_pairs=np.full(block_pairs, -1, np.int32)
    if packing.spans_rows
    else None,
    desirable=np.zeros(completions, np.int32) if labeled else None,
  )


def _fill(
  batch: Batch,
  m: int,
  table: token_table.Table,
  plan: packing_lib.Plan,
  dropout_ids: np.ndarray,
  packing: packing_lib.Packing,
  reference: np.ndarray | None,
) -> None:
  """Writes micro-batch `m`, the items of `table`.

  Arrays of parts of segments are [K, G], arrays of their tokens [n].
  """
  shard_size = batch.tokens.shape[1] // packing.shards * packing.row_length
  if batch.block_pairs is not None:
    for shard, pairs in enumerate(plan.block_pairs):
      batch.block_pairs[m, shard, : len(pairs)] = pairs
  start = plan.shard * shard_size + plan.offset
  order = np.argsort(start)
  item, start = plan.item[order], start[order]
  # `part` indexes the item's columns; `label` is its part id in the layout.
  if table.parts == 3 and packing.layout != "shared":
    part = np.stack([np.zeros_like(order), 1 + order % 2], 1)
    label = np.broadcast_to([PROMPT, CHOSEN], part.shape)
  else:
    part = label = np.broadcast_to(
      np.arange(table.parts), (len(item), table.parts)
    )
  columns = (item[:, None], part)
  size = table.lengths[columns]
  # Of each token: the part that it is of, and its place there.
  owner = np.repeat(np.arange(size.size), size.reshape(-1))
  first = token_table.contiguous_starts(size).reshape(-1)
  within = np.arange(len(owner)) - first[owner]

  def spread(values):
    """[K] or [K, G] to one value a token, [n]."""
    values = values if values.ndim == 2 else values[:, None]
    return np.broadcast_to(values, size.shape).reshape(-1)[owner]

  to = spread(start[:, None] + np.cumsum(size, 1) - size) + within
  taken = spread(table.starts[columns]) + within
  labels, prompt = spread(label), size[:, 0]
  span = shard_size if packing.spans_rows else packing.row_length
  for array, values in (
    (batch.tokens, table.tokens[taken]),
    (batch.positions, within + np.where(labels == PROMPT, 0, spread(prompt))),
    (batch.segment_ids, spread(_count_from_one(start // span))),
    (batch.part_ids, labels),
    (batch.dropout_ids, spread(dropout_ids[columns]) + within),
  ):
    array[m].reshape(-1)[to] = values

  is_predicted = labels != PROMPT
  if packing.loss_on_prompt:
    # Nothing predicts a text's first token.
    is_predicted |= within > 0
  predicted = np.flatnonzero(is_predicted)
  shard = to[predicted] // shard_size
  at = (m, shard, _count_from_one(shard) - 1)
  # The prompt's last token predicts the first token of every response.
  source = np.where(within == 0, spread(start + prompt), to) - 1
  sequence_ids = spread(item)
  if table.parts == 3:
    sequence_ids = 2 * sequence_ids + spread(part) - 1
  batch.source[at] = source[predicted] - shard * shard_size
  batch.target[at] = table.tokens[taken[predicted]]
  batch.sequence_ids[at] = sequence_ids[predicted]
  if reference is not None:
    batch.reference[at] = reference[taken[predicted]]
  if table.desirable is not None:
    batch.desirable[at] = spread(table.desirable[item])[predicted]


def _count_from_one(groups: np.ndarray) -> np.ndarray:
  """1, 2, 3, ... within each run of equal values of a sorted array."""
  return 1 + np.arange(len(groups)) - np.searchsorted(groups, groups)
