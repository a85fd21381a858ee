"""What a run's first and every later loss must be, or the run stops."""

import logging
import math
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from dpo_jax.core import errors, precision
from dpo_jax.training import config as config_lib
from dpo_jax.training import guards, losses

_log = logging.getLogger(__name__)

# How far the loss of an untrained policy may be from its known value, by what
# products are rounded to. On CPU both are exact; an accelerator may choose
# other bfloat16 kernels for the reference than for the policy.
START_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


# By how many nats the mean h may be off where the reference's log-probs were
# computed in other batches, whose shapes round otherwise.
KEPT_ROUNDING = {"float32": 1e-4, "bfloat16": 0.1}


class TrainingError(errors.Stopped):
  """The run had to stop; what it had saved before is whole."""


def start(config: config_lib.TrainSettings, loss: float) -> None:
  """An untrained policy equals its reference, so its loss is known.

  Raises:
    TrainingError: it is another.
  """
  if config.objective != "dpo":
    return
  wanted = losses.loss_at_start(config.loss)
  dtype = precision.matmul_dtype(config.model.dtype)
  tolerance = START_TOLERANCE[dtype] * max(wanted, 1)
  if config.precompute_reference:
    slope = losses.slope_at_start(config.loss)
    tolerance += slope * KEPT_ROUNDING[dtype]
  if abs(loss - wanted) > tolerance:
    raise TrainingError(
      f"the loss of step 0 is {loss:.8f}, not {wanted:.8f}: policy and"
      " reference differ before training, so their rewards mean nothing"
    )


def incident(
  step: int, row: dict[str, float], skipped: int, ids: Sequence[str]
) -> dict[str, Any]:
  """What there is to say of an update that was not made.

  Args:
    step: its number.
    row: its metrics.
    skipped: updates so far that were not made.
    ids: its items.
  """
  bad = "grad_norm" if math.isfinite(row["loss"]) else "loss"
  return {
    "step": step,
    "cause": f"{bad} is {row[bad]}",
    "loss": row["loss"],
    "grad_norm": row["grad_norm"],
    "skipped": skipped,
    "items": list(ids),
  }


def stop(settings: guards.GuardSettings, found: dict[str, Any]) -> None:
  """Ends the run at an incident, or lets it go on.

  Raises:
    TrainingError: the settings say to stop, or it is one skipped update too
      many.
  """
  text = f"step {found['step']}: {found['cause']}; the update was not made"
  if settings.not_finite == "skip":
    if found["skipped"] <= settings.max_skipped:
      _log.warning("%s; it is skipped (%d so far)", text, found["skipped"])
      return
    text += (
      f"; {found['skipped']} were not, more than"
      f" guards.max_skipped={settings.max_skipped}"
    )
  raise TrainingError(f"{text}. Its items: {', '.join(found['items'])}")


def out_of_memory(
  config: config_lib.TrainSettings, error: Exception
) -> TrainingError:
  """The error that names what decides a step's memory."""
  mesh = config.mesh
  return TrainingError(
    f"out of memory: {str(error).splitlines()[0]:.300}\n"
    "What a step needs is decided by: the rows of a micro-batch (raise"
    f" microbatches={config.microbatches}, or lower"
    f" batch_size={config.batch_size} or"
    f" eval_batch_size={config.eval_batch_size}), their length"
    f" (data.row_length={config.row_length},"
    f" data.max_length={config.data.max_length}), what is kept for the backward"
    f" pass (model.remat={config.model.remat!r}; 'full' keeps least), what is"
    f" trained (lora.rank={config.lora.rank}; 0 is all weights), and the mesh"
    f" (mesh.fsdp={mesh.fsdp} and mesh.tensor={mesh.tensor} split the weights)."
    "\npython -m dpo_jax plan with the same --config tells how much that is"
  )


def disk_full(workdir: pathlib.Path, error: OSError) -> TrainingError:
  """The error that says how much room there is where a file was written."""
  free = shutil.disk_usage(workdir).free
  return TrainingError(
    f"{error.filename or workdir}: {error.strerror}; {free:,} bytes are free."
    " What was committed is whole: make room and run the same command again"
  )
