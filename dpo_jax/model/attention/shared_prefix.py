"""Attention of rows that share prompts: a prompt's keys are read once for all.

A row's answer lies in slots of its own, and its prompt where other rows of the
same prompt look too. The softmax is one over both, from its two parts: their
larger maximum, and the sums that both have above it.

A prompt has G places, and a row that is being answered sits in one of them.
Rows that are split over devices sit at prompts of their own shard, so that none
looks at another device's.

Letters: B rows, P prompts, G places of a prompt, M a row's own slots, S slots
of a prompt, N heads, H head dim.

References:
  Juravsky et al., Hydragen, 2024 (arXiv 2402.05099), Section 3.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.model.attention import decode


class Parts(NamedTuple):
  """Keys or values, each in a form of `decode`.

  Attributes:
    own: those of each row's own slots, of B rows.
    prompt: those of the prompts, of P rows.
  """

  own: Any
  prompt: Any


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["mask", "prompt_mask", "members", "place"],
  meta_fields=["shards"],
)
@dataclasses.dataclass(frozen=True)
class Sharing:
  """Who looks where.

  Attributes:
    mask: which of its own slots a row sees, bool [B, 1, M].
    prompt_mask: which slots of a prompt are of it, bool [P, 1, S].
    members: the row in each place, counted in its shard, int32 [P, G]; any row
      where there is none.
    place: the place of each row, counted through all prompts of its shard,
      int32 [B]; any for a row that is in none, which gets something finite.
    shards: of rows and prompts alike; each is a run of them.
  """

  mask: jax.Array
  prompt_mask: jax.Array
  members: jax.Array
  place: jax.Array
  shards: int = 1


def attend(q: jax.Array, k: Parts, v: Parts, sharing: Sharing) -> jax.Array:
  """`dense` of one query a row over its prompt and its own slots.

  Args:
    q: queries, [B, 1, N, H].
    k: keys.
    v: values.
    sharing: who looks where.

  Returns:
    [B, 1, N, H] in the dtype of `q`; scores and softmax are float32.
  """

  def by_place(x):
    """[B, 1, ...] to [P, G, ...]."""
    return _taken(x[:, 0], sharing.members, sharing.shards)

  def by_row(x):
    """[P, G, ...] to [B, 1, ...]."""
    x = x.reshape(-1, *x.shape[2:])
    return _taken(x, sharing.place, sharing.shards)[:, None]

  own = _masked_scores(q, k.own, sharing.mask)
  prompt = _masked_scores(by_place(q), k.prompt, sharing.prompt_mask)
  # [B, 1, N] and [P, G, N], as queries lie.
  own_peak, prompt_peak = (
    jnp.swapaxes(jnp.max(x, axis=-1), 1, 2) for x in (own, prompt)
  )
  peak = jnp.maximum(own_peak, by_row(prompt_peak))
  # For a row that sits there this is `peak`; where none does, it is finite.
  prompt_peak = jnp.maximum(prompt_peak, by_place(peak))
  own_sum, own_total = _above(own, peak, k.own, v.own)
  prompt_sum, prompt_total = _above(prompt, prompt_peak, k.prompt, v.prompt)
  total = own_total + by_row(prompt_total)
  out = (own_sum + by_row(prompt_sum)) / total[..., None]
  return out.astype(q.dtype)


def _taken(x, index, shards):
  """Elements of the first axis, by an index that counts in each shard."""
  if shards == 1:
    return x[index]
  x, own = (y.reshape(shards, -1, *y.shape[1:]) for y in (x, index))
  taken = jax.vmap(lambda x, index: x[index])(x, own)
  return taken.reshape(*index.shape, *x.shape[2:])


def _masked_scores(q, k, mask):
  scores = decode.scores(q, k) / math.sqrt(q.shape[-1])
  return jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)


def _above(scores, peak, k, v):
  """Sums of values and of their weights, above a peak of each query."""
  weights = jnp.exp(scores - jnp.swapaxes(peak, 1, 2)[..., None])
  total = jnp.swapaxes(jnp.sum(weights, axis=-1), 1, 2)
  values = decode.attended(weights.astype(v.dtype), k, v)
  return values.astype(jnp.float32), total
