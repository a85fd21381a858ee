"""A run's directory belongs to one config.

Whoever begins a run writes config.json; whoever goes on with it must bring the
same values, or is told which differ.
"""

import json
import pathlib
from typing import Any

from dpo_jax import records, settings, strict_json


def claim(workdir: pathlib.Path, values: dict[str, Any]) -> None:
  """Writes `values` as config.json, or checks that they are those there.

  Raises:
    ValueError: see `check`.
  """
  check(workdir, values)
  path = workdir / "config.json"
  if not path.exists():
    records.write_atomic(path, json.dumps(values, indent=2) + "\n")


def check(workdir: pathlib.Path, values: dict[str, Any]) -> None:
  """Checks that a directory, if it was begun, was begun with `values`.

  Raises:
    ValueError: the directory was begun with other values, all of them named,
      or holds a config.json that is none.
  """
  if not (workdir / "config.json").exists():
    return
  changed = settings.differing(begun(workdir), json.loads(json.dumps(values)))
  if changed:
    raise ValueError(
      f"{workdir} was begun with another config:\n  "
      + "\n  ".join(changed)
      + "\nuse another --workdir, or the values that it was begun with"
    )


def begun(workdir: pathlib.Path) -> dict[str, Any]:
  """The values that a directory was begun with; {} for a new one.

  Raises:
    ValueError: its config.json is not an object in JSON.
  """
  path = workdir / "config.json"
  return strict_json.read_object(path) if path.exists() else {}
