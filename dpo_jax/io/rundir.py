"""A run's directory belongs to one config.

Whoever begins a run writes config.json; whoever goes on with it must bring the
same values, or is told which differ.
"""

import json
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

from dpo_jax.core import settings
from dpo_jax.io import atomic, strict_json


def prepare(workdir: pathlib.Path, *names: str) -> None:
  """Makes a directory, and others in it, and tries to write to each.

  Raises:
    ValueError: one cannot be made or written, and why.
  """
  for directory in (workdir, *(workdir / name for name in names)):
    try:
      directory.mkdir(parents=True, exist_ok=True)
      # Without a name: a process killed here leaves nothing.
      with tempfile.TemporaryFile(dir=directory) as probe:
        probe.write(b"\0" * 4096)
    except OSError as error:
      raise ValueError(
        f"{directory} cannot be written: {error.strerror}; make room or make"
        " it writable, or name another --workdir"
      ) from error


def refuse_foreign(workdir: pathlib.Path) -> None:
  """Checks that a run may begin, or go on, in a directory.

  A run is begun by its config.json. Without one, only what a run that was
  refused may leave, and logs, may lie there.

  Raises:
    ValueError: something else does.
  """
  if (workdir / "config.json").exists():
    return
  foreign = sorted(
    path.name
    for path in workdir.iterdir()
    if path.name not in ("lock", "manifest.json", "reference")
    and not path.name.startswith(".")
    and path.suffix not in (".err", ".log", ".out", ".txt")
    and not (path.is_dir() and not any(path.iterdir()))
  )
  if foreign:
    raise ValueError(
      f"{workdir} has no config.json, so no run was begun there, but it holds"
      f" {', '.join(foreign[:5])}: name an empty --workdir, or put config.json"
      " back"
    )


def claim(
  workdir: pathlib.Path, values: dict[str, Any], allowed: Iterable[str] = ()
) -> None:
  """Writes `values` as config.json, unless they are there.

  Raises:
    ValueError: see `check`.
  """
  path = workdir / "config.json"
  if check(workdir, values, allowed) or not path.exists():
    atomic.write_text(path, json.dumps(values, indent=2) + "\n")


def check(
  workdir: pathlib.Path, values: dict[str, Any], allowed: Iterable[str] = ()
) -> list[str]:
  """Checks that a directory, if it was begun, was begun with `values`.

  Args:
    workdir: the directory.
    values: of a config.
    allowed: names of values that may be others now: "loss.beta", or "loss"
      for all in it.

  Returns:
    Lines "config.loss.beta: 1 -> 2" of those that are.

  Raises:
    ValueError: the directory was begun with other values, all of them named,
      or holds a config.json that is none.
  """
  if not (workdir / "config.json").exists():
    return []
  return refuse_other(workdir, begun(workdir), values, allowed)


def refuse_other(
  where: Any,
  begun_with: Any,
  values: dict[str, Any],
  allowed: Iterable[str] = (),
) -> list[str]:
  """As `check`, of the values that the run at `where` was begun with."""
  what = "--workdir" if isinstance(where, pathlib.Path) else "checkpoint_bucket"
  found = settings.differing(begun_with, json.loads(json.dumps(values)))
  if refused := beyond(found, allowed):
    allow = ""
    if "allow_changes" in values:
      allow = ", or name in --config.allow_changes what may be another"
    raise ValueError(
      f"{where} was begun with another config:\n  "
      + "\n  ".join(refused)
      + f"\nuse another {what}, or the values that it was begun with{allow}"
    )
  return found


def beyond(changed: Iterable[str], allowed: Iterable[str]) -> list[str]:
  """Of the lines that `check` returns, those about none of `allowed`."""
  starts = tuple(f"config.{name}{end}" for name in allowed for end in ":.")
  return [line for line in changed if not line.startswith(starts)]


def begun(workdir: pathlib.Path) -> dict[str, Any]:
  """The values that a directory was begun with; {} for a new one.

  Raises:
    ValueError: its config.json is not an object in JSON.
  """
  path = workdir / "config.json"
  return strict_json.read_object(path) if path.exists() else {}
