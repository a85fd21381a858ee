"""Flops, bytes and traffic of compiled programs, against hand arithmetic."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import hlo, partitioning


def compiled(f, *args):
  return jax.jit(f).lower(*args).compile().as_text()


def shape(*sizes, sharding=None):
  return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
  def f(x, layers):
    def outer(x, layer):
      x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, layer)
      return x, None

    return jax.lax.scan(outer, x, layers)[0]

  found = hlo.cost(compiled(f, shape(8, 16), shape(5, 3, 16, 16)))
  # Fifteen products of [8, 16] and [16, 16].
  assert found.flops == 15 * 2 * 8 * 16 * 16
  assert found.open_loops == 0
  assert not found.collectives
  # Each reads and writes at least its operands and result.
  assert found.bytes >= 15 * 4 * (2 * 8 * 16 + 16 * 16)
  # Slices of the stack are read, not the stack in each round.
  assert found.bytes < 15 * 4 * 5 * 3 * 16 * 16


def test_products_with_several_axes_by_hand():
  def f(q, k):
    return jnp.einsum("BTNH,BSNH->BNTS", q, k)

  found = hlo.cost(compiled(f, shape(2, 8, 4, 16), shape(2, 32, 4, 16)))
  assert found.flops == 2 * (2 * 4 * 8 * 32) * 16


def test_a_loop_whose_end_depends_on_data_is_said_to_be_one():
  def f(x, count):
    step = lambda carry: (carry[0] @ carry[0], carry[1] - 1)  # noqa: E731
    return jax.lax.while_loop(lambda c: c[1] > 0, step, (x, count))

  count = jax.ShapeDtypeStruct((), jnp.int32)
  text = compiled(f, shape(8, 8), count)
  once, many = hlo.cost(text), hlo.cost(text, rounds=7)
  assert once.open_loops == many.open_loops == 1
  assert many.flops == 7 * once.flops == 7 * 2 * 8**3


def test_traffic_of_a_loop_by_hand():
  mesh = partitioning.make_mesh(1, 8, 1)

  def f(x, layers):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, layers)[0]

  split = functools.partial(NamedSharding, mesh)
  args = (
    shape(64, 32, sharding=split(P("fsdp"))),
    shape(3, 32, 32, sharding=split(P(None, "fsdp"))),
  )
  out = split(P("fsdp"))
  text = jax.jit(f, out_shardings=out).lower(*args).compile().as_text()
  found = hlo.cost(text)
  # Each device has eight rows, and gathers each layer: seven eighths of it are
  # elsewhere.
  assert found.flops == 3 * 2 * 8 * 32 * 32
  sent = 3 * 4 * 32 * 32 * 7 / 8
  assert found.traffic() == {"all-gather": (3, sent)}
  (one,) = found.collectives
  assert one.looped
  assert one.shape == (32, 32)


# As the TPU compiler writes them: a loop of two products a round, counted up by
# two; batch and contracted axes as axes of a window; arrays kept on the chip.
TPU = """
HloModule jit_f, is_scheduled=true

%body (p: (u32[], bf16[32,1024,80], bf16[32,80,1024])) -> (u32[]) {
  %p = (u32[]{:T(128)}, bf16[32,1024,80]{2,1,0}, /*index=2*/bf16[32,80,1024]{2,1,0:S(1)}) parameter(0)
  %one = u32[] constant(1)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %next = u32[] add(%i, %one)
  %last = u32[] add(%next, %one), metadata={op_name="a(b)"}
  %q = bf16[32,1024,80]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %k = bf16[32,80,1024]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=2
  %scores = f32[32,1024,1024]{2,1,0:T(8,128)S(1)} convolution(%q, %k), window={size=32 stride=31 lhs_dilate=32}, dim_labels=0bf_0io->0bf
  %sent = (bf16[32,1024,80]{2,1,0}, bf16[32,1024,80]{2,1,0}, u32[]) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
  %done = bf16[32,1024,80]{2,1,0} collective-permute-done(%sent)
  ROOT %t = (u32[], bf16[32,1024,80]{2,1,0}, bf16[32,80,1024]{2,1,0}) tuple(%last, %done, %k)
}

%condition (p: (u32[], bf16[32,1024,80], bf16[32,80,1024])) -> pred[] {
  %p = (u32[]{:T(128)}, bf16[32,1024,80]{2,1,0}, bf16[32,80,1024]{2,1,0}) parameter(0)
  %bound = u32[] constant(7)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (start: (u32[], bf16[32,1024,80], bf16[32,80,1024])) -> bf16[1024,320] {
  %start = (u32[], bf16[32,1024,80]{2,1,0}, bf16[32,80,1024]{2,1,0}) parameter(0)
  %loop = (u32[], bf16[32,1024,80]{2,1,0}, bf16[32,80,1024]{2,1,0}) while(%start), condition=%condition, body=%body
  %x = bf16[1024,32,80]{2,1,0} custom-call(), custom_call_target="x"
  %w = bf16[32,80,320]{2,1,0} custom-call(), custom_call_target="w"
  %gathered = bf16[32,80,320]{2,1,0} all-gather(%w), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={2}
  ROOT %out = bf16[1024,1,320]{2,1,0} convolution(%x, %gathered), window={size=32}, dim_labels=b0f_0io->b0f
}
"""  # noqa: E501


def test_what_the_tpu_compiler_writes():
  found = hlo.cost(TPU)
  # Four rounds: 0, 2, 4, 6.
  scores = 4 * 2 * 32 * 1024 * 1024 * 80
  assert found.flops == scores + 2 * 1024 * 320 * 32 * 80
  assert found.traffic() == {
    "all-gather": (1, 2 * 32 * 80 * 320 * 3 / 4),
    "collective-permute": (4, 4 * 2 * 32 * 1024 * 80),
  }
  # Of a round's product only the queries lie in memory.
  product = next(w for w in found.work if w.times == 4 and w.flops)
  assert product.bytes == 2 * 32 * 1024 * 80
  # A product that takes longer to compute than to read is bound by it.
  assert found.seconds(1.0, 1e30) == found.flops
  assert found.seconds(1e30, 1.0) == found.bytes


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="is it HLO"):
    hlo.cost("hello")
