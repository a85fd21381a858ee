"""Models and adapters to and from the files of Hugging Face.

The merged model of an export is what transformers loads, an exported adapter
what peft loads; reading either gives back our trees bit for bit. What a config
asks for and we do not compute is refused before any weight is read.
"""

import dataclasses
import hashlib
import os
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dpo_jax.core import distributed, sharding
from dpo_jax.io import remote, safetensors, strict_json
from dpo_jax.model import gpt_neox, hf_layout, hf_weights, peft_layout

Tree = dict[str, Any]

_FINGERPRINT = "dpo_jax_base_fingerprint"


def read_config(path: str | os.PathLike) -> gpt_neox.ModelConfig:
  """The shape of the model at a local directory or hub id (user/name@revision).

  Raises:
    ValueError: there is no model, or one that we do not compute.
  """
  return _read_config(remote.fetch(path))


def load(
  path: str | os.PathLike,
  *,
  dtype: Literal["float32", "bfloat16"],
  remat: gpt_neox.Remat,
  lora: gpt_neox.LoraConfig | None,
  param_dtype: Literal["float32", "bfloat16"],
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[gpt_neox.ModelConfig, Tree]:
  """A GPT-NeoX model and its base weights.

  Args:
    path: a directory with config.json and safetensors, or a hub id, with or
      without @revision.
    dtype: what the model computes in.
    remat: what the backward pass computes again.
    lora: adapters that the config is to describe; their weights come from
      `gpt_neox.init_lora` or `load_adapter`.
    param_dtype: what the weights are kept in.
    mesh: where the weights lie, by the rules of `sharding`; None leaves
      them on the default device.

  Raises:
    ValueError: the model is not one that we compute, or a tensor is missing,
      superfluous, of another shape, or not finite; all of them are named.
  """
  if param_dtype not in ("float32", "bfloat16"):
    raise ValueError(
      f"param_dtype={param_dtype!r} must be 'float32' or 'bfloat16'"
    )
  directory = remote.fetch(path)
  config = dataclasses.replace(
    _read_config(directory), dtype=dtype, remat=remat, lora=lora
  )
  tensors = safetensors.find(directory, "model")
  if "lm_head.weight" in tensors and "embed_out.weight" not in tensors:
    # transformers 5 has a new name for it, and can be asked to save that one.
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
  if config.layers > len(tensors):
    raise ValueError(
      f"{directory}: num_hidden_layers={config.layers}, but the files hold"
      f" {len(tensors)} tensors; fetch the files again"
    )
  base = hf_weights.read(
    directory, hf_layout.WEIGHTS, _shapes(config), tensors, param_dtype, mesh
  )
  return config, base


def export(
  directory: str | os.PathLike,
  config: gpt_neox.ModelConfig,
  base: Tree,
  tokenizer: Any = None,
) -> None:
  """Writes a model that transformers' Auto classes load.

  The weights keep their dtype. Fold adapters in first, with `lora.merge`.

  Args:
    directory: is made, or replaced if it is an earlier export.
    config: the model's shape.
    base: its weights.
    tokenizer: a tokenizer.Tokenizer to lie beside them.

  Raises:
    ValueError: the directory holds other files, the tokenizer has ids beyond
      the vocabulary, or a weight is not finite.
  """
  bos_id = eos_id = None
  if tokenizer is not None:
    bos_id, eos_id = tokenizer.backend.bos_token_id, tokenizer.eos_id
    if tokenizer.vocab_size > config.vocab_size:
      raise ValueError(
        f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has"
        f" vocab_size={config.vocab_size}; give the model's own tokenizer"
      )
  dtype = base["embed"]["kernel"].dtype.name
  text = hf_layout.config_json(config, dtype, bos_id, eos_id)
  with hf_weights.complete(directory) as staged:
    hf_weights.write(staged / "model.safetensors", hf_layout.WEIGHTS, base, {})
    if distributed.is_main():
      if tokenizer is not None:
        tokenizer.save(staged)
      (staged / "config.json").write_text(text, encoding="utf-8")


def load_adapter(
  directory: str | os.PathLike,
  config: gpt_neox.ModelConfig,
  base: Tree | None = None,
) -> tuple[gpt_neox.LoraConfig, Tree]:
  """A PEFT adapter as float32 adapters of ours.

  Args:
    directory: with adapter_config.json and safetensors, or a hub id, with or
      without @revision.
    config: the model that the adapter is for.
    base: that model's weights. An adapter that we wrote knows which base it
      was trained on, and is refused for another; PEFT's own do not, and only
      shapes are compared.

  Returns:
    The LoraConfig, to be put into the model's config, and the lora tree.

  Raises:
    ValueError: the adapter has settings that we do not compute, or was made
      for a model of another shape or for other weights.
  """
  directory = remote.fetch(directory)
  origin = directory / "adapter_config.json"
  lora = gpt_neox.LoraConfig(
    **peft_layout.fields(strict_json.read_object(origin), str(origin))
  )
  tensors = safetensors.find(directory, "adapter_model")
  shapes = jax.eval_shape(
    lambda: gpt_neox.init_lora(
      dataclasses.replace(config, lora=lora), jax.random.key(0)
    )
  )
  weights = peft_layout.weights(lora.targets)
  tree = hf_weights.read(directory, weights, shapes, tensors, "float32", None)
  file = directory / "adapter_model.safetensors"
  if base is not None and file.is_file():
    with safetensors.open_file(file) as opened:
      made_for = (opened.metadata() or {}).get(_FINGERPRINT)
    if made_for and made_for != fingerprint(base):
      raise ValueError(
        f"{directory} was trained on other base weights ({made_for}) than these"
        f" ({fingerprint(base)}); give the model that it was trained on"
      )
  return lora, tree


def export_adapter(
  directory: str | os.PathLike,
  config: gpt_neox.ModelConfig,
  lora: Tree,
  base_name: str,
  base: Tree | str | None = None,
) -> None:
  """Writes adapters as a directory that peft loads.

  Args:
    directory: is made, or replaced if it is an earlier export.
    config: the model's shape; `config.lora` describes the adapters.
    lora: the adapters.
    base_name: directory or hub id of the base model, for peft.
    base: the base weights, or their `fingerprint`; with it the adapter knows
      its base again.

  Raises:
    ValueError: the config has no LoRA, the directory holds other files, or a
      weight is not finite.
  """
  if config.lora is None:
    raise ValueError("config.lora is None: there is no adapter to export")
  text = peft_layout.config_json(config.lora, base_name)
  if base is not None and not isinstance(base, str):
    base = fingerprint(base)
  metadata = {} if base is None else {_FINGERPRINT: base}
  weights = peft_layout.weights(config.lora.targets)
  with hf_weights.complete(directory) as staged:
    hf_weights.write(
      staged / "adapter_model.safetensors", weights, lora, metadata
    )
    if distributed.is_main():
      (staged / "adapter_config.json").write_text(text, encoding="utf-8")


def fingerprint(base: Tree) -> str:
  """Sixteen hex digits that tell one model's weights from another's.

  It covers the first input row of every kernel and every norm and bias, in
  bfloat16: cheap at any size, and the same whatever dtype and mesh the weights
  are kept in.
  """
  digest = hashlib.sha256()
  for row in jax.tree.leaves(distributed.fetch(_first_rows(base))):
    digest.update(repr(row.shape).encode() + row.tobytes())
  return digest.hexdigest()[:16]


@jax.jit
def _first_rows(base: Tree) -> Tree:
  def one(path, leaf):
    name = sharding.path_name(path)
    if name.endswith("kernel"):
      leaf = leaf[:, :1] if name.startswith("blocks/") else leaf[:1]
    return leaf.astype(jnp.bfloat16)

  return jax.tree.map_with_path(one, base)


def content_hash(base: Tree) -> str:
  """Sixteen hex digits of every bit of a model's weights.

  Sums of mixed words, which wrap around and so do not depend on the mesh. They
  are made on the device, one after the other: what is mixed is a copy of one
  weight.
  """
  digest = hashlib.sha256()
  mix = jax.jit(_mixed_sum)
  for leaf in jax.tree.leaves(base):
    digest.update(f"{leaf.dtype} {leaf.shape}".encode())
    for odd in (0x9E3779B1, 0x85EBCA77):
      digest.update(distributed.fetch(mix(leaf, jnp.uint32(odd))).tobytes())
  return digest.hexdigest()[:16]


def _mixed_sum(leaf: jax.Array, odd: jax.Array) -> jax.Array:
  """Sum of a weight's words, each mixed with its place times `odd`, uint32."""
  width = jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32
  bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
  place = jnp.zeros(leaf.shape, jnp.uint32)
  for axis in range(leaf.ndim):
    place = place * jnp.uint32(leaf.shape[axis] % 2**32)
    place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
  mixed = bits + place * odd
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
  return jnp.sum(mixed, dtype=jnp.uint32)


def _read_config(directory: pathlib.Path) -> gpt_neox.ModelConfig:
  origin = directory / "config.json"
  fields = hf_layout.model_fields(strict_json.read_object(origin), str(origin))
  try:
    return gpt_neox.ModelConfig(**fields)
  except ValueError as error:
    raise ValueError(f"{origin}: {error}") from error


def _shapes(config: gpt_neox.ModelConfig) -> Tree:
  return jax.eval_shape(lambda: gpt_neox.init(config, jax.random.key(0)))
