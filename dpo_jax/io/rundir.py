"""Directory of a run, which belongs to one config.

A run starts by writing config.json; it resumes only with the same values.
"""

import json
import pathlib
import resource
import tempfile
from collections.abc import Iterable
from typing import Any

from dpo_jax.core import settings
from dpo_jax.io import atomic, metrics, step_files, strict_json

FINISHED = "finished.json"
# Checkpoints are written to many files at a time.
_OPEN_FILES = 64


def prepare(workdir: pathlib.Path, *names: str) -> None:
  """Creates a directory, and others in it.

  Raises:
    ValueError: one is read-only, or too few files may be open.
  """
  limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
  if 0 <= limit < _OPEN_FILES:
    raise ValueError(
      f"only {limit} files may be open at a time: raise the limit to"
      f" {_OPEN_FILES} or more (ulimit -n)"
    )
  for directory in (workdir, *(workdir / name for name in names)):
    try:
      directory.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryFile(dir=directory) as probe:
        probe.write(b"\0" * 4096)
    except OSError as error:
      raise ValueError(
        f"{directory} cannot be written: {error.strerror}; make room or make"
        " it writable, or name another --workdir"
      ) from error


def refuse_foreign(workdir: pathlib.Path) -> None:
  """Checks that a run may start or resume in a directory.

  Raises:
    ValueError: it has no config.json, but more than logs and what a refused
      run leaves.
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
  """Writes `values` to config.json if they are new; ValueError as `check`."""
  path = workdir / "config.json"
  if check(workdir, values, allowed) or not path.exists():
    atomic.write_text(path, json.dumps(values, indent=2) + "\n")


def check(
  workdir: pathlib.Path, values: dict[str, Any], allowed: Iterable[str] = ()
) -> list[str]:
  """Compares a config with that of a directory's run, if there is one.

  Args:
    workdir: the directory.
    values: of the config.
    allowed: names of fields that may differ: "loss.beta", or "loss" for all in
      it.

  Returns:
    Lines "config.loss.beta: 1 -> 2" of those that do.

  Raises:
    ValueError: other fields differ, all of them named; or config.json is not
      JSON.
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
  """`check` against the config of a run in a directory or a bucket."""
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


def portable(values: Any, root: pathlib.Path) -> Any:
  """`values` with {workdir} for `root` at the start of every path below it.

  A directory that was moved, or is reached by another path, is then the same.
  """
  if isinstance(values, dict):
    return {key: portable(value, root) for key, value in values.items()}
  if isinstance(values, list | tuple):
    return type(values)(portable(value, root) for value in values)
  if isinstance(values, str) and f"{values}/".startswith(f"{root}/"):
    return "{workdir}" + values.removeprefix(str(root))
  return values


def beyond(changed: Iterable[str], allowed: Iterable[str]) -> list[str]:
  """The lines of `check` that are about none of the `allowed` fields."""
  starts = tuple(f"config.{name}{end}" for name in allowed for end in ":.")
  return [line for line in changed if not line.startswith(starts)]


def finish(workdir: pathlib.Path, step: int) -> None:
  """Writes finished.json, the manifest of models, adapters and metrics."""
  found = [workdir / metrics.FILE]
  for models in ("export", "adapters/step-*"):
    # Not the hidden files of a system.
    found += sorted(workdir.glob(f"{models}/[!.]*"))
  files = {
    file.relative_to(workdir).as_posix(): step_files.describe(file)
    for file in found
  }
  text = step_files.encode(step_files.Manifest(step, files)).decode()
  atomic.write_text(workdir / FINISHED, text)


def finished(workdir: pathlib.Path) -> step_files.Manifest | None:
  """What `finish` wrote, or None of a run that is not finished.

  Raises:
    ValueError: finished.json is not what a run writes.
  """
  path = workdir / FINISHED
  if not path.exists():
    return None
  try:
    return step_files.decode(strict_json.read_bytes(path))
  except ValueError as error:
    raise ValueError(
      f"{path} is damaged ({error}): delete it, and the same command exports"
      " the model again from the newest checkpoint"
    ) from error


def refuse_damaged(workdir: pathlib.Path, part: str = "") -> None:
  """Compares files of a finished run, or below `part`, with finished.json.

  Raises:
    ValueError: one of them is missing or differs.
  """
  manifest = finished(workdir)
  for name, wanted in manifest.files.items() if manifest else ():
    file = workdir / name
    if f"{name}/".startswith(part) and not (
      file.is_file() and step_files.describe(file) == wanted
    ):
      raise ValueError(
        f"{file} is not what its run wrote: copy it back, or delete"
        f" {workdir / FINISHED} and run the same command again"
      )


def begun(workdir: pathlib.Path) -> dict[str, Any]:
  """The config of a directory's run, {} of a new one; ValueError if damaged."""
  path = workdir / "config.json"
  return strict_json.read_object(path) if path.exists() else {}
