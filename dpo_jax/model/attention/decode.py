"""Attention of decoding: one query a row, over the cache and shared prompts.

A row attends to its own slots and, where rows share prompts, to its prompt's
slots, which are read once for all of its rows. The softmax is one over both,
from its two parts: their larger maximum, and the sums that both have above it.
Row and prompt are on the same device, and heads too: no device reads another's.

Keys and values have the axes of the cache's layout (`kv_cache`), which says how
they are computed: unstacked, keys [B, N, H, S] and values [B, N, S, H] by sums
that a CPU's cores share; folded, both [B, S, C] with the heads in C = N H, by
one product.

Letters: B rows, T queries of a row, P prompts, G rows of a prompt, S slots,
N heads, H head dim.

References:
  Juravsky et al., Hydragen, 2024 (arXiv 2402.05099), Section 3.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.core import sharding as sharding_lib

# Of fewer queries the loop is slower than products one after another.
_FEWEST_QUERIES = 16


class Parts(NamedTuple):
  """Keys or values of rows and of their prompts.

  Attributes:
    own: of each row's own slots, B of them.
    prompt: of the prompts, P of them.
  """

  own: jax.Array
  prompt: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sharing:
  """Which rows share which prompt; indices count within a shard.

  Attributes:
    mask: own slots that a row sees, bool [B, 1, S].
    prompt_mask: slots of a prompt that hold its tokens, bool [P, 1, S].
    prefix_to_rows: rows of each prompt, int32 [P, G]; any row where it has
      fewer.
    row_to_prefix: each row's place in the flattened `prefix_to_rows`, int32
      [B]; any for a row without a prompt, whose output is finite.
  """

  mask: jax.Array
  prompt_mask: jax.Array
  prefix_to_rows: jax.Array
  row_to_prefix: jax.Array


def bind(visible: jax.Array | Sharing) -> Callable[..., jax.Array]:
  """Attention of one model call, (q, k, v) -> [B, 1, N, H].

  Args:
    visible: slots that each row sees, bool [B, 1, S]; or `Sharing`, for which
      keys and values are `Parts`.
  """
  attend = _attend_shared if isinstance(visible, Sharing) else _attend
  if jax.sharding.get_abstract_mesh().empty:
    return lambda q, k, v: attend(q, k, v, visible)
  # Indices of `Sharing` count within a shard, and heads stay where they are.
  rows, heads = (sharding_lib.RULES[name] for name in ("batch", "heads"))
  query = PartitionSpec(rows, None, heads)

  def split(q, k, v):
    folded = jax.tree.leaves(k)[0].ndim == 3
    cached = query if folded else PartitionSpec(rows, heads)
    return jax.shard_map(
      attend,
      in_specs=(query, cached, cached, PartitionSpec(rows)),
      out_specs=query,
      check_vma=False,
    )(q, k, v, visible)

  return split


def _attend(q, k, v, mask):
  """To a row's own slots, q [B, T, N, H]; scores and softmax in float32."""
  weights = jax.nn.softmax(_masked_scores(q, k, mask), axis=-1)
  return _weighted_values(weights.astype(v.dtype), v)


def _attend_shared(q, k, v, sharing):
  """To a row's prompt and its own slots, q [B, 1, N, H], as `_attend`."""

  def by_prompt(x):
    """[B, 1, ...] to [P, G, ...]."""
    return x[:, 0][sharing.prefix_to_rows]

  def by_row(x):
    """[P, G, ...] to [B, 1, ...]."""
    return x.reshape(-1, *x.shape[2:])[sharing.row_to_prefix][:, None]

  own = _masked_scores(q, k.own, sharing.mask)
  prompt = _masked_scores(by_prompt(q), k.prompt, sharing.prompt_mask)
  # [B, 1, N] and [P, G, N].
  own_max, prompt_max = (
    jnp.swapaxes(jnp.max(x, axis=-1), 1, 2) for x in (own, prompt)
  )
  row_max = jnp.maximum(own_max, by_row(prompt_max))
  # Equal to `row_max` at a row's place; finite at a place without a row.
  prompt_max = jnp.maximum(prompt_max, by_prompt(row_max))
  own_sum, own_total = _exp_sums(own, row_max, v.own)
  prompt_sum, prompt_total = _exp_sums(prompt, prompt_max, v.prompt)
  total = own_total + by_row(prompt_total)
  out = (own_sum + by_row(prompt_sum)) / total[..., None]
  return out.astype(q.dtype)


def _masked_scores(q, k, mask):
  scores = _scores(q, k) / math.sqrt(q.shape[-1])
  # A finite floor: a row that sees nothing stays free of NaN.
  return jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)


def _exp_sums(scores, maximum, v):
  """Sums of exp(scores - maximum), over values and alone, float32."""
  weights = jnp.exp(scores - jnp.swapaxes(maximum, 1, 2)[..., None])
  total = jnp.swapaxes(jnp.sum(weights, axis=-1), 1, 2)
  values = _weighted_values(weights.astype(v.dtype), v)
  return values.astype(jnp.float32), total


def _scores(q, k):
  """Products of queries [B, T, N, H] and keys in float32, [B, N, T, S]."""
  if k.ndim == 4:
    return _summed_scores(q, k)
  # Queries are zero outside their own head. That is N times the products, but
  # reads the keys as they are: decoding waits for memory.
  wide = q[:, :, :, None] * _own_head(q.shape[2], q.dtype)
  wide = wide.reshape(*q.shape[:3], -1)
  return jnp.einsum(
    "BTNC,BSC->BNTS", wide, k, preferred_element_type=jnp.float32
  )


def _weighted_values(weights, v):
  """Sums of values by weights [B, N, T, S], [B, T, N, H] in their dtype."""
  if v.ndim == 4:
    return _summed_values(weights, v)
  heads = weights.shape[1]
  every = jnp.einsum("BNTS,BSC->BTNC", weights, v)
  every = every.reshape(*every.shape[:3], heads, -1)
  # Only one term of each sum is not zero.
  return jnp.sum(every * _own_head(heads, v.dtype), axis=3)


def _own_head(heads, dtype):
  return jnp.eye(heads, dtype=dtype)[None, None, :, :, None]


def _summed_scores(q, k):
  """Sums of products over an axis that is not the last.

  A product of one query with its keys is too small for XLA to share among a
  CPU's cores, and it runs such products one after another. Written so, all
  rows' are one loop over memory, which all cores share and whose innermost axis
  is a vector: the slots here, the head's dimensions for the values.
  """
  if q.shape[0] * q.shape[1] < _FEWEST_QUERIES:
    return jnp.einsum(
      "BTNH,BNHS->BNTS", q, k, preferred_element_type=jnp.float32
    )
  q, keys = (x.astype(jnp.float32) for x in (q, k))
  if q.shape[1] == 1:
    # An axis of one makes XLA's loop tens of times slower.
    return jnp.sum(q[:, 0, :, :, None] * keys, axis=2)[:, :, None]
  q = jnp.swapaxes(q, 1, 2)[..., None]
  return jnp.sum(q * keys[:, :, None], axis=3)


def _summed_values(weights, v):
  """As `_summed_scores`."""
  queries = weights.shape[2]
  if len(v) * queries < _FEWEST_QUERIES:
    return jnp.einsum("BNTS,BNSH->BTNH", weights, v)
  dtype = v.dtype
  weights, v = (x.astype(jnp.float32) for x in (weights[..., None], v))
  if queries == 1:
    sums = jnp.sum(weights[:, :, 0] * v, axis=2)
  else:
    sums = jnp.sum(weights * v[:, :, None], axis=3)
  # Joined with the projection that follows, both are slower.
  sums = _no_fuse(sums.astype(dtype))
  return sums[:, None] if queries == 1 else jnp.swapaxes(sums, 1, 2)


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
