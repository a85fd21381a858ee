"""A model, a tokenizer and pairs so small that a test compiles in a second."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from dpo_jax.core import settings, sharding
from dpo_jax.data import token_table
from dpo_jax.model import gpt_neox
from dpo_jax.training import losses

# Head dim 8, of which 4 are rotated: both kinds of dimension exist. Every axis
# that a mesh splits is a multiple of eight.
CONFIG = gpt_neox.ModelConfig(
  vocab_size=64,
  width=16,
  layers=2,
  heads=2,
  mlp_width=32,
  rotary_fraction=0.5,
  rotary_base=10000.0,
  norm_eps=1e-5,
  max_positions=64,
)


def weights(config, seed=0):
  """Base weights, none of them near a special value: biases, norms too."""
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    name = sharding.path_name(path)
    shape = leaf.shape
    if name.endswith("kernel"):
      layer = shape[1:] if name.startswith("blocks") else shape
      fan_in = 1 if name == "embed/kernel" else layer[0]
      if name == "blocks/dense/kernel":
        fan_in = layer[0] * layer[1]
      value = rng.normal(0, 1.5 / fan_in**0.5, shape)
    else:
      value = rng.normal(name.endswith("scale"), 0.3, shape)
    return jnp.asarray(value, jnp.float32)

  shapes = jax.eval_shape(lambda: gpt_neox.init(config, jax.random.key(0)))
  return jax.tree.map_with_path(one, shapes)


def adapters(config, seed=1):
  """LoRA weights with B off zero, so that the branch matters."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: gpt_neox.init_lora(config, jax.random.key(0)))
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
    shapes,
  )


def loss(**values):
  """Loss settings of configs/common.py, but for these."""
  defaults = common.loss().to_dict()
  return settings.build(losses.LossSettings, defaults | values, "loss")


def pairs(count, seed=0, prompt=(2, 9), response=(1, 7), vocab=CONFIG):
  """Tokenized pairs of random lengths from half-open ranges."""
  rng = np.random.default_rng(seed)

  def text(bounds):
    size = rng.integers(*bounds)
    return tuple(int(i) for i in rng.integers(2, vocab.vocab_size, size))

  return [
    token_table.Pair(f"pair-{i}", text(prompt), text(response), text(response))
    for i in range(count)
  ]
