"""A transformer block of GPT-NeoX in Flax NNX, with LoRA on its projections.

`merge` gives the block of `graph` its weights, plain dicts of arrays, which
`gpt_neox` stacks and scans. No other file imports flax.

Einsum letters: B batch, T tokens, D width, N heads, H head dim, F mlp, I inputs
and O outputs of a kernel, flattened, R rank, C the three of q, k, v.

References:
  Black et al., GPT-NeoX-20B, 2022 (arXiv 2204.06745);
  Hu et al., LoRA, 2021 (arXiv 2106.09685), Eq. 3.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dpo_jax.core import sharding
from dpo_jax.model import lora as lora_lib
from dpo_jax.model import quantization

Tree = dict[str, Any]
# Kernels that LoRA can adapt.
TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@functools.lru_cache
def graph(config: Any, transposed: bool = False) -> Any:
  """A block without its weights.

  Args:
    config: a `gpt_neox.ModelConfig`; its `lora` describes the adapters.
    transposed: whether the weights are those of `transpose`.
  """
  config = dataclasses.replace(config.shape(), lora=config.lora)
  block = nnx.eval_shape(
    lambda: _Block(config, rngs=nnx.Rngs(0), transposed=transposed)
  )
  return nnx.split(block)[0]


def merge(graph: Any, *weights: Tree) -> Callable[..., Any]:
  """The block of `graph` with these weights, the base's first."""
  return nnx.merge(graph, *weights)


def init(config: Any, key: jax.Array) -> tuple[Tree, Tree]:
  """Base and LoRA weights of all blocks, stacked on axis 0."""

  def one(key):
    block = _Block(config, rngs=nnx.Rngs(key))
    _, lora, base = nnx.split(block, nnx.LoRAParam, ...)
    return _to_dict(base), _to_dict(lora)

  return jax.vmap(one)(jax.random.split(key, config.layers))


def transpose(block: Tree) -> Tree:
  """A layer's weights with kernels [O, I] and lora_a [R, I].

  XLA would copy a kernel of more than two axes at each product.
  """

  def transpose_part(name, part):
    part = dict(part)
    if "kernel" in part:
      inputs = quantization.input_axes(part)
      part["kernel"] = jax.tree.map(
        lambda leaf: leaf.reshape(math.prod(leaf.shape[:inputs]), -1).T,
        part["kernel"],
      )
    if "lora_a" in part:
      part["lora_a"] = jnp.swapaxes(part["lora_a"], -2, -1)
    return part

  return {
    name: transpose_part(name, part) if name in TARGETS else part
    for name, part in block.items()
  }


def rotation(config: Any, positions: jax.Array) -> tuple:
  """Cosine and sine of the rotary angles, each float32 [B, T, 1, H_rot/2]."""
  half = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32)
  frequency = config.rotary_base ** (-half / config.rotary_dim)
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency.reshape(
    1, 1, 1, -1
  )
  return jnp.cos(angle), jnp.sin(angle)


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> jax.Array:
  """Layer norm over the last axis in float32, [..., D] in the dtype of `x`."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  lead = tuple(range(x.ndim - 1))
  scale, bias = (
    jnp.expand_dims(w.astype(jnp.float32), lead) for w in (scale, bias)
  )
  return (y * scale + bias).astype(x.dtype)


def fold_in(
  keys: jax.Array | None, number: jax.Array | int
) -> jax.Array | None:
  """`jax.random.fold_in` for a key of each token, [B, T]; None without keys."""
  if keys is None:
    return None
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
  return fold(keys, number)


class _LayerNorm(nnx.Module):
  def __init__(self, width: int, eps: float):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((width,)))
    self.bias = nnx.Param(jnp.zeros((width,)))

  def __call__(self, x):
    return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class _Projection(nnx.Module):
  """einsum(equation, x, kernel) + bias + x A B * alpha / rank."""

  def __init__(self, equation, in_shape, out_shape, *, lora, rngs, transposed):
    self.equation, self.lora, self.out_shape = equation, lora, out_shape
    self.transposed = transposed
    fan_in, fan_out = math.prod(in_shape), math.prod(out_shape)
    shape = (fan_out, fan_in) if transposed else (*in_shape, *out_shape)
    self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros(out_shape))
    if lora is not None:
      # PEFT's initialization: A uniform in +-1/sqrt(fan_in), B zero.
      bound = 1 / math.sqrt(fan_in)
      shape = (lora.rank, fan_in) if transposed else (fan_in, lora.rank)
      self.lora_a = nnx.LoRAParam(
        jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
      )
      self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, fan_out)))

  def __call__(self, x, dropout_key, adapter=None):
    kernel, flat = self.kernel[...].astype(x.dtype), x.reshape(*x.shape[:2], -1)
    if self.transposed:
      y = jnp.einsum("BTI,OI->BTO", flat, kernel)
      y = y.reshape(*x.shape[:2], *self.out_shape)
    else:
      y = jnp.einsum(self.equation, x, kernel)
    y += jnp.expand_dims(self.bias[...].astype(x.dtype), (0, 1))
    if self.lora is None:
      return checkpoint_name(y, "projection")
    if dropout_key is not None and self.lora.dropout:
      keep = 1 - self.lora.dropout
      draw = functools.partial(
        jax.random.bernoulli, p=keep, shape=flat.shape[2:]
      )
      kept = jax.vmap(jax.vmap(draw))(dropout_key)
      flat = jnp.where(kept, flat / jnp.asarray(keep, flat.dtype), 0)
    a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
    scale = jnp.asarray(self.lora.alpha / self.lora.rank, x.dtype)
    if adapter is not None:
      delta = lora_lib.product(flat, a, b, adapter, self.transposed) * scale
    else:
      a = a.T if self.transposed else a
      # Two axes: with three, XLA for CPUs computes the gradient of B from a
      # transposed copy, a quarter of a small model's step. Scaled at rank R,
      # which is narrowest.
      delta = (flat.reshape(-1, flat.shape[-1]) @ a * scale) @ b
    return checkpoint_name(y + delta.reshape(y.shape), "projection")


class _Block(nnx.Module):
  """Attention and MLP read the same residual stream (parallel residual)."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs, transposed: bool = False):
    D, N, H, F = config.width, config.heads, config.head_dim, config.mlp_width

    def projection(name, equation, in_shape, out_shape):
      adapted = config.lora and name in config.lora.targets
      return _Projection(
        equation,
        in_shape,
        out_shape,
        lora=config.lora if adapted else None,
        rngs=rngs,
        transposed=transposed,
      )

    self.attention_norm = _LayerNorm(D, config.norm_eps)
    self.mlp_norm = _LayerNorm(D, config.norm_eps)
    self.query_key_value = projection(
      "query_key_value", "BTD,DNCH->BTNCH", (D,), (N, 3, H)
    )
    # h, not H: einsum sums over axes in alphabetical order, and in an order
    # other than the kernel's XLA transposes the kernel at each call.
    self.dense = projection("dense", "BTNh,NhD->BTD", (N, H), (D,))
    self.dense_h_to_4h = projection("dense_h_to_4h", "BTD,DF->BTF", (D,), (F,))
    self.dense_4h_to_h = projection("dense_4h_to_h", "BTF,FD->BTD", (F,), (D,))

  def __call__(self, x, rotation, attend, memory, dropout_key, adapter):
    """The block's output, and the cache that `memory` returns."""
    keys = [fold_in(dropout_key, i) for i in range(4)]
    qkv = self.query_key_value(self.attention_norm(x), keys[0], adapter)
    qkv = sharding.constrain(qkv, "batch", None, "heads", None, None)
    q, k, v = jnp.unstack(qkv, axis=3)
    q, k = _rotate(q, rotation), _rotate(k, rotation)
    k, v, cache = memory(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
    attended = self.dense(attend(q, k, v), keys[1], adapter)
    hidden = self.dense_h_to_4h(self.mlp_norm(x), keys[2], adapter)
    hidden = sharding.constrain(hidden, "batch", None, "mlp")
    hidden = _gelu(hidden)
    x = x + attended + self.dense_4h_to_h(hidden, keys[3], adapter)
    return sharding.constrain(x, "batch", None, None), cache


def _to_dict(state) -> Tree:
  flat = nnx.traversals.flatten_mapping(nnx.as_pure(state))
  return nnx.traversals.unflatten_mapping(flat)


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
  """GELU by erf in float32, as PyTorch computes it.

  `jax.nn.gelu` computes erfc, whose branches are slower on a CPU, in its
  derivative too.

  References:
    Hendrycks and Gimpel, Gaussian Error Linear Units, 2016 (arXiv 1606.08415).
  """
  y = x.astype(jnp.float32)
  return (y * _normal_cdf(y)).astype(x.dtype)


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  y = x.astype(jnp.float32)
  cdf = _normal_cdf(y)
  slope = cdf + y * jnp.exp(-y * y / 2) * (1 / math.sqrt(2 * math.pi))
  return (y * cdf).astype(x.dtype), slope.astype(x.dtype) * tangent


def _normal_cdf(y):
  return 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5)))


def _rotate(x: jax.Array, rotation: tuple) -> jax.Array:
  """Rotary embedding on the first dimensions of the head, in two halves."""
  cosine, sine = rotation
  size = cosine.shape[-1]
  first, second, rest = jnp.split(x, [size, 2 * size], axis=-1)
  a, b = first.astype(jnp.float32), second.astype(jnp.float32)
  rotated = jnp.concatenate(
    [a * cosine - b * sine, b * cosine + a * sine], axis=-1
  )
  return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)
