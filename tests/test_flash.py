"""The flash kernels against dense attention, interpreted; and that they lower.

Tested are their arithmetic, interpreted on the CPU, that Mosaic compiles them
for TPUs, and that they translate to Triton.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_jax.core import sharding as sharding_lib
from dpo_jax.model import attention
from dpo_jax.model.attention import flash
from dpo_jax.plan import compile_training, topology

ROWS, HEADS, LENGTH, DIM = 2, 2, 118, 8
SIZE = flash.SIZES["interpret"]


def segments_of(rows):
  """Segments from rows of segments, each its parts' lengths, or of a gap."""
  segment_ids, part_ids = np.zeros((2, len(rows), LENGTH), np.int32)
  for r, row in enumerate(rows):
    at = number = 0
    for lengths in row:
      if isinstance(lengths, int):
        at += lengths
        continue
      number += 1
      for part, size in enumerate(lengths):
        here = slice(min(at, LENGTH), min(at + size, LENGTH))
        segment_ids[r, here], part_ids[r, here] = number, part
        at += size
  return attention.Segments(jnp.asarray(segment_ids), jnp.asarray(part_ids))


def arrays(seed):
  """Queries, keys, values, and the gradient of the output."""
  rng = np.random.default_rng(seed)
  token, key = (ROWS, LENGTH, HEADS, DIM), (ROWS, HEADS, LENGTH, DIM)
  return [
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in (token, key, key, token)
  ]


@functools.partial(jax.jit, static_argnums=0)
def pulled(name, segments, q, k, v, gradient):
  """Attention and its gradients; `gradient` counts where there is a token."""
  out, pull = jax.vjp(attention.bind(name, segments), q, k, v)
  real = (segments.segment_ids > 0)[:, :, None, None]
  return out, *pull(jnp.where(real, gradient, 0))


def assert_equal(found, segments, values):
  wanted = pulled("dense", segments, *values)
  # Dense attention gives padding the mean of all values.
  real = np.asarray(segments.segment_ids > 0)[:, :, None, None]
  wanted = wanted[0] * real, *wanted[1:]
  for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
    # Float32 sums in another order.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=name)


_segment = st.one_of(
  # Prompt, chosen, rejected; prompt and response; padding.
  st.tuples(*3 * (st.integers(0, 30),)),
  st.tuples(*2 * (st.integers(1, 40),)),
  st.integers(1, 20),
)
_rows = st.lists(st.lists(_segment, max_size=6), min_size=ROWS, max_size=ROWS)


@settings(max_examples=40, deadline=None)
@example(rows=[[], [LENGTH]], seed=0)
@example(rows=[[(SIZE, SIZE, SIZE)], [(SIZE - 1, 1, SIZE + 1)]], seed=1)
@example(rows=[[(LENGTH,)], [(1,)] * LENGTH], seed=2)
@example(rows=[[2 * SIZE, (3, SIZE, 9)], [(1, 60, 9)]], seed=3)
@given(rows=_rows, seed=st.integers(0, 2**16))
def test_values_and_gradients_are_those_of_dense(rows, seed):
  segments = segments_of(rows)
  found = pulled("flash_interpreted", segments, *arrays(seed))
  assert_equal(found, segments, arrays(seed))
  if np.any(segments.segment_ids):
    assert all(float(jnp.abs(x).max()) > 0 for x in found[::3])


def test_masked_blocks_do_no_work():
  """NaN in blocks that nothing sees changes nothing."""
  segments = segments_of([[(SIZE,), (SIZE,), (SIZE, SIZE)]] * ROWS)
  q, k, v, gradient = arrays(4)
  wanted = pulled("flash_interpreted", segments, q, k, v, gradient)
  # The first segment is seen by itself alone.
  bad = jnp.nan
  k, v = (x.at[:, :, :SIZE].set(bad) for x in (k, v))
  q, gradient = (x.at[:, :SIZE].set(bad) for x in (q, gradient))
  out, dq, dk, dv = pulled("flash_interpreted", segments, q, k, v, gradient)
  np.testing.assert_array_equal(out[:, SIZE:], wanted[0][:, SIZE:])
  np.testing.assert_array_equal(dq[:, SIZE:], wanted[1][:, SIZE:])
  np.testing.assert_array_equal(dk[:, :, SIZE:], wanted[2][:, :, SIZE:])
  np.testing.assert_array_equal(dv[:, :, SIZE:], wanted[3][:, :, SIZE:])
  assert np.isnan(out[:, :SIZE]).all()


def test_a_mesh_gives_the_numbers_of_one_device():
  """Rows over four devices, heads over two."""
  rows = [[(3, 30, 40)], [(20, 9), 5, (30,)]]
  segments, values = segments_of(2 * rows), arrays(5)
  values = [jnp.concatenate([x, -x]) for x in values]
  with jax.set_mesh(sharding_lib.make_mesh(1, 4, 2)):
    found = pulled("flash_interpreted", segments, *values)
  assert_equal(found, segments, values)


def gradient_of(heads, length, dim, dtype, sharding=None):
  """The jitted gradient of attention, and the shapes that it takes."""

  def loss(q, k, v, *ids):
    attend = attention.bind("flash", attention.Segments(*ids))
    return jnp.sum(attend(q, k, v).astype(jnp.float32))

  def shape(*sizes, dtype=dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  key = shape(1, heads, length, dim)
  ids = shape(1, length, dtype=jnp.int32)
  shapes = (shape(1, length, heads, dim), key, key, ids, ids)
  return jax.jit(jax.grad(loss, (0, 1, 2))), shapes


@pytest.mark.parametrize(("dim", "dtype"), [(80, "bfloat16"), (64, "float32")])
def test_it_translates_to_triton(dim, dtype):
  step, shapes = gradient_of(2, 1000, dim, dtype)
  text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  for name in ("forward", "queries", "keys"):
    assert f"flash_{name}" in text
  assert "__gpu$xla.gpu.triton" in text


def compiled_for(slice_, *shape):
  device = topology.devices(slice_)[0]
  here = jax.sharding.SingleDeviceSharding(device)
  step, shapes = gradient_of(*shape, here)
  mesh = sharding_lib.make_mesh(1, 1, 1, devices=[device])
  with compile_training.uncached(mesh):
    return step.lower(*shapes).compile()


# Pythia-2.8B's heads.
@pytest.mark.parametrize(
  "case",
  [("v5e:2x4", 32, 1024, 80, "bfloat16")]
  + [
    pytest.param((kind, heads, length, dim, dtype), marks=pytest.mark.slow)
    for kind in ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4")
    for heads, length, dim in (
      (32, 1024, 80),
      (32, 2048, 80),
      (4, 1000, 32),
      (8, 640, 64),
      (16, 1024, 128),
      (8, 1024, 256),
    )
    for dtype in ("bfloat16", "float32")
  ],
)
def test_mosaic_compiles_it(case):
  compiled = compiled_for(*case)
  text = compiled.as_text()
  for name in ("forward", "queries", "keys"):
    assert text.count(f"%flash_{name}") >= 1
  # No array of scores: one of a head alone would be larger.
  _, heads, length, dim, _ = case
  arrays = 12 * heads * length * max(dim, 128) * 4
  assert compiled.memory_analysis().temp_size_in_bytes < arrays
