"""incidents.jsonl: the updates of a run that were not made, and their items.

The file is there once there was an incident. Like the metrics, it holds each
step once: a resumed run drops the lines after the step that it goes on from.
"""

import json
import math
import os
import pathlib
from typing import Any

from dpo_jax.storage import strict_json

FILE = "incidents.jsonl"


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
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


class Writer:
  """Appends incidents; each is on disk when `write` returns."""

  def __init__(self, directory: pathlib.Path, start_step: int):
    """Keeps the incidents up to and including `start_step`."""
    self._path = directory / FILE
    if not self._path.exists():
      return
    kept = [row for row in read(self._path) if row["step"] <= start_step]
    scratch = self._path.with_suffix(".tmp")
    with scratch.open("wb") as file:
      _commit(file, kept)
    os.replace(scratch, self._path)

  def write(self, row: dict[str, Any]) -> None:
    with self._path.open("ab") as file:
      _commit(file, [row])


def _commit(file, rows: list[dict[str, Any]]) -> None:
  file.writelines(
    json.dumps(
      {key: _plain(value) for key, value in row.items()}, ensure_ascii=False
    ).encode()
    + b"\n"
    for row in rows
  )
  file.flush()
  os.fsync(file.fileno())


def _plain(value: Any) -> Any:
  """JSON has no NaN: a number that is not finite is written as its name."""
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value
