"""Checkpoints in a bucket: names, manifests, verification and download.

  000300-5f0c61d2a9be/   files of step 300, by their paths in its run
  000300.json            their manifest, written last
  finished-.../          the exported model and the last records
  finished.json          their manifest

Without its manifest a step does not exist. A bucket is an fsspec file system
whose paths are relative to the run's address.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import logging
import math
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dpo_jax.core import errors
from dpo_jax.io import atomic, hashing, step_files, strict_json

FINISHED = "finished.json"
_MANIFEST = re.compile(r"(\d{6,}|finished)\.json")
_OBJECT = re.compile(r"((\d{6,}|finished)-[0-9a-f]{12})/.+", re.DOTALL)
_WORKERS = 8
# Of one request.
_TIMEOUT_S = 120.0


class Damaged(ValueError):
  """An object is missing, or is not what was uploaded."""


# --- Addresses


def check(address: str) -> None:
  """Checks the form of an address.

  Raises:
    ValueError: it is neither gs://bucket/path nor file:///directory.
  """
  form = r"(?:gs://[a-z0-9][a-z0-9._-]{1,220}|(?:file|memory)://)/(.+)"
  found = re.fullmatch(form, address)
  parts = found[1].rstrip("/").split("/") if found else [""]
  if not all(x.isprintable() and x not in ("", ".", "..") for x in parts):
    raise ValueError(
      f"{address!r} must be gs://bucket/path, or file:///directory"
    )


def connect(address: str) -> Any:
  """The file system of an address; ValueError if it cannot be used."""
  import fsspec
  from fsspec.implementations import dirfs

  check(address)
  # It logs a traceback for each request that fails.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  own = {"gs": {"requests_timeout": _TIMEOUT_S}, "file": {"auto_mkdir": True}}
  with reaching(address):
    bucket, path = fsspec.core.url_to_fs(
      address.rstrip("/"),
      use_listings_cache=False,
      skip_instance_cache=True,
      **own.get(address.partition(":")[0], {}),
    )
  return dirfs.DirFileSystem(path, bucket, skip_instance_cache=True)


@contextlib.contextmanager
def reaching(address: str) -> Iterator[None]:
  """Turns errors of clients and networks into a ValueError with what to do."""
  try:
    yield
  except (ValueError, errors.Stopped):
    raise
  # Each client and each network has exceptions of its own.
  except Exception as error:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise ValueError(
      f"{address}: {short(error)}; gs:// needs the extra gcs (pip install"
      " 'dpo-jax[gcs]'), the bucket must exist, and the credentials of this"
      " machine (a service account's, or `gcloud auth application-default"
      " login`) must let objects be listed and read, and for checkpoints"
      " created and deleted"
    ) from error


def short(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def each(call: Callable, items: Iterable) -> list:
  """The results of a call for each item, several at a time."""
  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    return list(pool.map(call, items))


# --- Listing


def manifest_name(step: int) -> str:
  return f"{step:06d}.json"


def new_folder(name: str) -> str:
  """An unused folder name for the objects of a manifest."""
  return f"{name.removesuffix('.json')}-{secrets.token_hex(6)}"


@dataclasses.dataclass(frozen=True)
class Listing:
  """What a bucket holds.

  Attributes:
    manifests: by their names.
    damaged: why a manifest or its objects cannot be used, by its name.
    names: of all objects.
  """

  manifests: dict[str, step_files.Manifest]
  damaged: dict[str, str]
  names: list[str]

  @property
  def steps(self) -> dict[int, step_files.Manifest]:
    return {x.step: x for name, x in self.manifests.items() if name != FINISHED}

  def unreferenced(self) -> list[str]:
    """Objects of no manifest.

    Without those newer than the newest manifest, which another process may be
    uploading, and those of damaged steps, which are kept to be looked at.
    """
    live = {manifest.folder for manifest in self.manifests.values()}
    newest = max(map(_order, self.manifests), default=-1)
    return [
      found[0]
      for found in map(_OBJECT.fullmatch, self.names)
      if found
      and found[1] not in live
      and f"{found[2]}.json" not in self.damaged
      and _order(found[2]) <= newest
    ]


def _order(name: str) -> float:
  """The step of a manifest or folder; the finished run is after all steps."""
  label = name.removesuffix(".json")
  return math.inf if label == "finished" else int(label)


def look(bucket: Any, known: Listing | None = None) -> Listing:
  """Lists a bucket; manifests that are `known` are not read again."""
  names = sorted(bucket.find(""))
  there = Listing({}, {}, names)
  for name in filter(_MANIFEST.fullmatch, names):
    if known and name in known.manifests:
      there.manifests[name] = known.manifests[name]
    elif known and name in known.damaged:
      there.damaged[name] = known.damaged[name]
    else:
      try:
        there.manifests[name] = _decode(name, bucket.cat_file(name))
      except step_files.OtherFormat as error:
        raise ValueError(f"{name}: {error}") from None
      except ValueError as error:
        there.damaged[name] = str(error)
  return there


def _decode(name: str, data: bytes) -> step_files.Manifest:
  found = step_files.decode(data)
  folder = _OBJECT.fullmatch(f"{found.folder}/x")
  if name not in (FINISHED, manifest_name(found.step)) or not (
    folder and f"{folder[2]}.json" == name
  ):
    raise ValueError(f"the manifest is of step {found.step} in {found.folder}")
  return found


def delete(bucket: Any, names: Iterable[str]) -> None:
  def one(name):
    # Another process may have deleted it.
    with contextlib.suppress(FileNotFoundError):
      bucket.rm_file(name)

  each(one, names)


# --- Verification and download


def _compare(
  manifest: step_files.Manifest, name: str, read: Callable[[str], str]
) -> None:
  """Compares an object with its hash; `read` returns that of an object."""
  place = f"{manifest.folder}/{name}"
  try:
    found = read(place)
  except FileNotFoundError as error:
    raise Damaged(f"{place} is missing") from error
  if name not in manifest.files or found != manifest.files[name].sha256:
    raise Damaged(f"{place} differs from its manifest")


def verify(
  bucket: Any, manifest: step_files.Manifest, names: Iterable[str]
) -> None:
  """Compares objects of a manifest with their hashes; raises Damaged."""

  def read(place):
    with bucket.open(place, "rb") as stream:
      return hashlib.file_digest(stream, "sha256").hexdigest()

  each(lambda name: _compare(manifest, name, read), names)


def download(
  bucket: Any, manifest: step_files.Manifest, workdir: pathlib.Path
) -> None:
  """Downloads the files of a manifest into a run's directory.

  Raises:
    Damaged: see `verify`; the directory is as it was.
  """
  # Hidden, so that a killed download leaves a directory that is still empty.
  arriving = workdir / ".download"
  shutil.rmtree(arriving, ignore_errors=True)
  checkpoint = f"checkpoints/{manifest.step}/"

  def one(name):
    path = arriving / name
    path.parent.mkdir(parents=True, exist_ok=True)

    def read(place):
      bucket.get_file(place, str(path))
      atomic.sync(path)
      return hashing.file_hash(path)

    _compare(manifest, name, read)

  # The first makes the directory this run's, the last makes it finished.
  order = {"config.json": 0, FINISHED: 2}
  try:
    each(one, manifest.files)
    for name in sorted(manifest.files, key=lambda name: order.get(name, 1)):
      if not name.startswith(checkpoint):
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (arriving / name).replace(workdir / name)
    if (arriving / checkpoint).exists():
      step_files.install(
        arriving / checkpoint, workdir / "checkpoints", manifest.step
      )
  finally:
    shutil.rmtree(arriving, ignore_errors=True)


def fetch(
  bucket: Any,
  there: Listing,
  workdir: pathlib.Path,
  here: int | None = None,
  check: Callable[[Any], Any] = lambda config: None,
) -> int | None:
  """Downloads the newest whole step, and the model of a finished run.

  Manifests whose objects are damaged move to `there.damaged`.

  Args:
    bucket: the file system.
    there: what it holds.
    workdir: the run's directory.
    here: the newest step that the directory has; earlier ones stay there.
    check: called with the config of the bucket's run.

  Returns:
    The newest step of the directory now.
  """
  names = sorted(there.manifests, key=_order, reverse=True)
  for name in [x for x in names if x != FINISHED]:
    manifest = there.manifests[name]
    with _passing_over(there, name):
      verify(bucket, manifest, ["config.json"])
      config = bucket.cat_file(f"{manifest.folder}/config.json")
      check(strict_json.parse(config))
      if here is None or here < manifest.step:
        download(bucket, manifest, workdir)
        here = manifest.step
      break
  final = there.manifests.get(FINISHED)
  if final and final.step == here and not (workdir / FINISHED).exists():
    with _passing_over(there, FINISHED):
      download(bucket, final, workdir)
  return here


@contextlib.contextmanager
def _passing_over(there: Listing, name: str) -> Iterator[None]:
  """Moves a manifest to the damaged ones if one of its objects is."""
  try:
    yield
  except Damaged as error:
    del there.manifests[name]
    there.damaged[name] = str(error)
