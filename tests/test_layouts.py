"""Real rows through Pythia-14m's shape and a deeper one: layouts are one sum.

All layouts and all cases share one shape, so that each model compiles once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sourcing
import tiny

from configs import models
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing, token_table, tokenization, tokenizer
from dpo_jax.model import gpt_neox, logprobs
from dpo_jax.training import losses, step

PAIRS, LENGTH = 4, 256
PYTHIA = gpt_neox.ModelConfig(**models.pythia("14m").to_dict())
SHAPES = {
  "pythia-14m": PYTHIA,
  # Narrower, deeper, more heads, another share of rotation, fewer words.
  "deeper": dataclasses.replace(
    PYTHIA,
    vocab_size=2048,
    width=64,
    layers=12,
    heads=8,
    mlp_width=192,
    rotary_fraction=0.5,
  ),
}
ADAPTERS = gpt_neox.LoraConfig(
  2, 4.0, 0.0, ("query_key_value", "dense_4h_to_h")
)


@pytest.fixture(scope="module")
def real(shared):
  """Pairs of harmless-base whose prompts were cut to 40 tokens."""
  words = tokenizer.load(shared / "tokenizer" / "pythia")
  rows = sourcing.harmless(shared, limit=40)
  table = tokenization.tokenize(
    words, rows, rules="paper", max_length=96, max_prompt_length=40
  ).table
  return table.take(np.arange(PAIRS) * 7)


def pack(items, layout):
  """Eight rows, one shard, room for all completions."""
  how = packing.Packing(
    layout, LENGTH, 1, 1, False, 1, (packing.Shape(2 * PAIRS, 512),)
  )
  batch, _ = batch_lib.pack(items, how)
  assert batch.tokens.shape == (1, 2 * PAIRS, LENGTH)
  assert batch.sequence_ids.shape == (1, 1, 512)
  return jax.tree.map(lambda x: x[0], batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def numbers(config, kind, base, adapters, batch):
  """(sums of log-probs, losses), and the gradient of the adapters."""

  def total(adapters):
    policy = step.token_logps(config, base, adapters, batch)
    sums, lengths = logprobs.sequence_sums(
      policy, batch.sequence_ids, 2 * PAIRS
    )
    if kind == "sft":
      # Of the chosen responses alone.
      return -jnp.sum(sums[::2]) / jnp.sum(lengths[::2]), (sums, sums)
    other = step.token_logps(config, base, None, batch)
    ratios, _ = logprobs.sequence_sums(
      policy - other, batch.sequence_ids, 2 * PAIRS
    )
    margins = ratios[::2] - ratios[1::2]
    each = losses.dpo_loss(margins, jnp.zeros_like(margins), beta=0.5)
    return jnp.mean(each), (sums, each)

  grads, values = jax.grad(total, has_aux=True)(adapters)
  return values, grads


@pytest.fixture(scope="module", params=SHAPES)
def trained(request):
  config = dataclasses.replace(SHAPES[request.param], lora=ADAPTERS)
  return config, tiny.weights(config), tiny.adapters(config)


@pytest.fixture
def pairs(real, trained):
  """The real pairs, in the model's vocabulary."""
  vocab_size = trained[0].vocab_size
  return dataclasses.replace(real, tokens=real.tokens % vocab_size)


def assert_close(found, wanted, atol):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    scale = max(1.0, float(jnp.abs(b).max()))
    np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=atol)


@pytest.mark.parametrize(
  "trained",
  ["pythia-14m", pytest.param("deeper", marks=pytest.mark.slow)],
  indirect=True,
)
def test_layouts_agree_on_real_rows(trained, pairs):
  config, *weights = trained
  found = {
    layout: numbers(config, "dpo", *weights, pack(pairs, layout))
    for layout in ("padded", "packed", "shared")
  }
  (sums, each), grads = found["padded"]
  assert float(jnp.abs(sums).min()) > 1
  assert float(jnp.ptp(each)) > 1e-2
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
  for layout in ("packed", "shared"):
    # Float32; sums of up to 1,000 nats are compared by their own size.
    assert_close(found[layout], found["padded"], 1e-4)


@pytest.mark.parametrize("trained", ["deeper"], indirect=True)
def test_neighbours_change_no_token(trained, pairs):
  config, *weights = trained
  other = [
    dataclasses.replace(
      item,
      prompt=item.prompt[::-1],
      chosen=item.chosen[::-1],
      rejected=item.rejected[::-1],
    )
    for item in pairs
  ]
  mixed = token_table.from_items([pairs[0], *other[1:]])
  batches = [pack(items, "shared") for items in (pairs, mixed)]
  # Its row has others in it.
  (row,) = set(
    (batches[0].source // LENGTH)[batches[0].sequence_ids == 0].tolist()
  )
  assert len(set(batches[0].segment_ids[row].tolist()) - {0}) > 1
  (before, _), (after, _) = (
    numbers(config, "dpo", *weights, batch)[0] for batch in batches
  )
  np.testing.assert_array_equal(before[:2], after[:2])
  assert np.abs(before[2:] - after[2:]).max() > 1e-2


@pytest.mark.parametrize("trained", ["deeper"], indirect=True)
def test_rejected_tokens_do_not_reach_the_chosen_gradient(trained, pairs):
  config, *weights = trained
  changed = token_table.from_items(
    [dataclasses.replace(p, rejected=p.rejected[::-1]) for p in pairs]
  )
  found = [
    numbers(config, "sft", *weights, pack(items, "shared"))
    for items in (pairs, changed)
  ]
  (before, grads), (after, other) = ((v[0], g) for v, g in found)
  np.testing.assert_array_equal(before[::2], after[::2])
  assert np.abs(before[1::2] - after[1::2]).max() > 1e-2
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other), strict=True):
    # Rejected tokens stand in the sums with weights of exactly zero.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)
    assert float(jnp.abs(a).max()) > 1e-5
