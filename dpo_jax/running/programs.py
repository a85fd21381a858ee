"""The compiled programs of a training run, for those who run or plan it.

Training calls them with arrays, the planner lowers them with shapes alone: what
is planned is what is run.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from dpo_jax import attention, model, partitioning, quantised, steps
from dpo_jax.rows import packing
from dpo_jax.running import allocator, recipe

Tree = dict[str, Any]
# Whether programs for CPUs are computed by threads of XLA's.
_DISPATCH = "jax_cpu_enable_async_dispatch"


def base(shape: model.ModelConfig, key: jax.Array, param_dtype: str) -> Tree:
  """Random base weights, kept as `model.param_dtype` says."""
  if param_dtype == "int8":
    return quantised.base(model.init(shape, key))
  return model.init(shape, key, param_dtype)


def quantise(base: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """`quantised.base`, laid on the mesh."""
  lying = partitioning.shardings(jax.eval_shape(quantised.base, base), mesh)
  return jax.jit(quantised.base, out_shardings=lying)(base)


def initial(
  shape: model.ModelConfig, tx: optax.GradientTransformation
) -> Callable[[Tree, jax.Array], steps.TrainState]:
  """(base, key) -> the state of step 0, with fresh adapters if it has any."""

  def make(base, key):
    adapters = model.init_lora(shape, key) if shape.lora else {}
    return steps.init_state(base, adapters, tx)

  return make


def check(
  config: recipe.TrainSettings,
  shape: model.ModelConfig,
  mesh: jax.sharding.Mesh,
) -> None:
  """Refuses what the mesh's devices cannot run, before anything compiles.

  Raises:
    ValueError: the implementation of attention is none for these devices, or
      for the model's shape or dtype.
  """
  attention.check(
    config.model.attention,
    mesh.devices.flat[0],
    dtype=config.model.dtype,
    head_dim=shape.head_dim,
    row_length=config.row_length,
  )


def keeps_reference(config: recipe.TrainSettings) -> bool:
  """Whether the reference is a second tree of weights beside the policy."""
  return (
    config.objective == "dpo"
    and not config.lora.rank
    and not config.precompute_reference
  )


def training(
  config: recipe.TrainSettings,
  shape: model.ModelConfig,
  tx: optax.GradientTransformation,
  state: steps.TrainState,
  mesh: jax.sharding.Mesh,
) -> tuple[Callable, Callable]:
  """The training and the evaluation step, compiled when first called.

  Args:
    config: of the run.
    shape: its model.
    tx: its optimizer.
    state: arrays, or their shapes.
    mesh: where the state lies, by the rules of `partitioning`.
  """
  objective = steps.Objective(
    config.objective,
    config.loss if config.objective == "dpo" else None,
    config.batch_size // config.microbatches,
  )
  here = partitioning.replicated(mesh)
  train_step = jax.jit(
    steps.make_train_step(shape, objective, tx, config.seed),
    donate_argnums=0,
    out_shardings=(partitioning.shardings(state, mesh), here),
    compiler_options=steps.COMPILER_OPTIONS,
  )
  evaluated = dataclasses.replace(objective, items=config.eval_batch_size)
  eval_step = jax.jit(
    steps.make_eval_step(shape, evaluated),
    out_shardings=here,
    compiler_options=steps.COMPILER_OPTIONS,
  )
  return train_step, eval_step


def ahead(
  step: Callable,
  arguments: tuple[Any, ...],
  batches: Iterable[packing.Batch],
  room: allocator.Room | None = None,
) -> Callable:
  """The step, compiled now for every shape of batch that is to come.

  A batch of yet another shape is compiled when it comes.

  Args:
    step: from `training`.
    arguments: what it takes before the batch: arrays, or their shapes.
    batches: the shapes, one batch of each.
    room: where its temporary memory lies, if it is computed by the thread that
      calls it, see `compute_at_call`.
  """
  compiled = {
    _sizes(batch): step.lower(*arguments, batch).compile() for batch in batches
  }
  takes = {
    sizes: _temporary_bytes(program) for sizes, program in compiled.items()
  }

  def call(*arguments):
    sizes = _sizes(arguments[-1])
    if room and sizes in takes:
      room.make(takes[sizes])
    return compiled.get(sizes, step)(*arguments)

  return call


def compute_at_call() -> None:
  """From now on a program for CPUs is computed by the thread that calls it.

  Its temporary memory, one block, is then always taken from that thread's
  arena, where the last one was freed. By XLA's threads it was taken from either
  of two, and there were two such blocks. To be called before there is a
  backend.
  """
  jax.config.update(_DISPATCH, False)


def computed_at_call() -> bool:
  """Whether programs for the devices at hand are so computed."""
  return jax.default_backend() == "cpu" and not jax.config.read(_DISPATCH)


def _temporary_bytes(program: jax.stages.Compiled) -> int:
  """What a program takes beside its arguments and results, where it tells."""
  found = program.memory_analysis()
  return found.temp_size_in_bytes if found is not None else 0


def _sizes(batch: packing.Batch) -> tuple[tuple[int, ...], ...]:
  return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def keep(directory: str) -> None:
  """Keeps compiled programs in a directory, from run to run; "" keeps none.

  Where JAX was told a directory already (JAX_COMPILATION_CACHE_DIR), it stays.
  """
  if directory and jax.config.jax_compilation_cache_dir is None:
    path = pathlib.Path(directory).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
