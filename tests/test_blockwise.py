"""Blockwise attention against dense attention of rows with whole segments."""

import dataclasses
import functools
import re

import hypothesis
import jax
import jax.extend.core as jax_core
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import strategies as st

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing, token_table
from dpo_jax.model import gpt_neox
from dpo_jax.model.attention import blockwise
from dpo_jax.training import step as step_lib

WHOLE = packing.Packing("shared", 64, 1, 1, False, 1)
# Blocks far shorter than most segments, and than some parts.
BLOCKS = dataclasses.replace(WHOLE, row_length=4, spans_rows=True)
LORA = dataclasses.replace(
  tiny.CONFIG, lora=gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
  st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 9)
)
def test_all_that_a_row_sees_is_listed_once(sizes, length):
  size = np.asarray(sizes)
  segment = np.repeat(np.arange(len(size)), size)
  wanted = sorted(
    {
      (q // length, k // length)
      for q in range(len(segment))
      for k in range(q + 1)
      if segment[q] == segment[k]
    }
  )
  found = packing._block_pairs(np.cumsum(size) - size, size, length)
  assert list(map(tuple, found.tolist())) == wanted


def test_a_line_has_no_gaps():
  shards = 3
  items = token_table.from_items(tiny.pairs(12, 4))
  how = dataclasses.replace(BLOCKS, shards=shards)
  batch, counts = batch_lib.pack(items, how)
  lines = batch.segment_ids.reshape(shards, -1)
  tokens = [np.count_nonzero(line) for line in lines]
  assert sum(tokens) == counts.tokens == items.lengths.sum()
  for line, count in zip(lines, tokens):
    assert (line[:count] > 0).all()
    # Numbers that no two segments of a line share.
    assert line[:count].tolist() == sorted(line[:count])
  # No line is longer than the shortest by more than the longest pair.
  assert max(tokens) - min(tokens) <= items.lengths.sum(1).max()


# --- the numbers


@functools.partial(jax.jit, static_argnums=0)
def outcome(config, base, adapters, batch):
  """Log-probs by sequence_ids, and their gradient."""

  def sums(adapters):
    found, _ = step_lib.sequence_logps(config, base, adapters, batch, 12)
    return jnp.sum(jnp.sin(found)), found

  grads, found = jax.grad(sums, has_aux=True)(adapters)
  return found, grads


texts = st.lists(
  st.integers(2, tiny.CONFIG.vocab_size - 1), min_size=1, max_size=12
).map(tuple)


@functools.cache
def weights():
  return tiny.weights(LORA), tiny.adapters(LORA)


def run(name, how, items):
  batch, _ = batch_lib.pack(items, how)
  micro = jax.tree.map(lambda x: x[0], batch)
  config = dataclasses.replace(LORA, attention=name)
  return outcome(config, *weights(), micro)


def assert_same(found, wanted):
  # Float32 sums of up to 36 terms in another order.
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=2e-5)

  def close(a, b):
    # The sine carries the sums' difference into gradients as large as these.
    scale = max(1.0, np.abs(b).max())
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5 * scale)

  jax.tree.map(close, found[1], wanted[1])


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  st.lists(
    st.builds(token_table.Pair, st.uuids().map(str), texts, texts, texts),
    min_size=6,
    max_size=6,
  )
)
def test_blocks_give_the_numbers_of_dense(items):
  dense = dataclasses.replace(WHOLE, shapes=(packing.Shape(6, 144),))
  blocks = dataclasses.replace(BLOCKS, shapes=(packing.Shape(56, 144, 400),))
  assert_same(run("blocks", blocks, items), run("dense", dense, items))


def gradients(q, k, v, visible, seen):
  """Attention, and the gradients of a sum of it."""

  def loss(q, k, v):
    out = blockwise.attend(q, k, v, visible, seen)
    return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

  grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
  return out, *grads


def test_bfloat16_is_multiplied_as_such():
  items = token_table.from_items(tiny.pairs(6, 4))
  batch, _ = batch_lib.pack(items, BLOCKS)
  micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
  visible = blockwise.mask(micro.segment_ids, micro.part_ids, micro.block_pairs)
  rows, size = micro.tokens.shape
  keys = jax.random.split(jax.random.key(3), 3)
  shapes = ((rows, size, 2, 8), (rows, 2, size, 8), (rows, 2, size, 8))
  exact = [jax.random.normal(*both) for both in zip(keys, shapes)]
  rounded = [x.astype(jnp.bfloat16) for x in exact]
  step = jax.jit(gradients)
  text = step.lower(*rounded, visible, micro.block_pairs).as_text()
  products = [x for x in text.splitlines() if "stablehlo.dot_general" in x]
  assert len(products) == 6
  for line in products:
    assert re.search(r": \(tensor<\w+xbf16>, tensor<\w+xbf16>\) -> ", line)
    assert re.search(r"-> tensor<\w+xf32>", line)
  found = step(*rounded, visible, micro.block_pairs)
  wanted = step(
    *(x.astype(jnp.float32) for x in rounded), visible, micro.block_pairs
  )
  for a, b in zip(found, wanted, strict=True):
    assert a.dtype == jnp.bfloat16
    # Eight bits of each operand, and of the result.
    scale = float(jnp.abs(b).max())
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-6 * scale)


@pytest.mark.parametrize(("layout", "shards"), [("packed", 1), ("shared", 2)])
def test_layouts_and_shards_give_the_numbers_of_dense(layout, shards):
  items = tiny.pairs(6, 9)
  how = dataclasses.replace(BLOCKS, layout=layout, shards=shards)
  assert_same(run("blocks", how, items), run("dense", WHOLE, items))


def test_padding_attends_to_nothing_and_stays_finite():
  ones = jnp.ones((2, 3, 1, 8))
  segment_ids = jnp.array([[1, 1, 0], [0, 0, 0]])
  seen = jnp.array([[[0, 0], [-1, -1]]])
  mask = blockwise.mask(segment_ids, 0 * segment_ids, seen)
  k = jnp.swapaxes(ones, 1, 2)
  out, back = jax.vjp(lambda q: blockwise.attend(q, k, k, mask, seen), ones)
  np.testing.assert_array_equal(out[..., 0, 0], [[1, 1, 0], [0, 0, 0]])
  (grad,) = back(jnp.full_like(out, 1e30))
  assert bool(jnp.isfinite(grad).all())


# --- rematerialization


@pytest.mark.parametrize(
  ("remat", "products"), [("none", 6), ("save_projections", 7), ("full", 8)]
)
def test_saved_attention_has_its_scores_alone_computed_again(remat, products):
  """Products of pairs of rows: two forward, four backward, and again."""
  batch, _ = batch_lib.pack(tiny.pairs(6, 9), BLOCKS)
  micro = jax.tree.map(lambda x: x[0], batch)
  config = dataclasses.replace(LORA, attention="blocks", remat=remat)
  base, adapters = weights()

  def total(adapters):
    return jnp.sum(step_lib.token_logps(config, base, adapters, micro))

  def dots(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        yield equation.params["dimension_numbers"][1]
      for inner in jax_core.jaxprs_in_params(equation.params):
        yield from dots(inner)

  found = dots(jax.make_jaxpr(jax.grad(total))(adapters).jaxpr)
  # A pair of rows and a head are batch axes of these products alone.
  assert sum(len(batched[0]) == 2 for batched in found) == products


# --- refusals


def test_rows_of_the_other_kind_are_refused():
  items = tiny.pairs(6)
  with pytest.raises(ValueError, match=r"'dense'.* packed with block_pairs"):
    run("dense", BLOCKS, items)
  with pytest.raises(ValueError, match=r"'blocks'.* without block_pairs"):
    run("blocks", WHOLE, items)
