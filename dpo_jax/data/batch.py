"""Token items laid out in rows: padded, packed, or with a shared prompt.

A step holds exactly `batch_size` items in data order, however they are laid
out, so that the layout changes the speed and never the numbers. A piece is
what must stand together: one sequence (prompt and response), or a whole pair
`[prompt | chosen | rejected]` whose responses both see the prompt and do not
see each other. The mask that does this is one line, in `attention.Segments`.

Where a piece goes is decided in `packing`; tokens are moved here, in a few
array operations.

Letters: M micro-batches, B rows, T tokens of a row, S shards into which the
rows are split, C completion tokens of a shard, P pairs of rows.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dpo_jax.data import packing, token_table
from dpo_jax.model import attention

PROMPT, CHOSEN, REJECTED = attention.PROMPT, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One optimizer step's data, int32 but for `reference`.

  Completion tokens are listed by shard and not by row, since rows differ much
  in how many they have; a shard's rows lie on one device.

  Attributes:
    tokens: token ids, [M, B, T].
    positions: position in the token's own sequence, [M, B, T].
    segment_ids: which piece of its row a token belongs to, from 1, or where
      pieces
      run on from row to row, of its shard; 0 is padding, [M, B, T].
    part_ids: 0 prompt, 1 chosen (or the only response), 2 rejected, [M, B, T].
    dropout_ids: a number for each of the step's tokens that no layout changes,
      0 for
      padding: copies of a prompt share theirs, [M, B, T].
    source: where the hidden state that predicts lies among the shard's rows,
      one after the other, in [0, B / S * T), [M, S, C].
    target: the token to predict, [M, S, C].
    sequence_ids: sequence that the predicted token counts for, -1 for padding.
      In a
      micro-batch of pairs, pair i owns sequences 2i (chosen) and 2i + 1;
      [M, S, C].
    reference: log-probs of the targets under the reference, in nats, float32
      [M, S, C]; None where the step computes them.
    block_pairs: where pieces run on, pairs of a row of queries and a row of
      keys that
      it looks at, counted from the shard's first, (-1, -1) for none,
      [M, S, P, 2]; else None.
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


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a batch holds: its items' ids, its real tokens, and all its places.

  `slots` counts the tokens that the rows could hold; `tokens / slots` is the
  fill. `visible` counts the pairs of a query and a key that it sees.
  """

  ids: tuple[str, ...]
  tokens: int
  completion_tokens: int
  slots: int
  visible: int


def pack(
  items: Sequence[token_table.Item],
  how: packing.Packing,
  reference: np.ndarray | None = None,
) -> tuple[Batch, Counts]:
  """Lays out one step's items.

  Args:
    items: pairs or examples, best as a `token_table.Table`; a multiple of
      `how.microbatches`.
    how: the layout.
    reference: log-probs of the table's response tokens, float32, laid out as
      its `tokens` are; None leaves the batch without them.

  Raises:
    ValueError: a piece is longer than a row, or the items do not divide into
      the micro-batches.
  """
  table = token_table.from_items(items)
  ids = table.ids
  # A number for the first token of each part of each item; 0 is padding.
  dropout_ids = 1 + _before(table.lengths.reshape(-1)).reshape(
    table.lengths.shape
  )
  order = packing.dealt(table.lengths, how)
  table, dropout_ids = table.take(order), dropout_ids[order]
  plans = packing.plans(table, how)
  shape = packing.shape_of(plans, how)
  batch = _empty(how, shape, reference is not None)
  share = len(table) // how.microbatches
  for m, plan in enumerate(plans):
    plan = dataclasses.replace(plan, item=plan.item + m * share)
    _fill(batch, m, m * share, table, plan, dropout_ids, how, reference)
  return batch, Counts(
    ids=ids,
    tokens=int(np.count_nonzero(batch.segment_ids)),
    completion_tokens=int(np.count_nonzero(batch.sequence_ids >= 0)),
    slots=batch.segment_ids.size,
    visible=packing.visible(table.lengths, how.layout),
  )


def shapes(
  how: packing.Packing,
  with_reference: bool,
  sharding: jax.sharding.Sharding,
) -> list[Batch]:
  """A batch of each of the layout's shapes, as jax.ShapeDtypeStruct.

  Args:
    how: the layout, settled.
    with_reference: whether batches carry the reference's log-probs.
    sharding: of the axis after the micro-batches.
  """
  return [
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      _empty(how, shape, with_reference),
    )
    for shape in how.shapes
  ]


def _empty(
  how: packing.Packing, shape: packing.Shape, with_reference: bool
) -> Batch:
  tokens = (how.microbatches, shape.rows, how.row_length)
  completions = (how.microbatches, how.shards, shape.width)
  return Batch(
    tokens=np.full(tokens, how.pad_id, np.int32),
    positions=np.zeros(tokens, np.int32),
    segment_ids=np.zeros(tokens, np.int32),
    part_ids=np.zeros(tokens, np.int32),
    dropout_ids=np.zeros(tokens, np.int32),
    source=np.zeros(completions, np.int32),
    target=np.zeros(completions, np.int32),
    sequence_ids=np.full(completions, -1, np.int32),
    reference=np.zeros(completions, np.float32) if with_reference else None,
    block_pairs=np.full((*completions[:2], shape.block_pairs, 2), -1, np.int32)
    if how.spans_rows
    else None,
  )


def _fill(
  batch: Batch,
  m: int,
  first_item: int,
  table: token_table.Table,
  plan: packing.Plan,
  dropout_ids: np.ndarray,
  how: packing.Packing,
  reference: np.ndarray | None,
) -> None:
  """Writes micro-batch `m`, whose items begin at `first_item`.

  A segment is one part in one piece; G segments make a piece. Arrays of
  segments are [K, G], arrays of their tokens [n].
  """
  length, shards = how.row_length, how.shards
  shard_size = batch.tokens.shape[1] // shards * length
  base = plan.shard * shard_size + plan.turn * length
  # What pieces are numbered in: a row, or a shard's line.
  span = shard_size if how.spans_rows else length
  if batch.block_pairs is not None:
    for s, seen in enumerate(plan.block_pairs):
      batch.block_pairs[m, s, : len(seen)] = seen
  order = np.lexsort((plan.start, base[plan.row]))
  item, start = plan.item[order], (base[plan.row] + plan.start)[order]
  # Which part of its item a segment is, and what the layout calls it.
  if table.parts == 3 and how.layout != "shared":
    part = np.stack([np.zeros_like(order), 1 + order % 2], 1)
    label = np.broadcast_to([PROMPT, CHOSEN], part.shape)
  else:
    part = label = np.broadcast_to(
      np.arange(table.parts), (len(item), table.parts)
    )
  size = table.lengths[item[:, None], part]
  at = start[:, None] + np.cumsum(size, 1) - size

  segment = np.repeat(np.arange(size.size), size.reshape(-1))
  within = np.arange(len(segment)) - _before(size.reshape(-1))[segment]

  def spread(values):
    """A value of each segment, or of each piece, as one of each token."""
    values = values if values.ndim == 2 else values[:, None]
    return np.broadcast_to(values, size.shape).reshape(-1)[segment]

  to = spread(at) + within
  of = spread(table.starts[item[:, None], part]) + within
  labels, prompt = spread(label), size[:, 0]
  for name, values in (
    ("tokens", table.tokens[of]),
    ("positions", within + np.where(labels == PROMPT, 0, spread(prompt))),
    ("segment_ids", spread(_numbers(start // span))),
    ("part_ids", labels),
    ("dropout_ids", spread(dropout_ids[item[:, None], part]) + within),
  ):
    getattr(batch, name)[m].reshape(-1)[to] = values

  wanted = labels != PROMPT
  if how.loss_on_prompt:
    # Nothing predicts a text's first token.
    wanted |= within > 0
  predicted = np.flatnonzero(wanted)
  shard = to[predicted] // shard_size
  place = np.arange(len(shard)) - np.searchsorted(shard, shard)
  # The prompt's last token predicts the first token of every response.
  source = np.where(within == 0, spread(start + prompt), to) - 1
  sequence_ids = spread(item - first_item)
  if table.parts == 3:
    sequence_ids = 2 * sequence_ids + spread(part) - 1
  batch.source[m, shard, place] = source[predicted] - shard * shard_size
  batch.target[m, shard, place] = table.tokens[of[predicted]]
  batch.sequence_ids[m, shard, place] = sequence_ids[predicted]
  if reference is not None:
    batch.reference[m, shard, place] = reference[of[predicted]]


def _numbers(rows: np.ndarray) -> np.ndarray:
  """Of pieces in the order of their rows, each one's number in its row."""
  return 1 + np.arange(len(rows)) - np.searchsorted(rows, rows)


def _before(sizes: np.ndarray) -> np.ndarray:
  """The sum of the sizes before each, [K]."""
  return np.cumsum(sizes) - sizes
