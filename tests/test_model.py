"""What the model promises about itself; that it is GPT-NeoX, test_hf shows.

Expected values are NumPy's, or come from another way to the same number: the
whole sequence at once against one token at a time, packed against alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax.model import block, gpt_neox, lora

LORA = gpt_neox.LoraConfig(3, 6.0, 0.0, gpt_neox.TARGETS)
CONFIG = gpt_neox.ModelConfig(
  vocab_size=50,
  width=32,
  layers=3,
  heads=4,
  mlp_width=48,
  rotary_fraction=0.5,
  rotary_base=10000.0,
  norm_eps=1e-5,
  max_positions=64,
)
ADAPTED = dataclasses.replace(CONFIG, lora=LORA)


def weights(shapes, seed):
  """Kernels that keep the scale of their input, biases and norms off rest."""
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    name = path[-1].key
    value = rng.normal(size=leaf.shape)
    if name == "kernel":
      fan_in = 1 if path[0].key == "embed" else CONFIG.width
      value *= 1.5 / np.sqrt(fan_in)
    else:
      value = 0.3 * value + (name == "scale")
    return jnp.asarray(value, jnp.float32)

  return jax.tree.map_with_path(one, shapes)


@pytest.fixture(scope="module")
def base():
  key = jax.random.key(0)
  return weights(jax.eval_shape(lambda: gpt_neox.init(CONFIG, key)), 0)


@pytest.fixture(scope="module")
def adapters():
  key = jax.random.key(0)
  return weights(jax.eval_shape(lambda: gpt_neox.init_lora(ADAPTED, key)), 1)


@pytest.fixture(scope="module")
def tokens():
  return jnp.asarray(np.random.default_rng(2).integers(0, 50, (2, 12)))


apply = jax.jit(gpt_neox.apply, static_argnums=0)


def causal(tokens):
  rows, count = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(count)[None], (rows, count))
  mask = jnp.broadcast_to(jnp.tri(count, dtype=bool), (rows, count, count))
  return positions, mask


def hidden(config, base, adapters, tokens, **options):
  return apply(config, base, adapters, tokens, *causal(tokens), **options)[0]


def test_adapters_off_is_exactly_the_base(base, adapters, tokens):
  plain = hidden(CONFIG, base, None, tokens)
  np.testing.assert_array_equal(hidden(ADAPTED, base, None, tokens), plain)
  assert np.abs(hidden(ADAPTED, base, adapters, tokens) - plain).max() > 0.1


def test_fresh_adapters_are_exactly_the_base(base, tokens):
  fresh = jax.jit(gpt_neox.init_lora, static_argnums=0)(
    ADAPTED, jax.random.key(3)
  )
  dense = fresh["blocks"]["dense_4h_to_h"]
  assert dense["lora_a"].shape == (3, 48, 3)
  assert dense["lora_b"].shape == (3, 3, 32)
  # PEFT's start: uniform in +-1/sqrt(fan_in), and B zero.
  bound = 1 / np.sqrt(48)
  assert 0.8 * bound < np.abs(dense["lora_a"]).max() <= bound
  assert not np.any(dense["lora_b"])
  assert not np.array_equal(dense["lora_a"][0], dense["lora_a"][1])
  np.testing.assert_array_equal(
    hidden(ADAPTED, base, fresh, tokens), hidden(CONFIG, base, None, tokens)
  )


@pytest.mark.parametrize("target", gpt_neox.TARGETS)
def test_branch_equals_kernels_merged_by_hand(base, adapters, tokens, target):
  config = dataclasses.replace(
    CONFIG, lora=dataclasses.replace(LORA, targets=(target,))
  )
  adapter = {"blocks": {target: adapters["blocks"][target]}}
  kernel = np.array(base["blocks"][target]["kernel"], np.float64)
  for layer in range(3):
    a, b = (
      np.array(adapter["blocks"][target][name][layer], np.float64)
      for name in ("lora_a", "lora_b")
    )
    # alpha / rank = 6 / 3.
    kernel[layer] += (2 * a @ b).reshape(kernel[layer].shape)
  by_hand = {
    **base,
    "blocks": {
      **base["blocks"],
      target: {
        **base["blocks"][target],
        "kernel": jnp.asarray(kernel, jnp.float32),
      },
    },
  }
  expected = hidden(CONFIG, by_hand, None, tokens)
  # Float32 sums in another order over three layers.
  np.testing.assert_allclose(
    hidden(config, base, adapter, tokens), expected, rtol=0, atol=2e-4
  )
  merged = lora.merge(config, base, adapter)
  # One rounding of a float32 sum of 4 products: a few ulps of numbers near 1.
  np.testing.assert_allclose(
    merged["blocks"][target]["kernel"], kernel, rtol=0, atol=2e-6
  )
  assert merged["embed"] is base["embed"]


def test_merge_into_bfloat16_rounds_once(base, adapters):
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
  merged = lora.merge(ADAPTED, rounded, adapters)["blocks"]["dense"]["kernel"]
  adapter = adapters["blocks"]["dense"]
  product = np.einsum("LIR,LRO->LIO", adapter["lora_a"], adapter["lora_b"])
  kernel = rounded["blocks"]["dense"]["kernel"].astype(jnp.float32)
  expected = kernel + 2 * product.reshape(kernel.shape)
  assert merged.dtype == jnp.bfloat16
  # A rounding to 8 bits is off by at most 2^-9 of the value, 2^-8 if the
  # float32 sums fall on two sides of a border.
  np.testing.assert_allclose(
    merged.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6
  )


def test_merge_refuses_what_does_not_fit(base, adapters):
  with pytest.raises(ValueError, match=r"config\.lora is None"):
    lora.merge(CONFIG, base, adapters)
  wrong = {"blocks": {"dense": adapters["blocks"]["dense_h_to_4h"]}}
  with pytest.raises(ValueError, match=r"blocks/dense: lora_a \(3, 32, 3\)"):
    lora.merge(ADAPTED, base, wrong)
  with pytest.raises(ValueError, match="no blocks/router"):
    lora.merge(ADAPTED, base, {"blocks": {"router": {}}})


def test_count_is_the_sum_over_the_shapes(base, adapters):
  # Embeddings, final norm, and for each layer two norms and four projections.
  layer = 4 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32
  assert lora.count(base) == 2 * 50 * 32 + 2 * 32 + 3 * layer
  fans = (32 + 96) + (32 + 32) + (32 + 48) + (48 + 32)
  assert lora.count(adapters) == 3 * 3 * fans


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_torchs(dtype):
  """Values and slopes against torch, and against the slow twin's."""
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
  twin = functools.partial(jax.nn.gelu, approximate=False)
  full = jnp.asarray(ours, jnp.float32)
  twins = jax.jvp(twin, (full,), (jnp.ones_like(full),))
  for found, other, third in (
    (value, wanted.detach(), twins[0]),
    (slope, theirs.grad, twins[1]),
  ):
    found = np.asarray(found, np.float32)
    np.testing.assert_allclose(found, other, rtol=close, atol=close)
    np.testing.assert_allclose(found, third, rtol=close, atol=close)


def test_remat_changes_memory_and_not_numbers(base, adapters, tokens):
  def loss(adapters, config):
    return jnp.sum(jnp.sin(hidden(config, base, adapters, tokens)))

  results = {}
  for remat in ("none", "save_projections", "full"):
    config = dataclasses.replace(ADAPTED, remat=remat)
    step = jax.jit(
      jax.value_and_grad(functools.partial(loss, config=config))
    ).lower(adapters)
    compiled = step.compile()
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


def test_bfloat16_computes_in_bfloat16_with_float32_logits(base, tokens):
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  low = hidden(config, base, None, tokens)
  assert low.dtype == jnp.bfloat16
  logits = gpt_neox.unembed(base, low)
  assert logits.dtype == jnp.float32
  expected = gpt_neox.unembed(base, hidden(CONFIG, base, None, tokens))
  error = np.abs(logits - expected)
  # Eight bits a value, three layers: about a percent of logits near 1.5.
  assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.05 * expected.std()


@pytest.mark.parametrize("adapted", [False, True])
def test_decoding_by_cache_equals_the_whole_sequence(
  base, adapters, tokens, adapted
):
  config, weights = (ADAPTED, adapters) if adapted else (CONFIG, None)
  expected = hidden(config, base, weights, tokens)
  rows, count = tokens.shape
  slots, start = 16, 5
  cache = gpt_neox.init_cache(config, rows, slots)
  assert cache["k"].shape == (3, rows, 4, slots, 8)
  positions, _ = causal(tokens)

  def step(cache, first, last):
    seen = jnp.arange(slots)[None] <= positions[0, first:last, None]
    mask = jnp.broadcast_to(seen[None], (rows, last - first, slots))
    return apply(
      config,
      base,
      weights,
      tokens[:, first:last],
      positions[:, first:last],
      mask,
      cache=cache,
      index=jnp.asarray(first),
    )

  # What an unwritten slot holds must not matter.
  cache = jax.tree.map(lambda x: x + 1e4, cache)
  out, cache = step(cache, 0, start)
  outs = [out]
  for index in range(start, count):
    out, cache = step(cache, index, index + 1)
    outs.append(out)
  # The sums run over 16 slots and not over 12 keys: float32 rounding.
  np.testing.assert_allclose(
    jnp.concatenate(outs, axis=1), expected, rtol=0, atol=1e-4
  )


def test_a_row_of_two_sequences_equals_two_rows(base, tokens):
  """Positions restart and the mask parts them: what packing relies on."""
  count = tokens.shape[1]
  expected = hidden(CONFIG, base, None, tokens)
  row = tokens.reshape(1, -1)
  positions = jnp.concatenate([jnp.arange(count)] * 2)[None]
  mask = jnp.kron(jnp.eye(2, dtype=int), jnp.tri(count, dtype=int)) > 0
  packed, _ = apply(CONFIG, base, None, row, positions, mask[None])
  np.testing.assert_allclose(
    packed.reshape(expected.shape), expected, rtol=0, atol=1e-4
  )


def test_a_token_sees_neither_the_future_nor_padding(base, tokens):
  expected = hidden(CONFIG, base, None, tokens)
  changed = tokens.at[:, 7:].set(0)
  out = hidden(CONFIG, base, None, changed)
  np.testing.assert_array_equal(out[:, :7], expected[:, :7])
  assert np.abs(out[:, 7:] - expected[:, 7:]).max() > 0.1
  # A padding token that sees nothing stays finite and disturbs no other.
  positions, mask = causal(tokens)
  mask = mask.at[:, 7:].set(False)
  out, _ = apply(CONFIG, base, None, tokens, positions, mask)
  assert np.isfinite(out).all()
  np.testing.assert_array_equal(out[:, :7], expected[:, :7])


def test_rotary_makes_attention_relative(base, tokens):
  """Only differences of positions count, so a shift changes nothing."""
  positions, mask = causal(tokens)
  expected, _ = apply(CONFIG, base, None, tokens, positions, mask)
  shifted, _ = apply(CONFIG, base, None, tokens, positions + 40, mask)
  np.testing.assert_allclose(shifted, expected, rtol=0, atol=1e-3)
  stretched, _ = apply(CONFIG, base, None, tokens, positions * 2, mask)
  assert np.abs(stretched - expected).max() > 0.1


def test_dropout_is_keyed_and_of_the_adapters_only(base, adapters, tokens):
  def config(dropout, **changes):
    changed = dataclasses.replace(LORA, dropout=dropout, **changes)
    return dataclasses.replace(CONFIG, lora=changed)

  one, two = (jax.random.split(jax.random.key(i), (2, 12)) for i in (1, 2))
  off = hidden(config(0.5), base, adapters, tokens)
  np.testing.assert_array_equal(hidden(ADAPTED, base, adapters, tokens), off)
  np.testing.assert_array_equal(
    hidden(config(0.0), base, adapters, tokens, dropout_key=one), off
  )
  first = hidden(config(0.5), base, adapters, tokens, dropout_key=one)
  again = hidden(config(0.5), base, adapters, tokens, dropout_key=one)
  other = hidden(config(0.5), base, adapters, tokens, dropout_key=two)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - off).max() > 0.1
  assert np.abs(first - other).max() > 0.1
  # The reference has no dropout, whatever key it is given.
  np.testing.assert_array_equal(
    hidden(config(0.5), base, None, tokens, dropout_key=one),
    hidden(CONFIG, base, None, tokens),
  )


def test_dropout_keeps_the_expected_branch(base, adapters, tokens):
  """Small adapters act linearly: their mean effect is that without dropout."""
  target = "dense_4h_to_h"
  small = {"blocks": {target: dict(adapters["blocks"][target])}}
  small["blocks"][target]["lora_b"] *= 1e-2
  config = dataclasses.replace(
    CONFIG, lora=gpt_neox.LoraConfig(3, 6.0, 0.25, (target,))
  )
  off = hidden(config, base, None, tokens)
  expected = hidden(config, base, small, tokens) - off

  @jax.jit
  @jax.vmap
  def draw(key):
    keys = jax.random.split(key, tokens.shape)
    return hidden(config, base, small, tokens, dropout_key=keys) - off

  drawn = draw(jax.random.split(jax.random.key(4), 512))
  # A fit of the mean effect on the expected one: 1 if kept inputs are divided
  # by 3/4, 0.75 if they are not. 512 draws leave about 0.01 of noise.
  slope = np.vdot(drawn.mean(0), expected) / np.vdot(expected, expected)
  assert slope == pytest.approx(1, abs=0.03)
  # Each token has a mask of its own: the noise of two tokens is unrelated.
  drawn = np.asarray(drawn)
  noise = (drawn - drawn.mean(0))[:, 0, :2]
  left, right = noise[:, 0].ravel(), noise[:, 1].ravel()
  assert abs(np.corrcoef(left, right)[0, 1]) < 0.2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rank": 0}, "lora.rank=0 must be at least 1"),
    ({"targets": ("query",)}, "query"),
    ({"targets": ()}, r"targets=\(\)"),
  ],
)
def test_wrong_adapters_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(LORA, **changes)


def test_wrong_shapes_are_refused():
  with pytest.raises(
    ValueError, match="width=32 must be a multiple of heads=5"
  ):
    dataclasses.replace(CONFIG, heads=5)
  with pytest.raises(ValueError, match="it must be even"):
    dataclasses.replace(CONFIG, rotary_fraction=0.4)
  with pytest.raises(ValueError, match=r"config\.lora is None"):
    gpt_neox.init_lora(CONFIG, jax.random.key(0))


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
  lora = gpt_neox.LoraConfig(2, 4.0, 0.5, gpt_neox.TARGETS)
  config = dataclasses.replace(CONFIG, lora=lora)
  tokens = jnp.array([[5, 6, 7]])
  hidden, _ = gpt_neox.apply(
    config,
    base,
    gpt_neox.init_lora(config, jax.random.key(1)),
    tokens,
    jnp.arange(3)[None],
    jnp.tril(jnp.ones((1, 3, 3), bool)),
    dropout_key=jax.random.split(jax.random.key(0), (1, 3)),
  )
  jax.block_until_ready(hidden)
  jax.effects_barrier()
  # Each layer has four projections.
  assert len(keys) == config.layers * 4 * 3


@pytest.mark.parametrize("turned", [False, True])
def test_each_row_takes_its_own_adapter(turned):
  """By NumPy, a row at a time; A lies as for training, or as for decoding."""
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
    jnp.asarray(np.swapaxes(a, 1, 2) if turned else a),
    jnp.asarray(b),
    jnp.asarray(adapter),
    turned,
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
