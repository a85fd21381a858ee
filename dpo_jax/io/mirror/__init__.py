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
import threading
import time
from collections.abc import Iterable
from typing import Any

from dpo_jax.core import console, errors
from dpo_jax.io import rundir, step_files, strict_json
from dpo_jax.io.mirror import contents, lease, objects, tables

_log = logging.getLogger(__name__)


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
    self._broken: list[str] = []
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
      found = tables.read(self._store, self._store.names(lease.NAME))
      self._steps, self._rejected = found.steps, found.rejected
      self._finished, self._broken = found.finished, found.broken
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
    broken = [name for name in self._broken if name.startswith("steps/")]
    damaged = len(broken)
    for name in broken:
      self._put_aside(name)
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
    tables.bring(self._store, table, self._workdir)
    console.say(
      f"brought step {step} from {self.address} ({_mib(table.bytes)},"
      f" {time.monotonic() - began_s:.1f} s)",
      "bucket",
      step=step,
      bytes=table.bytes,
    )

  def _bring_finished(self) -> None:
    if (self._workdir / tables.FINISHED).exists():
      return
    try:
      tables.bring_finished(self._store, self._finished, self._workdir)
    except contents.Damaged as error:
      _log.warning(
        "%s: the final model is not used, and made again: %s",
        self.address,
        error,
      )
      self._finished = None

  def _reject(self, step: int) -> None:
    self._rejected[step] = self._steps.pop(step)
    self._put_aside(tables.name(step))

  def _put_aside(self, name: str) -> None:
    """Moves a table of a step to rejected/."""
    content, _ = self._store.read(name)
    if content is not None:
      aside = name.replace("steps/", "rejected/")
      self._store.write(aside, content)
    self._store.delete(name)

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
    self._lease.told()

  def finish(self) -> None:
    """Puts what is missing of a finished run, and what failed once more.

    Raises:
      NotCopied: it could not be put, twice.
    """
    for _ in range(2):
      for newest in step_files.steps(self._directory)[-1:]:
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
    files |= tables.records(self._workdir)
    self._lease.check()
    made, sent = contents.put(self._store, files, self._known, wanted)
    metrics = step_files.metrics(self._directory, step)
    table = contents.Contents(step, metrics, made)
    self._commit(tables.name(step), table)
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
    files = tables.records(self._workdir)
    files[tables.FINISHED] = self._workdir / tables.FINISHED
    files |= tables.beneath(self._workdir, "export")
    # Of the steps on the disk, which may have been deleted since.
    step = max(step_files.steps(self._directory), default=-1)
    if step not in self._steps:
      raise objects.Failed(f"the last step of {self._directory} is not there")
    self._lease.check()
    made, sent = contents.put(self._store, files, self._known, {})
    table = contents.Contents(step, self._steps[step].metrics, made)
    if table != self._finished:
      self._commit(tables.FINISHED, table)
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
    """Deletes what is no longer kept; what fails is tried with the next."""
    try:
      self._delete_unkept()
    except objects.Failed as error:
      _log.warning("what is no longer kept was not deleted: %s", error)

  def _delete_unkept(self) -> None:
    """Deletes tables that retention does not keep, then parts of no table."""
    found = {step: table.metrics for step, table in self._steps.items()}
    for step in sorted(found.keys() - self._retention.kept(found)):
      self._lease.check()
      self._store.delete(tables.name(step))
      del self._steps[step]
    if self._broken:
      # Nobody knows which parts it speaks of.
      return
    kept = [*self._steps.values(), *self._rejected.values()]
    if self._finished:
      kept.append(self._finished)
    live = {part for table in kept for part in table.parts()}
    for name in self._store.names(lease.NAME):
      if name.startswith(contents.FOLDER) and name not in live:
        self._lease.check()
        self._known.discard(name.removeprefix(contents.FOLDER))
        self._store.delete(name)


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


def _mib(size: int) -> str:
  return f"{size / 2**20:,.1f} MiB"
