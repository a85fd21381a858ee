"""Flash attention over packed rows, in Pallas: one body for TPU and GPU.

Scores exist as blocks on the chip alone: the forward pass is an online softmax
over blocks of keys, and the backward pass computes the scores again from the
log of its sums. One code a token decides inside the kernel which tokens see
each other; a list for every block names the blocks that it sees, so that fully
masked blocks are neither read nor computed.

The kernels that come with jax mask by equal segment ids. A shared prompt is no
such equality: both responses see the prompt and not each other. Splash
attention's dynamic mask would hold all T x T of every row in memory.

`lowering` is "mosaic" (TPU), "triton" (NVIDIA GPU), "device" (either, by the
device compiled for) or "interpret" (anywhere, for tests). On a TPU one program
computes a head's whole row, since a block takes less time than starting a
program; on a GPU each block has a program. The kernels are compiled for TPUs
and GPUs and checked by the interpreter; they have not run on a device.

Letters: B rows, N heads, T tokens, H head dim, G blocks of a row.

References:
  Dao et al., FlashAttention, 2022 (arXiv 2205.14135), Algorithms 1 and 4;
  Dao, FlashAttention-2, 2023 (arXiv 2307.08691), sections 3.1 and 3.2.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

Lowering = Literal["mosaic", "triton", "device", "interpret"]

# Tokens of a block. A TPU's vectors have 128 lanes; on a GPU scores and sums
# have to fit into registers; tests want many blocks in short rows.
SIZES = {"mosaic": 128, "triton": 64, "interpret": 16}
# A token's code is segment_id * _PARTS + part_id.
_PARTS = 2**8
# Masked scores, and the least maximum: exp of their difference is 0.
_MASKED, _LEAST = -1e30, -1e20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """Codes and block lists of rows padded to whole blocks, int32.

  Attributes:
    codes: segment and part of each token in one number, -1 for padding,
      [B, 1, T].
    keys: by the size of blocks: for each block of queries the number of blocks
      of keys that it sees, then their indices, [B, 1, G * (G + 1)].
    queries: likewise for each block of keys, the blocks of queries that see it.
  """

  codes: jax.Array
  keys: dict[int, jax.Array]
  queries: dict[int, jax.Array]


def plan(
  segment_ids: jax.Array,
  part_ids: jax.Array,
  mask: jax.Array,
  lowering: Lowering,
) -> Plan:
  """The plan of rows, for the blocks of `lowering`.

  Args:
    segment_ids: int32 [B, T], below 2**16; 0 is padding.
    part_ids: int32 [B, T], below 2**8; 0 is the prompt.
    mask: which keys each query sees, bool [B, T, T]; XLA reduces it to blocks
      without storing it.
    lowering: of the `attend` that it is for.
  """
  names = ("mosaic", "triton") if lowering == "device" else (lowering,)
  sizes = {SIZES[name] for name in names}
  more = -segment_ids.shape[1] % math.lcm(*sizes)
  codes = jnp.where(segment_ids > 0, segment_ids * _PARTS + part_ids, -1)
  codes = jnp.pad(codes, ((0, 0), (0, more)), constant_values=-1)
  mask = jnp.pad(mask, ((0, 0), (0, more), (0, more)))
  keys, queries = {}, {}
  for size in sizes:
    count = mask.shape[1] // size
    blocks = mask.reshape(-1, count, size, count, size).any((2, 4))
    keys[size] = _block_lists(blocks)
    queries[size] = _block_lists(blocks.swapaxes(1, 2))
  return Plan(codes[:, None], keys, queries)


def _block_lists(blocks):
  """For each row of bool [B, G, G] the count and the indices of what is set."""
  count = jnp.sum(blocks, -1, keepdims=True, dtype=jnp.int32)
  indices = jnp.argsort(~blocks, axis=-1, stable=True).astype(jnp.int32)
  lists = jnp.concatenate([count, indices], -1)
  return lists.reshape(len(blocks), 1, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, rows: Plan, lowering: Lowering
) -> jax.Array:
  """Softmax attention, [B, N, T, H] as `v`; 0 where a token sees nothing.

  Args:
    q: queries, [B, N, T, H].
    k: keys, [B, N, T, H].
    v: values, [B, N, T, H].
    rows: of `plan`, for the same lowering.
    lowering: see above.
  """
  return _attend_forward(q, k, v, rows, lowering)[0]


def _attend_forward(q, k, v, rows, lowering):
  out, log_sums = _run("forward", lowering, rows, q, k, v)
  return out, (q, k, v, rows, out, log_sums)


def _attend_backward(lowering, saved, d_out):
  q, k, v, rows, out, log_sums = saved
  products = out.astype(jnp.float32) * d_out.astype(jnp.float32)
  delta = jnp.sum(products, -1)[:, :, None]
  arrays = (q, k, v, d_out, log_sums, delta)
  (dq,) = _run("queries", lowering, rows, *arrays)
  dk, dv = _run("keys", lowering, rows, *arrays)
  return dq, dk, dv, None


attend.defvjp(_attend_forward, _attend_backward)


def _run(name, lowering, rows, *arrays):
  """A kernel's results, cut to the tokens of `arrays`."""
  if lowering == "device":
    run = functools.partial(_run, name)
    return jax.lax.platform_dependent(
      rows,
      *arrays,
      tpu=functools.partial(run, "mosaic"),
      cuda=functools.partial(run, "triton"),
    )
  tokens, dim = arrays[0].shape[-2:]
  wide = dim
  if lowering == "triton":
    # Triton's blocks are powers of two, and its products at least 16 deep.
    wide = max(16, 1 << (dim - 1).bit_length())
  length = rows.codes.shape[-1]

  def pad(x):
    more = (0, length - x.shape[2]), (0, wide - dim)
    if x.shape[2] == 1:
      more = (0, 0), (0, length - x.shape[3])
    return jnp.pad(x, ((0, 0), (0, 0), *more))

  results = _call(name, lowering, 1 / math.sqrt(dim), rows, *map(pad, arrays))
  return tuple(
    x[..., :tokens] if x.shape[2] == 1 else x[:, :, :tokens, :dim]
    for x in results
  )


def _call(name, lowering, scale, rows, *arrays):
  """Runs a kernel on arrays padded to whole blocks."""
  batch, heads, length, _ = arrays[0].shape
  size = SIZES[lowering]
  count = length // size
  # Blocks of one program.
  span = 1 if lowering == "triton" else count
  lists = (rows.queries if name == "keys" else rows.keys)[size]
  token = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
  number = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
  kernel, outputs = {
    "forward": (_forward_kernel, (token, number)),
    "queries": (_queries_kernel, (token,)),
    "keys": (_keys_kernel, (token, token)),
  }[name]

  def row(x, **kwargs):
    """Shared by all heads of a row."""
    return pl.BlockSpec(
      (1, 1, x.shape[-1]), lambda b, n, i: (b, 0, 0), **kwargs
    )

  def whole(x):
    """A head's whole row."""
    return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, n, i: (b, n, 0, 0))

  def blocks(x):
    """The blocks of one program."""
    if x.shape[2] == 1:
      return pl.BlockSpec((1, 1, 1, span * size), lambda b, n, i: (b, n, 0, i))
    return pl.BlockSpec(
      (1, 1, span * size, x.shape[3]), lambda b, n, i: (b, n, i, 0)
    )

  scalars, params = {}, None
  if lowering == "mosaic":
    scalars = {"memory_space": pltpu.SMEM}
    params = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
  elif lowering == "triton":
    params = plgpu.CompilerParams(num_warps=4, num_stages=2)
  return pl.pallas_call(
    functools.partial(kernel, size=size, span=span, scale=scale),
    out_shape=outputs,
    grid=(batch, heads, count // span),
    in_specs=[row(lists, **scalars), row(rows.codes), *map(whole, arrays)],
    out_specs=tuple(map(blocks, outputs)),
    compiler_params=params,
    interpret=lowering == "interpret",
    name=f"flash_{name}",
  )(lists, rows.codes, *arrays)


# The kernels. Their first arguments are shared by the heads of a row: the block
# lists and the codes of `Plan`. Then come a head's arrays, [1, 1, T, H], or
# [1, 1, 1, T] of one number a token.


def _forward_kernel(lists, codes, q, k, v, out, log_sums, *, size, span, scale):
  """Output, and the log of the sum of each query's exponentials."""

  def block(at, here):
    query = q[0, 0, here, :]
    code = _column(codes[0, :, here])

    def add(other, there, carry):
      maximum, total, weighted = carry
      scores = _product(query, k[0, 0, there, :], 1, 1) * scale
      seen = _seen(code, codes[0, :, there], at, other, 0)
      scores = jnp.where(seen, scores, _MASKED)
      now = jnp.maximum(maximum, jnp.max(scores, 1, keepdims=True))
      weights = jnp.exp(scores - now)
      rescale = jnp.exp(maximum - now)
      total = total * rescale + jnp.sum(weights, 1, keepdims=True)
      weights = weights.astype(v.dtype)
      product = _product(weights, v[0, 0, there, :], 1, 0)
      return now, total, weighted * rescale + product

    carry = (
      jnp.full((size, 1), _LEAST, jnp.float32),
      jnp.zeros((size, 1), jnp.float32),
      jnp.zeros(query.shape, jnp.float32),
    )
    maximum, total, weighted = _for_listed(lists, at, size, add, carry)
    total = jnp.where(total > 0, total, 1.0)
    return (weighted / total, _row(maximum + jnp.log(total)))

  _for_blocks(block, (out, log_sums), size, span)


def _queries_kernel(
  lists, codes, q, k, v, d_out, log_sums, delta, dq, *, size, span, scale
):
  """The gradient of the queries."""

  def block(at, here):
    query, d_query = q[0, 0, here, :], d_out[0, 0, here, :]
    code = _column(codes[0, :, here])
    log_sum, shift = (_column(x[0, 0, :, here]) for x in (log_sums, delta))

    def add(other, there, carry):
      key = k[0, 0, there, :]
      scores = _product(query, key, 1, 1) * scale
      seen = _seen(code, codes[0, :, there], at, other, 0)
      weights = jnp.exp(jnp.where(seen, scores, _MASKED) - log_sum)
      d_scores = _product(d_query, v[0, 0, there, :], 1, 1) - shift
      d_scores = (weights * d_scores).astype(key.dtype)
      return (carry[0] + _product(d_scores, key, 1, 0),)

    zeros = jnp.zeros(query.shape, jnp.float32)
    (gradient,) = _for_listed(lists, at, size, add, (zeros,))
    return (gradient * scale,)

  _for_blocks(block, (dq,), size, span)


def _keys_kernel(
  lists, codes, q, k, v, d_out, log_sums, delta, dk, dv, *, size, span, scale
):
  """The gradients of keys and values; scores are [keys, queries] here."""

  def block(at, here):
    key, value = k[0, 0, here, :], v[0, 0, here, :]
    code = _column(codes[0, :, here])

    def add(other, there, carry):
      query, d_query = q[0, 0, there, :], d_out[0, 0, there, :]
      scores = _product(key, query, 1, 1) * scale
      seen = _seen(codes[0, :, there], code, other, at, 1)
      scores = jnp.where(seen, scores, _MASKED)
      weights = jnp.exp(scores - log_sums[0, 0, :, there])
      d_scores = _product(value, d_query, 1, 1) - delta[0, 0, :, there]
      d_scores = (weights * d_scores).astype(query.dtype)
      weights = weights.astype(d_query.dtype)
      return (
        carry[0] + _product(d_scores, query, 1, 0),
        carry[1] + _product(weights, d_query, 1, 0),
      )

    zeros = jnp.zeros(key.shape, jnp.float32)
    of_keys, of_values = _for_listed(lists, at, size, add, (zeros, zeros))
    return of_keys * scale, of_values

  _for_blocks(block, (dk, dv), size, span)


def _for_blocks(block, outputs, size, span):
  """Computes and writes each of a program's blocks."""
  first = pl.program_id(2) * span

  def one(i, nothing):
    at = first + i
    values = block(at, _tokens(at, size))
    here = _tokens(i, size)
    for ref, value in zip(outputs, values, strict=True):
      if ref.shape[2] == 1:
        ref[0, 0, :, here] = value
      else:
        ref[0, 0, here, :] = value.astype(ref.dtype)
    return nothing

  jax.lax.fori_loop(0, span, one, 0)


def _for_listed(lists, at, size, add, carry):
  """Folds `add` over the blocks that are listed for block `at`."""
  # Of G * (G + 1) numbers the root is G.
  start = at * (math.isqrt(lists.shape[-1]) + 1)

  def one(i, carry):
    other = lists[0, 0, start + 1 + i]
    return add(other, _tokens(other, size), carry)

  return jax.lax.fori_loop(0, lists[0, 0, start], one, carry)


def _tokens(block, size):
  return pl.ds(pl.multiple_of(block * size, size), size)


def _seen(query, key, query_block, key_block, query_axis):
  """Whether queries see keys, by their codes, bool [size, size]."""
  size = query.size
  prompt = jnp.where(query < 0, -2, query & -_PARTS)
  own = jnp.where(query < 0, -2, query)
  index = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (size, size))
  causal = key_block * size + index(1 - query_axis) <= (
    query_block * size + index(query_axis)
  )
  return ((key == own) | (key == prompt)) & causal


def _product(a, b, contracted_a, contracted_b):
  """A matrix product summed in float32; float32 operands stay that."""
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((contracted_a,), (contracted_b,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def _column(row):
  """[1, size] as [size, 1]; a reshape does not compile for every TPU.

  Codes are exact in float32, which they are summed in.
  """
  exact = jnp.where(_diagonal(row.size), row.astype(jnp.float32), 0.0)
  return jnp.sum(exact, 1, keepdims=True).astype(row.dtype)


def _row(column):
  """[size, 1], float32, as [1, size]."""
  exact = jnp.where(_diagonal(column.size), column, 0.0)
  return jnp.sum(exact, 0, keepdims=True)


def _diagonal(size):
  index = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (size, size))
  return index(0) == index(1)
