"""What a bucket holds of a run, read; and which files of a run it holds.

See `mirror` for the names of objects. Nothing is written to a bucket here.
"""

import dataclasses
import logging
import pathlib
import re
import shutil

from dpo_jax.io import step_files
from dpo_jax.io.mirror import contents, objects

_log = logging.getLogger(__name__)

FINISHED = "finished.json"
_TABLE = re.compile(r"(steps|rejected)/(\d{6,})\.json")
# What a run has beside its checkpoints and its final model. Files only grow or
# are replaced as a whole, and are cut to the step that a run goes on from.
_RECORDS = (
  "config.json",
  "manifest.json",
  "metrics.jsonl",
  "incidents.jsonl",
  "samples.jsonl",
  "metrics.csv",
  "hub.json",
  "wandb_run.json",
)
_FOLDERS = ("adapters", "reference", "tensorboard", "wandb")


@dataclasses.dataclass(frozen=True)
class Tables:
  """The tables of contents of a run.

  Attributes:
    steps: by their steps.
    rejected: those that were put aside, likewise.
    finished: of the finished run, if it is.
    broken: the objects of tables that cannot be read.
  """

  steps: dict[int, contents.Contents]
  rejected: dict[int, contents.Contents]
  finished: contents.Contents | None
  broken: list[str]


def read(store: objects.Store, names: list[str]) -> Tables:
  """The tables among the objects of these names.

  What cannot be read is told on stderr.
  """
  steps: dict[int, contents.Contents] = {}
  rejected: dict[int, contents.Contents] = {}
  finished, broken = None, []
  for name in names:
    found = _TABLE.fullmatch(name)
    if not found and name != FINISHED:
      continue
    try:
      table = contents.decode(store.read(name)[0])
      if found and int(found[2]) != table.step:
        raise contents.Damaged(f"it is of step {table.step}")
    except contents.Damaged as error:
      _log.warning("%s/%s is not used: %s", store.address, name, error)
      broken.append(name)
      continue
    if not found:
      finished = table
    else:
      (steps if found[1] == "steps" else rejected)[table.step] = table
  return Tables(steps, rejected, finished, broken)


def name(step: int) -> str:
  """The object of a step's table."""
  return f"steps/{step:06d}.json"


def bring(
  store: objects.Store, table: contents.Contents, workdir: pathlib.Path
) -> None:
  """Fetches a step and its records; the step is seen when all is there.

  Raises:
    contents.Damaged: a part of it is; the directory is as it was, but for
      records.
    ValueError: there is no room.
  """
  directory = workdir / "checkpoints"
  directory.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(directory).free
  if free < table.bytes:
    raise ValueError(
      f"{directory}: step {table.step} needs {table.bytes:,} bytes, but the"
      f" disk has {free:,} free; make room, or name another --workdir"
    )
  place = f"checkpoints/{table.step}/"
  own = {
    name.removeprefix(place): file
    for name, file in table.files.items()
    if name.startswith(place)
  }
  staged = step_files.staged(directory, table.step)
  shutil.rmtree(staged, ignore_errors=True)
  contents.get(store, own, staged)
  contents.get(
    store,
    {k: v for k, v in table.files.items() if not k.startswith(place)},
    workdir,
  )
  step_files.install(directory, table.step)


def bring_finished(
  store: objects.Store, table: contents.Contents, workdir: pathlib.Path
) -> None:
  """Fetches the final model; finished.json comes last.

  Raises:
    contents.Damaged: a part of it is; the directory has no model then.
  """
  if FINISHED not in table.files:
    raise contents.Damaged(f"it has no {FINISHED}")
  exported, records = {}, {}
  for name, file in table.files.items():
    folder, _, rest = name.partition("/")
    if folder == "export":
      exported[rest] = file
    elif name != FINISHED:
      records[name] = file
  # Not seen as a model before it is whole.
  staged = workdir / ".export.partial"
  shutil.rmtree(staged, ignore_errors=True)
  try:
    contents.get(store, exported, staged)
    shutil.rmtree(workdir / "export", ignore_errors=True)
    staged.rename(workdir / "export")
  finally:
    shutil.rmtree(staged, ignore_errors=True)
  contents.get(store, records, workdir)
  contents.get(store, {FINISHED: table.files[FINISHED]}, workdir)


def records(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
  """What a run has beside its checkpoints and its model, by its names."""
  files = {name: workdir / name for name in _RECORDS}
  files = {name: path for name, path in files.items() if path.is_file()}
  for folder in _FOLDERS:
    files |= beneath(workdir, folder)
  return files


def beneath(workdir: pathlib.Path, folder: str) -> dict[str, pathlib.Path]:
  """A folder's files but links and what is still being written, by their names.

  A directory that is not whole yet has a name that begins with a point.
  """
  found = {}
  for path in sorted((workdir / folder).rglob("*")):
    name = path.relative_to(workdir)
    hidden = any(part.startswith(".") for part in name.parts)
    if hidden or path.suffix == ".tmp" or path.is_symlink():
      continue
    if path.is_file():
      found[name.as_posix()] = path
  return found
