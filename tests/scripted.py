"""Small models for the sampler's tests: random ones, and one with a script."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.core import sharding
from dpo_jax.data import tokenizer
from dpo_jax.model import gpt_neox

TEXTS = [
  "\n\nHuman: Which river is the longest?\n\nAssistant: It is the Nile.",
  "\n\nHuman: Can you name a bird?\n\nAssistant: A heron: grey and patient.",
  "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Bye!\n\nAssistant: Farewell.",
  # Three line feeds make a token of two, with which a turn can be spelt.
  "One.\n\n\nTwo.",
] * 20


def small_tokenizer(directory):
  """A byte-level BPE of some 300 tokens."""
  return tokenizer.train(TEXTS, 320, directory)


def scripted(tok, chains):
  """(config, base) of a model whose next token is a function of the last.

  Its blocks add nothing, a token's embedding is its own axis, and the
  unembedding sends that axis to the next token of the chain. A token that is
  in no chain is followed by itself.
  """
  size = tok.vocab_size
  follows = np.arange(size)
  for chain in chains:
    assert len(set(chain[:-1])) == len(chain) - 1, "a token repeats"
    for before, after in itertools.pairwise(chain):
      assert follows[before] in (before, after), "two chains disagree"
      follows[before] = after
  config = gpt_neox.ModelConfig(
    vocab_size=size + 3,
    width=size + size % 2,
    layers=1,
    heads=1,
    mlp_width=8,
    rotary_fraction=0.5 if (size + size % 2) % 4 == 0 else 1.0,
    rotary_base=10000.0,
    norm_eps=1e-5,
    max_positions=256,
  )
  rng = np.random.default_rng(0)

  def zeros(*shape):
    return np.zeros(shape, np.float32)

  width = config.width
  unembed = zeros(width, config.vocab_size)
  unembed[np.arange(size), follows] = 10.0
  # Ids that the tokenizer does not have would win every draw.
  unembed[:, size:] = 100.0 * rng.random((width, 3))
  embed = zeros(config.vocab_size, width)
  embed[np.arange(size), np.arange(size)] = 1.0
  ones = np.ones((1, width), np.float32)
  norm = {"scale": ones, "bias": zeros(1, width)}
  return config, _tree(
    {
      "embed": {"kernel": embed},
      "unembed": {"kernel": unembed},
      "final_norm": {"scale": ones[0], "bias": zeros(width)},
      "blocks": {
        "attention_norm": norm,
        "mlp_norm": norm,
        "query_key_value": {
          "kernel": zeros(1, width, 1, 3, width),
          "bias": zeros(1, 1, 3, width),
        },
        "dense": {"kernel": zeros(1, 1, width, width), "bias": zeros(1, width)},
        "dense_h_to_4h": {"kernel": zeros(1, width, 8), "bias": zeros(1, 8)},
        "dense_4h_to_h": {
          "kernel": zeros(1, 8, width),
          "bias": zeros(1, width),
        },
      },
    }
  )


def noisy(vocab_size, layers=2, seed=0):
  """(config, base) of random weights that make uneven, context-bound logits."""
  config = gpt_neox.ModelConfig(
    vocab_size=vocab_size,
    width=32,
    layers=layers,
    heads=2,
    mlp_width=64,
    rotary_fraction=0.25,
    rotary_base=10000.0,
    norm_eps=1e-5,
    max_positions=256,
  )
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: gpt_neox.init(config, jax.random.key(0)))

  def one(path, leaf):
    name = sharding.path_name(path)
    noise = rng.standard_normal(leaf.shape)
    if name.endswith("kernel"):
      noise /= 4.0
    elif name.endswith("scale"):
      noise = 1 + 0.3 * noise
    else:
      noise *= 0.3
    return jnp.asarray(noise, jnp.float32)

  return config, jax.tree.map_with_path(one, shapes)


def _tree(tree):
  return jax.tree.map(jnp.asarray, tree)
