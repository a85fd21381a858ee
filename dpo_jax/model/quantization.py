"""Int8 kernels of a frozen base, with an absmax scale per output channel.

A kernel w is stored as round(w / s) in [-127, 127] with s = max |w| / 127 of an
output channel, so that each weight is off by at most s / 2. The model restores
one layer at a time and computes exactly as with the restored weights. Norms and
biases stay float32; embedding and unembedding become bfloat16. The effect on
quality is in benchmarks/int8.md.

References:
  Dettmers et al., LLM.int8(), 2022 (arXiv 2208.07339), section 2, vector-wise
  absmax quantization (here of weights alone).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
  """int8 `values` times a float32 `scale` per output channel."""

  values: jax.Array
  scale: jax.Array


def quantize(kernel: jax.Array, inputs: tuple[int, ...]) -> Kernel:
  """A kernel in int8; `inputs` are its input axes."""
  kernel = kernel.astype(jnp.float32)
  greatest = jnp.max(jnp.abs(kernel), inputs, keepdims=True)
  scale = jnp.where(greatest > 0, greatest, 1) / 127
  return Kernel(jnp.round(kernel / scale).astype(jnp.int8), scale)


def input_axes(part: Tree) -> int:
  """Number of a kernel's input axes; its output axes are those of its bias."""
  return jax.tree.leaves(part["kernel"])[0].ndim - part["bias"].ndim


def base(tree: Tree) -> Tree:
  """Base weights of `gpt_neox.init` with int8 kernels."""

  def embedding(part):
    return {"kernel": part["kernel"].astype(jnp.bfloat16)}

  def projection(part):
    inputs = tuple(range(1, 1 + input_axes(part)))  # After that of layers.
    return {**part, "kernel": quantize(part["kernel"], inputs)}

  blocks = {
    name: projection(part) if "kernel" in part else part
    for name, part in tree["blocks"].items()
  }
  ends = {name: embedding(tree[name]) for name in ("embed", "unembed")}
  return {**tree, **ends, "blocks": blocks}


def restore(tree: Tree, dtype: Any) -> Tree:
  """A tree whose int8 kernels are arrays of `dtype` again."""

  def one(leaf):
    if not isinstance(leaf, Kernel):
      return leaf
    return (leaf.values.astype(jnp.float32) * leaf.scale).astype(dtype)

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Kernel))
