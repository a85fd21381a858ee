"""LoRA on plain trees: merging, stacking and batched application of adapters.

References:
  Hu et al., LoRA, 2021 (arXiv 2106.09685), Section 4.1.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]


def merge(config: Any, base: Tree, lora: Tree) -> Tree:
  """Base weights with kernel + A B * alpha / rank for adapted kernels.

  The sum is float32, rounded once to the kernel's dtype. Weights without an
  adapter are shared with `base`, not copied.

  Args:
    config: a ModelConfig; its `lora` has the alpha and rank of `lora`.
    base: base weights.
    lora: adapters, {"blocks": {target: {"lora_a", "lora_b"}}}.
  """
  scale = config.lora.alpha / config.lora.rank
  blocks = dict(base["blocks"])
  for target, adapter in lora["blocks"].items():
    kernel = blocks[target]["kernel"]
    a, b = adapter["lora_a"], adapter["lora_b"]
    add = jax.jit(_add, static_argnums=3, out_shardings=kernel.sharding)
    blocks[target] = {**blocks[target], "kernel": add(kernel, a, b, scale)}
  return {**base, "blocks": blocks}


def stack(config: Any, trees: Sequence[Tree]) -> Tree:
  """K adapters of one shape as a tree of [L, K, ...] in `config.dtype`."""
  return jax.tree.map(
    lambda *leaves: jnp.stack(leaves, 1).astype(config.dtype), *trees
  )


def product(
  x: jax.Array,
  a: jax.Array,
  b: jax.Array,
  adapter: jax.Array,
  transposed: bool = False,
) -> jax.Array:
  """x A B with each row's own adapter, [B, T, O]; zero where it is -1.

  For one token a row, the K adapters are one of rank K R whose activations are
  masked to the row's own: every weight is read once, for any number of rows.
  For more tokens, each row's A and B are gathered.

  Args:
    x: inputs, [B, T, I].
    a: [K, I, R]; if `transposed`, for one token a row, [K, R, I].
    b: [K, R, O].
    adapter: in [-1, K), int32 [B].
    transposed: see `a`.
  """
  if x.shape[1] > 1:
    own = jnp.maximum(adapter, 0)
    low = jnp.einsum("BTI,BIR->BTR", x, a[own])
    low = jnp.where((adapter >= 0)[:, None, None], low, 0)
    return jnp.einsum("BTR,BRO->BTO", low, b[own])
  count, rank = b.shape[:2]
  if transposed:
    # Two axes: XLA would copy A for a product with three.
    low = jnp.einsum("BTI,OI->BTO", x, a.reshape(count * rank, -1))
    low = low.reshape(*x.shape[:2], count, rank)
  else:
    low = jnp.einsum("BTI,KIR->BTKR", x, a)
  own = jnp.arange(count)[None] == adapter[:, None]
  low = jnp.where(own[:, None, :, None], low, 0)
  low = low.reshape(*x.shape[:2], count * rank)
  return low @ b.reshape(count * rank, -1)


def count(tree: Tree) -> int:
  """Number of parameters of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _add(kernel, a, b, scale):
  def one(layer):
    kernel, a, b = layer
    product = jnp.einsum(
      "IR,RO->IO",
      a.astype(jnp.float32),
      b.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    delta = (product * scale).reshape(kernel.shape)
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)

  # Layer by layer: a float32 sum of the stack would be a second copy.
  return jax.lax.map(one, (kernel, a, b))
