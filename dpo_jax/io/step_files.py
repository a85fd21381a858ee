"""Checkpoint directories of a run: manifests, verification and deletion.

A step is a directory named by its number. Its manifest.json, written last,
holds the size and SHA-256 of every other file, and its own SHA-256. A step
without a manifest, or whose files differ from it, is neither resumed from nor
deleted: it is renamed to `<step>.rejected`.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Set
from typing import Any

from dpo_jax.core import settings
from dpo_jax.io import atomic, hashing, strict_json

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# A step being deleted: a killed deletion must not look like a damaged step.
_DELETING = ".deleting"
_REJECTED = ".rejected"
# Orbax's name for a step that it is still writing.
_WRITING = ".orbax-checkpoint-tmp"
_FORMAT = 4


class OtherFormat(ValueError):
  """A whole manifest that another version of this package wrote."""


@dataclasses.dataclass(frozen=True)
class File:
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Files of a step.

  Attributes:
    step: number of updates.
    files: by their paths in the folder.
    folder: name of the folder in a bucket (see `bucket`), "" on a disk.
  """

  step: int
  files: dict[str, File]
  folder: str = ""

  @property
  def bytes(self) -> int:
    return sum(file.bytes for file in self.files.values())


def steps(directory: pathlib.Path) -> list[int]:
  """All steps of a directory in ascending order, whole or not."""
  names = (path.name for path in directory.glob("*"))
  return sorted(int(name) for name in names if name.isdecimal())


def encode(manifest: Manifest) -> bytes:
  """JSON of a manifest, its own hash included."""
  values = dataclasses.asdict(manifest) | {"format": _FORMAT}
  text = json.dumps(values | {"sha256": _own_hash(values)}, indent=1)
  return text.encode() + b"\n"


def decode(data: bytes) -> Manifest:
  """The manifest that `encode` wrote.

  Raises:
    OtherFormat: another version wrote it; it is no damage.
    ValueError: it was changed since.
  """
  values = strict_json.parse(data)
  if not isinstance(values, dict) or (
    values.pop("sha256", None) != _own_hash(values)
  ):
    raise ValueError(f"{MANIFEST} is not what was written")
  if (found := values.pop("format", None)) != _FORMAT:
    raise OtherFormat(
      f"a checkpoint of format {found!r:.20}, and this version reads format"
      f" {_FORMAT}: resume with the version that wrote it"
    )
  manifest = settings.build(Manifest, values, "manifest")
  for name in manifest.files:
    if "\0" in name or {"", ".", ".."} & {*name.split("/")}:
      raise ValueError(f"the file {name!r:.80} would leave the directory")
  return manifest


def _own_hash(values: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def describe(path: pathlib.Path) -> File:
  """Size and hash of a file."""
  return File(path.stat().st_size, hashing.file_hash(path))


def manifest(directory: pathlib.Path, step: int) -> Manifest:
  """The manifest of a step; ValueError if it is missing or damaged."""
  found = decode(strict_json.read_bytes(directory / str(step) / MANIFEST))
  if found.step != step:
    raise ValueError(f"{MANIFEST} is of step {found.step}")
  return found


def complete(directory: pathlib.Path, step: int) -> None:
  """Writes a step's manifest, once all its files are written."""
  path = directory / str(step)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(atomic.sync, [*path.rglob("*"), path]))
  text = encode(Manifest(step, _described(path))).decode()
  atomic.write_text(path / MANIFEST, text)
  atomic.sync(directory)


def problem(directory: pathlib.Path, step: int) -> str:
  """What is wrong with a step, every file hashed; "" if it is whole.

  Raises:
    OtherFormat: see `decode`.
  """
  path = directory / str(step)
  if not (path / MANIFEST).is_file():
    return f"it has no {MANIFEST}: its save was interrupted"
  try:
    wanted, found = manifest(directory, step).files, _described(path)
  except OtherFormat as error:
    raise OtherFormat(f"{path}: {error}") from None
  except (OSError, ValueError) as error:
    return str(error)
  for name in found.keys() - wanted.keys():
    if any(part.startswith(".") for part in name.split("/")):
      # A file manager's or a network file system's.
      _log.warning("%s is passed over: its step does not list it", path / name)
      del found[name]
  wrong = sorted({name for name, _ in wanted.items() ^ found.items()})
  if wrong:
    return f"it differs from its manifest in {', '.join(wrong[:3])}"
  return ""


def _described(path: pathlib.Path) -> dict[str, File]:
  """Each file beneath a step but its manifest, by name."""
  files = [
    file
    for file in sorted(path.rglob("*"))
    # A killed writer may have left a temporary of the manifest.
    if not file.is_dir() and not (file.parent == path and MANIFEST in file.name)
  ]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    names = [file.relative_to(path).as_posix() for file in files]
    return dict(zip(names, pool.map(describe, files)))


def install(source: pathlib.Path, directory: pathlib.Path, step: int) -> None:
  """Moves a downloaded step into place; one already there is put aside."""
  directory.mkdir(exist_ok=True)
  path = directory / str(step)
  if path.exists():
    _reject(path)
  source.rename(path)
  atomic.sync(directory)


def newest(directory: pathlib.Path) -> tuple[int | None, list[str]]:
  """The newest whole step, and what is wrong with those after it.

  Raises:
    ValueError: a step was whole once, but none is now; or one is of
      `OtherFormat`.
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
    elif not path.name.endswith(_REJECTED) and path.name[0] != ".":
      raise ValueError(
        f"{path} is no checkpoint: move it away, or use another directory"
      )
  atomic.sync(directory)


def prune(
  directory: pathlib.Path, keep: int, held: Set[int] = frozenset()
) -> None:
  """Deletes completed steps but the `keep` newest (0: all) and `held`.

  Steps that were put aside go once one as late is whole.
  """
  found = []
  for step in steps(directory):
    # One that is damaged neither counts nor is deleted.
    with contextlib.suppress(ValueError):
      found.append(manifest(directory, step).step)
  for step in found[:-keep]:
    if step not in held:
      gone = directory / f"{step}{_DELETING}"
      (directory / str(step)).rename(gone)
      atomic.sync(directory)
      shutil.rmtree(gone)
  for path in directory.glob(f"*{_REJECTED}"):
    step = path.name.removesuffix(_REJECTED)
    if step.isdecimal() and int(step) <= max(found, default=-1):
      shutil.rmtree(path)


def _reject(path: pathlib.Path) -> None:
  aside = path.with_name(path.name + _REJECTED)
  shutil.rmtree(aside, ignore_errors=True)
  path.rename(aside)
