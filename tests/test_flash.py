"""The flash kernels against dense attention, interpreted; and that they lower.

They run on TPUs and GPUs, of which there is none here: what is tested is their
arithmetic, step by step on the CPU, that Mosaic compiles them for TPUs, and
that they translate to Triton's language.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sourcing
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_jax.core import sharding as sharding_lib
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing, tokenization, tokenizer
from dpo_jax.model import attention, gpt_neox
from dpo_jax.model.attention import flash
from dpo_jax.plan import compile_training, topology
from dpo_jax.training import losses
from dpo_jax.training import step as step_lib

ROWS, HEADS, LENGTH, DIM = 2, 2, 118, 8
SIZE = flash.SIZES["interpret"]


def segments_of(rows, length=LENGTH):
  """Segments of rows of pieces, each the lengths of its parts or of a gap."""
  pieces, parts = np.zeros((2, len(rows), length), np.int32)
  for r, row in enumerate(rows):
    at = number = 0
    for lengths in row:
      if isinstance(lengths, int):
        at += lengths
        continue
      number += 1
      for part, size in enumerate(lengths):
        here = slice(min(at, length), min(at + size, length))
        pieces[r, here], parts[r, here] = number, part
        at += size
  return attention.Segments(jnp.asarray(pieces), jnp.asarray(parts))


def arrays(seed, rows=ROWS, heads=HEADS, length=LENGTH, dim=DIM):
  """Queries, keys, values, and the gradient of the output."""
  rng = np.random.default_rng(seed)
  shapes = [(rows, length, heads, dim)] + 2 * [(rows, heads, length, dim)]
  shapes.append(shapes[0])
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


@functools.partial(jax.jit, static_argnums=0)
def pulled(name, segments, q, k, v, gradient):
  """Attention and its gradients; `gradient` counts where there is a token."""
  out, pull = jax.vjp(attention.bind(name, segments), q, k, v)
  real = (segments.segment_ids > 0)[:, :, None, None]
  return out, *pull(jnp.where(real, gradient, 0))


def assert_equal(segments, values, atol=1e-5):
  found = pulled("flash_interpreted", segments, *values)
  wanted = pulled("dense", segments, *values)
  # Dense attention gives padding the mean of all values.
  real = np.asarray(segments.segment_ids > 0)[:, :, None, None]
  wanted = wanted[0] * real, *wanted[1:]
  for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
    # Float32 sums in another order.
    np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)
  return found


_piece = st.one_of(
  # Prompt, chosen, rejected; prompt and response; padding.
  st.tuples(*3 * (st.integers(0, 30),)),
  st.tuples(*2 * (st.integers(1, 40),)),
  st.integers(1, 20),
)
_rows = st.lists(st.lists(_piece, max_size=6), min_size=ROWS, max_size=ROWS)


@settings(max_examples=40, deadline=None)
@example(rows=[[], [LENGTH]], seed=0)
@example(rows=[[(SIZE, SIZE, SIZE)], [(SIZE - 1, 1, SIZE + 1)]], seed=1)
@example(rows=[[(LENGTH,)], [(1,)] * LENGTH], seed=2)
@example(rows=[[2 * SIZE, (3, SIZE, 9)], [(1, 60, 9)]], seed=3)
@given(rows=_rows, seed=st.integers(0, 2**16))
def test_values_and_gradients_are_those_of_dense(rows, seed):
  segments = segments_of(rows)
  found = assert_equal(segments, arrays(seed))
  if np.any(segments.segment_ids):
    assert all(float(jnp.abs(x).max()) > 0 for x in found[::3])


@given(rows=_rows)
@settings(max_examples=40, deadline=None)
def test_todo_lists_just_the_blocks_that_see_something(rows):
  segments = segments_of(rows)
  mask = np.asarray(segments.mask())
  plan = flash.plan(segments.segment_ids, segments.part_ids, mask, "interpret")
  count = -(-LENGTH // SIZE)
  for listed, turned in (
    (plan.keys[SIZE], mask),
    (plan.queries[SIZE], mask.swapaxes(1, 2)),
  ):
    table = np.asarray(listed).reshape(ROWS, count, count + 1)
    for r in range(ROWS):
      for block, (number, *places) in enumerate(table[r]):
        rows_of_block = turned[r, block * SIZE : (block + 1) * SIZE]
        seen = sorted(set(np.flatnonzero(rows_of_block.any(0)) // SIZE))
        assert places[:number] == seen


def test_hidden_blocks_do_no_work():
  """What is not a number, in blocks that nobody sees, touches nothing."""
  segments = segments_of([[(SIZE,), (SIZE,), (SIZE, SIZE)]] * ROWS)
  q, k, v, gradient = arrays(4)
  wanted = pulled("flash_interpreted", segments, q, k, v, gradient)
  # The first piece is seen by itself alone.
  bad = jnp.nan
  k, v = (x.at[:, :, :SIZE].set(bad) for x in (k, v))
  q, gradient = (x.at[:, :SIZE].set(bad) for x in (q, gradient))
  out, dq, dk, dv = pulled("flash_interpreted", segments, q, k, v, gradient)
  np.testing.assert_array_equal(out[:, SIZE:], wanted[0][:, SIZE:])
  np.testing.assert_array_equal(dq[:, SIZE:], wanted[1][:, SIZE:])
  np.testing.assert_array_equal(dk[:, :, SIZE:], wanted[2][:, :, SIZE:])
  np.testing.assert_array_equal(dv[:, :, SIZE:], wanted[3][:, :, SIZE:])
  assert np.isnan(out[:, :SIZE]).all()


def test_real_packed_rows(shared):
  words = tokenizer.load(shared / "tokenizer" / "pythia")
  rows = sourcing.harmless(shared, limit=12)
  table = tokenization.tokenize(
    words, rows, rules="paper", max_length=40, max_prompt_length=20
  ).table
  how = packing.Packing("shared", LENGTH, 1, 1, False, 1)
  batch, _ = batch_lib.pack(table, how)
  assert batch.segment_ids.max() > 1
  assert batch.segment_ids.min() == 0
  for at in range(0, batch.segment_ids.shape[1] - 1, ROWS):
    here = slice(at, at + ROWS)
    segments = attention.Segments(
      jnp.asarray(batch.segment_ids[0, here]),
      jnp.asarray(batch.part_ids[0, here]),
    )
    assert_equal(segments, arrays(at))


CONFIGS = {
  name: dataclasses.replace(
    tiny.CONFIG,
    attention=name,
    lora=gpt_neox.LoraConfig(2, 4.0, 0.0, ("query_key_value",)),
  )
  for name in ("dense", "flash_interpreted")
}


@functools.cache
def trained(name, sizes=None, count=4):
  """Losses and gradient norms of some updates, and the adapters after them."""
  config = CONFIGS[name]
  tx = optax.partition(
    {"train": optax.sgd(0.05), "freeze": optax.set_to_zero()},
    {"base": "freeze", "lora": "train"},
  )
  objective = step_lib.Objective(
    "dpo", losses.LossSettings("sigmoid", 0.5, 0), 4
  )
  step = jax.jit(step_lib.make_train_step(config, objective, tx, 0))
  shards = 1
  if sizes is not None:
    mesh = sharding_lib.make_mesh(*sizes)
    shards = sharding_lib.data_shards(mesh)
  shape = packing.Shape(4, 16 if shards > 1 else 64)
  how = packing.Packing("shared", 40, shards, 1, False, 1, (shape,))
  state = step_lib.init_state(tiny.weights(config), tiny.adapters(config), tx)
  if sizes is not None:
    state = jax.device_put(state, sharding_lib.shardings(state, mesh))
  seen = []
  for number in range(count):
    batch, _ = batch_lib.pack(tiny.pairs(4, number), how)
    if sizes is not None:
      batch = sharding_lib.put(batch, mesh, leading=1)
    state, metrics = step(state, None, batch)
    seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
  return np.array(seen), jax.device_get(state.params["lora"])


def assert_trained_alike(found, wanted):
  # Losses differ, so that the steps are not all one.
  assert wanted[0][:, 0].std() > 1e-2
  np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
    found[1],
    wanted[1],
  )


def test_on_a_mesh_training_is_that_of_one_device():
  sizes = (1, 4, 2)
  with jax.set_mesh(sharding_lib.make_mesh(*sizes)):
    found = trained("flash_interpreted", sizes)
  assert_trained_alike(found, trained("dense"))


@pytest.mark.slow
def test_many_steps_on_one_device_are_those_of_dense_attention():
  found = trained("flash_interpreted", count=40)
  assert_trained_alike(found, trained("dense", count=40))


def gradient_of(heads, length, dim, dtype, sharding=None):
  """The jitted gradient of attention, and the shapes that it takes."""

  def loss(q, k, v, pieces, parts):
    attend = attention.bind("flash", attention.Segments(pieces, parts))
    return jnp.sum(attend(q, k, v).astype(jnp.float32))

  def shape(*sizes, dtype=dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  key = shape(1, heads, length, dim)
  ids = shape(1, length, dtype=jnp.int32)
  shapes = (shape(1, length, heads, dim), key, key, ids, ids)
  return jax.jit(jax.grad(loss, (0, 1, 2))), shapes


@pytest.mark.parametrize(
  ("dim", "dtype"),
  [(32, "bfloat16"), (64, "float32"), (80, "bfloat16"), (128, "float32")],
)
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
  # Nine products of a block of scores, in the causal half of the blocks.
  size = flash.SIZES["mosaic"]
  blocks = -(-length // size)
  scores = heads * size**2 * blocks * (blocks + 1) / 2
  said = re.findall(r'"cost_estimate":\{"flops":"(\d+)"', text)
  assert sum(map(int, said)) == 2 * 9 * scores * dim
