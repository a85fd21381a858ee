"""A run's model, state and compiled steps.

The planner lowers the same functions with shapes instead of arrays: what is
planned is what runs.
"""

import ctypes
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax

from dpo_jax.core import console, distributed, sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.io import metrics
from dpo_jax.model import attention, flops, gpt_neox, hf, quantization
from dpo_jax.training import config as config_lib
from dpo_jax.training import guards, loop, losses, trackers
from dpo_jax.training import step as step_lib

Tree = dict[str, Any]


def keep_freed_memory() -> None:
  """Reuses freed memory instead of returning it to the system, under glibc.

  XLA on a CPU allocates a step's temporary memory by malloc; returned, all its
  pages are faulted in again at the next step. To be called before the first
  computation.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, "mallopt"):
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    # More arenas would each keep what a compiler's thread has freed.
    libc.mallopt(-8, 2)  # M_ARENA_MAX
  # Steps on the calling thread: arenas of others do not hold large blocks.
  jax.config.update("jax_cpu_enable_async_dispatch", False)


def release_freed_memory() -> None:
  """Returns freed memory to the system now, under glibc."""
  libc = ctypes.CDLL(None)
  if hasattr(libc, "malloc_trim"):
    libc.malloc_trim(ctypes.c_size_t(0))


def use_compilation_cache() -> None:
  """Keeps compiled programs from run to run, so that the next starts faster.

  In JAX_COMPILATION_CACHE_DIR, by default ~/.cache/dpo_jax/xla.
  """
  if jax.config.jax_compilation_cache_dir is None:
    path = pathlib.Path("~/.cache/dpo_jax/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))


def load_model(
  config: config_lib.TrainSettings,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
) -> tuple[gpt_neox.ModelConfig, Tree]:
  """The model's config and its base weights, not quantized.

  Raises:
    ValueError: the weights are not readable, or the model does not fit the
      devices, the tokenizer or data.max_length.
  """
  path = config.model.path
  model = config.computing(hf.read_config(path))
  attention.check(
    model.attention,
    mesh.devices.flat[0],
    dtype=model.dtype,
    head_dim=model.head_dim,
    row_length=config.row_length,
  )
  if tokenizer.vocab_size > model.vocab_size:
    raise ValueError(
      f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens,"
      f" but model {path} only {model.vocab_size}"
    )
  if config.data.max_length > model.max_positions:
    raise ValueError(
      f"data.max_length={config.data.max_length} is more than the"
      f" {model.max_positions} positions of {path}"
    )
  return model, _load_base(config.model, mesh)


def _load_base(
  settings: config_lib.ModelSettings, mesh: jax.sharding.Mesh | None
) -> Tree:
  # Weights are quantized from float32.
  kept = settings.param_dtype
  _, base = hf.load(
    settings.path,
    dtype=settings.dtype,
    remat=settings.remat,
    lora=None,
    param_dtype="float32" if kept == "int8" else kept,
    mesh=mesh,
  )
  return base


def load_adapters(
  settings: config_lib.LoraSettings,
  model: gpt_neox.ModelConfig,
  base: Tree,
  mesh: jax.sharding.Mesh,
) -> Tree | None:
  """The adapters that training begins from; None if from zero.

  Raises:
    ValueError: they are not readable, of another base, or not as in `settings`.
  """
  if not settings.path:
    return None
  found, lora = hf.load_adapter(settings.path, model, base)
  # Dropout is the run's own.
  wanted = dataclasses.replace(settings.config(), dropout=found.dropout)
  if found != wanted:
    raise ValueError(
      f"lora.path={settings.path!r} has {found}, not {wanted}: set lora.rank,"
      " lora.alpha and lora.targets to its own"
    )
  return jax.device_put(lora, sharding.shardings(lora, mesh))


def weights_hash(base_hash: str, lora: Tree | None) -> str:
  """Hash of the base and of the adapters that training begins from, if any."""
  return base_hash if lora is None else f"{base_hash}+{hf.content_hash(lora)}"


def reload_base(
  settings: config_lib.ModelSettings,
  mesh: jax.sharding.Mesh | None,
  content_hash: str,
) -> Tree:
  """The base weights before quantization, read again.

  Raises:
    ValueError: they are not those that the run began with.
  """
  base = _load_base(settings, mesh)
  found = hf.content_hash(base)
  if found != content_hash:
    raise ValueError(
      f"{settings.path} holds other weights than when the run began"
      f" ({found}, not {content_hash}): put those back, and run again"
    )
  return base


def quantize(base: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """`quantization.base`, sharded over the mesh."""
  shapes = jax.eval_shape(quantization.base, base)
  sharded = sharding.shardings(shapes, mesh)
  return jax.jit(quantization.base, out_shardings=sharded)(base)


def initial_state(
  model: gpt_neox.ModelConfig, tx: optax.GradientTransformation
) -> Callable[[Tree, Tree | None, jax.Array], step_lib.TrainState]:
  """(base, adapters or None for fresh ones, key) -> the state of step 0."""

  def make(base, lora, key):
    if lora is None:
      lora = gpt_neox.init_lora(model, key) if model.lora else {}
    return step_lib.init_state(base, lora, tx)

  return make


def make_state(
  model: gpt_neox.ModelConfig,
  base: Tree,
  lora: Tree | None,
  tx: optax.GradientTransformation,
  seed: int,
  mesh: jax.sharding.Mesh,
  *,
  donate: bool,
) -> step_lib.TrainState:
  """The state of step 0, sharded over the mesh; `donate` gives `base` up.

  `lora` None is fresh adapters.
  """
  make = initial_state(model, tx)
  # Another stream than dropout's, which folds steps into the seed.
  key = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)
  sharded = sharding.shardings(jax.eval_shape(make, base, lora, key), mesh)
  jitted = jax.jit(
    make, out_shardings=sharded, donate_argnums=(0,) if donate else ()
  )
  return jitted(base, lora, key)


def jit_steps(
  model: gpt_neox.ModelConfig,
  objective: step_lib.Objective,
  eval_items: int,
  tx: optax.GradientTransformation,
  seed: int,
  state: step_lib.TrainState,
  mesh: jax.sharding.Mesh,
) -> tuple[Callable, Callable]:
  """The training and the evaluation step under jax.jit.

  `state` may be shapes instead of arrays. `eval_items` are those of an
  evaluation batch.
  """
  replicated = sharding.replicated(mesh)
  train_step = jax.jit(
    step_lib.make_train_step(model, objective, tx, seed),
    donate_argnums=0,
    out_shardings=(sharding.shardings(state, mesh), replicated),
    compiler_options=step_lib.COMPILER_OPTIONS,
  )
  evaluated = dataclasses.replace(objective, items=eval_items)
  eval_step = jax.jit(
    step_lib.make_eval_step(model, evaluated),
    out_shardings=replicated,
    compiler_options=step_lib.COMPILER_OPTIONS,
  )
  return train_step, eval_step


def step_log(
  config: config_lib.TrainSettings,
  workdir: pathlib.Path,
  model: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  rates: np.ndarray,
  start: int,
) -> loop.StepLog:
  """The log of a run's steps after `start`; the first process writes it."""
  if distributed.is_main():
    writer = trackers.Writer(config.trackers, workdir, start)
  else:
    writer = metrics.Writer(None, start)
    console.mute()
  is_dpo = config.objective == "dpo"
  objective = config.step_objective()
  live = objective.has_reference and not config.precompute_reference
  # Fresh adapters are zero; others differ from the reference by their dropout.
  same = not (config.lora.path and config.lora.dropout)
  starts_equal = objective.has_reference and same
  check_first = functools.partial(
    guards.check_first_loss,
    start=losses.at_start(config.loss) if starts_equal else {},
    dtype=config.model.dtype,
    precomputed=config.precompute_reference,
  )
  return loop.StepLog(
    writer,
    rates,
    start,
    f"{config.objective} {workdir.name}",
    "pairs" if is_dpo and not config.loss.labeled else "examples",
    config.guards,
    check_first,
    functools.partial(flops.step, model, reference=live),
    mesh.devices,
  )


def compile_ahead(
  step: Callable,
  arguments: tuple[Any, ...],
  batches: Iterable[batch_lib.Batch],
) -> Callable:
  """The step, compiled now for every shape of batch of the run.

  `arguments` come before the batch; they and `batches` may be arrays or shapes.
  A batch of another shape is compiled when it comes.
  """
  # The compiler's memory and that of the steps are then not added up.
  release_freed_memory()
  compiled = {
    _shapes(batch): step.lower(*arguments, batch).compile() for batch in batches
  }
  release_freed_memory()

  def call(*arguments):
    return compiled.get(_shapes(arguments[-1]), step)(*arguments)

  return call


def _shapes(batch: batch_lib.Batch) -> tuple[tuple[int, ...], ...]:
  return tuple(leaf.shape for leaf in jax.tree.leaves(batch))
