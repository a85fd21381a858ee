"""Properties of the model; that it is GPT-NeoX is shown by test_hf.

Expected values are NumPy's or torch's, or those of the same sequence computed
whole against one token at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from dpo_jax.model import block, gpt_neox, kv_cache, lora

LORA = gpt_neox.LoraConfig(3, 6.0, 0.0, gpt_neox.TARGETS)
CONFIG = tiny.CONFIG
ADAPTED = dataclasses.replace(CONFIG, lora=LORA)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, 64, (2, 12)))


@pytest.fixture(scope="module")
def base():
  return tiny.weights(CONFIG)


@pytest.fixture(scope="module")
def adapters():
  return tiny.adapters(ADAPTED)


@pytest.fixture(scope="module")
def plain(base):
  """Hidden states of the base."""
  return hidden(CONFIG, base, None)


apply = jax.jit(gpt_neox.apply, static_argnums=0, static_argnames="prefill")


def causal(tokens):
  rows, count = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(count)[None], (rows, count))
  mask = jnp.broadcast_to(jnp.tri(count, dtype=bool), (rows, count, count))
  return positions, mask


def hidden(config, base, adapters, tokens=TOKENS, **options):
  return apply(config, base, adapters, tokens, *causal(tokens), **options)[0]


def test_adapters_off_is_exactly_the_base(base, adapters, plain):
  np.testing.assert_array_equal(hidden(ADAPTED, base, None), plain)
  assert np.abs(hidden(ADAPTED, base, adapters) - plain).max() > 0.1


def test_fresh_adapters_are_exactly_the_base(base, plain):
  fresh = jax.jit(gpt_neox.init_lora, static_argnums=0)(
    ADAPTED, jax.random.key(3)
  )
  dense = fresh["blocks"]["dense_4h_to_h"]
  assert dense["lora_a"].shape == (2, 32, 3)
  assert dense["lora_b"].shape == (2, 3, 16)
  # PEFT's initialization: uniform in +-1/sqrt(fan_in), and B zero.
  bound = 1 / np.sqrt(32)
  assert 0.8 * bound < np.abs(dense["lora_a"]).max() <= bound
  assert not np.any(dense["lora_b"])
  assert not np.array_equal(dense["lora_a"][0], dense["lora_a"][1])
  np.testing.assert_array_equal(hidden(ADAPTED, base, fresh), plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_kernels_by_hand(base, adapters, dtype):
  cast = jax.tree.map(lambda x: x.astype(dtype), base)
  merged = lora.merge(ADAPTED, cast, adapters)
  for target, adapter in adapters["blocks"].items():
    a, b = (np.array(adapter[x], np.float64) for x in ("lora_a", "lora_b"))
    kernel = np.array(cast["blocks"][target]["kernel"], np.float64)
    # alpha / rank = 6 / 3.
    wanted = kernel + 2 * np.einsum("LIR,LRO->LIO", a, b).reshape(kernel.shape)
    found = merged["blocks"][target]["kernel"]
    assert found.dtype == dtype
    # One rounding of a float32 sum, of numbers near 1: a few ulps; to 8 bits
    # 2^-9 of the value, or 2^-8 where the sums round to two sides.
    rtol = 0 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(
      np.array(found, np.float64), wanted, rtol=rtol, atol=2e-6
    )
  assert merged["embed"] is cast["embed"]
  if dtype == "float32":
    # Float32 sums in another order over the layers.
    np.testing.assert_allclose(
      hidden(ADAPTED, base, adapters),
      hidden(CONFIG, merged, None),
      rtol=0,
      atol=2e-4,
    )


def test_count_is_the_sum_over_the_shapes(base, adapters):
  # Embeddings, final norm, and for each layer two norms and four projections.
  layer = 4 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16
  assert lora.count(base) == 2 * 64 * 16 + 2 * 16 + 2 * layer
  fans = (16 + 48) + (16 + 16) + (16 + 32) + (32 + 16)
  assert lora.count(adapters) == 2 * 3 * fans


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_torchs(dtype):
  """Values and derivatives."""
  points = np.linspace(-9, 9, 721, dtype=np.float32)
  # Half of x times a rounded 1 + erf; bfloat16 has eight bits.
  close = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
  ours = jnp.asarray(points, dtype)
  theirs = torch.tensor(np.asarray(ours, np.float32), requires_grad=True)
  wanted = torch.nn.functional.gelu(theirs)
  wanted.sum().backward()
  value, slope = jax.jvp(block._gelu, (ours,), (jnp.ones_like(ours),))
  assert value.dtype == slope.dtype == dtype
  np.testing.assert_array_equal(value, block._gelu(ours))
  for found, other in ((value, wanted.detach()), (slope, theirs.grad)):
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found, other, rtol=close, atol=close)


def test_remat_changes_memory_and_not_numbers(base, adapters):
  def loss(adapters, config):
    return jnp.sum(jnp.sin(hidden(config, base, adapters)))

  results = {}
  for remat in ("none", "save_projections", "full"):
    config = dataclasses.replace(ADAPTED, remat=remat)
    step = jax.value_and_grad(functools.partial(loss, config=config))
    compiled = jax.jit(step).lower(adapters).compile()
    results[remat] = compiled(adapters), compiled.memory_analysis()
  (expected, expected_gradient), _ = results["none"]
  for (value, gradient), _ in results.values():
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # The recomputed block may be fused otherwise: float32 rounding only.
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
      gradient,
      expected_gradient,
    )
  sizes = [memory.temp_size_in_bytes for _, memory in results.values()]
  assert sizes == sorted(sizes, reverse=True)
  assert len(set(sizes)) == 3


def test_bfloat16_computes_in_bfloat16_with_float32_logits(base, plain):
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  low = hidden(config, base, None)
  assert low.dtype == jnp.bfloat16
  logits = gpt_neox.unembed(base, low)
  assert logits.dtype == jnp.float32
  expected = gpt_neox.unembed(base, plain)
  error = np.abs(logits - expected)
  # Eight bits a value, two layers: about a percent of logits near 1.5.
  assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.05 * expected.std()


def test_decoding_by_cache_equals_the_whole_sequence(base, adapters):
  expected = hidden(ADAPTED, base, adapters)
  rows, count = TOKENS.shape
  slots, start = 16, 5
  positions, mask = causal(TOKENS)
  out, cache = apply(
    ADAPTED,
    base,
    adapters,
    TOKENS[:, :start],
    positions[:, :start],
    mask[:, :start, :start],
    prefill="float32",
  )
  cache = tuple(kv_cache.resize(layer, slots) for layer in cache)
  assert cache[0]["k"].shape == (rows, 2, 8, slots)
  # The content of unwritten slots must not matter.
  for layer in cache:
    layer["k"] = layer["k"].at[..., start:].set(1e4)
    layer["v"] = layer["v"].at[:, :, start:].set(1e4)
  outs = [out]
  for index in range(start, count):
    seen = jnp.arange(slots)[None] <= index
    out, cache = apply(
      ADAPTED,
      base,
      adapters,
      TOKENS[:, index : index + 1],
      positions[:, index : index + 1],
      jnp.broadcast_to(seen[None], (rows, 1, slots)),
      cache=cache,
      index=jnp.full((rows,), index),
    )
    outs.append(out)
  # The sums run over 16 slots and not over 12 keys: float32 rounding.
  np.testing.assert_allclose(
    jnp.concatenate(outs, axis=1), expected, rtol=0, atol=1e-4
  )


def test_a_token_sees_neither_the_future_nor_padding(base, plain):
  out = hidden(CONFIG, base, None, TOKENS.at[:, 7:].set(0))
  np.testing.assert_array_equal(out[:, :7], plain[:, :7])
  assert np.abs(out[:, 7:] - plain[:, 7:]).max() > 0.1
  # A padding token that sees nothing stays finite and disturbs no other.
  positions, mask = causal(TOKENS)
  mask = mask.at[:, 7:].set(False)
  out, _ = apply(CONFIG, base, None, TOKENS, positions, mask)
  assert np.isfinite(out).all()
  np.testing.assert_array_equal(out[:, :7], plain[:, :7])


def dropping(rate, targets=gpt_neox.TARGETS):
  changed = dataclasses.replace(LORA, dropout=rate, targets=targets)
  return dataclasses.replace(CONFIG, lora=changed)


def test_dropout_is_keyed_and_of_the_adapters_only(base, adapters, plain):
  one, two = (jax.random.split(jax.random.key(i), (2, 12)) for i in (1, 2))
  off = hidden(dropping(0.5), base, adapters)
  np.testing.assert_array_equal(hidden(ADAPTED, base, adapters), off)
  np.testing.assert_array_equal(
    hidden(dropping(0.0), base, adapters, dropout_key=one), off
  )
  first, again, other = (
    hidden(dropping(0.5), base, adapters, dropout_key=key)
    for key in (one, one, two)
  )
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - off).max() > 0.1
  assert np.abs(first - other).max() > 0.1
  # The reference has no dropout, whatever key it is given.
  np.testing.assert_array_equal(
    hidden(dropping(0.5), base, None, dropout_key=one), plain
  )


def test_dropout_keeps_the_expected_branch(base, adapters, plain):
  """Small adapters act linearly: their mean effect is that without dropout."""
  target = "dense_4h_to_h"
  small = {"blocks": {target: dict(adapters["blocks"][target])}}
  small["blocks"][target]["lora_b"] *= 1e-2
  config = dropping(0.25, (target,))
  expected = hidden(config, base, small) - plain

  @jax.jit
  @jax.vmap
  def draw(key):
    keys = jax.random.split(key, TOKENS.shape)
    return hidden(config, base, small, dropout_key=keys) - plain

  drawn = np.asarray(draw(jax.random.split(jax.random.key(4), 512)))
  # A fit of the mean effect on the expected one: 1 if kept inputs are divided
  # by 3/4, 0.75 if they are not. 512 draws leave about 0.01 of noise.
  slope = np.vdot(drawn.mean(0), expected) / np.vdot(expected, expected)
  assert slope == pytest.approx(1, abs=0.03)


def test_each_layer_projection_and_token_draws_its_own_dropout(
  base, monkeypatch
):
  draw, keys = jax.random.bernoulli, set()

  def noted(key, *arguments, **values):
    jax.debug.callback(
      lambda data: keys.add(tuple(np.asarray(data).tolist())),
      jax.random.key_data(key),
    )
    return draw(key, *arguments, **values)

  monkeypatch.setattr(jax.random, "bernoulli", noted)
  config = dropping(0.5)
  jax.block_until_ready(
    jax.jit(functools.partial(hidden, config, base))(
      gpt_neox.init_lora(config, jax.random.key(1)),
      jnp.array([[5, 6, 7]]),
      dropout_key=jax.random.split(jax.random.key(0), (1, 3)),
    )
  )
  jax.effects_barrier()
  # Each layer has four projections.
  assert len(keys) == config.layers * 4 * 3


@pytest.mark.parametrize(
  ("config", "changes", "message"),
  [
    (LORA, {"rank": 0}, "lora.rank=0 must be at least 1"),
    (LORA, {"targets": ("query",)}, "query"),
    (LORA, {"targets": ()}, r"targets=\(\)"),
    (CONFIG, {"heads": 5}, "width=16 must be a multiple of heads=5"),
    (CONFIG, {"rotary_fraction": 0.4}, "it must be even"),
    (CONFIG, {"logit_chunk": 0}, "logit_chunk=0 must be at least 1"),
    (CONFIG, {"vocab_tile": -1}, "vocab_tile=-1 must not be negative"),
  ],
)
def test_wrong_configs_are_refused(config, changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(config, **changes)


@pytest.mark.parametrize("transposed", [False, True])
def test_each_row_takes_its_own_adapter(transposed):
  """By NumPy, a row at a time."""
  draw = np.random.default_rng(0).normal
  x, a, b = (
    draw(size=shape).astype(np.float32)
    for shape in ((5, 1, 6), (3, 6, 2), (3, 2, 4))
  )
  adapter = np.array([2, 0, -1, 2, 1], np.int32)
  expected = [
    x[row] @ a[own] @ b[own] if own >= 0 else np.zeros((1, 4))
    for row, own in enumerate(adapter)
  ]
  found = lora.product(
    jnp.asarray(x),
    jnp.asarray(np.swapaxes(a, 1, 2) if transposed else a),
    jnp.asarray(b),
    jnp.asarray(adapter),
    transposed,
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
