"""Flops, bytes and traffic of compiled programs, against hand arithmetic."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax import partitioning
from dpo_jax.planning import compiling, hlo, topology


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
  assert found.seconds(1.0, 1.0, 1e30) == found.flops
  assert found.seconds(1e30, 1e30, 1.0) == found.bytes


# One all-gather that is carried along by two products, as the TPU compiler
# writes it: four fusions of one channel.
CHAIN = """
HloModule jit_f, is_scheduled=true, num_partitions=8

%begin (a: bf16[32,64]) -> (bf16[32,64], bf16[256,64], u32[]) {
  %a = bf16[32,64]{1,0} parameter(0)
  %g = bf16[256,64]{1,0} all-gather(%a), channel_id=80, replica_groups=mesh['x'=8] {'x'}, dimensions={0}
  ROOT %c = (bf16[32,64]{1,0}, bf16[256,64]{1,0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%link (a: bf16[32,64], b: bf16[256,64], s: u32[], x: bf16[16,32], y: bf16[32,8]) -> (bf16[16,8], bf16[32,64], bf16[256,64], bf16[256,64], u32[]) {
  %x = bf16[16,32]{1,0} parameter(3)
  %y = bf16[32,8]{1,0} parameter(4)
  %d = bf16[16,8]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[256,64]{1,0} parameter(1)
  %g = bf16[256,64]{1,0} all-gather(%a), channel_id=80, replica_groups=mesh['x'=8] {'x'}, dimensions={0}
  %s = u32[]{:S(2)} parameter(2)
  ROOT %t = (bf16[16,8]{1,0}, bf16[32,64]{1,0}, bf16[256,64]{1,0}, bf16[256,64]{1,0}, u32[]{:S(2)}) tuple(%d, %a, %b, %g, %s)
}

%end (a: bf16[32,64], b: bf16[256,64], s: u32[]) -> bf16[256,64] {
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[256,64]{1,0} parameter(1)
  %s = u32[]{:S(2)} parameter(2)
  %g = bf16[256,64]{1,0} all-gather(%a), channel_id=80, replica_groups=mesh['x'=8] {'x'}, dimensions={0}
  ROOT %c = bf16[256,64]{1,0} custom-call(%a, %b, %g, %s), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[32,64], x: bf16[16,32], y: bf16[32,8]) -> bf16[256,64] {
  %a = bf16[32,64]{1,0} parameter(0)
  %x = bf16[16,32]{1,0} parameter(1)
  %y = bf16[32,8]{1,0} parameter(2)
  %f0 = (bf16[32,64]{1,0}, bf16[256,64]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%begin
  %a1 = bf16[32,64]{1,0} get-tuple-element(%f0), index=0
  %b1 = bf16[256,64]{1,0} get-tuple-element(%f0), index=1
  %s1 = u32[]{:S(2)} get-tuple-element(%f0), index=2
  %f1 = (bf16[16,8]{1,0}, bf16[32,64]{1,0}, bf16[256,64]{1,0}, bf16[256,64]{1,0}, u32[]{:S(2)}) fusion(%a1, %b1, %s1, %x, %y), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {})}, calls=%link
  %a2 = bf16[32,64]{1,0} get-tuple-element(%f1), index=1
  %b2 = bf16[256,64]{1,0} get-tuple-element(%f1), index=2
  %s2 = u32[]{:S(2)} get-tuple-element(%f1), index=4
  %f2 = (bf16[16,8]{1,0}, bf16[32,64]{1,0}, bf16[256,64]{1,0}, bf16[256,64]{1,0}, u32[]{:S(2)}) fusion(%a2, %b2, %s2, %x, %y), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {})}, calls=%link
  %a3 = bf16[32,64]{1,0} get-tuple-element(%f2), index=1
  %b3 = bf16[256,64]{1,0} get-tuple-element(%f2), index=2
  %s3 = u32[]{:S(2)} get-tuple-element(%f2), index=4
  ROOT %f3 = bf16[256,64]{1,0} fusion(%a3, %b3, %s3), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""  # noqa: E501


def test_the_links_of_a_chain_are_one_collective():
  found = hlo.cost(CHAIN)
  sent = 2 * 256 * 64 * 7 / 8
  assert found.traffic() == {"all-gather": (1, sent)}
  assert found.sent == found.sent_meanwhile == sent
  assert found.flops == 2 * 2 * 16 * 8 * 32
  # Read and written once by the gathering, not by each link; two products.
  product = 2 * (16 * 32 + 32 * 8 + 16 * 8)
  gathered = 2 * (2 * 32 * 64 + 256 * 64)
  assert found.bytes == gathered + 2 * product


# Several arrays in one operation, begun and ended apart; a group that is not
# spelt out; and a sum of which each device keeps a slice.
JOINED = """
HloModule jit_f, is_scheduled=true, num_partitions=4

%summed (x: f32[64,16], i: s32[]) -> f32[16,16] {
  %x = f32[64,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %r = f32[64,16]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[16,16]{1,0} dynamic-slice(%r, %i, %zero), dynamic_slice_sizes={16,16}
}

ENTRY %main (a: f32[8], b: f32[4,4], x: f32[64,16], i: s32[]) -> f32[16,16] {
  %a = f32[8]{0} parameter(0)
  %b = f32[4,4]{1,0} parameter(1)
  %x = f32[64,16]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %g = ((f32[8]{0}, f32[4,4]{1,0}), (f32[32]{0}, f32[16,4]{1,0})) all-gather-start(%a, %b), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  %gd = (f32[32]{0}, f32[16,4]{1,0}) all-gather-done(%g)
  %s = (f32[8]{0}, f32[4,4]{1,0}) all-reduce-start(%a, %b), channel_id=3, replica_groups={}, to_apply=%add
  %sd = (f32[8]{0}, f32[4,4]{1,0}) all-reduce-done(%s)
  ROOT %f = f32[16,16]{1,0} fusion(%x, %i), kind=kCustom, calls=%summed
}
"""  # noqa: E501


def test_traffic_of_joined_and_sliced_collectives_by_hand():
  found = hlo.cost(JOINED)
  assert found.traffic() == {
    "all-gather": (1, 4 * (32 + 16 * 4) * 3 / 4),
    "all-reduce": (1, 2 * 4 * (8 + 4 * 4) * 3 / 4),
    # Three quarters of what each device adds up belong to the others.
    "reduce-scatter": (1, 4 * 64 * 16 * 3 / 4),
  }
  assert found.sent - found.sent_meanwhile == 4 * 64 * 16 * 3 / 4


def test_what_is_written_in_place_counts_as_what_is_written():
  """One token of each row goes into a cache in a loop; a few rows are read."""

  def f(cache, new, index):
    def step(at, carry):
      cache, total = carry
      cache = cache.at[jnp.arange(4), index + at].set(new)
      return cache, total + jnp.sum(cache[:, at])

    return jax.lax.fori_loop(0, 10, step, (cache, jnp.float32(0)))

  index = jax.ShapeDtypeStruct((4,), jnp.int32)
  jitted = jax.jit(f, donate_argnums=0)
  args = (shape(4, 1000, 64), shape(4, 64), index)
  found = hlo.cost(jitted.lower(*args).compile().as_text())
  # Ten times 4 rows of 64 are written and read; the cache has 1,024,000 bytes.
  assert found.bytes < 10 * 4 * 4 * 64 * 20 < 4 * 4 * 1000 * 64


# A product that takes one layer's kernel of a stack by a fusion within its own,
# as the TPU compiler writes it, and puts what it makes into another stack.
NESTED = """
HloModule jit_f, is_scheduled=true

%take (stack: f32[4,32,8], i: s32[]) -> bf16[32,8] {
  %stack = f32[4,32,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %c = bf16[4,32,8]{2,1,0} convert(%stack)
  %s = bf16[1,32,8]{2,1,0} dynamic-slice(%c, %i, %zero, %zero), dynamic_slice_sizes={1,32,8}
  ROOT %b = bf16[32,8]{1,0} bitcast(%s)
}

%put (kept: bf16[4,16,8], y: bf16[16,8], i: s32[]) -> bf16[4,16,8] {
  %kept = bf16[4,16,8]{2,1,0} parameter(0)
  %y = bf16[16,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %b = bf16[1,16,8]{2,1,0} bitcast(%y)
  ROOT %u = bf16[4,16,8]{2,1,0} dynamic-update-slice(%kept, %b, %i, %zero, %zero)
}

%product (x: bf16[16,32], stack: f32[4,32,8], kept: bf16[4,16,8], i: s32[]) -> bf16[4,16,8] {
  %x = bf16[16,32]{1,0} parameter(0)
  %stack = f32[4,32,8]{2,1,0} parameter(1)
  %kept = bf16[4,16,8]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %w = bf16[32,8]{1,0} fusion(%stack, %i), kind=kLoop, calls=%take
  %y = bf16[16,8]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %f = bf16[4,16,8]{2,1,0} fusion(%kept, %y, %i), kind=kLoop, calls=%put
}

ENTRY %main (x: bf16[16,32], stack: f32[4,32,8], kept: bf16[4,16,8], i: s32[]) -> bf16[4,16,8] {
  %x = bf16[16,32]{1,0} parameter(0)
  %stack = f32[4,32,8]{2,1,0} parameter(1)
  %kept = bf16[4,16,8]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %place = bf16[4,16,8]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %begun = ((f32[4,32,8]{2,1,0}), f32[1,32,8]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%stack), slice={[0:1], [0:32], [0:8]}
  %done = f32[1,32,8]{2,1,0:S(1)} slice-done(%begun)
  ROOT %out = bf16[4,16,8]{2,1,0} fusion(%x, %stack, %kept, %i), kind=kOutput, calls=%product
}
"""  # noqa: E501


def test_a_slice_within_an_inner_fusion_counts_as_the_slice():
  found = hlo.cost(NESTED)
  assert found.flops == 2 * 16 * 8 * 32
  # One layer of four is read, in the type of the stack, and one is written;
  # beside it the operand, the index, and the slice that is begun early and goes
  # to the chip.
  product = 4 * 32 * 8 + 2 * 16 * 32 + 2 * 16 * 8 + 4
  assert found.bytes == product + 4 * 32 * 8


def test_a_pass_over_a_stack_reads_it_once_on_a_tpu():
  """As compiled: each round takes a layer's kernel within its product."""
  mesh = partitioning.make_mesh(1, 1, 1, devices=topology.devices("v5e:1x1"))
  here = partitioning.replicated(mesh)
  kernels = jax.ShapeDtypeStruct((8, 2048, 2048), jnp.bfloat16, sharding=here)
  x = jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16, sharding=here)

  def f(x, kernels):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

  with compiling.uncached(mesh):
    found = hlo.cost(compiled(f, x, kernels))
  assert found.flops == 8 * 2 * 512 * 2048**2
  stack, rows = 8 * 2 * 2048**2, 2 * 512 * 2048
  assert stack <= found.bytes <= stack + 8 * 2 * rows


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="is it HLO"):
    hlo.cost("hello")
