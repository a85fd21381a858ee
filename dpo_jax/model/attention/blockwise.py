"""Attention over short rows that computes no block that is masked whole.

The rows are blocks of T tokens, and a piece runs on from row to row. A list
says which row of keys each row of queries must look at; the scores of these
pairs of rows are all that exists, so that the work grows with the segment_ids'
lengths and not with the rows'. It is plain XLA, quick on a CPU. The slow twin
is `attention.dense` on rows that hold whole segment_ids.

Scores lie with keys before queries, so that sums over keys run along whole
vectors, and the backward pass is written out: it keeps the exponentials, and
takes the softmax's gradient from the output instead of another sum over keys.

Letters: S shards of the rows, B rows of a shard, T tokens of a row, P pairs of
rows, N heads, H head dim; in an einsum q and k are a row's queries and keys.

References:
  Dao et al., FlashAttention, 2022 (arXiv 2205.14135), Algorithm 4: the
  gradient of the softmax from the output.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# What rematerialisation may keep of attention, one value a query and head dim:
# then scores and exponentials alone are computed again.
SAVED = "attended"


def mask(
  segment_ids: jax.Array, part_ids: jax.Array, block_pairs: jax.Array
) -> jax.Array:
  """Which keys each query of each pair of rows sees, bool [S, P, k, q].

  Args:
    segment_ids: piece of each token, unlike any other of its shard; 0 is
      padding,
      [S * B, T].
    part_ids: part of each token in its piece, 0 for a prompt, [S * B, T].
    block_pairs: pairs of a row of queries and a row of keys, both counted from
      the
      shard's first row; (-1, -1) for none, [S, P, 2].
  """
  shards, size = len(block_pairs), segment_ids.shape[1]
  segment_ids = segment_ids.reshape(shards, -1, size)
  part_ids = part_ids.reshape(shards, -1, size)
  query, key = (jnp.maximum(block_pairs[:, :, i], 0) for i in (0, 1))

  def of(x, rows):
    return jnp.take_along_axis(x, rows[:, :, None], axis=1)

  def both(x):
    return of(x, query)[:, :, None, :], of(x, key)[:, :, :, None]

  query_piece, key_piece = both(segment_ids)
  query_part, key_part = both(part_ids)
  own = (query == key)[:, :, None, None]
  causal = jnp.triu(jnp.ones((1, 1, size, size), bool))
  return (
    (block_pairs[:, :, :1, None] >= 0)
    & (query_piece == key_piece)
    & (key_piece > 0)
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

  Operands of the products keep the dtype of `v`, and their sums are float32. A
  query that sees nothing (padding) gets zero.

  Args:
    q: queries, [S * B, T, N, H].
    k: keys, [S * B, N, T, H].
    v: values, [S * B, N, T, H].
    visible: `mask` of the rows.
    block_pairs: what `mask` was made with; every key that a query sees must be
      in it.
  """

  def by_shard(x):
    return x.reshape(len(block_pairs), -1, *x.shape[1:])

  query, key = (jnp.maximum(block_pairs[:, :, i], 0) for i in (0, 1))
  rows = (by_shard(x) for x in (jnp.swapaxes(q, 1, 2), k, v))
  if len(block_pairs) == 1:
    # Gathers without an axis of shards are quicker.
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
  add = functools.partial(
    jax.ops.segment_sum, segment_ids=query, num_segments=len(q)
  )
  q, k, v = (checkpoint_name(x, SAVED) for x in (q, k, v))
  scores = _product("PNkH,PNqH->PNkq", k[key], q[query]) * _scale(q)
  # A finite floor: what sees nothing stays free of NaN.
  floor = jnp.finfo(jnp.float32).min
  scores = jnp.where(visible[:, None], scores, floor)
  peak = jax.ops.segment_max(
    jnp.max(scores, axis=2), query, num_segments=len(q)
  )
  # Above the floor, so that where all is masked the exponentials vanish.
  peak = checkpoint_name(jnp.maximum(peak, floor / 2), SAVED)
  weights = jnp.exp(scores - peak[query][:, :, None, :])
  total = add(jnp.sum(weights, axis=2))
  # Real queries see themselves: their total is at least one.
  share = jnp.where(total > 0, 1 / jnp.maximum(total, 1), 0)
  share = checkpoint_name(share, SAVED)
  out = add(_product("PNkq,PNkH->PNqH", weights, v[key]))
  out = checkpoint_name(out * share[:, :, :, None], SAVED)
  return out, (q, k, v, weights, out, share, query, key)


def _backward(kept, grad):
  q, k, v, weights, out, share, query, key = kept

  def add(values, rows):
    return jax.ops.segment_sum(values, rows, num_segments=len(q))

  # `weights` lack their `share`: the gradient takes it, which is smaller.
  grad = grad * share[:, :, :, None]
  common = jnp.sum(grad * out, axis=-1)
  common, grad = common[query][:, :, None, :], grad.astype(v.dtype)[query]
  slope = _product("PNkH,PNqH->PNkq", v[key], grad)
  slope = weights * (slope - common) * _scale(q)
  of_q = add(_product("PNkq,PNkH->PNqH", slope, k[key]), query)
  of_k = add(_product("PNkq,PNqH->PNkH", slope, q[query]), key)
  of_v = add(_product("PNkq,PNqH->PNkH", weights, grad), key)
  grads = (x.astype(v.dtype) for x in (of_q, of_k, of_v))
  return *grads, None, None, None


_attend.defvjp(_forward, _backward)


def _product(equation, a, b):
  """An einsum of what the model computes in, the dtype of `b`, in float32."""
  return jnp.einsum(
    equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32
  )


def _scale(q):
  return 1 / math.sqrt(q.shape[-1])
