"""What stops a run or skips an update: losses that are not what they must be.

An update whose loss or gradient norm is not finite leaves weights and optimizer
as they were; the step decides it on the device (`finite`). The host reads the
decision with the step's metrics, one step late, and stops the run or continues,
as configured. skipped_updates.jsonl holds each skipped update once: a resumed
run drops those after its checkpoint.
"""

import dataclasses
import errno
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dpo_jax.core import errors, precision
from dpo_jax.core import settings as settings_lib
from dpo_jax.io import atomic, strict_json
from dpo_jax.io import metrics as metrics_lib
from dpo_jax.training import losses

_log = logging.getLogger(__name__)

SKIPPED = "skipped_updates.jsonl"

# How far the loss of an untrained policy may be from its known value, by the
# precision of matrix products. On CPU both are exact; an accelerator may choose
# other bfloat16 kernels for the reference than for the policy.
START_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}

# By how many nats the mean h may be off where the reference's log-probs were
# precomputed in other batches, whose shapes round otherwise.
PRECOMPUTED_ROUNDING = {"float32": 1e-4, "bfloat16": 0.1}


class TrainingError(errors.Stopped):
  """The run had to stop; its last checkpoint is whole."""


@dataclasses.dataclass(frozen=True)
class GuardSettings:
  """See configs/common.py for what each field means."""

  not_finite: Literal["stop", "skip"]
  max_skipped: int

  def __post_init__(self):
    settings_lib.check(self, "guards.")


def finite(loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
  """Whether an update may be applied, bool []."""
  return jnp.isfinite(loss) & jnp.isfinite(grad_norm)


def check_first_loss(
  loss: float, settings: losses.LossSettings, dtype: str, *, precomputed: bool
) -> None:
  """Checks the DPO loss of step 0, where the policy is its reference.

  `precomputed` allows for the rounding of log-probs from other batches.

  Raises:
    TrainingError: it is not the loss of equal models.
  """
  expected = losses.loss_at_start(settings)
  dtype = precision.matmul_dtype(dtype)
  tolerance = START_TOLERANCE[dtype] * max(expected, 1)
  if precomputed:
    tolerance += losses.slope_at_start(settings) * PRECOMPUTED_ROUNDING[dtype]
  if abs(loss - expected) > tolerance:
    raise TrainingError(
      f"the loss of step 0 is {loss:.8f}, not {expected:.8f}: policy and"
      " reference differ before training, so their rewards mean nothing"
    )


def skip_or_stop(settings: GuardSettings, skipped: dict[str, Any]) -> None:
  """Continues after a skipped update, a row of `skipped_row`, or ends the run.

  Raises:
    TrainingError: the settings stop at the first, or at this many.
  """
  text = f"step {skipped['step']}: {skipped['cause']}; the update was skipped"
  if settings.not_finite == "skip":
    if skipped["skipped"] <= settings.max_skipped:
      _log.warning("%s (%d so far)", text, skipped["skipped"])
      return
    text += (
      f"; {skipped['skipped']} were, more than"
      f" guards.max_skipped={settings.max_skipped}"
    )
  raise TrainingError(f"{text}. Its items: {', '.join(skipped['items'])}")


def skipped_row(
  step: int, metrics: dict[str, float], skipped: int, ids: Sequence[str]
) -> dict[str, Any]:
  """The row of a step whose update was the `skipped`-th one skipped."""
  bad = "grad_norm" if math.isfinite(metrics["loss"]) else "loss"
  return {
    "step": step,
    "cause": f"{bad} is {metrics[bad]}",
    "loss": metrics["loss"],
    "grad_norm": metrics["grad_norm"],
    "skipped": skipped,
    "items": list(ids),
  }


def read_skipped(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of skipped_updates.jsonl without an interrupted last line.

  Raises:
    ValueError: a line is no skipped update; file and line are named.
  """
  rows = []
  for number, row in strict_json.appended(path):
    if not (
      isinstance(row, dict)
      and type(row.get("step")) is int
      and isinstance(row.get("cause"), str)
      and isinstance(row.get("items"), list)
    ):
      raise ValueError(
        f"{path}:{number} is not a skipped update with step, cause and items"
      )
    rows.append(row)
  return rows


def drop_skipped_after(directory: pathlib.Path, step: int) -> None:
  """Keeps the rows of skipped_updates.jsonl up to and including `step`."""
  path = directory / SKIPPED
  if path.exists():
    kept = [row for row in read_skipped(path) if row["step"] <= step]
    atomic.write_text(path, "".join(map(metrics_lib.encode, kept)))


def append_skipped(directory: pathlib.Path, row: dict[str, Any]) -> None:
  """Appends a row; it is on disk on return."""
  with (directory / SKIPPED).open("a", encoding="utf-8") as file:
    file.write(metrics_lib.encode(row))
    file.flush()
    os.fsync(file.fileno())


def explained(
  error: Exception, workdir: pathlib.Path, memory: dict[str, Any]
) -> TrainingError | None:
  """The error to raise for a lack of memory or disk; None for any other.

  `memory` holds the settings that decide a step's memory, by name.
  """
  if isinstance(error, OSError):
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      return None
    free = shutil.disk_usage(workdir).free
    return TrainingError(
      f"{error.filename or workdir}: {error.strerror}; {free:,} bytes are free."
      " What was committed is whole: make room and run the same command again"
    )
  if "RESOURCE_EXHAUSTED" not in str(error):
    return None
  values = ", ".join(f"{name}={value!r}" for name, value in memory.items())
  return TrainingError(
    f"out of memory: {str(error).splitlines()[0]:.300}\n"
    f"A step's memory is decided by {values}. Raise microbatches or lower the"
    " batch sizes for fewer rows, shorten rows, set model.remat='full' to keep"
    " the least for the backward pass, train adapters (lora.rank > 0), or split"
    " the weights (mesh.fsdp, mesh.tensor).\npython -m dpo_jax plan with the"
    " same --config prints the bytes of a device"
  )
