"""A run's directory in a bucket, as it was at each kept checkpoint.

After a step is whole on the disk a thread puts its files, and the run's records
as they then are, into the bucket, and after them a table of contents:

  steps/000300.json   what the run held at step 300; it counts only with this
  finished.json       the exported model and the last records
  objects/            parts of files, see `contents`
  owner.json          who writes there, see `lease`
  rejected/           tables of steps that were found damaged

Where a directory has less than the bucket, as on a machine whose predecessor
is gone with its disk, it is brought from there before the run looks at it, and
the run goes on as it would have. What fails on the way stops no training: the
next checkpoint is put again, and the last one at the end.
"""

import concurrent.futures
import logging
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Iterable
from typing import Any

from dpo_jax import (
  console,
  contents,
  errors,
  lease,
  objects,
  rundir,
  step_files,
  strict_json,
)

_log = logging.getLogger(__name__)

_TABLE = re.compile(r"(steps|rejected)/(\d{6,})\.json")
_FINISHED = "finished.json"
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
_FOLDERS = ("adapters", "reference", "tensorboard", "wandb", "figures")


class NotCopied(errors.Stopped):
  """Training is done and its files are whole, but not all are in the bucket."""


class Mirror:
  """Keeps a run's directory in a bucket; a context manager.

  Only the first process of a run has one. `completed`, `held` and `check` are
  for the run's checkpoints.

  Raises:
    ValueError: on entering, when the bucket cannot be read and written.
    lease.Held: on entering, when another process writes there.
  """

  def __init__(
    self,
    address: str,
    workdir: pathlib.Path,
    retention: step_files.Retention,
    *,
    tries: int = 4,
    lasting_s: float = lease.LASTING_S,
  ):
    self.address, self._workdir = address.rstrip("/"), workdir
    self._directory, self._retention = workdir / "checkpoints", retention
    self._store = objects.Store(address, tries)
    self._lease = lease.Lease(self._store, lasting_s)
    # The tables of contents in the bucket.
    self._steps: dict[int, contents.Contents] = {}
    self._rejected: dict[int, contents.Contents] = {}
    self._finished: contents.Contents | None = None
    # Parts that this process put there.
    self._known: set[str] = set()
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "mirror")
    self._changing = threading.Lock()
    self._waiting: int | None = None
    self._pushing: int | None = None
    self._failed = ""
    self._lost: lease.Lost | None = None

  def __enter__(self) -> "Mirror":
    try:
      self._lease.__enter__()
    except objects.Failed as error:
      raise _unusable(error) from error
    try:
      found = tables(self._store, self._store.names(lease.NAME))
      self._steps, self._rejected, self._finished = found
    except BaseException as error:
      self._lease.__exit__()
      if isinstance(error, objects.Failed):
        raise _unusable(error) from error
      raise
    return self

  def __exit__(self, *exc_info) -> None:
    try:
      if self.held():
        console.say(f"a checkpoint is on its way to {self.address}", "bucket")
      self._worker.shutdown()
    finally:
      self._lease.__exit__()

  def fetch(self, values: dict[str, Any], allowed: Iterable[str]) -> None:
    """Brings what the bucket has and the directory has not.

    Args:
      values: the run's config.
      allowed: see `rundir.check`.

    Raises:
      ValueError: the bucket holds another run, or no whole step; or there is
        no room.
    """
    try:
      self._fetch(values, allowed)
    except objects.Failed as error:
      raise _unusable(error) from error

  def _fetch(self, values, allowed) -> None:
    here = _newest_here(self._directory)
    damaged = 0
    for step in sorted(self._steps, reverse=True):
      try:
        self._refuse_other(step, values, allowed)
        if here is None or step > here:
          self._bring(step)
          here = step
        break
      except contents.Damaged as error:
        damaged += 1
        _log.warning("%s: step %d is not used: %s", self.address, step, error)
        self._reject(step)
    if damaged and here is None:
      raise ValueError(
        f"{self.address} holds no whole step any more, {damaged} are damaged;"
        " name another path to start over"
      )
    if here is None:
      return
    if self._finished and self._finished.step == here:
      self._bring_finished()
    if here not in self._steps:
      self.completed(here)

  def _refuse_other(self, step: int, values, allowed) -> None:
    """Checks that a step is of a run of this config."""
    file = self._steps[step].files.get("config.json")
    if file is None:
      raise contents.Damaged("it has no config.json")
    found = strict_json.parse(contents.read(self._store, file))
    rundir.refuse_other(self.address, found, values, allowed)

  def _bring(self, step: int) -> None:
    began_s, table = time.monotonic(), self._steps[step]
    bring(self._store, table, self._workdir)
    console.say(
      f"brought step {step} from {self.address} ({_mib(table.bytes)},"
      f" {time.monotonic() - began_s:.1f} s)",
      "bucket",
      step=step,
      bytes=table.bytes,
    )

  def _bring_finished(self) -> None:
    if (self._workdir / _FINISHED).exists():
      return
    try:
      bring_finished(self._store, self._finished, self._workdir)
    except contents.Damaged as error:
      _log.warning(
        "%s: the final model is not used, and made again: %s",
        self.address,
        error,
      )
      self._finished = None

  def _reject(self, step: int) -> None:
    table = self._rejected[step] = self._steps.pop(step)
    self._store.write(f"rejected/{step:06d}.json", contents.encode(table))
    self._store.delete(_name(step))

  def completed(self, step: int) -> None:
    """A step is whole on the disk; returns at once.

    Of steps that wait while another is put, only the newest is.
    """
    with self._changing:
      self._waiting = step
    self._worker.submit(self._push_waiting)

  def held(self) -> set[int]:
    """Steps whose files are still needed on the disk."""
    with self._changing:
      return {self._waiting, self._pushing} - {None}

  def check(self) -> None:
    """Raises lease.Lost if another process has taken the bucket over."""
    if self._lost is not None:
      raise self._lost

  def finish(self) -> None:
    """Puts what is missing of a finished run, and what failed once more.

    Raises:
      NotCopied: it could not be put, twice.
    """
    for _ in range(2):
      newest = step_files.steps(self._directory)[-1]
      if newest not in self._steps and newest not in self.held():
        self.completed(newest)
      self._worker.submit(self._attempt, self._push_finished).result()
      self.check()
      if not self._failed:
        return
    raise NotCopied(
      f"the run is finished, but not all of it is in {self.address}"
      f" ({self._failed}); the same command puts what is missing"
    )

  def _push_waiting(self) -> None:
    with self._changing:
      step, self._waiting = self._waiting, None
      self._pushing = step
    if step is not None:
      self._attempt(lambda: self._push(step))
    with self._changing:
      self._pushing = None

  def _attempt(self, push) -> None:
    """Pushes, and keeps what went wrong."""
    try:
      if self._lost is None:
        push()
        self._failed = ""
    except lease.Lost as error:
      self._lost = error
    # Whatever the network, the bucket or the disk does, training goes on.
    except Exception as error:
      self._failed = f"{type(error).__name__}: {error}"
      _log.warning(
        "not put into %s, and tried again with the next checkpoint: %s",
        self.address,
        self._failed,
      )

  def _push(self, step: int) -> None:
    began_s = time.monotonic()
    path = self._directory / str(step)
    place = f"checkpoints/{step}/"
    files = {
      place + file.relative_to(path).as_posix(): file
      for file in sorted(path.rglob("*"))
      if file.is_file()
    }
    hashes = step_files.hashes(self._directory, step)
    wanted = {place + name: digest for name, digest in hashes.items()}
    files |= _records(self._workdir)
    self._lease.check()
    made, sent = contents.put(self._store, files, self._known, wanted)
    metrics = step_files.metrics(self._directory, step)
    table = contents.Contents(step, metrics, made)
    self._commit(_name(step), table)
    self._steps[step] = table
    console.say(
      f"step {step} is in {self.address} ({_mib(sent)} sent,"
      f" {time.monotonic() - began_s:.1f} s)",
      "bucket",
      step=step,
      bytes=sent,
    )
    self._prune()

  def _push_finished(self) -> None:
    files = _records(self._workdir)
    files[_FINISHED] = self._workdir / _FINISHED
    files |= _beneath(self._workdir, "export")
    step = step_files.steps(self._directory)[-1]
    if step not in self._steps:
      raise objects.Failed(f"step {step} is not there yet")
    self._lease.check()
    made, sent = contents.put(self._store, files, self._known, {})
    table = contents.Contents(step, self._steps[step].metrics, made)
    if table != self._finished:
      self._commit(_FINISHED, table)
      self._finished = table
      console.say(
        f"the final model is in {self.address} ({_mib(sent)} sent)", "bucket"
      )
    self._prune()

  def _commit(self, name: str, table: contents.Contents) -> None:
    self._lease.check()
    data = contents.encode(table)
    _, generation = self._store.read(name)
    made = self._store.swap(name, data, generation)
    if made is None and self._store.read(name)[0] != data:
      raise lease.Lost(
        f"{self.address}/{name} was written by another process: let one of"
        " the two go on alone"
      )

  def _prune(self) -> None:
    """Deletes tables that retention does not keep, then parts of no table."""
    found = {step: table.metrics for step, table in self._steps.items()}
    for step in sorted(found.keys() - self._retention.kept(found)):
      self._lease.check()
      self._store.delete(_name(step))
      del self._steps[step]
    tables = [*self._steps.values(), *self._rejected.values()]
    if self._finished:
      tables.append(self._finished)
    live = {part for table in tables for part in table.parts()}
    for name in self._store.names(lease.NAME):
      if name.startswith(contents.FOLDER) and name not in live:
        self._lease.check()
        self._known.discard(name.removeprefix(contents.FOLDER))
        self._store.delete(name)


def tables(
  store: objects.Store, names: Iterable[str]
) -> tuple[
  dict[int, contents.Contents],
  dict[int, contents.Contents],
  contents.Contents | None,
]:
  """The tables of steps, of rejected steps, and of a finished run.

  Those that are damaged are left out, which is told on stderr.
  """
  steps: dict[int, contents.Contents] = {}
  rejected: dict[int, contents.Contents] = {}
  finished = None
  for name in names:
    found = _TABLE.fullmatch(name)
    if not found and name != _FINISHED:
      continue
    try:
      table = contents.decode(store.read(name)[0])
    except contents.Damaged as error:
      _log.warning("%s/%s is not used: %s", store.address, name, error)
      continue
    if not found:
      finished = table
    elif int(found[2]) == table.step:
      (steps if found[1] == "steps" else rejected)[table.step] = table
  return steps, rejected, finished


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
  if _FINISHED not in table.files:
    raise contents.Damaged(f"it has no {_FINISHED}")
  exported, records = {}, {}
  for name, file in table.files.items():
    folder, _, rest = name.partition("/")
    if folder == "export":
      exported[rest] = file
    elif name != _FINISHED:
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
  contents.get(store, {_FINISHED: table.files[_FINISHED]}, workdir)


def _records(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
  files = {name: workdir / name for name in _RECORDS}
  files = {name: path for name, path in files.items() if path.is_file()}
  for folder in _FOLDERS:
    files |= _beneath(workdir, folder)
  return files


def _beneath(workdir: pathlib.Path, folder: str) -> dict[str, pathlib.Path]:
  """A folder's files but temporaries and links, by their names."""
  return {
    path.relative_to(workdir).as_posix(): path
    for path in sorted((workdir / folder).rglob("*"))
    if path.is_file() and not path.is_symlink() and path.suffix != ".tmp"
  }


def _newest_here(directory: pathlib.Path) -> int | None:
  """The newest whole step on the disk, None also where all are damaged."""
  try:
    return step_files.newest(directory)[0]
  except ValueError:
    return None


def _unusable(error: objects.Failed) -> ValueError:
  return ValueError(
    f"checkpoint_bucket: {error}; the bucket must exist, and the credentials of"
    " this machine (a service account's, or `gcloud auth application-default"
    " login`) must let objects be listed, read, written and deleted"
  )


def _name(step: int) -> str:
  return f"steps/{step:06d}.json"


def _mib(size: int) -> str:
  return f"{size / 2**20:,.1f} MiB"
