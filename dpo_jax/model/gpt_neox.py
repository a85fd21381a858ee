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
from dpo_jax.model.attention import blockwise, decode

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
  unstacked: bool = True,
) -> kv_cache.Cache:
  """An empty `kv_cache` of the model, by default in `config.dtype`."""
  shape = (config.layers, batch, config.heads, slots, config.head_dim)
  return kv_cache.init(*shape, kind or config.dtype, unstacked)


def apply(
  config: ModelConfig,
  base: Tree,
  lora: Tree | None,
  tokens: jax.Array,
  positions: jax.Array,
  visible: jax.Array | attention_lib.Segments | decode.Sharing,
  *,
  dropout_key: jax.Array | None = None,
  prefill: kv_cache.Kind | None = None,
  unstacked: bool = True,
  cache: kv_cache.Cache | None = None,
  prompts: kv_cache.Cache | None = None,
  index: jax.Array | None = None,
  adapter: jax.Array | None = None,
) -> tuple[jax.Array, kv_cache.Cache | None]:
  """Hidden states after the final norm.

  Args:
    config: the model's shape; `config.lora` describes `lora`.
    base: base weights as `init` gives them, or their `quantization.base`.
    lora: adapters as `init_lora` gives them; None switches them off, which
      gives exactly the base: the reference of DPO.
    tokens: token ids, [B, T].
    positions: position of each token in its own sequence, [B, T].
    visible: which keys a query sees: the segments of the rows; or a mask, bool
      [B, T, S]; S is T without a cache; or, with `prompts`, `decode.Sharing`.
    dropout_key: a key for each token, [B, T], of LoRA's dropout; None in
      evaluation and sampling.
    prefill: the kind of `kv_cache` to return with these tokens' keys and
      values.
    unstacked: its layout.
    cache: keys and values of earlier tokens, for decoding one token a row;
      with one that is unstacked `base` and `lora` may be those of `unstack`.
      Its first slots are seen, as many as `visible` has.
    prompts: the cache of prompts that rows share; read only.
    index: the slot that each row's token is written to, int32 [B].
    adapter: where `lora` is a stack of `lora.stack`, which of them each row
      takes, int32 [B]; -1 is none of them, exactly the base.

  Returns:
    Hidden states [B, T, D] in `config.dtype`; and the cache: of these tokens
    (`prefill`), the updated one (`cache`), or None.
  """
  lora_config = config.lora if lora is not None else None
  config = dataclasses.replace(config, lora=lora_config)
  transposed = isinstance(base["blocks"], tuple)
  graph = block_lib.graph(config, transposed=transposed)
  adapters = lora["blocks"] if lora is not None else {}
  x, rotation = _enter(config, base, tokens, positions)
  if cache is None:
    attend = attention_lib.bind(config.attention, visible)
  else:
    attend = decode.bind(visible)

  def block(x, layer, memory):
    params, adapters, number = layer
    key = block_lib.fold_in(dropout_key, number)
    params = quantization.restore(params, config.dtype)
    states = (params, adapters) if adapters else (params,)
    return block_lib.merge(graph, *states)(
      x, rotation, attend, memory, key, adapter
    )

  layers = (base["blocks"], adapters, jnp.arange(config.layers))
  if cache is None:
    memory = _no_memory
    if prefill is not None:
      memory = functools.partial(_prefilled, prefill, unstacked)
    block = _remat(config, functools.partial(block, memory=memory))
    x, cache = jax.lax.scan(block, x, layers)
    if prefill is not None and unstacked:
      cache = kv_cache.unstack(cache)
  elif isinstance(cache, tuple):
    cache = list(cache)
    for number, own in enumerate(cache):
      layer = (_layer(base["blocks"], number), _layer(adapters, number), None)
      shared = prompts[number] if prompts is not None else None
      memory = functools.partial(_cached, own, shared, None, index, visible)
      x, cache[number] = block(x, layer, memory)
    cache = tuple(cache)
  else:

    def step(carry, layer):
      x, cache = carry
      memory = functools.partial(
        _cached, cache, prompts, layer[-1], index, visible
      )
      return block(x, layer, memory), None

    (x, cache), _ = jax.lax.scan(step, (x, cache), layers)
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


def _layer(blocks, number):
  """One layer's weights, of `unstack` or of a stack."""
  if isinstance(blocks, tuple):
    return blocks[number]
  return jax.tree.map(lambda leaf: leaf[number], blocks)


def _cached(cache, prompts, layer, index, visible, k, v):
  """All keys and values of a layer after a token's, and the updated cache."""
  dtype = k.dtype
  cache = kv_cache.write(cache, layer, index, k, v)
  if prompts is None:
    return *kv_cache.read(cache, layer, visible.shape[-1], dtype), cache
  own = kv_cache.read(cache, layer, visible.mask.shape[-1], dtype)
  slots = visible.prompt_mask.shape[-1]
  shared = kv_cache.read(prompts, layer, slots, dtype)
  k, v = (decode.Parts(*both) for both in zip(own, shared, strict=True))
  return k, v, cache


def _prefilled(kind, unstacked, k, v):
  """Keys and values as the cache will return them, and as it stores them."""
  stored = kv_cache.encode(k, v, kind)
  return (
    *kv_cache.restore(stored, k.dtype),
    kv_cache.arrange(stored, unstacked),
  )


def _no_memory(k, v):
  return k, v, None
