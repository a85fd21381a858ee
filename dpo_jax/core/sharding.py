"""The mesh, and one table that says how every weight lies on it.

Three axes: `data` replicates weights and splits the batch; `fsdp` splits the
batch and the weights' width; `tensor` splits heads, MLP and vocabulary. A path
regex gives each weight its logical axes, `RULES` maps those to mesh axes. An
array axis that its mesh axis does not divide is an error, never a silent
replication.

No axis splits the tokens of a row. A row of HH has 1,024 of them, for which
Pythia-2.8B keeps 168 MB (32 layers x 1,024 x 2,560 in bfloat16, each layer
recomputed), and a step of 64 pairs has 14 such rows: rows go over devices
before their tokens have to. Split tokens would send the keys and values of
every layer, 10.5 MB a row, forward and again backward, which is about what
`tensor` sends, and `tensor` splits weights too. It would pay for rows of 32,768
tokens, for which 5.4 GB are kept.
"""

import dataclasses
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
  """A mesh with axes data, fsdp, tensor.

  Args:
    data: devices along `data`; -1, for at most one of the three, takes what
      the others leave.
    fsdp: devices along `fsdp`.
    tensor: devices along `tensor`.
    devices: what to lay out; all devices of all processes by default.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [data, fsdp, tensor]
  if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
    raise ValueError(
      f"mesh sizes {dict(zip(AXES, sizes))} must be positive, with at most"
      " one -1"
    )
  count = len(devices)
  if -1 in sizes:
    known = -data * fsdp * tensor
    sizes[sizes.index(-1)] = max(count // known, 1)
  if sizes[0] * sizes[1] * sizes[2] != count:
    raise ValueError(
      f"mesh {dict(zip(AXES, sizes))} needs"
      f" {sizes[0] * sizes[1] * sizes[2]} devices, but there are {count}"
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


def place(tree: Any, mesh: Mesh, leading: int = 0) -> Any:
  """Lays arrays that every process has whole on the mesh, split as a batch.

  Each process hands over just the rows of its own devices.
  """
  sharding = batch_sharding(mesh, leading)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      x.shape, sharding, lambda index: x[index]
    ),
    tree,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def path_name(path: tuple[Any, ...]) -> str:
  """A key path of jax.tree as "blocks/dense/kernel"."""
  return "/".join(
    str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))))
    for key in path
  )


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
  axes = [RULES[axis] if axis else None for axis in logical]
  axes = [None] * (len(shape) - len(axes)) + axes
  for size, axis in zip(shape, axes, strict=True):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(
        f"{name} {shape}: {size} is not a multiple of the mesh axis"
        f" {axis!r} ({mesh.shape[axis]}); choose another mesh"
      )
  return NamedSharding(mesh, PartitionSpec(*axes))


def laid(mesh: Mesh, *logical: str | None) -> NamedSharding:
  """Where an array with these logical axes lies; `RULES` tells."""
  axes = [RULES[axis] if axis else None for axis in logical]
  return NamedSharding(mesh, PartitionSpec(*axes))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
  """Says where an activation lies; without a mesh in context, nothing."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  axes = [RULES[axis] if axis else None for axis in logical]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
