"""GPT-NeoX, the architecture of every Pythia, with LoRA.

`block` defines one transformer block; here layers are stacked on a leading axis
and run by `lax.scan`. Weights are plain nested dicts, `base` and `lora`. The
reference of DPO is the same base with `lora=None`: no second copy.

Einsum letters: B batch, T query tokens, S key tokens or cache slots, D width,
N heads, H head dim, V vocab.

References:
  Black et al., GPT-NeoX-20B, 2022 (arXiv 2204.06745);
  Biderman et al., Pythia, 2023 (arXiv 2304.01373).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dpo_jax.core import settings, sharding
from dpo_jax.model import attention as attention_lib
from dpo_jax.model import block as block_lib
from dpo_jax.model import kv_cache, quantization
from dpo_jax.model.attention import blockwise, shared_prefix

Tree = dict[str, Any]
# Rematerialization policy, by what a block saves for the backward pass: all;
# outputs of projections and of blockwise attention; its input alone.
Remat = Literal["none", "save_projections", "full"]
TARGETS = block_lib.TARGETS
# Narrower unembeddings are not transposed by `unstack`: a CPU is faster so.
TURNED_WIDTH = 256


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Adapters y += dropout(x) A B * alpha / rank on the `targets` kernels."""

  rank: int
  alpha: float
  dropout: float
  targets: tuple[str, ...]

  def __post_init__(self):
    settings.check(self, "lora.")
    unknown = [name for name in self.targets if name not in TARGETS]
    if unknown or not self.targets:
      raise ValueError(f"lora.targets={self.targets} must be some of {TARGETS}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape and numerics of a GPT-NeoX; hashable, so static under jit.

  Attributes:
    dtype: of the blocks; layer norms, the softmax of attention and the logits
      are float32 in any case.
    remat: rematerialization policy.
    attention: implementation for packed rows, see `attention`.
    logit_chunk: tokens whose logits exist at one time, see `logprobs`.
    vocab_tile: columns of these logits that do; 0 is all.
    lora: shape of the adapters; None without.
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
  vocab_tile: int = 0
  lora: LoraConfig | None = None

  def __post_init__(self):
    settings.check(self)
    if self.width % self.heads:
      raise ValueError(
        f"width={self.width} must be a multiple of heads={self.heads}"
      )
    if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
      raise ValueError(
        f"rotary_fraction={self.rotary_fraction} of head dim {self.head_dim}"
        f" gives {self.rotary_dim} rotated dimensions; it must be even"
      )

  @property
  def head_dim(self) -> int:
    return self.width // self.heads

  @property
  def rotary_dim(self) -> int:
    return int(self.head_dim * self.rotary_fraction)

  def shape(self) -> "ModelConfig":
    """The config with adapters and numerics at their defaults."""
    return dataclasses.replace(
      self,
      **{
        field.name: field.default
        for field in dataclasses.fields(self)
        if field.default is not dataclasses.MISSING
      },
    )


def init(
  config: ModelConfig, key: jax.Array, param_dtype: Any = jnp.float32
) -> Tree:
  """Random base weights: normal(0.02) kernels, zero biases, unit scales."""
  embed_key, unembed_key, blocks_key = jax.random.split(key, 3)
  shape = (config.vocab_size, config.width)
  plain = dataclasses.replace(config, lora=None)
  base = {
    "embed": {"kernel": 0.02 * jax.random.normal(embed_key, shape)},
    "blocks": block_lib.init(plain, blocks_key)[0],
    "final_norm": {
      "scale": jnp.ones((config.width,)),
      "bias": jnp.zeros((config.width,)),
    },
    "unembed": {"kernel": 0.02 * jax.random.normal(unembed_key, shape[::-1])},
  }
  return jax.tree.map(lambda x: x.astype(param_dtype), base)


def init_lora(config: ModelConfig, key: jax.Array) -> Tree:
  """Fresh float32 adapters of `config.lora`; B is zero."""
  return {"blocks": block_lib.init(config, key)[1]}


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
  visible: jax.Array | attention_lib.Segments | shared_prefix.Sharing,
  *,
  dropout_key: jax.Array | None = None,
  cache: Tree | tuple[Tree, ...] | None = None,
  prompts: Tree | tuple[Tree, ...] | None = None,
  index: jax.Array | int | None = None,
  adapter: jax.Array | None = None,
) -> tuple[jax.Array, Tree | tuple[Tree, ...] | None]:
  """Hidden states after the final norm.

  Args:
    config: the model's shape; `config.lora` describes `lora`.
    base: base weights as `init` gives them, or their `quantization.base`.
    lora: adapters as `init_lora` gives them; None switches them off, which
      gives exactly the base: the reference of DPO.
    tokens: token ids, [B, T].
    positions: position of each token in its own sequence, [B, T].
    visible: which keys a query sees: the segments of the rows; or a mask, bool
      [B, T, S]; S is T without a cache; or, with `prompts`, who shares which.
    dropout_key: a key for each token, [B, T], of LoRA's dropout; None in
      evaluation and sampling.
    cache: keys and values of earlier tokens, see `init_cache`; its first S
      slots are seen. With those of `kv_cache.unstack` `base` and `lora` are of
      single layers too, as `apart` gives them.
    prompts: such a cache of prompts that rows share, which is only read.
    index: the slot, in [0, S), where this call's first token is written; for
      one token a row it may be a row's own, [B].
    adapter: where `lora` is a stack of `lora.stack`, which of them each row
      takes, int32 [B]; -1 is none of them, exactly the base.

  Returns:
    Hidden states [B, T, D] in `config.dtype`, and the updated cache.
  """
  lora_config = config.lora if lora is not None else None
  config = dataclasses.replace(config, lora=lora_config)
  graph = block_lib.graph(config, transposed=isinstance(cache, tuple))
  adapters = lora["blocks"] if lora is not None else {}
  x, rotation = _enter(config, base, tokens, positions)
  attend = attention_lib.bind(config.attention, visible)

  def block(carry, layer, prompts=prompts):
    x, cache = carry
    params, adapters, number = layer
    key = block_lib.fold_in(dropout_key, number)
    params = quantization.restore(params, config.dtype)
    states = (params, adapters) if adapters else (params,)
    memory = _no_memory
    if cache is not None:
      memory = functools.partial(
        _memory, cache, prompts, number, index, visible
      )
    x, cache = block_lib.merge(graph, *states)(
      x, rotation, attend, memory, key, adapter
    )
    return (x, cache), None

  if cache is None:
    block = _remat(config, block)
  if isinstance(cache, tuple):
    caches = []
    for number, own in enumerate(cache):
      layer = (base["blocks"][number], adapters and adapters[number], None)
      read = prompts and prompts[number]
      (x, own), _ = block((x, own), layer, read)
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
  """Hidden states of `apply` with and without adapters, in one pass.

  Each layer of the base is dequantized once and gathered on a mesh once for
  both. The base and the second output have no gradient.
  """
  with_adapters = block_lib.graph(config)
  without = block_lib.graph(dataclasses.replace(config, lora=None))
  base = jax.lax.stop_gradient(base)
  x, rotation = _enter(config, base, tokens, positions)
  attend = attention_lib.bind(config.attention, visible)
  common = (rotation, attend, _no_memory)

  def block(carry, layer):
    policy, reference = carry
    params, adapters, number = layer
    key = block_lib.fold_in(dropout_key, number)
    params = quantization.restore(params, config.dtype)
    # One cast for both: two would be gathered one by one.
    cast = {
      name: jax.tree.map(lambda x: x.astype(config.dtype), params[name])
      for name in TARGETS
    }
    params = {**params, **cast}
    policy, _ = block_lib.merge(with_adapters, params, adapters)(
      policy, *common, key, None
    )
    reference, _ = block_lib.merge(without, params)(
      reference, *common, None, None
    )
    return (policy, reference), None

  layers = (base["blocks"], lora["blocks"], jnp.arange(config.layers))
  both, _ = jax.lax.scan(_remat(config, block), (x, x), layers)
  policy, reference = (_leave(config, base, x) for x in both)
  return policy, reference


def unstack(weights: Tree | None) -> Tree | None:
  """`base` or `lora` as a CPU decodes with them: copies, a layer's by itself.

  The blocks are a tuple of single layers'. Their kernels are [O, I], flattened
  outputs and inputs, lora_a [R, I] or of a stack [K, R, I], and the unembedding
  of a model that is not narrow is "words", [V, D]: a product of few rows reads
  memory in the order in which it lies so.
  """
  if weights is None:
    return None
  layers = len(jax.tree.leaves(weights["blocks"])[0])
  stacks = weights["blocks"]
  blocks = tuple(
    block_lib.transpose(jax.tree.map(lambda leaf, at=at: leaf[at], stacks))
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
    # Transposed by `unstack`.
    equation, kernel = "...D,VD->...V", base["unembed"]["words"]
  else:
    equation = "...D,DV->...V"
  return jnp.einsum(
    equation,
    hidden,
    kernel.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )


def _enter(config, base, tokens, positions):
  """Embeddings of tokens, [B, T, D], and the rotary angles of all blocks."""
  # Split as the batch is, the embeddings would be replicated in between.
  kernel = sharding.constrain(base["embed"]["kernel"], "vocab", None)
  x = kernel[tokens].astype(config.dtype)
  x = sharding.constrain(x, "batch", None, None)
  return x, block_lib.rotation(config, positions)


def _leave(config, base, x):
  """Hidden states after the final norm."""
  norm = base["final_norm"]
  return block_lib.layer_norm(x, norm["scale"], norm["bias"], config.norm_eps)


def _remat(config, block):
  """A block under the rematerialization policy of the config."""
  if config.remat == "none":
    return block
  saved = ()
  if config.remat == "save_projections":
    saved = ("projection", blockwise.SAVED)
  policy = jax.checkpoint_policies.save_only_these_names(*saved)
  return jax.checkpoint(block, prevent_cse=False, policy=policy)


def _memory(cache, prompts, layer, index, visible, k, v):
  """All keys and values to attend to, and the cache that now holds these."""
  if prompts is None:
    return kv_cache.remember(cache, layer, index, k, v, visible.shape[-1])
  span = visible.mask.shape[-1]
  *own, cache = kv_cache.remember(cache, layer, index, k, v, span)
  span = visible.prompt_mask.shape[-1]
  read = kv_cache.recall(prompts, layer, span, k.dtype)
  k, v = (shared_prefix.Parts(*both) for both in zip(own, read, strict=True))
  return k, v, cache


def _no_memory(k, v):
  return k, v, None
