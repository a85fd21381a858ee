"""Scores and sums of a row's queries over keys and values, however these lie.

A cache gives keys and values in one of three forms:

  heads apart: both [B, N, S, H].
  folded: both [B, S, C], where a TPU would pad a head dim of its own.
  `Columns`: keys [B, N, H, S] and values [B, N, S, H], made for CPUs.

A product of one query with its keys is too small for XLA to share among a CPU's
cores, and it runs such products one after another. Written as sums of products
over an axis that is not the last, all rows' are one loop over memory, which all
cores share and whose innermost axis is a vector: the slots for the scores, the
head's dimensions for what is attended to.

Letters: B rows, T queries of a row, S keys, N heads, H head dim, C = N H.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Of fewer queries the loop is slower than products one after another.
_FEWEST_QUERIES = 16


class Columns(NamedTuple):
  """Keys as columns, [B, N, H, S]: told by their type from [B, N, S, H]."""

  keys: jax.Array


def scores(q: jax.Array, k: Any) -> jax.Array:
  """Products of queries [B, T, N, H] and keys in float32, [B, N, T, S]."""
  if isinstance(k, Columns):
    return _column_scores(q, k.keys)
  if k.ndim == 3:
    return jnp.einsum(
      "BTNC,BSC->BNTS", _spread(q), k, preferred_element_type=jnp.float32
    )
  return jnp.einsum("BTNH,BNSH->BNTS", q, k, preferred_element_type=jnp.float32)


def attended(weights: jax.Array, k: Any, v: jax.Array) -> jax.Array:
  """Sums of values by their weights [B, N, T, S], [B, T, N, H].

  Args:
    weights: in the dtype of `v`, which the sums have too.
    k: keys, which say in what form `v` is.
    v: values.
  """
  if isinstance(k, Columns):
    return _columns_attended(weights, v)
  if v.ndim == 3:
    heads = weights.shape[1]
    every = jnp.einsum("BNTS,BSC->BTNC", weights, v)
    every = every.reshape(*every.shape[:3], heads, -1)
    # Only one term of each sum is not zero.
    return jnp.sum(every * _own_head(heads, v.dtype), axis=3)
  return jnp.einsum("BNTS,BNSH->BTNH", weights, v)


def _spread(q):
  """A query over C, [B, T, N, C], with zeros where the other heads are.

  And of what each head gets all but its own part is left out. That is N times
  the products, but keys and values are read where and as they lie: decoding
  waits for memory.
  """
  rows, queries, heads, head_dim = q.shape
  wide = q[:, :, :, None] * _own_head(heads, q.dtype)
  return wide.reshape(rows, queries, heads, heads * head_dim)


def _own_head(heads, dtype):
  return jnp.eye(heads, dtype=dtype)[None, None, :, :, None]


def _column_scores(q, keys):
  if _few(q.shape[0] * q.shape[1]):
    return jnp.einsum(
      "BTNH,BNHS->BNTS", q, keys, preferred_element_type=jnp.float32
    )
  q, keys = (x.astype(jnp.float32) for x in (q, keys))
  if q.shape[1] == 1:
    # An axis of one makes XLA's loop tens of times slower.
    return jnp.sum(q[:, 0, :, :, None] * keys, axis=2)[:, :, None]
  q = jnp.swapaxes(q, 1, 2)[..., None]
  return jnp.sum(q * keys[:, :, None], axis=3)


def _columns_attended(weights, v):
  if _few(weights.shape[0] * weights.shape[2]):
    return jnp.einsum("BNTS,BNSH->BTNH", weights, v)
  dtype = v.dtype
  weights, v = (x.astype(jnp.float32) for x in (weights[..., None], v))
  if weights.shape[2] == 1:
    sums = jnp.sum(weights[:, :, 0] * v, axis=2)
  else:
    sums = jnp.sum(weights * v[:, :, None], axis=3)
  # Joined with the projection that follows, both are slower.
  sums = _no_fuse(sums.astype(dtype))
  if weights.shape[2] == 1:
    return sums[:, None]
  return jnp.swapaxes(sums, 1, 2)


def _few(queries):
  return queries < _FEWEST_QUERIES


def _no_fuse(x: jax.Array) -> jax.Array:
  """`x` itself, computed before anything that reads it.

  XLA for CPUs fuses a chain of operations into one, which then runs on fewer
  cores. It removes optimization barriers before it fuses, but not a condition
  that it cannot decide.
  """
  first = x.ravel()[0]
  # Always true, NaN included; LLVM knows, but runs after the fusion.
  holds = (first == first) | (first != first)
  return jax.lax.cond(holds, lambda x: x, jnp.zeros_like, x)
