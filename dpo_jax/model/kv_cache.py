"""KV cache of decoding, in one of two layouts.

Unstacked, on CPUs: a tuple of layers, each {"k": [B, N, H, S],
"v": [B, N, S, H]}. A CPU copies a slice of a stack before it reads it, and its
cores share the sums of many rows where keys are columns (`attention.decode`).

Folded, elsewhere: {"k", "v"} of [L, B, S, C], one stack of layers for one
scanned loop, with the heads in one axis, which no TPU pads.

In int8 each key and value vector has the scale of its largest magnitude over
127: {"k_scale", "v_scale"}, float32 [B, N, S] or [L, B, N, S].

Letters: L layers, B rows, N heads, S slots, T tokens, H head dim, C = N H.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

Layer = dict[str, jax.Array]
Cache = tuple[Layer, ...] | Layer
Kind = Literal["float32", "bfloat16", "int8"]


def init(
  layers: int,
  batch: int,
  heads: int,
  slots: int,
  head_dim: int,
  kind: Kind,
  unstacked: bool = True,
) -> Cache:
  """An empty cache."""
  rows = jax.ShapeDtypeStruct((batch, heads, slots, head_dim), jnp.float32)
  shapes = jax.eval_shape(
    lambda x: arrange(encode(x, x, kind), unstacked), rows
  )

  def zeros(*before):
    return {
      name: jnp.zeros((*before, *leaf.shape), leaf.dtype)
      for name, leaf in shapes.items()
    }

  return tuple(zeros() for _ in range(layers)) if unstacked else zeros(layers)


def bytes_of(
  layers: int, heads: int, slots: int, head_dim: int, kind: Kind
) -> int:
  """Bytes of one row."""
  tree = jax.eval_shape(lambda: init(layers, 1, heads, slots, head_dim, kind))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def axes(name: str, unstacked: bool) -> tuple[str | None, ...]:
  """Logical axes of an array of the cache."""
  if name.endswith("_scale"):
    names = ("batch", "heads", None)
  else:
    names = ("batch", "heads", None, None)
    names = names if unstacked else ("batch", None, "heads")
  return names if unstacked else (None, *names)


def encode(k: jax.Array, v: jax.Array, kind: Kind) -> Layer:
  """Keys and values [B, N, T, H] in the dtype of the cache, with int8's scales.

  The axes are still those of `k` and `v`.
  """
  if kind != "int8":
    return {"k": k.astype(kind), "v": v.astype(kind)}
  layer = {}
  for name, x in (("k", k), ("v", v)):
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1) / 127
    # A key of zeros has scale 0 and stays zeros.
    steps = x / jnp.where(scale > 0, scale, 1)[..., None]
    layer[name] = jnp.round(steps).astype(jnp.int8)
    layer[f"{name}_scale"] = scale
  return layer


def restore(encoded: Layer, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """Keys and values [B, N, T, H] of `encode`, in `dtype`."""

  def one(name):
    x = encoded[name].astype(dtype)
    if f"{name}_scale" in encoded:
      x *= encoded[f"{name}_scale"][..., None].astype(dtype)
    return x

  return one("k"), one("v")


def arrange(encoded: Layer, unstacked: bool) -> Layer:
  """One layer of `encode` with the axes of the cache."""

  def one(name, leaf):
    if name.endswith("_scale"):
      return leaf
    if not unstacked:
      rows, _, tokens, _ = leaf.shape
      return jnp.swapaxes(leaf, 1, 2).reshape(rows, tokens, -1)
    return jnp.swapaxes(leaf, 2, 3) if name == "k" else leaf

  return {name: one(name, leaf) for name, leaf in encoded.items()}


def unstack(layers: Layer) -> tuple[Layer, ...]:
  """The unstacked cache of arranged layers on a leading axis."""
  return tuple(
    {name: leaf[at] for name, leaf in layers.items()}
    for at in range(len(layers["k"]))
  )


def write(
  cache: Layer,
  layer: jax.Array | None,
  index: jax.Array,
  k: jax.Array,
  v: jax.Array,
) -> Layer:
  """The cache with one token a row of a layer.

  Args:
    cache: a layer of an unstacked cache, or a folded one.
    layer: its number in a folded cache, else None.
    index: the slot of each row, int32 [B].
    k: keys, [B, N, 1, H].
    v: values, [B, N, 1, H].
  """
  cache, rows = dict(cache), jnp.arange(len(index))
  encoded = encode(k, v, cache["k"].dtype.name)
  for name, new in arrange(encoded, layer is None).items():
    axis = _slots_axis(name, layer is None)
    at = (rows, *(slice(None),) * (axis - 1), index)
    at = at if layer is None else (layer, *at)
    leaf = cache[name].at[at]
    cache[name] = leaf.set(
      jnp.squeeze(new, axis), mode="promise_in_bounds", unique_indices=True
    )
  return cache


def read(
  cache: Layer, layer: jax.Array | None, slots: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
  """Keys and values of a layer's first slots in `dtype`, with the cache's axes.

  Args:
    cache: a layer of an unstacked cache, or a folded one.
    layer: its number in a folded cache, else None.
    slots: how many to read.
    dtype: of the result.
  """

  def leaf(name):
    x = cache[name]
    if layer is not None:
      x = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    axis = _slots_axis(name, layer is None)
    return jax.lax.slice_in_dim(x, 0, slots, axis=axis).astype(dtype)

  def one(name):
    x = leaf(name)
    if f"{name}_scale" not in cache:
      return x
    scale = leaf(f"{name}_scale")
    if layer is None:
      return x * jnp.expand_dims(scale, 2 if name == "k" else 3)
    # Repeated for each dimension of the head: the axes stay as they are.
    head_dim = x.shape[-1] // scale.shape[1]
    return x * jnp.repeat(jnp.swapaxes(scale, 1, 2), head_dim, axis=-1)

  return one("k"), one("v")


def resize(layer: Layer, slots: int) -> Layer:
  """The unstacked layer with this many slots; new ones, at the end, are 0."""

  def one(name, leaf):
    axis = _slots_axis(name, True)
    kept = min(slots, leaf.shape[axis])
    ends = [(0, 0)] * leaf.ndim
    ends[axis] = (0, slots - kept)
    return jnp.pad(jax.lax.slice_in_dim(leaf, 0, kept, axis=axis), ends)

  return {name: one(name, leaf) for name, leaf in layer.items()}


def _slots_axis(name, unstacked):
  """The axis of slots in a layer's array."""
  if name.endswith("_scale"):
    return 2
  if not unstacked:
    return 1
  return 3 if name == "k" else 2
