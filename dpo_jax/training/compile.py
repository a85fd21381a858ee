"""The compiled programs of a training run, for those who run or plan it.

Training calls them with arrays, the planner lowers them with shapes alone: what
is planned is what is run.
"""

import ctypes
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from dpo_jax.core import sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.model import attention, gpt_neox, quantization
from dpo_jax.training import config as config_lib
from dpo_jax.training import step as step_lib

Tree = dict[str, Any]
# Whether programs for CPUs are computed by threads of XLA's.
_DISPATCH = "jax_cpu_enable_async_dispatch"
# By the environment's name for it: glibc's number (malloc.h) and a value, an
# int, so that a threshold is at most 2 GiB less one. Two arenas: with one, what
# threads keep lies between the steps' large blocks, and the heap has grown by a
# half in some runs; with many, more of what is freed waits where nobody asks.
_MALLOC = {
  "MALLOC_MMAP_MAX_": (-4, 0),
  "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
  "MALLOC_TOP_PAD_": (-2, 2**28),
  "MALLOC_ARENA_MAX": (-8, 2),
}


def base(shape: gpt_neox.ModelConfig, key: jax.Array, param_dtype: str) -> Tree:
  """Random base weights, kept as `model.param_dtype` says."""
  if param_dtype == "int8":
    return quantization.base(gpt_neox.init(shape, key))
  return gpt_neox.init(shape, key, param_dtype)


def quantize(base: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """`quantization.base`, laid on the mesh."""
  lying = sharding.shardings(jax.eval_shape(quantization.base, base), mesh)
  return jax.jit(quantization.base, out_shardings=lying)(base)


def initial(
  shape: gpt_neox.ModelConfig, tx: optax.GradientTransformation
) -> Callable[[Tree, jax.Array], step_lib.TrainState]:
  """(base, key) -> the state of step 0, with fresh adapters if it has any."""

  def make(base, key):
    adapters = gpt_neox.init_lora(shape, key) if shape.lora else {}
    return step_lib.init_state(base, adapters, tx)

  return make


def check(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
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


def keeps_reference(config: config_lib.TrainSettings) -> bool:
  """Whether the reference is a second tree of weights beside the policy."""
  return (
    config.objective == "dpo"
    and not config.lora.rank
    and not config.precompute_reference
  )


def training(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  tx: optax.GradientTransformation,
  state: step_lib.TrainState,
  mesh: jax.sharding.Mesh,
) -> tuple[Callable, Callable]:
  """The training and the evaluation step, compiled when first called.

  Args:
    config: of the run.
    shape: its model.
    tx: its optimizer.
    state: arrays, or their shapes.
    mesh: where the state lies, by the rules of `sharding`.
  """
  objective = step_lib.Objective(
    config.objective,
    config.loss if config.objective == "dpo" else None,
    config.batch_size // config.microbatches,
  )
  here = sharding.replicated(mesh)
  train_step = jax.jit(
    step_lib.make_train_step(shape, objective, tx, config.seed),
    donate_argnums=0,
    out_shardings=(sharding.shardings(state, mesh), here),
    compiler_options=step_lib.COMPILER_OPTIONS,
  )
  evaluated = dataclasses.replace(objective, items=config.eval_batch_size)
  eval_step = jax.jit(
    step_lib.make_eval_step(shape, evaluated),
    out_shardings=here,
    compiler_options=step_lib.COMPILER_OPTIONS,
  )
  return train_step, eval_step


def ahead(
  step: Callable,
  arguments: tuple[Any, ...],
  batches: Iterable[batch_lib.Batch],
) -> Callable:
  """The step, compiled now for every shape of batch that is to come.

  A batch of yet another shape is compiled when it comes.

  Args:
    step: from `training`.
    arguments: what it takes before the batch: arrays, or their shapes.
    batches: the shapes, one batch of each.
  """
  # Before and after: the peak is the greater of what the compiler and the steps
  # take, not their sum.
  _trim()
  compiled = {
    _sizes(batch): step.lower(*arguments, batch).compile() for batch in batches
  }
  _trim()

  def call(*arguments):
    return compiled.get(_sizes(arguments[-1]), step)(*arguments)

  return call


def keep_freed_memory() -> None:
  """From now on this process keeps freed memory and uses it again.

  XLA on a CPU takes the temporary memory of a step, one block, from malloc.
  glibc gives it back to the system as it is freed, so that each page of the
  next step is mapped, zeroed and faulted in again. Steps are also computed by
  the thread that calls them: threads of XLA's would take blocks from either of
  two arenas, for a fifth more peak memory.

  To be called before there is a backend, whose threads keep their arenas. Under
  another C library nothing is done. What the environment sets, each by its
  variable or all by GLIBC_TUNABLES, is left alone.

  References:
    mallopt(3), M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX.
  """
  library = ctypes.CDLL(None)
  glibc = hasattr(library, "gnu_get_libc_version")
  if not glibc or "GLIBC_TUNABLES" in os.environ:
    return
  for name, setting in _MALLOC.items():
    if name not in os.environ:
      library.mallopt(*setting)
  jax.config.update(_DISPATCH, False)


def _trim() -> None:
  """Gives memory that is free back to the system, where glibc is the library.

  References:
    malloc_trim(3).
  """
  library = ctypes.CDLL(None)
  if hasattr(library, "malloc_trim"):
    library.malloc_trim(ctypes.c_size_t(0))


def computed_at_call() -> bool:
  """Whether a step is computed when its call returns."""
  return jax.default_backend() == "cpu" and not jax.config.read(_DISPATCH)


def _sizes(batch: batch_lib.Batch) -> tuple[tuple[int, ...], ...]:
  return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def keep(directory: str) -> None:
  """Keeps compiled programs in a directory, from run to run; "" keeps none.

  Where JAX was told a directory already (JAX_COMPILATION_CACHE_DIR), it stays.
  """
  if directory and jax.config.jax_compilation_cache_dir is None:
    path = pathlib.Path(directory).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
