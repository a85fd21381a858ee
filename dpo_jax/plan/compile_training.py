"""A training run's own programs, compiled from shapes alone."""

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax.cli import help as help_lib
from dpo_jax.core import hardware, sharding
from dpo_jax.model import attention, gpt_neox, hf, quantization
from dpo_jax.plan import mean_batch
from dpo_jax.training import config as config_lib
from dpo_jax.training import optimizer, setup, step


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one program on one device.

  Attributes:
    arguments: of its arguments.
    outputs: of its results.
    donated: of results in the memory of donated arguments.
    temporary: of intermediate values.
    code: of the program.
    resident: on the device meanwhile, without being an argument.
  """

  arguments: int
  outputs: int
  donated: int
  temporary: int
  code: int
  resident: int = 0

  @property
  def total(self) -> int:
    new = self.outputs - self.donated + self.temporary + self.code
    return self.arguments + new + self.resident


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program's memory, or the compiler's refusal.

  Attributes:
    name: "train", "eval", or one of `compile_sampling`.
    memory: None if the compiler refused it.
    refusal: the compiler's message, "" without.
  """

  name: str
  memory: Memory | None
  refusal: str = ""

  def fits(self, chip: hardware.Chip | None) -> bool:
    """Whether it fits; on an unknown chip, whether it compiled."""
    if self.memory is None:
      return False
    return chip is None or self.memory.total <= chip.hbm_bytes


def compile_one(
  name: str, lower: Callable[[], Any], resident: int = 0
) -> Compiled:
  """Compiles what `lower` returns; out of memory is a result, no error."""
  try:
    compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
      raise
    wanted = re.search(
      r"[Uu]sed [\d.]+\w+ of [\d.]+\w+|total.*?\(.*?\).*?\)", text
    )
    refusal = wanted[0] if wanted else text.splitlines()[0]
    return Compiled(name, None, refusal)
  found = compiled.memory_analysis()
  memory = Memory(
    found.argument_size_in_bytes,
    found.output_size_in_bytes,
    found.alias_size_in_bytes,
    found.temp_size_in_bytes,
    found.generated_code_size_in_bytes,
    resident,
  )
  return Compiled(name, memory)


def shape_of(
  config: config_lib.TrainSettings, name: str
) -> gpt_neox.ModelConfig:
  """The model's config in a training run, without reading its weights.

  Args:
    config: of the run.
    name: a size in configs/models.py; "" if `model.path` is a directory, or it
      or the tokenizer's id names a Pythia.
  """
  path = config.model.path
  if not name and pathlib.Path(path).is_dir():
    shape = hf.read_config(path)
  else:
    shape = shape_named(name, path, config.tokenizer)
  return config.computing(shape)


def shape_named(name: str, *ids: str) -> gpt_neox.ModelConfig:
  """Shape of the Pythia of this size, or if it is "", of the one in `ids`."""
  sizes = re.findall(r"pythia-([\d.]+[mb])\b", " ".join(ids))
  size = name.removeprefix("pythia-") or next(iter(sizes), "")
  if not size:
    raise ValueError(
      f"{' and '.join(map(repr, ids))} are no directory and name no Pythia; set"
      " --model=SIZE, one of configs/models.py"
    )
  return gpt_neox.ModelConfig(
    **help_lib.load(f"configs/models.py:{size}").to_dict()
  )


def random_base(
  shape: gpt_neox.ModelConfig, key: jax.Array, param_dtype: str
) -> dict[str, Any]:
  """Random base weights, stored as `model.param_dtype` says."""
  if param_dtype == "int8":
    return quantization.base(gpt_neox.init(shape, key))
  return gpt_neox.init(shape, key, param_dtype)


def compile_steps(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  rows: int,
  names: tuple[str, ...] = ("train", "eval"),
) -> list[Compiled]:
  """The run's steps, compiled from shapes for the devices of `mesh`.

  `rows` are those of a training micro-batch on one device; evaluation has no
  micro-batches.
  """
  attention.check(
    shape.attention,
    mesh.devices.flat[0],
    dtype=shape.dtype,
    head_dim=shape.head_dim,
    row_length=config.row_length,
  )
  tx = optimizer.make(config.optimizer, 1000, step.trainable(shape))
  key = jax.eval_shape(lambda: jax.random.key(0))
  kept = config.model.param_dtype
  base = jax.eval_shape(lambda key: random_base(shape, key, kept), key)
  state = jax.eval_shape(setup.initial_state(shape, tx), base, None, key)
  state = sharded(state, mesh)
  reference = sharded(base, mesh) if config.keeps_reference else None
  train, evaluate = setup.jit_steps(
    shape,
    config.step_objective(),
    config.eval_batch_size,
    tx,
    config.seed,
    state,
    mesh,
  )
  eval_rows = mean_batch.rows_of(
    config, config.eval_batch_size, sharding.data_shards(mesh)
  )
  least = bytes_on_device((state, reference))
  chip = hardware.chip(mesh.devices.flat[0].device_kind)
  if chip and least > chip.hbm_bytes:
    refusal = (
      f"state and reference alone take {least / hardware.GIB:.2f} of"
      f" {chip.hbm_bytes / hardware.GIB:.2f} GiB a device"
    )
    return [Compiled(name, None, refusal) for name in names]
  # An evaluation does not take the optimizer's state, which stays allocated.
  resident = {"train": 0, "eval": bytes_on_device(state.opt_state)}
  with jax.set_mesh(mesh):
    lowered = {
      "train": lambda: train.lower(
        state,
        reference,
        mean_batch.batch_of(config, mesh, rows, config.microbatches),
      ),
      "eval": lambda: evaluate.lower(
        state.params, reference, mean_batch.batch_of(config, mesh, eval_rows, 1)
      ),
    }
    with uncached(mesh):
      return [
        compile_one(name, lowered[name], resident[name]) for name in names
      ]


@contextlib.contextmanager
def uncached(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """No compilation cache, which cannot load programs for absent devices."""
  if mesh.devices.flat[0].platform in ("cpu", jax.default_backend()):
    yield
    return
  before = jax.config.jax_enable_compilation_cache
  # JAX looks at the setting once a process, unless the cache is reset.
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def sharded(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """A tree's shapes with their shardings on a mesh."""
  return jax.tree.map(
    lambda x, split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split),
    tree,
    sharding.shardings(tree, mesh),
  )


def bytes_on_device(tree: Any) -> int:
  """Bytes on one device of a tree of `sharded`, without padding."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  )
