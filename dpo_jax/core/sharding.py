"""Device mesh and sharding rules of all weights, batches and activations.

The mesh has three axes: `data` replicates weights and splits the batch; `fsdp`
splits the batch and the weights' width; `tensor` splits heads, MLP and
vocabulary. `PATHS` maps a weight's path to logical axes, `RULES` maps those to
mesh axes. A dimension that its mesh axis does not divide is an error, never
replicated silently.

There is no sequence parallelism: rows have about 1,024 tokens, and splitting
them would send as much as `tensor`, which splits the weights as well.
"""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Mesh axes by logical axis.
RULES = {
  "batch": ("data", "fsdp"),
  "vocab": "tensor",
  "width": "fsdp",
  "heads": "tensor",
  "mlp": "tensor",
}

# (regex of a path's end, logical axes of the trailing dimensions). The leading
# layer axis of stacked blocks is not split: lax.scan iterates over it.
PATHS = (
  # Adafactor's means over rows and columns, which are small.
  (r"v_(row|col)/.*$", ()),
  (r"embed/kernel$", ("vocab", "width")),
  (r"unembed/kernel$", ("width", "vocab")),
  (r"query_key_value/kernel(/values)?$", ("width", "heads", None, None)),
  (r"query_key_value/bias$", ("heads", None, None)),
  (r"dense/kernel(/values)?$", ("heads", None, "width")),
  (r"dense_h_to_4h/kernel(/values)?$", ("width", "mlp")),
  (r"dense_h_to_4h/bias$", ("mlp",)),
  (r"dense_4h_to_h/kernel(/values)?$", ("mlp", "width")),
  (r"lora_[ab]$", (None, None)),
  (r"(scale|bias)$", (None,)),
)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """Devices along each axis: arguments of `make_mesh`."""

  data: int
  fsdp: int
  tensor: int


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None
) -> Mesh:
  """Mesh of `devices`, by default all devices of all processes.

  One of the sizes may be -1, for all devices that the others leave. ValueError
  if the product of the sizes is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [data, fsdp, tensor]
  if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
    raise ValueError(
      f"mesh sizes {dict(zip(AXES, sizes))} must be positive, with at most"
      " one -1"
    )
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(len(devices) // -math.prod(sizes), 1)
  if (needed := math.prod(sizes)) != len(devices):
    raise ValueError(
      f"mesh {dict(zip(AXES, sizes))} needs {needed} devices, but there are"
      f" {len(devices)}"
    )
  return jax.make_mesh(
    tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def data_shards(mesh: Mesh) -> int:
  """Number of shards of the batch axis."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
  """Sharding of rows over data and fsdp, after `leading` unsplit axes."""
  return NamedSharding(mesh, PartitionSpec(*(None,) * leading, RULES["batch"]))


def put(tree: Any, mesh: Mesh, leading: int = 0) -> Any:
  """Global arrays of a batch of which every process has all rows."""
  sharding = batch_sharding(mesh, leading)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
    tree,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
  """A jax.tree key path as "blocks/dense/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh) -> Any:
  """NamedSharding of every leaf of weights or optimizer state.

  Moments are sharded as their weights, whose paths they repeat; leaves that no
  pattern matches, such as step counters, are replicated.

  Raises:
    ValueError: a mesh axis does not divide a dimension.
  """

  def one(path, leaf):
    name, shape = path_name(path), tuple(leaf.shape)
    matches = (axes for end, axes in PATHS if re.search(f"(^|/){end}", name))
    logical = next(matches, ())
    if shape == (1,):
      # Optax's placeholder for a moment that is factored.
      logical = ()
    spec = _spec(*(None,) * (len(shape) - len(logical)), *logical)
    for size, axis in zip(shape, spec, strict=True):
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(
          f"{name} {shape}: {size} is not a multiple of the mesh axis"
          f" {axis!r} ({mesh.shape[axis]}); choose another mesh"
        )
    return NamedSharding(mesh, spec)

  return jax.tree.map_with_path(one, tree)


def _spec(*logical: str | None) -> PartitionSpec:
  return PartitionSpec(*(RULES[axis] if axis else None for axis in logical))


def named(mesh: Mesh, *logical: str | None) -> NamedSharding:
  """Sharding of an array with these logical axes."""
  return NamedSharding(mesh, _spec(*logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Sharding constraint on an activation, if there is a mesh in context."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, _spec(*logical))
