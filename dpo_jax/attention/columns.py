"""Attention of one query a row to keys that lie as columns, made for CPUs.

A product of one query with its keys is too small for XLA to share among a CPU's
cores, and it runs such products one after another. Written as sums of products
over an axis that is not the last, all rows' are one loop over memory, which all
cores share and whose innermost axis is a vector: the slots for the scores, the
head's dimensions for what is attended to. Keys are [B, N, H, S] for that.

Letters: B rows, N heads, S keys, H head dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of fewer rows the loop is slower than products one after another.
_FEWEST_ROWS = 16


class Columns(NamedTuple):
  """Keys as columns, [B, N, H, S]: told by their type from [B, N, S, H]."""

  keys: jax.Array


def attend(
  q: jax.Array, k: Columns, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """`attention.dense` of one query a row; scores and softmax in float32.

  Args:
    q: queries, [B, 1, N, H].
    k: keys.
    v: values, [B, N, S, H].
    mask: bool, [B, 1, S].
  """
  many = len(q) >= _FEWEST_ROWS
  q = q[:, 0]
  scores = (_scores if many else _scores_by_products)(q, k.keys)
  scores = scores / math.sqrt(q.shape[-1])
  scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  if not many:
    return _attended_by_products(weights, v)[:, None]
  # XLA would join it with the projection that follows, which made both slower.
  return jax.lax.optimization_barrier(_attended(weights, v))[:, None]


def _scores(q, keys):
  products = q[..., None].astype(jnp.float32) * keys.astype(jnp.float32)
  return jnp.sum(products, axis=2)


def _scores_by_products(q, keys):
  return jnp.einsum(
    "BNH,BNHS->BNS", q, keys, preferred_element_type=jnp.float32
  )


def _attended(weights, v):
  products = weights[..., None].astype(jnp.float32) * v.astype(jnp.float32)
  return jnp.sum(products, axis=2).astype(v.dtype)


def _attended_by_products(weights, v):
  return jnp.einsum("BNS,BNSH->BNH", weights, v)
