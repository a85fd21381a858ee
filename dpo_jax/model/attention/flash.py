"""Flash attention over packed rows, in Pallas: one body for TPU and GPU.

Scores live in blocks on the chip and are never written out; the softmax is
kept up to date block by block, and the backward pass computes the scores again
from the logarithms of its sums. Which tokens see each other is tested inside,
by one code a token (`codes`), and `todo` lists for every block the blocks that
have something to see: what is hidden whole is neither computed nor read.

The kernels that come with jax take segment ids whose equality is the mask. With
a shared prompt, who sees whom is no equality: both responses see the prompt and
not each other. Splash attention's other way, a dynamic mask, holds all T x T of
every row in memory, which is what is to be spared.

`lowering` is "mosaic" (TPU), "triton" (NVIDIA GPU), "device" (one of these two,
by the device that is compiled for) or "interpret" (anywhere, for checks). On a
TPU one program takes a head's whole row, for its blocks are shorter than what
it costs to begin a program; on a GPU each block has one of its own. The kernels
were compiled for TPUs and GPUs and checked by the interpreter; they have run on
no device yet.

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
# have to fit into registers; checks want many blocks in short rows.
SIZES = {"mosaic": 128, "triton": 64, "interpret": 16}
# A part's number stands in the lower bits of a token's code.
_PARTS = 2**8
# Scores of what is hidden, and the least maximum: exp of their difference is 0.
_HIDDEN, _LEAST = -1e30, -1e20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """What the kernels know of rows that were padded to whole blocks, int32.

  Attributes:
    codes: piece and part of each token in one number, -1 for padding,
      [B, 1, T].
    keys: by the size of blocks: for each block of queries how many blocks of
      keys it sees, and then which, [B, 1, G * (G + 1)].
    queries: the same for each block of keys, of the blocks that see it.
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
    mask: who sees whom, bool [B, T, T]; it is reduced to blocks, and need not
      be held.
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
    keys[size], queries[size] = todo(blocks), todo(blocks.swapaxes(1, 2))
  return Plan(codes[:, None], keys, queries)


def todo(blocks: jax.Array) -> jax.Array:
  """Of bool [B, G, G], for each row of blocks the count and the places."""
  count = jnp.sum(blocks, -1, keepdims=True, dtype=jnp.int32)
  places = jnp.argsort(~blocks, axis=-1, stable=True).astype(jnp.int32)
  listed = jnp.concatenate([count, places], -1)
  return listed.reshape(len(blocks), 1, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, rows: Plan, lowering: Lowering
) -> jax.Array:
  """Softmax attention, [B, N, T, H] as `v` is; 0 where a token sees nothing.

  Args:
    q: queries, [B, N, T, H].
    k: keys, [B, N, T, H].
    v: values, [B, N, T, H].
    rows: of `plan`, for the same lowering.
    lowering: see above.
  """
  return _attend_forward(q, k, v, rows, lowering)[0]


def _attend_forward(q, k, v, rows, lowering):
  out, sums = _run("forward", lowering, rows, q, k, v)
  return out, (q, k, v, rows, out, sums)


def _attend_backward(lowering, kept, gradient):
  q, k, v, rows, out, sums = kept
  products = out.astype(jnp.float32) * gradient.astype(jnp.float32)
  delta = jnp.sum(products, -1)[:, :, None]
  arrays = (q, k, v, gradient, sums, delta)
  (dq,) = _run("queries", lowering, rows, *arrays)
  dk, dv = _run("keys", lowering, rows, *arrays)
  return dq, dk, dv, None


attend.defvjp(_attend_forward, _attend_backward)


def _run(name, lowering, rows, *arrays):
  """Runs a kernel; its results are cut to the tokens of `arrays`."""
  if lowering == "device":
    one = functools.partial(_run, name)
    return jax.lax.platform_dependent(
      rows,
      *arrays,
      tpu=functools.partial(one, "mosaic"),
      cuda=functools.partial(one, "triton"),
    )
  tokens, dim = arrays[0].shape[-2:]
  wide = dim
  if lowering == "triton":
    # Triton's blocks are powers of two, and its products at least 16 deep.
    wide = max(16, 1 << (dim - 1).bit_length())
  length = rows.codes.shape[-1]

  def padded(x):
    more = length - x.shape[-1 if x.shape[2] == 1 else -2]
    if x.shape[2] == 1:
      return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
    return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, wide - dim)))

  found = _call(name, lowering, 1 / math.sqrt(dim), rows, *map(padded, arrays))
  return tuple(
    x[..., :tokens] if x.shape[2] == 1 else x[:, :, :tokens, :dim]
    for x in found
  )


def _call(name, lowering, scale, rows, *arrays):
  """Runs a kernel on arrays of whole blocks."""
  batch, heads, length, _ = arrays[0].shape
  size = SIZES[lowering]
  count = length // size
  # Blocks of one program.
  span = 1 if lowering == "triton" else count
  kernel = {
    "forward": _forward_kernel,
    "queries": _queries_kernel,
    "keys": _keys_kernel,
  }[name]
  listed = (rows.queries if name == "keys" else rows.keys)[size]

  def spec(x, whole):
    """A head's whole row, or what one program makes of it."""
    axis = 3 if x.shape[2] == 1 else 2
    block = [1, 1, *x.shape[2:]]
    if not whole:
      block[axis] = span * size
    place = lambda b, n, i: (  # noqa: E731
      b,
      n,
      *(i if at == axis and not whole else 0 for at in (2, 3)),
    )
    return pl.BlockSpec(tuple(block), place)

  def row(x, **kwargs):
    """What all heads of a row share."""
    return pl.BlockSpec(
      (1, 1, x.shape[-1]), lambda b, n, i: (b, 0, 0), **kwargs
    )

  token = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
  made = {
    "forward": (
      token,
      jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
    ),
    "queries": (token,),
    "keys": (token, token),
  }[name]
  scalars, params = {}, None
  if lowering == "mosaic":
    scalars = {"memory_space": pltpu.SMEM}
    params = pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel")
    )
  elif lowering == "triton":
    params = plgpu.CompilerParams(num_warps=4, num_stages=2)
  return pl.pallas_call(
    functools.partial(kernel, size=size, span=span, scale=scale),
    out_shape=made,
    grid=(batch, heads, count // span),
    in_specs=[
      row(listed, **scalars),
      row(rows.codes),
      *(spec(x, True) for x in arrays),
    ],
    out_specs=tuple(spec(x, False) for x in made),
    compiler_params=params,
    interpret=lowering == "interpret",
    cost_estimate=_cost(name, arrays, made, size),
    name=f"flash_{name}",
  )(listed, rows.codes, *arrays)


def _cost(name, arrays, made, size) -> pl.CostEstimate:
  """At most: of rows that are one piece. How much is hidden is data."""
  batch, heads, length, dim = arrays[0].shape
  blocks = length // size
  scores = batch * heads * size**2 * blocks * (blocks + 1) // 2
  products = {"forward": 2, "queries": 3, "keys": 4}[name]
  return pl.CostEstimate(
    flops=2 * products * scores * dim,
    transcendentals=scores,
    bytes_accessed=sum(
      math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *made)
    ),
  )


# The kernels. Their arguments begin with what the heads of a row share: `todo`,
# the list of blocks to visit, and `codes`; then come a head's arrays,
# [1, 1, T, H] and of one number a token [1, 1, 1, T].


def _forward_kernel(todo, codes, q, k, v, out, sums, *, size, span, scale):
  """Output, and the logarithm of the sum of each query's exponentials."""

  def block(at, here):
    query = q[0, 0, here, :]
    code = _column(codes[0, :, here])

    def one(other, there, carry):
      greatest, total, weighted = carry
      scores = _product(query, k[0, 0, there, :], 1, 1) * scale
      seen = _seen(code, codes[0, :, there], at, other, 0)
      scores = jnp.where(seen, scores, _HIDDEN)
      now = jnp.maximum(greatest, jnp.max(scores, 1, keepdims=True))
      weights = jnp.exp(scores - now)
      fade = jnp.exp(greatest - now)
      total = total * fade + jnp.sum(weights, 1, keepdims=True)
      weights = weights.astype(v.dtype)
      product = _product(weights, v[0, 0, there, :], 1, 0)
      return now, total, weighted * fade + product

    carry = (
      jnp.full((size, 1), _LEAST, jnp.float32),
      jnp.zeros((size, 1), jnp.float32),
      jnp.zeros(query.shape, jnp.float32),
    )
    greatest, total, weighted = _visit(todo, at, size, one, carry)
    total = jnp.where(total > 0, total, 1.0)
    return (weighted / total, _row(greatest + jnp.log(total)))

  _each_block(block, (out, sums), size, span)


def _queries_kernel(
  todo, codes, q, k, v, gradient, sums, delta, dq, *, size, span, scale
):
  """The gradient of the queries."""

  def block(at, here):
    query, above = q[0, 0, here, :], gradient[0, 0, here, :]
    code = _column(codes[0, :, here])
    total, less = (_column(x[0, 0, :, here]) for x in (sums, delta))

    def one(other, there, carry):
      key = k[0, 0, there, :]
      scores = _product(query, key, 1, 1) * scale
      seen = _seen(code, codes[0, :, there], at, other, 0)
      weights = jnp.exp(jnp.where(seen, scores, _HIDDEN) - total)
      slope = _product(above, v[0, 0, there, :], 1, 1) - less
      slope = (weights * slope).astype(key.dtype)
      return (carry[0] + _product(slope, key, 1, 0),)

    (found,) = _visit(
      todo, at, size, one, (jnp.zeros(query.shape, jnp.float32),)
    )
    return (found * scale,)

  _each_block(block, (dq,), size, span)


def _keys_kernel(
  todo, codes, q, k, v, gradient, sums, delta, dk, dv, *, size, span, scale
):
  """The gradients of keys and values; scores are [keys, queries] here."""

  def block(at, here):
    key, value = k[0, 0, here, :], v[0, 0, here, :]
    code = _column(codes[0, :, here])

    def one(other, there, carry):
      query, above = q[0, 0, there, :], gradient[0, 0, there, :]
      scores = _product(key, query, 1, 1) * scale
      seen = _seen(codes[0, :, there], code, other, at, 1)
      scores = jnp.where(seen, scores, _HIDDEN)
      weights = jnp.exp(scores - sums[0, 0, :, there])
      slope = _product(value, above, 1, 1) - delta[0, 0, :, there]
      slope = (weights * slope).astype(query.dtype)
      weights = weights.astype(above.dtype)
      return (
        carry[0] + _product(slope, query, 1, 0),
        carry[1] + _product(weights, above, 1, 0),
      )

    zeros = jnp.zeros(key.shape, jnp.float32)
    slopes, weighted = _visit(todo, at, size, one, (zeros, zeros))
    return slopes * scale, weighted

  _each_block(block, (dk, dv), size, span)


def _each_block(block, made, size, span):
  """Runs `block` for each of a program's blocks, and writes what it makes."""
  first = pl.program_id(2) * span

  def one(i, nothing):
    at = first + i
    found = block(at, _tokens(at, size))
    here = _tokens(i, size)
    for ref, value in zip(made, found, strict=True):
      if ref.shape[2] == 1:
        ref[0, 0, :, here] = value
      else:
        ref[0, 0, here, :] = value.astype(ref.dtype)
    return nothing

  jax.lax.fori_loop(0, span, one, 0)


def _visit(todo, at, size, visit, carry):
  """Goes through the blocks that `todo` lists for block `at`."""
  start = at * (_blocks(todo) + 1)

  def one(i, carry):
    other = todo[0, 0, start + 1 + i]
    return visit(other, _tokens(other, size), carry)

  return jax.lax.fori_loop(0, todo[0, 0, start], one, carry)


def _blocks(todo) -> int:
  """G of G * (G + 1)."""
  return math.isqrt(todo.shape[-1])


def _tokens(block, size):
  return pl.ds(pl.multiple_of(block * size, size), size)


def _seen(query, key, query_block, key_block, query_axis):
  """Whether queries see keys, by their codes, bool [size, size]."""
  size = query.size
  prompt = jnp.where(query < 0, -2, query & -_PARTS)
  own = jnp.where(query < 0, -2, query)
  place = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (size, size))
  before = key_block * size + place(1 - query_axis) <= (
    query_block * size + place(query_axis)
  )
  return ((key == own) | (key == prompt)) & before


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

  Numbers of codes are exact in float32, which they are summed in.
  """
  exact = jnp.where(_diagonal(row.size), row.astype(jnp.float32), 0.0)
  return jnp.sum(exact, 1, keepdims=True).astype(row.dtype)


def _row(column):
  """[size, 1], float32, as [1, size]."""
  exact = jnp.where(_diagonal(column.size), column, 0.0)
  return jnp.sum(exact, 0, keepdims=True)


def _diagonal(size):
  place = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (size, size))
  return place(0) == place(1)
