"""Models and adapters in the files of transformers and peft.

An exported model loads in transformers, an exported adapter in peft; reading
either gives back our trees bit for bit. A config that we do not compute exactly
is refused before any weight is read.

Each device's part of a stacked weight is filled layer by layer from the stored
tensors, so that no model is in memory twice. A file is written a layer at a
time in a staging directory, which is renamed when it is complete.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.core import distributed, sharding
from dpo_jax.io import atomic, remote, rundir, safetensors, strict_json
from dpo_jax.model import gpt_neox, hf_layout

Tree = dict[str, Any]

# Metadata of an adapter's file: the `fingerprint` of its base.
_FINGERPRINT = "dpo_jax_base_fingerprint"
# An export replaces a directory that holds a model and nothing that an export
# does not write.
_MODELS = {"adapter_model.safetensors", "model.safetensors"}
_EXPORTED = _MODELS | {
  "adapter_config.json",
  "added_tokens.json",
  "chat_template.jinja",
  "config.json",
  "merges.txt",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
}


def read_config(path: str | os.PathLike) -> gpt_neox.ModelConfig:
  """Shape of the model in a local directory or hub id (user/name@revision).

  Raises:
    ValueError: there is no model, or one that we do not compute.
  """
  origin = remote.fetch(path) / "config.json"
  fields = hf_layout.model_fields(strict_json.read_object(origin), str(origin))
  try:
    return gpt_neox.ModelConfig(**fields)
  except ValueError as error:
    raise ValueError(f"{origin}: {error}") from error


def load(
  path: str | os.PathLike,
  *,
  dtype: Literal["float32", "bfloat16"],
  remat: gpt_neox.Remat,
  lora: gpt_neox.LoraConfig | None,
  param_dtype: Literal["float32", "bfloat16"],
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[gpt_neox.ModelConfig, Tree]:
  """Config and base weights of a GPT-NeoX model.

  Args:
    path: a directory with config.json and safetensors, or a hub id, with or
      without @revision.
    dtype: of the config, as are `remat` and `lora`.
    param_dtype: of the weights.
    mesh: splits the weights by the rules of `sharding`; None puts them on the
      default device.

  Raises:
    ValueError: the model is not one that we compute, or a tensor is missing,
      superfluous, of another shape, or not finite; all of them are named. Or a
      run's export is not what the run wrote.
  """
  directory = remote.fetch(path)
  if directory.name == "export":
    rundir.refuse_damaged(directory.parent, "export/")
  config = dataclasses.replace(
    read_config(directory), dtype=dtype, remat=remat, lora=lora
  )
  tensors = safetensors.find(directory, "model")
  if "lm_head.weight" in tensors and "embed_out.weight" not in tensors:
    # transformers 5 saves this name with save_original_format=False.
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
  if config.layers > len(tensors):
    raise ValueError(
      f"{directory}: num_hidden_layers={config.layers}, but the files hold"
      f" {len(tensors)} tensors; fetch the files again"
    )
  shapes = jax.eval_shape(lambda: gpt_neox.init(config, jax.random.key(0)))
  base = _read(directory, hf_layout.WEIGHTS, shapes, tensors, param_dtype, mesh)
  return config, base


def export(
  directory: str | os.PathLike,
  config: gpt_neox.ModelConfig,
  base: Tree,
  tokenizer: Any = None,
) -> None:
  """Writes a model that transformers' Auto classes load, in its own dtype.

  Adapters are not written: merge them with `lora.merge` first.

  Args:
    directory: created, or replaced if it is an earlier export.
    config: the model's shape.
    base: its weights.
    tokenizer: a `tokenizer.Tokenizer` that is saved too.

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
  with _staged(directory) as staged:
    _write(staged / "model.safetensors", hf_layout.WEIGHTS, base, {})
    if distributed.is_main():
      if tokenizer is not None:
        tokenizer.save(staged)
      (staged / "config.json").write_text(text, encoding="utf-8")


def load_adapter(
  directory: str | os.PathLike,
  config: gpt_neox.ModelConfig,
  base: Tree | None = None,
) -> tuple[gpt_neox.LoraConfig, Tree]:
  """LoraConfig and float32 adapters from a PEFT adapter.

  Args:
    directory: with adapter_config.json and safetensors, or a hub id, with or
      without @revision.
    config: of the base model.
    base: its weights. Our adapters are refused on a base with another
      fingerprint; PEFT's have none, and only shapes are compared.

  Raises:
    ValueError: the adapter has settings that we do not compute, belongs to a
      model of another shape or with other weights, or is not what its run
      wrote.
  """
  directory = remote.fetch(directory)
  if directory.parent.name == "adapters":
    run = directory.parent.parent
    rundir.refuse_damaged(run, f"adapters/{directory.name}/")
  origin = directory / "adapter_config.json"
  lora = gpt_neox.LoraConfig(
    **hf_layout.lora_fields(strict_json.read_object(origin), str(origin))
  )
  tensors = safetensors.find(directory, "adapter_model")
  shapes = jax.eval_shape(
    lambda: gpt_neox.init_lora(
      dataclasses.replace(config, lora=lora), jax.random.key(0)
    )
  )
  weights = hf_layout.adapter_weights(lora.targets)
  tree = _read(directory, weights, shapes, tensors, "float32", None)
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
  """Writes adapters that peft loads.

  Args:
    directory: created, or replaced if it is an earlier export.
    config: the model's shape; `config.lora` describes the adapters.
    lora: the adapters.
    base_name: directory or hub id of the base model, for peft.
    base: the base weights or their `fingerprint`, for `load_adapter` to check.

  Raises:
    ValueError: the directory holds other files, or a weight is not finite.
  """
  text = hf_layout.adapter_config_json(config.lora, base_name)
  if base is not None and not isinstance(base, str):
    base = fingerprint(base)
  metadata = {} if base is None else {_FINGERPRINT: base}
  weights = hf_layout.adapter_weights(config.lora.targets)
  with _staged(directory) as staged:
    _write(staged / "adapter_model.safetensors", weights, lora, metadata)
    if distributed.is_main():
      (staged / "adapter_config.json").write_text(text, encoding="utf-8")


def fingerprint(base: Tree) -> str:
  """Sixteen hex digits of the first input rows of kernels, norms and biases.

  In bfloat16: cheap at any size, and the same in any dtype and on any mesh.
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

  They hash wrapping sums of mixed words, which do not depend on the mesh; one
  weight at a time is mixed, on the device.
  """
  digest = hashlib.sha256()
  mix = jax.jit(_mixed_sum)
  for leaf in jax.tree.leaves(base):
    digest.update(f"{leaf.dtype} {leaf.shape}".encode())
    for odd in (0x9E3779B1, 0x85EBCA77):
      digest.update(distributed.fetch(mix(leaf, jnp.uint32(odd))).tobytes())
  return digest.hexdigest()[:16]


def _mixed_sum(leaf: jax.Array, odd: jax.Array) -> jax.Array:
  """Sum of a weight's words, each mixed with its index times `odd`, uint32."""
  width = jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32
  bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
  index = jnp.zeros(leaf.shape, jnp.uint32)
  for axis in range(leaf.ndim):
    index = index * jnp.uint32(leaf.shape[axis] % 2**32)
    index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
  mixed = bits + index * odd
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
  return jnp.sum(mixed, dtype=jnp.uint32)


def _read(
  directory: pathlib.Path,
  weights: Sequence[hf_layout.Weight],
  shapes: Tree,
  tensors: dict[str, Any],
  dtype: str,
  mesh: jax.sharding.Mesh | None,
) -> Tree:
  """A tree of these shapes, after all names and shapes are checked.

  `tensors` are of `safetensors.find`; `directory` is for messages.
  """
  expected = {}
  for weight in weights:
    shape = _leaf(shapes, weight.path).shape
    expected |= dict.fromkeys(weight.names(shape), weight.stored_shape(shape))
  problems = [
    f"{name} is not a weight of this model"
    for name in tensors
    if name not in expected and not hf_layout.BUFFERS.search(name)
  ]
  for name, shape in expected.items():
    if name not in tensors:
      problems.append(f"{name} is missing")
      continue
    found = tuple(tensors[name].get_shape())
    kind, kinds = tensors[name].get_dtype(), safetensors.WEIGHT_DTYPES
    if found != shape:
      problems.append(f"{name} has shape {found}, but its config says {shape}")
    elif kind not in kinds:
      problems.append(f"{name} is {kind}, not one of {list(kinds)}")
  _refuse(directory, problems)
  tree: Tree = {}
  placed = shapes if mesh is None else sharding.shardings(shapes, mesh)
  for weight in weights:
    to = None if mesh is None else _leaf(placed, weight.path)
    shape = _leaf(shapes, weight.path).shape
    *parents, last = weight.path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = _read_weight(weight, shape, tensors, dtype, to, problems)
  _refuse(directory, problems)
  return tree


def _read_weight(weight, shape, tensors, dtype, to, problems) -> jax.Array:
  """One weight, stacked over layers, read into the parts that devices hold."""
  names = weight.names(shape)
  parts: dict[Any, np.ndarray] = {}

  def part(index):
    key = tuple(axis.indices(size) for axis, size in zip(index, shape))
    if key in parts:  # Another device has the same part.
      return parts[key]
    sizes = [len(range(*axis)) for axis in key]
    out = parts[key] = np.empty(sizes, jnp.dtype(dtype))
    layers, chosen, inner, whole = out[None], names, index, shape
    if weight.stacked:
      layers, chosen = out, names[index[0]]
      inner, whole = index[1:], shape[1:]
    for layer, name in zip(layers, chosen, strict=True):
      stored = weight.read(tensors[name], whole, inner)
      np.copyto(layer, stored, casting="unsafe")
      if not np.isfinite(layer).all():
        problems.append(f"{name} holds NaN or infinity")
    return out

  if to is None:
    return jax.device_put(part((slice(None),) * len(shape)))
  return jax.make_array_from_callback(shape, to, part)


def _refuse(directory: pathlib.Path, problems: list[str]) -> None:
  if problems:
    listed = "".join(f"\n  {problem}" for problem in sorted(set(problems)))
    raise ValueError(
      f"{directory}: {len(set(problems))} tensors cannot be used; fetch or"
      f" export the model again:{listed}"
    )


def _write(
  path: pathlib.Path,
  weights: Sequence[hf_layout.Weight],
  tree: Tree,
  metadata: dict[str, str],
) -> None:
  """Writes one file of weights, gathered a layer at a time.

  A collective: all processes call it, and the first one writes.
  """
  shapes = {}
  for weight in weights:
    leaf = _leaf(tree, weight.path)
    stored = jax.ShapeDtypeStruct(weight.stored_shape(leaf.shape), leaf.dtype)
    shapes |= dict.fromkeys(weight.names(leaf.shape), stored)

  def arrays() -> Iterator[np.ndarray]:
    for weight in weights:
      leaf = _leaf(tree, weight.path)
      shape = weight.stored_shape(leaf.shape)
      for layer in _layers(leaf, weight.stacked):
        yield weight.stored(layer, shape)

  if distributed.is_main():
    safetensors.write(path, shapes, arrays(), metadata)
  else:
    for _ in arrays():
      pass


def _layers(leaf: jax.Array, stacked: bool) -> Iterator[np.ndarray]:
  """A weight, or the layers of a stack, gathered one at a time; collective."""
  if leaf.is_fully_addressable:
    leaf = jax.device_get(leaf)
  layers = (leaf[i] for i in range(len(leaf))) if stacked else [leaf]
  return map(distributed.fetch, layers)


def _leaf(tree: Tree, path: str) -> Any:
  for key in path.split("/"):
    tree = tree[key]
  return tree


@contextlib.contextmanager
def _staged(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A staging directory that takes its final name when the block ends.

  The first process makes it; the others get its path and write nothing.

  Raises:
    ValueError: the final name holds what no export wrote.
  """
  final = pathlib.Path(directory)
  staged = final.with_name(f".{final.name}.partial")
  if not distributed.is_main():
    yield staged
    return
  found = {path.name for path in final.iterdir()} if final.exists() else set()
  if found and not (found <= _EXPORTED and found & _MODELS):
    raise ValueError(
      f"{final} holds {sorted(found)}, which is no earlier export; choose"
      " another directory or empty it"
    )
  replaced = final.with_name(f".{final.name}.replaced")
  for left in (staged, replaced):
    shutil.rmtree(left, ignore_errors=True)
  staged.mkdir(parents=True)
  try:
    yield staged
    for path in (*staged.iterdir(), staged):
      atomic.sync(path)
    if final.exists():
      final.rename(replaced)
    staged.rename(final)
    atomic.sync(final.parent)
  finally:
    for left in (staged, replaced):
      shutil.rmtree(left, ignore_errors=True)
