"""metrics.jsonl: one row of metrics a step.

A resumed run drops the rows after the step that it resumes from: those updates
were lost with the process that made them.
"""

import json
import math
import os
import pathlib
import time
from typing import Any

from dpo_jax.io import atomic, strict_json

FILE = "metrics.jsonl"


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a metrics file, without a last line that was cut.

  Raises:
    ValueError: naming file and line, if one is no object with an integer step.
  """
  rows = []
  values, _, _ = strict_json.scan(path, strict_json.parse)
  for number, row in enumerate(values, 1):
    if not isinstance(row, dict) or type(row.get("step")) is not int:
      raise ValueError(f"{path}:{number} is not a row of metrics with a step")
    for name, value in row.items():
      if type(value) not in (int, float, str):
        raise ValueError(
          f"{path}:{number}: field {name!r:.80} is {value!r:.40}, not a number"
        )
    rows.append(row)
  return rows


class Writer:
  """Appends rows to a run's metrics.jsonl; without a directory to nothing."""

  def __init__(self, directory: pathlib.Path | None, start_step: int):
    """Opens the file and keeps rows up to `start_step`; at 0 it keeps none."""
    self.rows: list[dict[str, Any]] = []
    self._file = None
    if directory is None:
      return
    path = directory / FILE
    if start_step and path.exists():
      self.rows = [row for row in read(path) if row["step"] <= start_step]
    atomic.write_text(path, "".join(map(encode, self.rows)))
    self._file = path.open("a", encoding="utf-8")

  def write(self, row: dict[str, Any]) -> None:
    if self._file:
      self.rows.append(row)
      self._file.write(encode(row))
      self._file.flush()

  def at(self, step: int) -> list[dict[str, Any]]:
    """The rows of a step."""
    return [row for row in self.rows if row["step"] == step]

  def sync(self) -> None:
    """Makes all rows survive a power cut."""
    if self._file:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file:
      self._file.close()


class Throughput:
  """Tokens and items per second since the last call.

  Args:
    items: plural name of the items, for the metric's name.
  """

  def __init__(self, items: str):
    self._items = items
    self._then = time.perf_counter()

  def __call__(self, tokens: int, items: int) -> dict[str, float]:
    now = time.perf_counter()
    seconds, self._then = max(now - self._then, 1e-9), now
    return {
      "tokens_per_second": tokens / seconds,
      f"{self._items}_per_second": items / seconds,
    }


def encode(row: dict[str, Any]) -> str:
  """JSON line of a row, newline included."""
  values = {key: _plain(value) for key, value in row.items()}
  return json.dumps(values, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
  """A value that JSON can hold: non-finite numbers become "nan" or "inf"."""
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value
