"""One JSON line a step: what happened, and how fast.

The file holds each step once. A resumed run drops the lines after the step it
goes on from, since those updates were lost with the process that made them.
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
  """The rows of a metrics file; an interrupted last line is left out.

  Raises:
    ValueError: naming file and line, if one is no object with a whole number
      as its step.
  """
  rows = []
  for number, row in strict_json.appended(path):
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
  """Appends rows to a run's metrics.jsonl."""

  def __init__(self, directory: pathlib.Path, start_step: int):
    """Opens the file, keeping rows up to and including `start_step`.

    A run that starts at step 0 starts over: its step 0 is evaluated again.
    """
    path = directory / FILE
    kept = []
    if start_step and path.exists():
      kept = [row for row in read(path) if row["step"] <= start_step]
    atomic.write_text(path, "".join(map(encode, kept)))
    self.rows = kept
    self._file = path.open("a", encoding="utf-8")

  def write(self, row: dict[str, Any]) -> None:
    self.rows.append(row)
    self._file.write(encode(row))
    self._file.flush()

  def at(self, step: int) -> list[dict[str, Any]]:
    """The rows of a step."""
    return [row for row in self.rows if row["step"] == step]

  def sync(self) -> None:
    """Puts all rows on disk, where a power cut leaves them."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class Silent:
  """What the other processes of a run have in place of a Writer."""

  def __init__(self, directory: pathlib.Path, start_step: int):
    del directory, start_step

  def write(self, row: dict[str, Any]) -> None:
    del row

  def table(self, step: int, name: str, columns: Any, rows: Any) -> None:
    del step, name, columns, rows

  def at(self, step: int) -> list[dict[str, Any]]:
    del step
    return []

  def sync(self) -> None:
    pass

  def close(self) -> None:
    pass


class Throughput:
  """Tokens and items per second between two calls.

  Args:
    items: what an item is, in the plural; the rate is called by it.
  """

  def __init__(self, items: str):
    self._items = items
    self._then = time.perf_counter()

  def __call__(self, tokens: int, items: int) -> dict[str, float]:
    """Rates since the last call, for real tokens, padding not counted."""
    now = time.perf_counter()
    seconds, self._then = max(now - self._then, 1e-9), now
    return {
      "tokens_per_second": tokens / seconds,
      f"{self._items}_per_second": items / seconds,
    }


def encode(row: dict[str, Any]) -> str:
  """The row's line of JSON, newline included."""
  values = {key: _plain(value) for key, value in row.items()}
  return json.dumps(values, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
  """JSON has no NaN: a non-finite number is written as its name."""
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value
