"""What stops a run or skips an update: losses that are not what they must be.

An update whose loss or gradient norm is not finite leaves weights and optimizer
as they were; the step decides it on the device (`finite`). The host reads the
decision with the step's metrics, one step late, and stops the run or continues,
as configured.
"""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from dpo_jax.core import errors, precision
from dpo_jax.core import settings as settings_lib

_log = logging.getLogger(__name__)

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
  metrics: dict[str, float],
  start: dict[str, tuple[float, float]],
  dtype: str,
  *,
  precomputed: bool,
) -> None:
  """Checks the loss before the first update, where policy and reference agree.

  `start` is `losses.at_start`; `precomputed` allows for the rounding of
  log-probs from other batches.

  Raises:
    TrainingError: it is not the loss of equal models.
  """
  dtype = precision.matmul_dtype(dtype)
  for name, (expected, slope) in start.items():
    found = metrics[name]
    tolerance = START_TOLERANCE[dtype] * max(expected, 1)
    if precomputed:
      tolerance += slope * PRECOMPUTED_ROUNDING[dtype]
    if abs(found - expected) > tolerance:
      raise TrainingError(
        f"the first {name} is {found:.8f}, not {expected:.8f}:"
        " policy and reference differ before training, so their rewards mean"
        " nothing"
      )


def skip_or_stop(
  settings: GuardSettings,
  step: int,
  metrics: dict[str, float],
  skipped: int,
  ids: Sequence[str],
) -> None:
  """Continues after the run's `skipped`-th skipped update, or ends the run.

  Raises:
    TrainingError: the settings stop at the first, or at this many; `ids` of the
      step's items are named.
  """
  bad = "grad_norm" if math.isfinite(metrics["loss"]) else "loss"
  text = f"step {step}: {bad} is {metrics[bad]}; the update was skipped"
  if settings.not_finite == "skip":
    if skipped <= settings.max_skipped:
      _log.warning("%s (%d so far)", text, skipped)
      return
    text += (
      f"; {skipped} were, more than guards.max_skipped={settings.max_skipped}"
    )
  raise TrainingError(f"{text}. Its items: {', '.join(ids)}")


def explained(error: Exception, workdir: pathlib.Path) -> errors.Stopped | None:
  """The error to raise for a lack of memory, disk or files; else None."""
  if isinstance(error, OSError):
    return errors.limit(error, workdir)
  if "RESOURCE_EXHAUSTED" not in str(error):
    return None
  return TrainingError(
    f"out of memory: {str(error).splitlines()[0]:.300}\n"
    "Raise microbatches or lower batch_size and eval_batch_size for fewer rows,"
    " shorten rows (data.row_length, data.max_length), set model.remat='full'"
    " to keep the least for the backward pass, train adapters (lora.rank > 0),"
    " or split the weights (mesh.fsdp, mesh.tensor).\npython -m dpo_jax plan"
    " with the same --config prints the bytes of a device"
  )
