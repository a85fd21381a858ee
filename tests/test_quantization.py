"""An int8 base: what is stored, computed, trained and exported."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
import tiny

from dpo_jax.core import sharding
from dpo_jax.model import attention, gpt_neox, hf, quantization
from dpo_jax.training import setup, train


def test_a_kernel_by_hand():
  kernel = jnp.array([[1.0, -2.0, 0.0], [0.5, 4.0, 0.0]])
  found = quantization.quantize(kernel, (0,))
  np.testing.assert_allclose(found.scale, [[1 / 127, 4 / 127, 1 / 127]])
  # 0.5 * 127 and -2 * 127 / 4 are halfway, and round to even.
  np.testing.assert_array_equal(found.values, [[127, -64, 0], [64, 127, 0]])
  np.testing.assert_allclose(
    quantization.restore({"kernel": found}, jnp.float32)["kernel"],
    [[1, -64 * 4 / 127, 0], [64 / 127, 4, 0]],
    rtol=1e-6,
  )


def test_each_output_channel_has_a_scale_and_half_of_it_is_the_error():
  full = tiny.weights(tiny.CONFIG)
  kept = jax.jit(quantization.base)(full)
  layers, width, mlp = 2, tiny.CONFIG.width, tiny.CONFIG.mlp_width
  channels = {
    "query_key_value": 3 * width,
    "dense": width,
    "dense_h_to_4h": mlp,
    "dense_4h_to_h": width,
  }
  back = quantization.restore(kept, jnp.float32)["blocks"]
  for name, count in channels.items():
    kernel = kept["blocks"][name]["kernel"]
    assert kernel.values.dtype == jnp.int8
    assert kernel.scale.size == layers * count
    error = jnp.abs(back[name]["kernel"] - full["blocks"][name]["kernel"])
    assert float((error / kernel.scale).max()) < 0.5 + 1e-4
    assert float((error / kernel.scale).max()) > 0.4
    bias = full["blocks"][name]["bias"]
    np.testing.assert_array_equal(back[name]["bias"], bias)
  assert kept["embed"]["kernel"].dtype == jnp.bfloat16
  assert kept["unembed"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("bits", "widest"), [(8, 0), (32, 0), (32, 256)])
def test_unstacked_weights_decode_as_the_stack_does(bits, widest, monkeypatch):
  """Their kernels are transposed; the sums are the same in another order."""
  monkeypatch.setattr(gpt_neox, "TURNED_WIDTH", widest)
  config = tiny.CONFIG
  base = tiny.weights(config)
  base = jax.jit(quantization.base)(base) if bits == 8 else base
  unstacked = gpt_neox.unstack(base)
  kernel = unstacked["blocks"][1]["query_key_value"]["kernel"]
  kernel = kernel.values if bits == 8 else kernel
  assert kernel.shape == (3 * config.width, config.width)
  assert list(unstacked["unembed"]) == ["kernel" if widest else "words"]
  cache = gpt_neox.init_cache(config, 2, 4)
  found = []
  for weights in (base, unstacked):
    own = cache
    for place in range(2):
      hidden, own = gpt_neox.apply(
        config,
        weights,
        None,
        jnp.array([[3 + place], [5]]),
        jnp.full((2, 1), place),
        jnp.broadcast_to(jnp.arange(4) <= place, (2, 1, 4)),
        cache=own,
        index=jnp.full((2,), place),
      )
    found.append(gpt_neox.unembed(weights, hidden))
  # Some 1e-7 of logits near 1.
  np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_the_model_computes_with_the_restored_weights():
  config = tiny.CONFIG
  kept = jax.jit(quantization.base)(tiny.weights(config))
  tokens = jnp.arange(24).reshape(2, 12)
  places = jnp.broadcast_to(jnp.arange(12), (2, 12))
  segments = attention.Segments(jnp.ones_like(tokens), jnp.zeros_like(tokens))

  @jax.jit
  def hidden(base):
    return gpt_neox.apply(config, base, None, tokens, places, segments)[0]

  restored = quantization.restore(kept, jnp.float32)
  # The same numbers in another program.
  np.testing.assert_allclose(hidden(kept), hidden(restored), atol=1e-5, rtol=0)
  other = hidden(tiny.weights(config))
  assert float(jnp.abs(hidden(kept) - other).max()) > 1e-3


def test_a_mesh_splits_it_as_the_full_kernels():
  mesh = sharding.make_mesh(2, 2, 2)
  full = tiny.weights(tiny.CONFIG)
  wanted = sharding.shardings(full, mesh)
  found = setup.quantize(jax.device_put(full, wanted), mesh)
  for name in gpt_neox.TARGETS:
    kernel = found["blocks"][name]["kernel"].values
    assert kernel.sharding == wanted["blocks"][name]["kernel"]
  alone = jax.jit(quantization.base)(full)
  jax.tree.map(np.testing.assert_array_equal, found, alone)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return running.make_files(tmp_path_factory.mktemp("files"))


def test_a_run_exports_adapters_on_the_full_weights(files, tmp_path):
  updates = 2
  config = running.configs(files)(
    **{"model.param_dtype": "int8", "model.remat": "full"}
    | {"max_steps": updates, "eval_every": 0, "checkpoint_every": 0}
  )
  run = tmp_path / "run"
  train.run(config, run)
  found = [row for row in running.read(run) if "loss" in row]
  # Policy and reference are one base.
  assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert abs(found[-1]["loss"] - found[0]["loss"]) > 1e-4
  options = {"dtype": "float32", "remat": "none", "param_dtype": "float32"}
  shape, base = hf.load(files / "model", lora=None, **options)
  manifest = json.loads((run / "manifest.json").read_text())
  assert manifest["base"]["hash"] == hf.content_hash(base)
  name = f"step-{updates:06d}"
  lora, adapters = hf.load_adapter(run / "adapters" / name, shape, base)
  _, merged = hf.load(run / "export", lora=None, **options)
  for target, adapter in adapters["blocks"].items():
    before = np.asarray(base["blocks"][target]["kernel"])
    delta = np.einsum("lir,lro->lio", adapter["lora_a"], adapter["lora_b"])
    delta = delta.reshape(before.shape) * lora.alpha / lora.rank
    after = np.asarray(merged["blocks"][target]["kernel"])
    np.testing.assert_allclose(after, before + delta, rtol=1e-6, atol=1e-6)
    assert np.abs(delta).max() > 1e-4
  np.testing.assert_array_equal(
    merged["embed"]["kernel"], base["embed"]["kernel"]
  )


def test_a_base_that_changed_during_the_run_is_refused(files, tmp_path):
  config = running.configs(files)
  with pytest.raises(ValueError, match="other weights than when the run began"):
    setup.reload_base(config().model, None, "0" * 16)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model.remat": "none"}, "int8.*remat='full'"),
    ({"lora.rank": 0, "export_adapters": False}, "need float32 weights"),
  ],
)
def test_int8_needs_lora_and_remat(files, changes, words):
  changes = {"model.param_dtype": "int8", "model.remat": "full"} | changes
  with pytest.raises(ValueError, match=words):
    running.configs(files)(**changes)
