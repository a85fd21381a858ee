"""Keys and values of earlier tokens: kept at each row's own slot, and read.

One cache serves all layers. It is carried through them and written in place: as
a scanned input and output it would be copied whole for every token. Or each
layer has one of its own, as `split` gives them: what a layer attends to is then
an array, and no slice that a CPU would copy first. Or one cache has its heads
folded into its last axis: a TPU pads a last axis to a multiple of 128, and
copies a cache whose head dim is not one into such a form and back. In int8 each
key and each value has a scale of its own, its largest magnitude over 127.

A layer's own cache holds its keys as columns, [B, N, H, S]: of many rows with
one query each, a CPU's cores then share the sums (`attention.decode`).

Letters: L layers, B rows, N heads, S slots, T tokens of this call, H head dim,
C = N H.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dpo_jax.model.attention import decode

Tree = dict[str, Any]
Kind = Literal["float32", "bfloat16", "int8"]
Layout = Literal["stacked", "apart", "folded"]

_NAMES = ("k", "v")


def init(
  layers: int,
  batch: int,
  heads: int,
  slots: int,
  head_dim: int,
  kind: Kind,
  folded: bool = False,
) -> Tree:
  """An empty cache: {"k", "v"} of [L, B, N, S, H]; in int8 scales beside them.

  Folded they are [L, B, S, C]. Scales are {"k_scale", "v_scale"} of float32
  [L, B, N, S] in any case.
  """
  shape = (layers, batch, heads, slots, head_dim)
  lying = (layers, batch, slots, heads * head_dim) if folded else shape
  cache = {name: jnp.zeros(lying, kind) for name in _NAMES}
  if kind == "int8":
    cache |= {
      f"{name}_scale": jnp.zeros(shape[:-1], jnp.float32) for name in _NAMES
    }
  return cache


def bytes_of(
  layers: int, heads: int, slots: int, head_dim: int, kind: Kind
) -> int:
  """Bytes that one row takes."""
  tree = jax.eval_shape(lambda: init(layers, 1, heads, slots, head_dim, kind))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def axes(name: str, dims: int) -> tuple[str, ...]:
  """Names of the axes of a leaf behind that of its layers, if it has one.

  Args:
    name: its key in the cache.
    dims: how many axes it has without that of the layers.
  """
  if dims == 3 and name in _NAMES:
    return ("batch", "slots", "heads")
  return ("batch", "heads", "slots", "head_dim")[:dims]


def unstack(cache: Tree) -> tuple[Tree, ...]:
  """Caches of single layers from one of all.

  "k" is [B, N, H, S] and "v" [B, N, S, H]; scales are [B, N, S].
  """

  def one(name, leaf):
    return jnp.swapaxes(leaf, 2, 3) if name == "k" else leaf

  layers = cache["k"].shape[0]
  return tuple(
    {name: one(name, leaf[at]) for name, leaf in cache.items()}
    for at in range(layers)
  )


def resize(cache: Tree, slots: int) -> Tree:
  """A single layer's cache with so many slots; new ones, at the end, are 0."""

  def one(name, leaf):
    axis = 3 if name == "k" else 2
    ends = [(0, 0)] * leaf.ndim
    ends[axis] = (0, max(slots - leaf.shape[axis], 0))
    kept = min(slots, leaf.shape[axis])
    return jnp.pad(jax.lax.slice_in_dim(leaf, 0, kept, axis=axis), ends)

  return {name: one(name, leaf) for name, leaf in cache.items()}


def remember(
  cache: Tree,
  layer: jax.Array | None,
  index: jax.Array | int,
  k: jax.Array,
  v: jax.Array,
  span: int,
) -> tuple[Any, Any, Tree]:
  """Writes a layer's keys and values and gives back all of its first slots.

  Args:
    cache: see `init`; with `layer` None one of `split`.
    layer: which layer's they are.
    index: the slot of the first token: one for all rows, or, for one token a
      row, int32 [B].
    k: keys, [B, N, T, H].
    v: values, [B, N, T, H].
    span: how many slots are given back; no row may have written behind them.

  Returns:
    Keys and values as `recall` gives them, but of a folded cache, where a row
    has several tokens, [B, N, span, H]; and the cache.
  """
  cache = dict(cache)
  folded = cache["k"].ndim == 4 and layer is not None
  for name, new in zip(_NAMES, (k, v), strict=True):
    parts = {name: new.astype(cache[name].dtype)}
    if f"{name}_scale" in cache:
      parts = _quantised(name, new)
    for part, value in parts.items():
      if layer is None:
        cache[part] = _write_apart(part, cache[part], index, value)
      elif folded and part == name:
        cache[part] = _write_folded(cache[part], layer, index, value)
      else:
        cache[part] = _write(cache[part], layer, index, value)
  found = recall(cache, layer, span, k.dtype)
  _, heads, tokens, _ = k.shape
  if folded and tokens > 1:
    found = (
      jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2) for x in found
    )
  return *found, cache


def recall(
  cache: Tree, layer: jax.Array | None, span: int, dtype: Any
) -> tuple[Any, Any]:
  """A layer's keys and values of the first slots, for one query a row.

  Args:
    cache: see `init`; with `layer` None one of `split`.
    layer: which layer's they are.
    span: how many slots are given back.
    dtype: what they are given back in.

  Returns:
    Keys and values in a form of `attention.decode`: [B, N, span, H]; of a
    folded cache [B, span, C]; of one of `split` keys are `decode.Columns`.
  """
  if layer is None:
    return _recall_apart(cache, span, dtype)
  read = _read_folded if cache["k"].ndim == 4 else _read_scaled
  return tuple(read(cache, name, layer, span, dtype) for name in _NAMES)


def _recall_apart(cache, span, dtype):
  keys = cache["k"][..., :span].astype(dtype)
  values = cache["v"][:, :, :span].astype(dtype)
  if "k_scale" in cache:
    keys *= cache["k_scale"][:, :, None, :span].astype(dtype)
    values *= cache["v_scale"][:, :, :span, None].astype(dtype)
  return decode.Columns(keys), values


def _write_apart(name, leaf, index, new):
  if jnp.ndim(index) == 0:
    if name == "k":
      new, start = jnp.swapaxes(new, 2, 3), (0, 0, 0, index)
    else:
      start = (0, 0, index, 0)[: leaf.ndim]
    return jax.lax.dynamic_update_slice(leaf, new, start)
  rows = jnp.arange(leaf.shape[0])
  at = leaf.at[rows, ..., index] if name == "k" else leaf.at[rows, :, index]
  return at.set(new[:, :, 0], mode="promise_in_bounds", unique_indices=True)


def _quantised(name, x):
  scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1) / 127
  # A key of zeros has scale 0 and stays zeros.
  steps = x / jnp.where(scale > 0, scale, 1)[..., None]
  return {
    name: jnp.round(steps).astype(jnp.int8),
    f"{name}_scale": scale,
  }


def _write(leaf, layer, index, new):
  if jnp.ndim(index) == 0:
    start = (layer, 0, 0, index, 0)[: leaf.ndim]
    return jax.lax.dynamic_update_slice(leaf, new[None], start)
  rows = jnp.arange(leaf.shape[1])
  return leaf.at[layer, rows, :, index].set(
    new[:, :, 0], mode="promise_in_bounds", unique_indices=True
  )


def _read(leaf, layer, span):
  leaf = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
  return leaf[:, :, :span]


def _read_scaled(cache, name, layer, span, dtype):
  read = _read(cache[name], layer, span).astype(dtype)
  if f"{name}_scale" in cache:
    scale = _read(cache[f"{name}_scale"], layer, span)
    read *= scale[..., None].astype(dtype)
  return read


def _write_folded(leaf, layer, index, new):
  rows, _, tokens, _ = new.shape
  new = jnp.swapaxes(new, 1, 2).reshape(rows, tokens, -1)
  if jnp.ndim(index) == 0:
    return jax.lax.dynamic_update_slice(leaf, new[None], (layer, 0, index, 0))
  return leaf.at[layer, jnp.arange(rows), index].set(
    new[:, 0], mode="promise_in_bounds", unique_indices=True
  )


def _read_folded(cache, name, layer, span, dtype):
  leaf = jax.lax.dynamic_index_in_dim(cache[name], layer, keepdims=False)
  read = leaf[:, :span].astype(dtype)
  if f"{name}_scale" in cache:
    scale = _read(cache[f"{name}_scale"], layer, span).astype(dtype)
    # One for each dimension of the head: the axes stay as they lie.
    head_dim = read.shape[-1] // scale.shape[1]
    read *= jnp.repeat(jnp.swapaxes(scale, 1, 2), head_dim, axis=-1)
  return read
