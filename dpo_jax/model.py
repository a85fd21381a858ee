"""GPT-NeoX, the architecture of every Pythia, with LoRA beside its kernels.

Flax NNX defines the layers of one block; outside `apply` there are only plain
nested dicts of arrays, `base` and `lora`, and `jax.*` transforms. The base path
of a weight is the same with and without LoRA, so that the reference of DPO is
the same base with `lora=None`: no second copy of the weights. Layers are
stacked on a leading axis and run by `lax.scan`. This is the only file that
imports flax.

Einsum letters: B batch, T query tokens, S key tokens or cache slots, D width,
N heads, H head dim, F mlp, V vocab, L layers, R rank, C the three of q, k, v.

References:
  Black et al., GPT-NeoX-20B, 2022 (arXiv 2204.06745);
  Biderman et al., Pythia, 2023 (arXiv 2304.01373);
  Hu et al., LoRA, 2021 (arXiv 2106.09685), Eq. 3.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dpo_jax import attention as attention_lib
from dpo_jax import lora as lora_lib
from dpo_jax import partitioning, quantised
from dpo_jax.attention import block_attention
from dpo_jax.engine import kv_cache

Tree = dict[str, Any]
# What the backward pass finds and what it computes again: all is kept; the
# outputs of the projections and of attention by blocks; one activation a layer.
Remat = Literal["none", "save_projections", "full"]
TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# Of a narrower unembedding a CPU's product is faster as it lies; see `apart`.
TURNED_WIDTH = 256


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Adapters y += dropout(x) A B * alpha / rank on the `targets` kernels."""

  rank: int
  alpha: float
  dropout: float
  targets: tuple[str, ...]

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"lora.rank={self.rank} must be at least 1")
    if self.alpha <= 0:
      raise ValueError(f"lora.alpha={self.alpha} must be positive")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"lora.dropout={self.dropout} must be in [0, 1)")
    unknown = [name for name in self.targets if name not in TARGETS]
    if unknown or not self.targets:
      raise ValueError(f"lora.targets={self.targets} must be some of {TARGETS}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and numerics of a GPT-NeoX; hashable, so static under jit.

  `dtype` is what the blocks compute in; layer norms, the softmax of attention
  and the logits are float32 whatever it says. `attention` names how segments
  are attended, see `attention`; `logit_chunk` and `logit_words` are how many
  tokens' logits of how many words exist at one time, see `logps`.
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  rotary_fraction: float
  rotary_base: float
  norm_eps: float
  max_positions: int
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Remat = "none"
  attention: attention_lib.Name = "dense"
  logit_chunk: int = 1024
  logit_words: int = 0
  lora: LoraConfig | None = None

  def __post_init__(self):
    if self.width % self.heads:
      raise ValueError(
        f"width={self.width} must be a multiple of heads={self.heads}"
      )
    if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
      raise ValueError(
        f"rotary_fraction={self.rotary_fraction} of head dim {self.head_dim}"
        f" gives {self.rotary_dim} rotated dimensions; it must be even"
      )
    if self.logit_chunk < 1:
      raise ValueError(f"logit_chunk={self.logit_chunk} must be at least 1")
    if self.logit_words < 0:
      raise ValueError(f"logit_words={self.logit_words} must not be negative")

  @property
  def head_dim(self) -> int:
    return self.width // self.heads

  @property
  def rotary_dim(self) -> int:
    return int(self.head_dim * self.rotary_fraction)

  def shape(self) -> "ModelConfig":
    """The same without adapters, and all that is not shape at its default."""
    return dataclasses.replace(
      self,
      **{
        field.name: field.default
        for field in dataclasses.fields(self)
        if field.default is not dataclasses.MISSING
      },
    )


class _LayerNorm(nnx.Module):
  def __init__(self, width: int, eps: float):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((width,)))
    self.bias = nnx.Param(jnp.zeros((width,)))

  def __call__(self, x):
    return _layer_norm(x, self.scale[...], self.bias[...], self.eps)


class _Projection(nnx.Module):
  """einsum(equation, x, kernel) + bias, and the low-rank branch beside it.

  `turned`: the kernel is [O, I] and lora_a [R, I], as in `apart`.
  """

  def __init__(
    self, equation, in_shape, out_shape, *, lora, rngs, turned=False
  ):
    self.equation, self.lora, self.out_shape = equation, lora, out_shape
    self.turned = turned
    fan_in, fan_out = math.prod(in_shape), math.prod(out_shape)
    shape = (*in_shape, *out_shape)
    if turned:
      shape = (fan_out, fan_in)
    self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros(out_shape))
    if lora is not None:
      # PEFT's start: A uniform in +-1/sqrt(fan_in), B zero.
      bound = 1 / math.sqrt(fan_in)
      shape = (lora.rank, fan_in) if turned else (fan_in, lora.rank)
      self.lora_a = nnx.LoRAParam(
        jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
      )
      self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, fan_out)))

  def __call__(self, x, dropout_key, adapter=None):
    kernel, flat = self.kernel[...].astype(x.dtype), x.reshape(*x.shape[:2], -1)
    if self.turned:
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
      delta = lora_lib.product(flat, a, b, adapter, self.turned) * scale
    else:
      a = a.T if self.turned else a
      # By two axes: of a product of three XLA takes the gradient of B on a CPU
      # from a transposed copy, which cost a quarter of a small model's step.
      # Scaled where they are narrowest.
      delta = (flat.reshape(-1, flat.shape[-1]) @ a * scale) @ b
    return checkpoint_name(y + delta.reshape(y.shape), "projection")


class _Block(nnx.Module):
  """Attention and MLP read the same residual stream (parallel residual)."""

  def __init__(
    self, config: ModelConfig, *, rngs: nnx.Rngs, turned: bool = False
  ):
    D, N, H, F = config.width, config.heads, config.head_dim, config.mlp_width
    self.config = config

    def projection(name, equation, in_shape, out_shape):
      lora = (
        config.lora if config.lora and name in config.lora.targets else None
      )
      return _Projection(
        equation, in_shape, out_shape, lora=lora, rngs=rngs, turned=turned
      )

    self.attention_norm = _LayerNorm(D, config.norm_eps)
    self.mlp_norm = _LayerNorm(D, config.norm_eps)
    self.query_key_value = projection(
      "query_key_value", "BTD,DNCH->BTNCH", (D,), (N, 3, H)
    )
    # h, not H: einsum sums over axes in the order of their letters, and in any
    # order but the kernel's XLA transposes the kernel at each call.
    self.dense = projection("dense", "BTNh,NhD->BTD", (N, H), (D,))
    self.dense_h_to_4h = projection("dense_h_to_4h", "BTD,DF->BTF", (D,), (F,))
    self.dense_4h_to_h = projection("dense_4h_to_h", "BTF,FD->BTD", (F,), (D,))

  def __call__(self, x, rotation, attend, memory, dropout_key, adapter):
    """The block's output, and the cache after `memory` took keys and values."""
    keys = [None] * 4
    if dropout_key is not None:
      keys = [_fold_in(dropout_key, i) for i in range(4)]
    qkv = self.query_key_value(self.attention_norm(x), keys[0], adapter)
    qkv = partitioning.constrain(qkv, "batch", None, "heads", None, None)
    q, k, v = jnp.unstack(qkv, axis=3)
    q, k = _rotate(q, rotation), _rotate(k, rotation)
    k, v, cache = memory(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
    attended = self.dense(attend(q, k, v), keys[1], adapter)
    hidden = self.dense_h_to_4h(self.mlp_norm(x), keys[2], adapter)
    hidden = partitioning.constrain(hidden, "batch", None, "mlp")
    hidden = _gelu(hidden)
    x = x + attended + self.dense_4h_to_h(hidden, keys[3], adapter)
    return partitioning.constrain(x, "batch", None, None), cache


def init(
  config: ModelConfig, key: jax.Array, param_dtype: Any = jnp.float32
) -> Tree:
  """Random base weights: normal(0.02) kernels, zero biases, unit norms."""
  embed_key, unembed_key, blocks_key = jax.random.split(key, 3)
  shape = (config.vocab_size, config.width)
  base = {
    "embed": {"kernel": 0.02 * jax.random.normal(embed_key, shape)},
    "blocks": _init_blocks(dataclasses.replace(config, lora=None), blocks_key)[
      0
    ],
    "final_norm": {
      "scale": jnp.ones((config.width,)),
      "bias": jnp.zeros((config.width,)),
    },
    "unembed": {"kernel": 0.02 * jax.random.normal(unembed_key, shape[::-1])},
  }
  return jax.tree.map(lambda x: x.astype(param_dtype), base)


def init_lora(config: ModelConfig, key: jax.Array) -> Tree:
  """Fresh float32 adapters, under which the model still equals its base.

  Raises:
    ValueError: the config has no LoRA.
  """
  if config.lora is None:
    raise ValueError("config.lora is None: there are no adapters to make")
  return {"blocks": _init_blocks(config, key)[1]}


def init_cache(
  config: ModelConfig,
  batch: int,
  slots: int,
  kind: kv_cache.Kind | None = None,
  folded: bool = False,
) -> Tree:
  """An empty `kv_cache` of the model, in `config.dtype` if not told."""
  shape = (config.layers, batch, config.heads, slots, config.head_dim)
  return kv_cache.init(*shape, kind or config.dtype, folded)


def apply(
  config: ModelConfig,
  base: Tree,
  lora: Tree | None,
  tokens: jax.Array,
  positions: jax.Array,
  visible: jax.Array | attention_lib.Segments,
  *,
  dropout_key: jax.Array | None = None,
  cache: Tree | tuple[Tree, ...] | None = None,
  index: jax.Array | int | None = None,
  adapter: jax.Array | None = None,
) -> tuple[jax.Array, Tree | tuple[Tree, ...] | None]:
  """Hidden states after the final norm.

  Args:
    config: the model's shape; `config.lora` describes `lora`.
    base: base weights as `init` gives them, or their `quantised.base`.
    lora: adapters as `init_lora` gives them; None switches them off, which
      gives exactly the base: the reference of DPO.
    tokens: token ids, [B, T].
    positions: position of each token in its own sequence, [B, T].
    visible: which keys a query sees: the segments of the rows, or a mask, bool
      [B, T, S]; S is T without a cache.
    dropout_key: a key for each token, [B, T], of LoRA's dropout; None in
      evaluation and sampling.
    cache: keys and values of earlier tokens, see `init_cache`; its first S
      slots are seen. With those of `kv_cache.split` `base` and `lora` are of
      single layers too, as `apart` gives them.
    index: the slot, in [0, S), where this call's first token is written; for
      one token a row it may be a row's own, [B].
    adapter: where `lora` is a stack of `lora.stack`, which of them each row
      takes, int32 [B]; -1 is none of them, exactly the base.

  Returns:
    Hidden states [B, T, D] in `config.dtype`, and the updated cache.
  """
  lora_config = config.lora if lora is not None else None
  config = dataclasses.replace(config, lora=lora_config)
  graph, _ = _blocks_graph(config, turned=isinstance(cache, tuple))
  adapters = lora["blocks"] if lora is not None else {}
  x, rotation = _enter(config, base, tokens, positions)
  attend = attention_lib.bind(config.attention, visible)

  def block(carry, layer):
    x, cache = carry
    params, adapters, number = layer
    key = dropout_key
    if key is not None:
      key = _fold_in(key, number)
    params = quantised.restore(params, config.dtype)
    states = (params, adapters) if adapters else (params,)
    memory = _no_memory
    if cache is not None:
      memory = functools.partial(
        kv_cache.remember, cache, number, index, span=visible.shape[-1]
      )
    x, cache = nnx.merge(graph, *states)(
      x, rotation, attend, memory, key, adapter
    )
    return (x, cache), None

  if cache is None:
    block = _rematerialised(config, block)
  if isinstance(cache, tuple):
    caches = []
    for number, own in enumerate(cache):
      layer = (base["blocks"][number], adapters and adapters[number], None)
      (x, own), _ = block((x, own), layer)
      caches.append(own)
    cache = tuple(caches)
  else:
    layers = (base["blocks"], adapters, jnp.arange(config.layers))
    (x, cache), _ = jax.lax.scan(block, (x, cache), layers)
  return _leave(config, base, x), cache


def apply_both(
  config: ModelConfig,
  base: Tree,
  lora: Tree,
  tokens: jax.Array,
  positions: jax.Array,
  visible: attention_lib.Segments,
  *,
  dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`apply` with the adapters and `apply` without them, in one pass.

  The two share the base, and each of its layers is read once for both: restored
  from eight bits once, and on a mesh gathered once. No gradient is formed of
  the second.

  Args:
    config: the model's shape; `config.lora` describes `lora`.
    base: as in `apply`, as are all below; frozen.

  Returns:
    Hidden states of policy and reference, both [B, T, D] in `config.dtype`.
  """
  with_adapters, _ = _blocks_graph(config)
  without, _ = _blocks_graph(dataclasses.replace(config, lora=None))
  base = jax.lax.stop_gradient(base)
  x, rotation = _enter(config, base, tokens, positions)
  attend = attention_lib.bind(config.attention, visible)
  common = (rotation, attend, _no_memory)

  def block(carry, layer):
    policy, reference = carry
    params, adapters, number = layer
    key = dropout_key
    if key is not None:
      key = _fold_in(key, number)
    params = quantised.restore(params, config.dtype)
    # Cast here, and not by each of them, so that both read one array: two casts
    # would be gathered one by one.
    cast = {
      name: jax.tree.map(lambda x: x.astype(config.dtype), params[name])
      for name in TARGETS
    }
    params = {**params, **cast}
    policy, _ = nnx.merge(with_adapters, params, adapters)(
      policy, *common, key, None
    )
    reference, _ = nnx.merge(without, params)(reference, *common, None, None)
    return (policy, reference), None

  layers = (base["blocks"], lora["blocks"], jnp.arange(config.layers))
  both, _ = jax.lax.scan(_rematerialised(config, block), (x, x), layers)
  policy, reference = (_leave(config, base, x) for x in both)
  return policy, reference


def apart(weights: Tree | None) -> Tree | None:
  """`base` or `lora` as a CPU decodes with them: copies, a layer's by itself.

  The blocks are a tuple of single layers'. Their kernels are [O, I], flattened
  outputs and inputs, lora_a [R, I] or of a stack [K, R, I], and the unembedding
  of a model that is not narrow is "words", [V, D]: a product of few rows reads
  memory in the order in which it lies so.
  """
  if weights is None:
    return None
  layers = len(jax.tree.leaves(weights["blocks"])[0])
  blocks = tuple(
    _turned(jax.tree.map(lambda leaf, at=at: leaf[at], weights["blocks"]))
    for at in range(layers)
  )
  weights = {**weights, "blocks": blocks}
  if "unembed" in weights and len(weights["unembed"]["kernel"]) >= TURNED_WIDTH:
    weights["unembed"] = {"words": weights["unembed"]["kernel"].T}
  return weights


def unembed(base: Tree, hidden: jax.Array) -> jax.Array:
  """Logits in float32, [..., V], of hidden states [..., D]."""
  kernel = base["unembed"].get("kernel")
  if kernel is None:
    # `apart` laid it so.
    equation, kernel = "...D,VD->...V", base["unembed"]["words"]
  else:
    equation = "...D,DV->...V"
  return jnp.einsum(
    equation,
    hidden,
    kernel.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )


def _turned(block: Tree) -> Tree:
  """A layer's block with kernels [O, I] and lora_a [R, I].

  A kernel of more axes than two XLA would copy at each product.
  """

  def turn(name, part):
    part = dict(part)
    if "kernel" in part:
      inputs = len(quantised.INPUTS[name])
      part["kernel"] = jax.tree.map(
        lambda leaf: leaf.reshape(math.prod(leaf.shape[:inputs]), -1).T,
        part["kernel"],
      )
    if "lora_a" in part:
      part["lora_a"] = jnp.swapaxes(part["lora_a"], -2, -1)
    return part

  return {
    name: turn(name, part) if name in TARGETS else part
    for name, part in block.items()
  }


def _enter(config, base, tokens, positions):
  """What the first block reads, [B, T, D], and the rotation of all blocks."""
  # Rows of another split than the batch's would be replicated on their way.
  words = partitioning.constrain(base["embed"]["kernel"], "vocab", None)
  x = words[tokens].astype(config.dtype)
  x = partitioning.constrain(x, "batch", None, None)
  return x, _rotation(config, positions)


def _leave(config, base, x):
  """Hidden states after the final norm, of what the last block gives."""
  norm = base["final_norm"]
  return _layer_norm(x, norm["scale"], norm["bias"], config.norm_eps)


def _rematerialised(config, block):
  """A block of which the backward pass finds what `config.remat` says."""
  if config.remat == "none":
    return block
  saved = ()
  if config.remat == "save_projections":
    saved = ("projection", block_attention.SAVED)
  policy = jax.checkpoint_policies.save_only_these_names(*saved)
  return jax.checkpoint(block, prevent_cse=False, policy=policy)


@functools.lru_cache
def _blocks_graph(config: ModelConfig, turned: bool = False):
  """The static part of a block and its abstract state."""
  config = dataclasses.replace(config.shape(), lora=config.lora)
  block = nnx.eval_shape(
    lambda: _Block(config, rngs=nnx.Rngs(0), turned=turned)
  )
  return nnx.split(block)


def _init_blocks(config: ModelConfig, key: jax.Array) -> tuple[Tree, Tree]:
  """Base and LoRA weights of all blocks, stacked on axis 0."""

  def one(key):
    block = _Block(config, rngs=nnx.Rngs(key))
    _, lora, base = nnx.split(block, nnx.LoRAParam, ...)
    return _to_dict(base), _to_dict(lora)

  return jax.vmap(one)(jax.random.split(key, config.layers))


def _to_dict(state) -> Tree:
  flat = nnx.traversals.flatten_mapping(nnx.as_pure(state))
  return nnx.traversals.unflatten_mapping(flat)


def _fold_in(keys: jax.Array, number: jax.Array | int) -> jax.Array:
  """jax.random.fold_in for the keys of all tokens, [B, T]."""
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
  return fold(keys, number)


def _layer_norm(x, scale, bias, eps):
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  lead = tuple(range(x.ndim - 1))
  scale, bias = (
    jnp.expand_dims(w.astype(jnp.float32), lead) for w in (scale, bias)
  )
  return (y * scale + bias).astype(x.dtype)


@jax.custom_jvp
def _gelu(x: jax.Array) -> jax.Array:
  """x times the normal distribution function of x, as PyTorch computes it.

  By erf in float32. `jax.nn.gelu`, the slow twin, takes erfc, whose branches
  are slower on a CPU, and its derivative has them again.

  References:
    Hendrycks and Gimpel, Gaussian Error Linear Units, 2016 (arXiv 1606.08415).
  """
  y = x.astype(jnp.float32)
  return (y * _normal(y)).astype(x.dtype)


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (along,) = primals, tangents
  y = x.astype(jnp.float32)
  below = _normal(y)
  slope = below + y * jnp.exp(-y * y / 2) * (1 / math.sqrt(2 * math.pi))
  return (y * below).astype(x.dtype), slope.astype(x.dtype) * along


def _normal(y):
  return 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5)))


def _rotation(config: ModelConfig, positions: jax.Array) -> tuple:
  """Cosine and sine of the rotary angles, each float32 [B, T, 1, H_rot/2]."""
  half = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32)
  frequency = config.rotary_base ** (-half / config.rotary_dim)
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency.reshape(
    1, 1, 1, -1
  )
  return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: jax.Array, rotation: tuple) -> jax.Array:
  """Rotary embedding on the first dimensions of the head, in two halves."""
  cosine, sine = rotation
  size = cosine.shape[-1]
  first, second, rest = jnp.split(x, [size, 2 * size], axis=-1)
  a, b = first.astype(jnp.float32), second.astype(jnp.float32)
  turned = jnp.concatenate(
    [a * cosine - b * sine, b * cosine + a * sine], axis=-1
  )
  return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def _no_memory(k, v):
  return k, v, None
