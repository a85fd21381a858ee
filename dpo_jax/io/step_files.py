"""The files of a run's checkpoints: which steps are whole, and which are kept.

A step is a directory named by its number. Its manifest.json, written last,
holds the SHA-256 of every other file and of itself: a step without one was
never completed, and one whose files differ from it is damaged. Neither is ever
gone on from, and neither is deleted: it is renamed to `<step>.rejected`.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import pathlib
import shutil
import sys
import types
from collections.abc import Set
from typing import Any, Literal

from dpo_jax.core import console
from dpo_jax.io import atomic, hashing, strict_json

MANIFEST = "manifest.json"
# A step being deleted: a killed deletion must not look like a damaged step.
_DELETING = ".deleting"
_REJECTED = ".rejected"
# What orbax calls a step that it is still writing.
_WRITING = ".orbax-checkpoint-tmp"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Retention:
  """Which steps are kept: those that any rule keeps.

  The rules are the `newest` steps (0: all), multiples of `every` (0: none), and
  the `best` steps by an evaluation's `metric`; of equals the earlier is better,
  and steps where it is missing or not finite are not among the best.
  """

  newest: int
  every: int
  best: int
  metric: str
  best_is: Literal["lowest", "highest"]

  def kept(self, found: dict[int, dict[str, float]]) -> set[int]:
    """The steps to keep, of steps with their metrics."""
    # Not at the top: `checkpoint list` would take a second longer.
    from orbax.checkpoint import checkpoint_managers as policies

    sign = 1 if self.best_is == "lowest" else -1
    ranks = {
      step: (sign * metrics[self.metric], step)
      for step, metrics in found.items()
      if math.isfinite(metrics.get(self.metric, math.nan))
    }
    rules: list[policies.PreservationPolicy] = [
      policies.LatestN(self.newest or None),
      policies.BestN(
        get_metric_fn=lambda rank: rank,
        reverse=True,
        # Asked for as many as there are steps, it keeps those without a metric.
        n=min(self.best, len(ranks)),
        keep_checkpoints_without_metrics=False,
      ),
    ]
    if self.every:
      rules.append(policies.EveryNSteps(self.every))
    steps: list[Any] = [
      types.SimpleNamespace(step=step, metrics=ranks.get(step))
      for step in sorted(found)
    ]
    kept = policies.AnyPreservationPolicy(rules).should_preserve(
      steps, context=policies.PreservationContext()
    )
    return {item.step for item, keep in zip(steps, kept) if keep}


def steps(directory: pathlib.Path) -> list[int]:
  """All steps of a directory in ascending order, whole or not."""
  if not directory.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in directory.iterdir()
    if path.name.isdecimal() and path.is_dir()
  )


def complete(
  directory: pathlib.Path, step: int, metrics: dict[str, float]
) -> None:
  """Writes a step's manifest once all its files are on disk.

  Args:
    directory: the run's checkpoints.
    step: whose files are all written.
    metrics: of the evaluation at this step, for retention.
  """
  path = directory / str(step)
  files = _files(path)

  def flushed(name):
    atomic.sync(path / name)
    return hashing.file_hash(path / name)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    hashes = list(pool.map(flushed, files))
  for folder in (*filter(pathlib.Path.is_dir, path.rglob("*")), path):
    atomic.sync(folder)
  manifest = {
    "format": _FORMAT,
    "step": step,
    "metrics": _finite(metrics),
    "files": {
      name: {"bytes": (path / name).stat().st_size, "sha256": digest}
      for name, digest in zip(files, hashes)
    },
  }
  _write(directory, step, manifest)


def problem(directory: pathlib.Path, step: int) -> str:
  """What is wrong with a step, every file compared; "" if it is whole."""
  path = directory / str(step)
  if not (path / MANIFEST).is_file():
    return f"it has no {MANIFEST}: its save was interrupted"
  try:
    wanted = _manifest(directory, step)["files"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    return str(error)
  found = _files(path)
  for what, names in (
    ("missing", wanted.keys() - set(found)),
    ("not its own", set(found) - wanted.keys()),
  ):
    if names:
      return f"{len(names)} files are {what}: {', '.join(sorted(names)[:3])}"

  def differs(name):
    size = (path / name).stat().st_size
    if size != wanted[name]["bytes"]:
      return f"{name} has {size} bytes, not {wanted[name]['bytes']}"
    if hashing.file_hash(path / name) != wanted[name]["sha256"]:
      return f"{name} is not what was written"
    return ""

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    return next(filter(None, pool.map(differs, found)), "")


def metrics(directory: pathlib.Path, step: int) -> dict[str, float]:
  """The evaluation at a whole step.

  Raises:
    ValueError: its manifest is damaged.
  """
  return _manifest(directory, step)["metrics"]


def hashes(directory: pathlib.Path, step: int) -> dict[str, str]:
  """The SHA-256 of each file of a step, but its manifest, as it was completed.

  Raises:
    ValueError: its manifest is damaged.
  """
  files = _manifest(directory, step)["files"]
  return {name: file["sha256"] for name, file in files.items()}


def staged(directory: pathlib.Path, step: int) -> pathlib.Path:
  """Where a step's files are brought to before it is seen."""
  return directory / f"{step}{_WRITING}-brought"


def install(directory: pathlib.Path, step: int) -> None:
  """Makes a step of what was staged; what is in its place is put aside."""
  path = directory / str(step)
  if path.exists():
    aside = path.with_name(path.name + _REJECTED)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
  staged(directory, step).rename(path)
  atomic.sync(directory)


def note(directory: pathlib.Path, step: int, metrics: dict[str, float]) -> None:
  """Puts the evaluation of a whole step into its manifest."""
  manifest = _manifest(directory, step) | {"metrics": _finite(metrics)}
  _write(directory, step, manifest)


def size(directory: pathlib.Path, step: int) -> int:
  """Bytes of a step's files."""
  path = directory / str(step)
  return sum((path / name).stat().st_size for name in _files(path))


def newest(directory: pathlib.Path) -> tuple[int | None, list[str]]:
  """The newest whole step, and why those after it are not.

  Raises:
    ValueError: a step was whole once, but none is now.
  """
  problems = []
  completed = False
  for step in reversed(steps(directory)):
    found = problem(directory, step)
    if not found:
      return step, problems
    completed |= (directory / str(step) / MANIFEST).exists()
    problems.append(f"{directory / str(step)} is not used: {found}")
  if completed:
    raise ValueError(
      f"{directory} holds no whole checkpoint:\n  "
      + "\n  ".join(problems)
      + f"\ncopy one back, or delete {directory} to start over"
    )
  return None, problems


def tidy(directory: pathlib.Path, latest: int | None) -> None:
  """Puts aside what an interrupted process left; `latest` is the newest step.

  Steps after `latest` are renamed, half-written and half-deleted ones removed.

  Raises:
    ValueError: the directory holds what no run wrote.
  """
  for path in directory.iterdir():
    if path.name.endswith(_DELETING) or _WRITING in path.name:
      shutil.rmtree(path)
    elif path.name.isdecimal() and (latest is None or int(path.name) > latest):
      aside = path.with_name(path.name + _REJECTED)
      shutil.rmtree(aside, ignore_errors=True)
      path.rename(aside)
    elif not (path.name.isdecimal() or path.name.endswith(_REJECTED)):
      raise ValueError(
        f"{path} is no checkpoint: move it away, or use another directory"
      )
  atomic.sync(directory)


def prune(
  directory: pathlib.Path,
  retention: Retention,
  held: Set[int] = frozenset(),
) -> None:
  """Deletes completed steps that no rule keeps, and nobody holds."""
  found = {}
  for step in steps(directory):
    # One that is damaged neither counts nor is deleted.
    with contextlib.suppress(OSError, ValueError):
      found[step] = metrics(directory, step)
  for step in sorted(found.keys() - retention.kept(found) - held):
    path = directory / str(step)
    gone = path.with_name(path.name + _DELETING)
    path.rename(gone)
    atomic.sync(directory)
    shutil.rmtree(gone)


def _finite(metrics: dict[str, float]) -> dict[str, float]:
  return {k: value for k, value in metrics.items() if math.isfinite(value)}


def _write(directory: pathlib.Path, step: int, manifest: dict) -> None:
  manifest = manifest | {"sha256": _own_hash(manifest)}
  text = json.dumps(manifest, indent=2) + "\n"
  atomic.write_text(directory / str(step) / MANIFEST, text)
  atomic.sync(directory)


def _manifest(directory: pathlib.Path, step: int) -> dict:
  path = directory / str(step) / MANIFEST
  found = strict_json.read(path)
  if not isinstance(found, dict) or found.get("sha256") != _own_hash(found):
    raise ValueError(f"{MANIFEST} is not what was written")
  if found["format"] != _FORMAT or found["step"] != step:
    raise ValueError(
      f"{MANIFEST} is of step {found['step']} in format {found['format']}"
    )
  return found


def _own_hash(manifest: dict) -> str:
  content = {key: value for key, value in manifest.items() if key != "sha256"}
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _files(path: pathlib.Path) -> list[str]:
  """All files beneath a step but its manifest, sorted."""
  return sorted(
    file.relative_to(path).as_posix()
    for file in path.rglob("*")
    if not file.is_dir() and file != path / MANIFEST
  )


def main(arguments: list[str]) -> int:
  """What a run's checkpoints are: python -m dpo_jax checkpoint COMMAND DIR.

  `list` prints each step with its size and evaluation. `verify` compares every
  file with its step's manifest and fails if one differs. DIR is a run's
  directory, or its checkpoints/. Exit codes: 0 all whole; 1 a step is not; 2
  there is nothing to look at.
  """
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax checkpoint",
    description=inspect.getdoc(main),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("command", choices=("verify", "list"))
  parser.add_argument("directory", type=pathlib.Path)
  console.add_flag(parser)
  options = parser.parse_args(arguments)
  directory = options.directory
  if (directory / "checkpoints").is_dir():
    directory = directory / "checkpoints"
  found = steps(directory)
  if not found:
    console.error(f"{directory} holds no checkpoints")
    return 2
  show = _show_verified if options.command == "verify" else _show_size
  return max([show(directory, step) for step in found])


def _show_verified(directory: pathlib.Path, step: int) -> int:
  found = problem(directory, step)
  console.result(f"step {step}: {found or 'whole'}", step=step)
  return 1 if found else 0


def _show_size(directory: pathlib.Path, step: int) -> int:
  said = f"step {step}: {size(directory, step):,} bytes"
  try:
    found = metrics(directory, step)
  except (OSError, ValueError, KeyError, TypeError) as error:
    console.result(f"{said}, not whole: {error}", step=step)
    return 1
  values = [f"{name} {value:.6g}" for name, value in found.items()]
  console.result(", ".join([said, *values]), step=step)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
