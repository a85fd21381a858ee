"""Blockwise attention, for packed rows that segments cross.

Rows are blocks of T tokens of one long line per shard, and a segment continues
from row to row. `block_pairs` lists which row of keys each row of queries must
attend to; only the scores of these pairs exist, so that work grows with the
segments' lengths and not with the rows'. It is plain XLA, fast on a CPU.

Scores are [keys, queries], so that sums over keys run along whole vectors. The
backward pass is written out: it saves the exponentials, and takes the gradient
of the softmax from the output instead of another sum over keys.

Letters: S shards of the rows, B rows of a shard, T tokens of a row, P pairs of
rows, N heads, H head dim; in an einsum q and k are a row's queries and keys.

References:
  Dao et al., FlashAttention, 2022 (arXiv 2205.14135), Algorithm 4: the
  gradient of the softmax from the output.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Checkpoint name of what rematerialization may save of attention, one value for
# each query and head dim: only scores and exponentials are computed again.
SAVED = "attended"


def mask(
  segment_ids: jax.Array, part_ids: jax.Array, block_pairs: jax.Array
) -> jax.Array:
  """Which keys each query of each pair of rows sees, bool [S, P, k, q].

  Args:
    segment_ids: unique in a shard; 0 is padding, [S * B, T].
    part_ids: 0 for a segment's prompt, [S * B, T].
    block_pairs: a row of queries and a row of keys, both counted from the
      shard's first row; (-1, -1) for none, [S, P, 2].
  """
  shards, size = len(block_pairs), segment_ids.shape[1]
  segment_ids = segment_ids.reshape(shards, -1, size)
  part_ids = part_ids.reshape(shards, -1, size)
  query, key = (jnp.maximum(block_pairs[:, :, i], 0) for i in (0, 1))

  def take(x, rows):
    return jnp.take_along_axis(x, rows[:, :, None], axis=1)

  def both(x):
    return take(x, query)[:, :, None, :], take(x, key)[:, :, :, None]

  query_segment, key_segment = both(segment_ids)
  query_part, key_part = both(part_ids)
  own = (query == key)[:, :, None, None]
  causal = jnp.triu(jnp.ones((1, 1, size, size), bool))
  return (
    (block_pairs[:, :, :1, None] >= 0)
    & (query_segment == key_segment)
    & (key_segment > 0)
    & ((key_part == 0) | (key_part == query_part))
    & (causal | ~own)
  )


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array,
  block_pairs: jax.Array,
) -> jax.Array:
  """Attention, [S * B, T, N, H] in the dtype of `v`; the softmax in float32.

  Products have operands in the dtype of `v` and float32 sums. The output of
  padding, which sees nothing, is zero.

  Args:
    q: queries, [S * B, T, N, H].
    k: keys, [S * B, N, T, H].
    v: values, [S * B, N, T, H].
    visible: `mask` of the rows and of `block_pairs`.
    block_pairs: must list every key that a query sees.
  """

  def by_shard(x):
    return x.reshape(len(block_pairs), -1, *x.shape[1:])

  query, key = (jnp.maximum(block_pairs[:, :, i], 0) for i in (0, 1))
  rows = (by_shard(x) for x in (jnp.swapaxes(q, 1, 2), k, v))
  if len(block_pairs) == 1:
    # Gathers without an axis of shards are faster.
    rows = (x[0] for x in rows)
    out = _attend(*rows, visible[0], query[0], key[0])
  else:
    out = jax.vmap(_attend)(*rows, visible, query, key)
  out = jnp.swapaxes(out.reshape(q.shape[0], *out.shape[-3:]), 1, 2)
  return out.astype(v.dtype)


@jax.custom_vjp
def _attend(q, k, v, visible, query, key):
  """One shard: q, k, v [B, N, T, H], visible [P, k, q], query, key [P]."""
  return _forward(q, k, v, visible, query, key)[0]


def _forward(q, k, v, visible, query, key):
  q, k, v = (checkpoint_name(x, SAVED) for x in (q, k, v))
  scores = _product("PNkH,PNqH->PNkq", k[key], q[query]) * _scale(q)
  # A finite floor: rows that see nothing stay free of NaN.
  floor = jnp.finfo(jnp.float32).min
  scores = jnp.where(visible[:, None], scores, floor)
  peak = jax.ops.segment_max(
    jnp.max(scores, axis=2), query, num_segments=len(q)
  )
  # Above the floor, so that exponentials of padding are zero.
  peak = checkpoint_name(jnp.maximum(peak, floor / 2), SAVED)
  weights = jnp.exp(scores - peak[query][:, :, None, :])
  total = _sum_by_row(jnp.sum(weights, axis=2), query, q)
  # Tokens see themselves: their total is at least one.
  share = jnp.where(total > 0, 1 / jnp.maximum(total, 1), 0)
  share = checkpoint_name(share, SAVED)
  out = _sum_by_row(_product("PNkq,PNkH->PNqH", weights, v[key]), query, q)
  out = checkpoint_name(out * share[:, :, :, None], SAVED)
  return out, (q, k, v, weights, out, share, query, key)


def _backward(saved, grad):
  q, k, v, weights, out, share, query, key = saved
  # `weights` lack the factor `share`; applied to the gradient, it is cheaper.
  grad = grad * share[:, :, :, None]
  common = jnp.sum(grad * out, axis=-1)
  common, grad = common[query][:, :, None, :], grad.astype(v.dtype)[query]
  of_scores = _product("PNkH,PNqH->PNkq", v[key], grad)
  of_scores = weights * (of_scores - common) * _scale(q)
  of_q = _sum_by_row(_product("PNkq,PNkH->PNqH", of_scores, k[key]), query, q)
  of_k = _sum_by_row(_product("PNkq,PNqH->PNkH", of_scores, q[query]), key, q)
  of_v = _sum_by_row(_product("PNkq,PNqH->PNkH", weights, grad), key, q)
  grads = (x.astype(v.dtype) for x in (of_q, of_k, of_v))
  return *grads, None, None, None


_attend.defvjp(_forward, _backward)


def _sum_by_row(values, rows, q):
  return jax.ops.segment_sum(values, rows, num_segments=len(q))


def _product(equation, a, b):
  """An einsum of operands in the dtype of `b`, summed in float32."""
  return jnp.einsum(
    equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32
  )


def _scale(q):
  return 1 / math.sqrt(q.shape[-1])
