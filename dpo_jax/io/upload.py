"""Checkpoint upload to a bucket.

Once a step is whole on the disk, a thread copies its files and the run's
records into a folder with a fresh name, then creates the step's manifest; see
`bucket` for the names. A manifest is created, never replaced: a second writer
of the same step is refused. On a machine whose disk has less than the bucket,
the newest whole step is downloaded before the run reads its directory. No
failure of an upload stops training: the next checkpoint is uploaded again, and
the last one at the end.
"""

import concurrent.futures
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dpo_jax.core import console, errors
from dpo_jax.io import bucket as bucket_lib
from dpo_jax.io import rundir, step_files

_log = logging.getLogger(__name__)

# Files of a run besides checkpoints and model; they grow or are replaced as a
# whole, and are cut to the step that a run resumes from.
_RECORDS = (
  "config.json",
  "manifest.json",
  "metrics.jsonl",
  "samples.jsonl",
  "metrics.csv",
  "wandb_run.json",
  "adapters",
  "reference",
  "tensorboard",
  "wandb",
)


class NotCopied(errors.Stopped):
  """Training is done and its files are whole, but not all are in the bucket."""


class Uploader:
  """Keeps a run's directory in a bucket; a context manager.

  Only the first process of a run has one. `completed` and `held` are for the
  run's checkpoints. Of its steps the `keep` newest stay there, 0 for all.

  Raises:
    ValueError: on entering, when the bucket cannot be read and written.
  """

  def __init__(
    self,
    address: str,
    workdir: pathlib.Path,
    keep: int,
  ):
    self._address, self._workdir = address.rstrip("/"), workdir
    self._directory, self._keep = workdir / "checkpoints", keep
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "upload")
    # The step that is being uploaded, and those that wait.
    self._steps: list[int] = []
    self._failed = self._refused = ""

  def __enter__(self) -> "Uploader":
    self._bucket = bucket_lib.connect(self._address)
    probe = f"{bucket_lib.new_folder('000000')}/probe"
    with bucket_lib.reaching(self._address):
      self._bucket.pipe_file(probe, b"probe")
      self._bucket.rm_file(probe)
      self._there = bucket_lib.look(self._bucket)
    return self

  def __exit__(self, *exc_info) -> None:
    if self.held():
      console.say(f"waiting for the upload to {self._address}", "bucket")
    self._worker.shutdown()

  def fetch(self, values: dict[str, Any], allowed: Iterable[str]) -> None:
    """Downloads what the bucket has and the directory does not.

    Args:
      values: the run's config.
      allowed: see `rundir.check`.

    Raises:
      ValueError: the bucket holds another run, or no whole step.
    """
    there = self._there
    try:
      here = step_files.newest(self._directory)[0]
    except step_files.OtherFormat:
      raise
    except ValueError:
      # Every step on the disk is damaged; the bucket may have a whole one.
      here = None
    with bucket_lib.reaching(self._address):
      here = bucket_lib.fetch(
        self._bucket,
        there,
        self._workdir,
        here,
        lambda begun: rundir.refuse_other(
          self._address, begun, values, allowed
        ),
      )
    for name, why in there.damaged.items():
      _log.warning("%s/%s is not used: %s", self._address, name, why)
    if here is None and there.damaged:
      raise ValueError(
        f"{self._address} holds no whole step any more, only damaged ones;"
        " name another path to start over"
      )
    if here is not None and here not in there.steps:
      self.completed(here)

  def completed(self, step: int) -> None:
    """Uploads a step that is whole on the disk; returns at once.

    Of steps that wait for an upload in progress, only the newest is uploaded.
    """
    self._steps.append(step)
    self._worker.submit(self._upload_first)

  def held(self) -> set[int]:
    """Steps whose files are still needed on the disk."""
    return {*self._steps[:1], *self._steps[-1:]}

  def finish(self) -> None:
    """Uploads the exported model, and again what failed last.

    Raises:
      NotCopied: it failed, or another process uploads there too.
    """
    self._worker.submit(self._attempt, self._upload_finished).result()
    if self._failed or self._refused:
      raise NotCopied(
        f"the run is finished, but not all of it is in {self._address}"
        f" ({self._failed or self._refused}); the same command uploads what is"
        " missing"
      )

  def _upload_first(self) -> None:
    if len(self._steps) == 1:
      self._attempt(self._upload_step, self._steps[0])
    self._steps.pop(0)

  def _attempt(self, upload: Callable, *arguments: Any) -> None:
    self._failed = self._failure(upload, *arguments)
    if not self._failed:
      self._failure(self._prune)

  def _failure(self, call: Callable, *arguments: Any) -> str:
    """Why a call failed; "" if it did not."""
    # No failure of the network, the bucket or the disk may stop training.
    try:
      call(*arguments)
    except Exception as error:
      why = bucket_lib.short(error)
      _log.warning("%s, until the next checkpoint: %s", self._address, why)
      return why
    return ""

  def _upload_step(self, step: int) -> None:
    manifest = step_files.manifest(self._directory, step)
    place = f"checkpoints/{step}"
    files: dict[str, step_files.File | None] = {
      f"{place}/{name}": file for name, file in manifest.files.items()
    }
    files[f"{place}/{step_files.MANIFEST}"] = None
    name = bucket_lib.manifest_name(step)
    self._upload(name, step, files)

  def _upload_finished(self) -> None:
    step = max(step_files.steps(self._directory))
    self._upload_step(step)
    files: dict[str, step_files.File | None] = {
      name: step_files.describe(self._workdir / name)
      for name in _files(self._workdir, ("export",))
    }
    # A run that made its last steps again has the same model, in other seconds.
    files[bucket_lib.FINISHED] = None
    self._upload(bucket_lib.FINISHED, step, files)

  def _upload(
    self,
    name: str,
    step: int,
    files: Mapping[str, step_files.File | None],
  ) -> None:
    """Uploads files and the records, then creates their manifest.

    Files with a size and hash do not change any more.
    """
    there = self._there
    if name not in there.manifests:
      folder = bucket_lib.new_folder(name)
      records = _files(self._workdir, _RECORDS)

      def send(place):
        path, target = self._workdir / place, f"{folder}/{place}"
        if file := files.get(place):
          self._bucket.put_file(str(path), target)
          return file
        # It may grow: hash the bytes that are sent.
        data = path.read_bytes()
        self._bucket.pipe_file(target, data)
        return step_files.File(len(data), hashlib.sha256(data).hexdigest())

      sent = [*records, *files]
      described = dict(zip(sent, bucket_lib.each(send, sent)))
      manifest = step_files.Manifest(step, described, folder)
      mode = "overwrite" if name in there.damaged else "create"
      try:
        self._bucket.pipe_file(name, step_files.encode(manifest), mode=mode)
        there.manifests[name] = manifest
        there.damaged.pop(name, None)
        console.say(
          f"uploaded {name} to {self._address} ({manifest.bytes:,} bytes)",
          "bucket",
          step=step,
          bytes=manifest.bytes,
        )
      except FileExistsError:
        # Of another process, or of a request whose reply was lost.
        self._there = there = bucket_lib.look(self._bucket, there)
    found = there.manifests.get(name)
    fixed = {place: file for place, file in files.items() if file}
    if found is None or not fixed.items() <= found.files.items():
      self._refused = (
        f"{self._address}/{name} was uploaded by another process: train this"
        " run in one place at a time"
      )
      _log.warning("%s", self._refused)

  def _prune(self) -> None:
    """Deletes steps that are not kept, then objects of no manifest."""
    there = self._there = bucket_lib.look(self._bucket, self._there)
    for step in sorted(there.steps)[: -self._keep]:
      name = bucket_lib.manifest_name(step)
      bucket_lib.delete(self._bucket, [name])
      del there.manifests[name]
    bucket_lib.delete(self._bucket, there.unreferenced())


def _files(workdir: pathlib.Path, names: Iterable[str]) -> list[str]:
  """Names of whole files of a run, of the given files and folders.

  A file or folder that is still being written has a name that begins with a
  point; the folder may be renamed at any moment.
  """
  found = []
  for top in map(workdir.joinpath, names):
    paths = [top]
    # Unlike `rglob`, it passes over a folder that is gone when it is read.
    for folder, inside, files in os.walk(top):
      inside[:] = [name for name in inside if not name.startswith(".")]
      paths += [
        pathlib.Path(folder, name) for name in files if not name.startswith(".")
      ]
    found += [
      path.relative_to(workdir).as_posix()
      for path in sorted(paths)
      if path.is_file() and not path.is_symlink()
    ]
  return found
