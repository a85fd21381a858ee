"""The bodies of `flash`'s kernels, for Mosaic, Triton and the interpreter.

References of all kernels begin with what the heads of a row share: `todo`, the
list of blocks to visit, and `codes`, which say what tokens see each other; then
come a head's arrays, [1, 1, T, H] and of one number a token [1, 1, 1, T].
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# A part's number stands in the lower bits of a token's code.
PARTS = 2**8
# Scores of what is hidden, and the least maximum: exp of their difference is 0.
_HIDDEN, _LEAST = -1e30, -1e20


def forward(todo, codes, q, k, v, out, sums, *, size, span, scale):
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


def queries(
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


def keys(
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
  prompt = jnp.where(query < 0, -2, query & -PARTS)
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
