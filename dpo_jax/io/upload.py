"""Checkpoint upload to a bucket.

After a step is whole on the disk, a thread copies its files and the run's
records into a folder with a fresh name, then creates the step's table; see
`bucket` for the names. A table is created, never replaced: a second writer of
the same step is refused. On a machine whose disk has less than the bucket, the
newest whole step is downloaded before the run looks at its directory. No
failure of an upload stops training: the next checkpoint is uploaded again, and
the last one at the end.
"""

import concurrent.futures
import contextlib
import hashlib
import logging
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from dpo_jax.core import console, errors
from dpo_jax.io import bucket as bucket_lib
from dpo_jax.io import hashing, rundir, step_files, strict_json

_log = logging.getLogger(__name__)

# What a run has besides checkpoints and model. Files grow or are replaced as a
# whole, and are cut to the step that a run resumes from.
_RECORDS = (
  "config.json",
  "manifest.json",
  "metrics.jsonl",
  "skipped_updates.jsonl",
  "samples.jsonl",
  "metrics.csv",
  "hub.json",
  "wandb_run.json",
  "adapters",
  "reference",
  "tensorboard",
  "wandb",
)


# Files by their names, each with its hash if it never grows.
_Files = dict[str, tuple[pathlib.Path, str | None]]


class Refused(ValueError):
  """Another process uploaded the same step."""


class NotCopied(errors.Stopped):
  """Training is done and its files are whole, but not all are in the bucket."""


class Uploader:
  """Keeps a run's directory in a bucket; a context manager.

  Only the first process of a run has one. `completed` and `held` are for the
  run's checkpoints.

  Raises:
    ValueError: on entering, when the bucket cannot be read and written, or
      holds what no run uploaded.
  """

  def __init__(
    self,
    address: str,
    workdir: pathlib.Path,
    retention: step_files.Retention,
  ):
    self._address, self._workdir = address.rstrip("/"), workdir
    self._directory, self._retention = workdir / "checkpoints", retention
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "upload")
    # The step that is being uploaded, and those that wait.
    self._steps: list[int] = []
    self._failed = self._refused = ""
    # Folders of this process, and those that it found as it began.
    self._own: set[str] = set()

  def __enter__(self) -> "Uploader":
    self._bucket = bucket_lib.connect(self._address)
    probe = f"{bucket_lib.fresh(bucket_lib.table_name(0))}/probe"
    with bucket_lib.reaching(self._address):
      self._bucket.pipe_file(probe, b"probe")
      self._bucket.rm_file(probe)
      self._there = bucket_lib.look(self._bucket, {})
    if foreign := self._there.foreign():
      raise ValueError(
        f"{self._address} holds {foreign[:5]}, which no run uploaded;"
        " name a path for this run alone"
      )
    self._own = {table.folder for table in self._there.tables.values()}
    return self

  def __exit__(self, *exc_info) -> None:
    if self.held():
      console.say(f"a checkpoint is on its way to {self._address}", "bucket")
    self._worker.shutdown()

  def fetch(self, values: dict[str, Any], allowed: Iterable[str]) -> None:
    """Downloads what the bucket has and the directory does not.

    Args:
      values: the run's config.
      allowed: see `rundir.check`.

    Raises:
      ValueError: the bucket holds another run, or no whole step.
    """
    with bucket_lib.reaching(self._address):
      here, damaged = self._bring_newest(values, allowed)
      final = self._there.tables.get(bucket_lib.FINISHED)
      done = (self._workdir / bucket_lib.FINISHED).exists()
      if final and final.step == here and not done:
        try:
          bucket_lib.bring(self._bucket, final, self._workdir)
        except bucket_lib.Damaged as error:
          damaged[bucket_lib.FINISHED] = str(error)
      for name, why in damaged.items():
        _log.warning("%s/%s is not used: %s", self._address, name, why)
      if here is None and (damaged or self._there.rejected()):
        raise ValueError(
          f"{self._address} holds no whole step any more, only damaged ones;"
          " name another path to start over"
        )
      for name in damaged:
        self._put_aside(name)
    if here is not None and here not in self._there.steps:
      self.completed(here)

  def _bring_newest(self, values, allowed) -> tuple[int | None, dict[str, str]]:
    """The newest whole step of the directory, and what is damaged above it."""
    here = _newest_here(self._directory)
    damaged = dict(self._there.damaged)
    for step, table in sorted(self._there.steps.items(), reverse=True):
      try:
        bucket_lib.verify(self._bucket, table, ["config.json"])
        found = strict_json.parse(
          self._bucket.cat_file(f"{table.folder}/config.json")
        )
        rundir.refuse_other(self._address, found, values, allowed)
        if here is not None and here >= step:
          break
        began_s = time.monotonic()
        bucket_lib.bring(self._bucket, table, self._workdir)
        self._say(f"brought step {step} from", step, table.bytes, began_s)
        return step, damaged
      except bucket_lib.Damaged as error:
        damaged[bucket_lib.table_name(step)] = str(error)
    return here, damaged

  def _put_aside(self, name: str) -> None:
    """Frees the name of a damaged table; its objects stay."""
    aside = f"rejected/{bucket_lib.fresh(name)}.json"
    self._bucket.pipe_file(aside, self._bucket.cat_file(name))
    self._bucket.rm_file(name)
    self._there.tables.pop(name, None)

  def completed(self, step: int) -> None:
    """A step is whole on the disk; returns at once.

    Of steps that wait for an upload in progress, only the newest is uploaded.
    """
    self._steps.append(step)
    self._worker.submit(self._push_first)

  def held(self) -> set[int]:
    """Steps whose files are still needed on the disk."""
    return {*self._steps[:1], *self._steps[-1:]}

  def finish(self) -> None:
    """Uploads the exported model, and what failed once more.

    Raises:
      NotCopied: it failed twice, or another process uploads there too.
    """
    for _ in range(2):
      self._worker.submit(self._attempt, self._push_finished).result()
      if not self._failed:
        break
    if self._failed or self._refused:
      raise NotCopied(
        f"the run is finished, but not all of it is in {self._address}"
        f" ({self._failed or self._refused}); the same command uploads what is"
        " missing"
      )

  def _push_first(self) -> None:
    step = self._steps[0]
    if len(self._steps) == 1:
      self._attempt(lambda: self._push(step))
    self._steps.pop(0)

  def _attempt(self, push) -> None:
    """Uploads, and keeps what went wrong."""
    # Whatever the network, the bucket or the disk does, training goes on.
    try:
      push()
      self._failed = ""
    except Refused as error:
      self._failed, self._refused = "", str(error)
      _log.warning("%s", error)
      return
    except Exception as error:
      self._failed = bucket_lib.short(error)
      _log.warning(
        "not uploaded to %s, and tried again with the next checkpoint: %s",
        self._address,
        self._failed,
      )
      return
    try:
      self._prune()
    except Exception as error:
      _log.warning(
        "what is no longer kept was not deleted from %s: %s",
        self._address,
        bucket_lib.short(error),
      )

  def _push(self, step: int) -> None:
    if step in self._there.steps:
      return self._check_own(bucket_lib.table_name(step))
    path, place = self._directory / str(step), f"checkpoints/{step}/"
    hashes = step_files.hashes(self._directory, step)
    files: _Files = {
      place + name: (path / name, hashes[name]) for name in hashes
    }
    manifest = path / step_files.MANIFEST
    files[place + manifest.name] = (manifest, None)
    metrics = step_files.metrics(self._directory, step)
    return self._upload(bucket_lib.table_name(step), step, metrics, files)

  def _push_finished(self) -> None:
    step = max(step_files.steps(self._directory), default=None)
    if step is None:
      raise ValueError(f"{self._directory} holds no checkpoint")
    self._push(step)
    if bucket_lib.FINISHED in self._there.tables:
      return self._check_own(bucket_lib.FINISHED)
    files = _files(self._workdir, ("export", bucket_lib.FINISHED))
    return self._upload(bucket_lib.FINISHED, step, {}, files)

  def _upload(
    self,
    name: str,
    step: int,
    metrics: dict[str, float],
    files: _Files,
  ) -> None:
    """Uploads files and the records, then creates their table."""
    began_s = time.monotonic()
    folder = bucket_lib.fresh(name)
    self._own.add(folder)
    files = _files(self._workdir, _RECORDS) | files

    def one(place):
      path, digest = files[place]
      if digest:
        self._bucket.put_file(str(path), f"{folder}/{place}")
        return bucket_lib.File(path.stat().st_size, digest)
      # It may grow: what is read is what is sent.
      data = path.read_bytes()
      self._bucket.pipe_file(f"{folder}/{place}", data)
      return bucket_lib.File(len(data), hashlib.sha256(data).hexdigest())

    made = dict(zip(files, bucket_lib.each(one, files)))
    table = bucket_lib.Table(step, metrics, folder, made)
    try:
      self._bucket.pipe_file(name, bucket_lib.encode(table), mode="create")
      self._there.tables[name] = table
    except FileExistsError:
      self._there = bucket_lib.look(self._bucket, self._there.tables)
    # It may be of this process, to which the answer got lost.
    self._check_own(name)
    self._say(f"{name} is in", step, table.bytes, began_s)

  def _check_own(self, name: str) -> None:
    found = self._there.tables.get(name)
    if found is None or found.folder not in self._own:
      raise Refused(
        f"{self._address}/{name} was uploaded by another process: train this"
        " run in one place at a time"
      )

  def _say(self, what: str, step: int, size: int, began_s: float) -> None:
    took_s = time.monotonic() - began_s
    console.say(
      f"{what} {self._address} ({size / 2**20:,.1f} MiB, {took_s:.1f} s)",
      "bucket",
      step=step,
      bytes=size,
    )

  def _prune(self) -> None:
    """Deletes tables that retention drops, then objects of no table."""
    there = self._there = bucket_lib.look(self._bucket, self._there.tables)
    found = {step: table.metrics for step, table in there.steps.items()}
    for step in found.keys() & set(step_files.steps(self._directory)):
      # Its evaluation may have come after its upload.
      with contextlib.suppress(OSError, ValueError):
        found[step] = step_files.metrics(self._directory, step)
    dropped = found.keys() - self._retention.kept(found)
    bucket_lib.delete(self._bucket, map(bucket_lib.table_name, dropped))
    for step in dropped:
      del there.tables[bucket_lib.table_name(step)]
    bucket_lib.delete(self._bucket, there.stale())


def _newest_here(directory: pathlib.Path) -> int | None:
  """The newest whole step on the disk, None also where all are damaged."""
  try:
    return step_files.newest(directory)[0]
  except ValueError:
    return None


def _files(workdir: pathlib.Path, names: Iterable[str]) -> _Files:
  """Files and folders of a run.

  Without links and what is still being written: the name of a directory that is
  not whole yet begins with a point.
  """
  found: _Files = {}
  for top in map(workdir.joinpath, names):
    for path in (top, *sorted(top.rglob("*"))):
      name = path.relative_to(workdir)
      if (
        path.is_file()
        and not path.is_symlink()
        and path.suffix != ".tmp"
        and not any(part.startswith(".") for part in name.parts)
      ):
        fixed = path.suffix == ".safetensors"
        digest = hashing.file_hash(path) if fixed else None
        found[name.as_posix()] = (path, digest)
  return found
