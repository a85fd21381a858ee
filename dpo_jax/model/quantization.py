"""Kernels of a frozen base in eight bits, with a scale for each output channel.

A kernel w is kept as round(w / s) in [-127, 127], where s is the greatest |w|
of an output channel over 127: each weight is off by at most half of s. The
model computes with the products of the two, made a layer at a time where they
are used; what it computes is exactly what it would with these weights in full.
Kernels of blocks are nearly all weights of a large model; norms and biases stay
float32, embedding and unembedding become bfloat16. What it costs in
quality, on a small model, is in benchmarks/int8.md.

References:
  Dettmers et al., LLM.int8(), 2022 (arXiv 2208.07339), section 2, vector-wise
  absmax quantisation (of weights alone, here).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]

# Axes of a kernel's inputs, behind the stacked layers.
INPUTS = {
  "query_key_value": (1,),
  "dense": (1, 2),
  "dense_h_to_4h": (1,),
  "dense_4h_to_h": (1,),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
  """`values`, int8, times `scale`, float32 of one number a channel."""

  values: jax.Array
  scale: jax.Array


def quantize(kernel: jax.Array, inputs: tuple[int, ...]) -> Kernel:
  """A kernel in eight bits; `inputs` are the axes that its product sums."""
  kernel = kernel.astype(jnp.float32)
  greatest = jnp.max(jnp.abs(kernel), inputs, keepdims=True)
  scale = jnp.where(greatest > 0, greatest, 1) / 127
  return Kernel(jnp.round(kernel / scale).astype(jnp.int8), scale)


def base(tree: Tree) -> Tree:
  """The base weights `tree`, as `model.init` gives them, with eight bits."""

  def embedding(part):
    return {"kernel": part["kernel"].astype(jnp.bfloat16)}

  blocks = {
    name: {**part, "kernel": quantize(part["kernel"], INPUTS[name])}
    if name in INPUTS
    else part
    for name, part in tree["blocks"].items()
  }
  ends = {name: embedding(tree[name]) for name in ("embed", "unembed")}
  return {**tree, **ends, "blocks": blocks}


def restore(tree: Tree, dtype: Any) -> Tree:
  """Weights as arrays: those in eight bits in `dtype`, others as they are."""

  def one(leaf):
    if not isinstance(leaf, Kernel):
      return leaf
    return (leaf.values.astype(jnp.float32) * leaf.scale).astype(dtype)

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Kernel))
