"""The mesh, and one table that says how every weight lies on it.

Three axes: `data` replicates weights and splits the batch; `fsdp` splits the
batch and the weights' width; `tensor` splits heads, MLP and vocabulary. A path
regex gives each weight its logical axes, `RULES` maps those to mesh axes. An
array axis that its mesh axis does not divide is an error, never a silent
replication.

No axis splits the tokens of a row: with rows of 1,024 of them, rows go over
devices before their tokens have to. Split tokens would send the keys and values
of every layer, forward and backward, about what `tensor` sends, which splits
weights too.
"""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Mesh axes of each logical axis.
RULES = {
  "batch": ("data", "fsdp"),
  "vocab": "tensor",
  "width": "fsdp",
  "heads": "tensor",
  "mlp": "tensor",
}

# (regex of a path's end, logical axes of the trailing dimensions). A stacked
# layer axis in front of them is never split: lax.scan runs over it.
PATHS = (
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
  """Devices along each axis, the arguments of `make_mesh`."""

  data: int
  fsdp: int
  tensor: int


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None
) -> Mesh:
  """A mesh of `devices`, by default all devices of all processes.

  Raises:
    ValueError: the sizes do not multiply to the number of devices; -1, for at
      most one of them, takes what the others leave.
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
  """Into how many parts the batch axis is split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
  """Rows over data and fsdp; `leading` unsplit axes stand before them."""
  return NamedSharding(mesh, PartitionSpec(*(None,) * leading, RULES["batch"]))


def put(tree: Any, mesh: Mesh, leading: int = 0) -> Any:
  """Arrays that every process has whole, split over the mesh as a batch."""
  sharding = batch_sharding(mesh, leading)

  def one(x):
    # Each process hands over just the rows of its own devices.
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

  return jax.tree.map(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
  """A key path of jax.tree as "blocks/dense/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh) -> Any:
  """The NamedSharding of every leaf of a tree of weights or optimizer state.

  Optimizer state repeats the weights' paths, so its moments lie like the
  weights; leaves that no path names (counters) are replicated.

  Raises:
    ValueError: a mesh axis does not divide an array axis.
  """

  def one(path, leaf):
    return _sharding(path_name(path), tuple(leaf.shape), mesh)

  return jax.tree.map_with_path(one, tree)


def _sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  logical = next(
    (axes for pattern, axes in PATHS if re.search(rf"(^|/){pattern}", name)),
    (None,) * len(shape),
  )
  axes = (*(None,) * (len(shape) - len(logical)), *_axes(logical))
  for size, axis in zip(shape, axes, strict=True):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(
        f"{name} {shape}: {size} is not a multiple of the mesh axis"
        f" {axis!r} ({mesh.shape[axis]}); choose another mesh"
      )
  return NamedSharding(mesh, PartitionSpec(*axes))


def _axes(logical: tuple[str | None, ...]) -> list[Any]:
  return [RULES[axis] if axis else None for axis in logical]


def named(mesh: Mesh, *logical: str | None) -> NamedSharding:
  """Where an array with these logical axes lies; `RULES` tells."""
  return NamedSharding(mesh, PartitionSpec(*_axes(logical)))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Says where an activation lies; without a mesh in context, nothing."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*_axes(logical)))
