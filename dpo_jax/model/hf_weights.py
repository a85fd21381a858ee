"""Trees of weights to and from safetensors, by the tables of the layouts.

Reading never holds a model twice: each device's part of a stacked weight is
filled layer by layer with what is read of the stored tensors. Writing goes one
stacked weight at a time into a hidden sibling directory, which is renamed when
it is complete: a directory of the final name is never half a model.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.core import distributed, sharding
from dpo_jax.io import atomic, safetensors
from dpo_jax.model import hf_layout

Tree = dict[str, Any]

# Only a directory with a model, and nothing else that an export would not
# write, is replaced by an export.
_MODELS = frozenset({"adapter_model.safetensors", "model.safetensors"})
_EXPORTED = _MODELS | frozenset(
  {
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
)


def read(
  directory: pathlib.Path,
  weights: Sequence[hf_layout.Weight],
  shapes: Tree,
  tensors: dict[str, Any],
  dtype: str,
  mesh: jax.sharding.Mesh | None,
) -> Tree:
  """All weights as a tree, after all names and shapes have been checked.

  Args:
    directory: where the tensors are from, for messages.
    weights: what the tree holds.
    shapes: the tree's shapes.
    tensors: the stored tensors by name, from `safetensors.find`.
    dtype: what to keep the weights in.
    mesh: where to put them; None leaves them on the default device.

  Raises:
    ValueError: tensors are missing, superfluous, of another shape or type, or
      not finite; all of them are named.
  """
  problems = []
  expected = {}
  for weight in weights:
    shape = _leaf(shapes, weight.path).shape
    for name in weight.names(shape):
      expected[name] = weight.stored_shape(shape)
  for name, shape in expected.items():
    if name not in tensors:
      problems.append(f"{name} is missing")
      continue
    found = tuple(tensors[name].get_shape())
    dtype_found = tensors[name].get_dtype()
    if found != shape:
      problems.append(f"{name} has shape {found}, but its config says {shape}")
    elif dtype_found not in safetensors.WEIGHT_DTYPES:
      problems.append(
        f"{name} is {dtype_found}, not one of {list(safetensors.WEIGHT_DTYPES)}"
      )
  for name in tensors:
    if name not in expected and not hf_layout.BUFFERS.search(name):
      problems.append(f"{name} is not a weight of this model")
  _refuse(directory, problems)
  tree: Tree = {}
  places = shapes if mesh is None else sharding.shardings(shapes, mesh)
  for weight in weights:
    place = None if mesh is None else _leaf(places, weight.path)
    *parents, last = weight.path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = _read_weight(
      weight, _leaf(shapes, weight.path).shape, tensors, dtype, place, problems
    )
  _refuse(directory, problems)
  return tree


def _read_weight(weight, shape, tensors, dtype, place, problems) -> jax.Array:
  """One weight, stacked over layers, read into the parts that devices hold."""
  names = weight.names(shape)
  parts: dict[Any, np.ndarray] = {}

  def part(index):
    key = tuple(axis.indices(size) for axis, size in zip(index, shape))
    if key in parts:  # Another device has the same part.
      return parts[key]
    size = tuple(len(range(*axis)) for axis in key)
    out = parts[key] = np.empty(size, jnp.dtype(dtype))
    layers, chosen, inner, whole = out[None], names, index, shape
    if weight.stacked:
      layers, chosen = out, names[index[0]]
      inner, whole = index[1:], shape[1:]
    for layer, name in zip(layers, chosen, strict=True):
      found = weight.read(tensors[name], whole, inner)
      np.copyto(layer, found, casting="unsafe")
      if not np.isfinite(layer).all():
        problems.append(f"{name} holds NaN or infinity")
    return out

  if place is None:
    return jax.device_put(part((slice(None),) * len(shape)))
  return jax.make_array_from_callback(shape, place, part)


def _refuse(directory: pathlib.Path, problems: list[str]) -> None:
  if problems:
    listed = "".join(f"\n  {problem}" for problem in sorted(set(problems)))
    raise ValueError(
      f"{directory}: {len(set(problems))} tensors cannot be used; fetch or"
      f" export the model again:{listed}"
    )


def write(
  path: pathlib.Path,
  weights: Sequence[hf_layout.Weight],
  tree: Tree,
  metadata: dict[str, str],
) -> None:
  """Weights as one file, gathered to the first process a layer at a time.

  All processes of a run must call it together; the first one writes.

  Args:
    path: the file.
    weights: what to write.
    tree: their values, arrays of JAX.
    metadata: strings kept in the file's header.

  Raises:
    ValueError: a weight is not finite.
  """
  shapes = {}
  for weight in weights:
    leaf = _leaf(tree, weight.path)
    shape = weight.stored_shape(leaf.shape)
    for name in weight.names(leaf.shape):
      shapes[name] = jax.ShapeDtypeStruct(shape, leaf.dtype)

  def arrays() -> Iterator[np.ndarray]:
    for weight in weights:
      leaf = _leaf(tree, weight.path)
      if leaf.is_fully_addressable:
        leaf = jax.device_get(leaf)
      layers = (leaf[i] for i in range(len(leaf))) if weight.stacked else [leaf]
      for layer in layers:
        yield weight.stored(distributed.fetch(layer))

  if distributed.is_main():
    safetensors.write(path, shapes, arrays(), metadata)
  else:
    for _ in arrays():
      pass


def _leaf(tree: Tree, path: str) -> Any:
  for key in path.split("/"):
    tree = tree[key]
  return tree


@contextlib.contextmanager
def complete(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A directory to fill, which takes its final name when the block ends.

  Only the first process makes it; the others get its path, to write nothing.

  Raises:
    ValueError: the final name belongs to something that no export wrote.
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
