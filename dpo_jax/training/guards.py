"""Which updates are made, decided on the device; and a record of the others.

An update whose loss or gradient norm is not finite leaves weights and optimizer
as they were. The host reads the decision with the step's metrics, one step
late, and stops the run or lets it go on, as its config says: the device never
waits. skipped_updates.jsonl, there once an update was not made, holds each such
step
once: a resumed run drops the lines after the step that it goes on from.
"""

import dataclasses
import os
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dpo_jax.core import settings as settings_lib
from dpo_jax.io import atomic, strict_json
from dpo_jax.io import metrics as metrics_lib

SKIPPED = "skipped_updates.jsonl"

# What the step's metrics tell the host of the decision.
_TOLD = "guard/"


@dataclasses.dataclass(frozen=True)
class GuardSettings:
  """See configs/common.py for what each field means."""

  not_finite: Literal["stop", "skip"]
  max_skipped: int

  def __post_init__(self):
    settings_lib.check(self, "guards.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
  """What the guard knows of earlier steps; a part of the training state.

  Attributes:
    made: updates that were made, int32 [].
    skipped: updates that were not, int32 [].
  """

  made: jax.Array
  skipped: jax.Array


def init() -> GuardState:
  """The state of step 0."""
  zero = jnp.zeros((), jnp.int32)
  return GuardState(zero, zero)


def decide(
  state: GuardState, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, GuardState, dict[str, jax.Array]]:
  """Whether to make an update of this loss and gradient norm.

  Args:
    state: before this step.
    loss: float32 [].
    grad_norm: float32 [].

  Returns:
    The decision, bool []; the state after it; and metrics for `told`.
  """
  make = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  after = GuardState(
    state.made + make.astype(jnp.int32),
    state.skipped + (~make).astype(jnp.int32),
  )
  return make, after, {_TOLD + "made": make, _TOLD + "skipped": after.skipped}


def told(metrics: dict[str, Any]) -> dict[str, Any]:
  """Takes the decision out of a step's metrics.

  Returns:
    "made", whether the update was; and "skipped", how many so far were not.
  """
  return {
    key.removeprefix(_TOLD): metrics.pop(key)
    for key in list(metrics)
    if key.startswith(_TOLD)
  }


def read_skipped(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The incidents of a file; an interrupted last line is left out.

  Raises:
    ValueError: naming file and line, if one is no incident.
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
        f"{path}:{number} is not an incident with step, cause and items"
      )
    rows.append(row)
  return rows


class SkippedUpdateLog:
  """Appends incidents; each is on disk when `write` returns."""

  def __init__(self, directory: pathlib.Path, start_step: int):
    """Keeps the incidents up to and including `start_step`."""
    self._path = directory / SKIPPED
    if not self._path.exists():
      return
    kept = [
      row for row in read_skipped(self._path) if row["step"] <= start_step
    ]
    atomic.write_text(self._path, "".join(map(metrics_lib.encode, kept)))

  def write(self, row: dict[str, Any]) -> None:
    with self._path.open("a", encoding="utf-8") as file:
      file.write(metrics_lib.encode(row))
      file.flush()
      os.fsync(file.fileno())
