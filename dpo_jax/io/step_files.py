"""Checkpoint directories of a run: manifests, verification and retention.

A step is a directory named by its number. Its manifest.json, written last,
holds the SHA-256 of every other file and of itself. A step without a manifest,
or whose files differ from it, is neither resumed from nor deleted: it is
renamed to `<step>.rejected`.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import types
from collections.abc import Set
from typing import Any, Literal

from dpo_jax.io import atomic, hashing, strict_json

MANIFEST = "manifest.json"
# A step being deleted: a killed deletion must not look like a damaged step.
_DELETING = ".deleting"
_REJECTED = ".rejected"
# Orbax's name for a step that it is still writing.
_WRITING = ".orbax-checkpoint-tmp"
_FORMAT = 2


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
    infos: list[Any] = [
      types.SimpleNamespace(step=step, metrics=ranks.get(step))
      for step in sorted(found)
    ]
    kept = policies.AnyPreservationPolicy(rules).should_preserve(
      infos, context=policies.PreservationContext()
    )
    return {info.step for info, keep in zip(infos, kept) if keep}


def steps(directory: pathlib.Path) -> list[int]:
  """All steps of a directory in ascending order, whole or not."""
  names = (path.name for path in directory.glob("*"))
  return sorted(int(name) for name in names if name.isdecimal())


def complete(
  directory: pathlib.Path, step: int, metrics: dict[str, float]
) -> None:
  """Writes a step's manifest, once all its files are written.

  `metrics` are of the evaluation at the step, for retention.
  """
  path = directory / str(step)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(atomic.sync, [*path.rglob("*"), path]))
  _write(directory, step, metrics, _hashed(path))


def problem(directory: pathlib.Path, step: int) -> str:
  """What is wrong with a step, every file hashed; "" if it is whole."""
  path = directory / str(step)
  if not (path / MANIFEST).is_file():
    return f"it has no {MANIFEST}: its save was interrupted"
  try:
    wanted, found = hashes(directory, step), _hashed(path)
  except (OSError, ValueError) as error:
    return str(error)
  wrong = sorted({name for name, _ in wanted.items() ^ found.items()})
  if wrong:
    return f"it differs from its manifest in {', '.join(wrong[:3])}"
  return ""


def metrics(directory: pathlib.Path, step: int) -> dict[str, float]:
  """The evaluation at a step; ValueError if its manifest is damaged."""
  return _manifest(directory, step)["metrics"]


def hashes(directory: pathlib.Path, step: int) -> dict[str, str]:
  """SHA-256 of each file of a step; ValueError if its manifest is damaged."""
  return _manifest(directory, step)["files"]


def note(directory: pathlib.Path, step: int, metrics: dict[str, float]) -> None:
  """Puts the evaluation of a whole step into its manifest."""
  _write(directory, step, metrics, hashes(directory, step))


def staged(directory: pathlib.Path, step: int) -> pathlib.Path:
  """Where a step's files are downloaded to before `install`."""
  return directory / f"{step}{_WRITING}-brought"


def install(directory: pathlib.Path, step: int) -> None:
  """Makes a step of what was staged; one already there is put aside."""
  path = directory / str(step)
  if path.exists():
    _reject(path)
  staged(directory, step).rename(path)
  atomic.sync(directory)


def newest(directory: pathlib.Path) -> tuple[int | None, list[str]]:
  """The newest whole step, and what is wrong with those after it.

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
  """Puts steps after `latest` aside, removes half-written and -deleted ones.

  Raises:
    ValueError: the directory holds something else.
  """
  for path in directory.iterdir():
    if path.name.endswith(_DELETING) or _WRITING in path.name:
      shutil.rmtree(path)
    elif path.name.isdecimal():
      if latest is None or int(path.name) > latest:
        _reject(path)
    elif not path.name.endswith(_REJECTED):
      raise ValueError(
        f"{path} is no checkpoint: move it away, or use another directory"
      )
  atomic.sync(directory)


def prune(
  directory: pathlib.Path,
  retention: Retention,
  held: Set[int] = frozenset(),
) -> None:
  """Deletes the completed steps that retention does not keep, but `held`."""
  found = {}
  for step in steps(directory):
    # One that is damaged neither counts nor is deleted.
    with contextlib.suppress(ValueError):
      found[step] = metrics(directory, step)
  for step in sorted(found.keys() - retention.kept(found) - held):
    gone = directory / f"{step}{_DELETING}"
    (directory / str(step)).rename(gone)
    atomic.sync(directory)
    shutil.rmtree(gone)


def _reject(path: pathlib.Path) -> None:
  aside = path.with_name(path.name + _REJECTED)
  shutil.rmtree(aside, ignore_errors=True)
  path.rename(aside)


def _hashed(path: pathlib.Path) -> dict[str, str]:
  """The SHA-256 of each file beneath a step but its manifest, by name."""
  files = [
    file
    for file in sorted(path.rglob("*"))
    # A killed writer may have left a temporary of the manifest.
    if not file.is_dir() and not (file.parent == path and MANIFEST in file.name)
  ]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    names = [file.relative_to(path).as_posix() for file in files]
    return dict(zip(names, pool.map(hashing.file_hash, files)))


def _write(
  directory: pathlib.Path,
  step: int,
  metrics: dict[str, float],
  files: dict[str, str],
) -> None:
  content = {
    "format": _FORMAT,
    "step": step,
    "metrics": {k: x for k, x in metrics.items() if math.isfinite(x)},
    "files": files,
  }
  text = json.dumps(content | {"sha256": _own_hash(content)}, indent=2) + "\n"
  atomic.write_text(directory / str(step) / MANIFEST, text)
  atomic.sync(directory)


def _manifest(directory: pathlib.Path, step: int) -> dict:
  found = strict_json.read(directory / str(step) / MANIFEST)
  if not isinstance(found, dict) or found.get("sha256") != _own_hash(found):
    raise ValueError(f"{MANIFEST} is not what was written")
  if (found["format"], found["step"]) != (_FORMAT, step):
    raise ValueError(
      f"{MANIFEST} is of step {found['step']} in format {found['format']},"
      f" not {step} in {_FORMAT}"
    )
  return found


def _own_hash(manifest: dict) -> str:
  content = {key: value for key, value in manifest.items() if key != "sha256"}
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()
