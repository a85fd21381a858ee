"""What a bucket holds of a run, and download from it, over fsspec.

  000300-5f0c61d2a9be/   files of step 300, by their names in the directory
  000300.json            their sizes and SHA-256, and the table's own hash
  finished-.../          the exported model and the last records
  finished.json          their table
  rejected/              tables that were found damaged

Without its table a step does not exist. A bucket is a file system of fsspec
whose paths are relative to the run's address.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dpo_jax.core import errors
from dpo_jax.io import atomic, hashing, step_files, strict_json

FINISHED = "finished.json"
_TABLE = re.compile(r"(\d{6,}|finished)\.json")
# Objects of a table, and tables put aside.
_OBJECT = re.compile(r"(\d{6,}|finished)-[0-9a-f]{12}/.+", re.DOTALL)
_REJECTED = re.compile(r"rejected/(\d{6,}|finished)-[0-9a-f]{12}\.json")
_FORMAT = 1
_WORKERS = 8
# Of one request.
_TIMEOUT_S = 120.0


class Damaged(ValueError):
  """What a bucket holds is not what was put there."""


# --- Tables


@dataclasses.dataclass(frozen=True)
class File:
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Table:
  """A run's directory when a step had been saved.

  Attributes:
    step: updates that were done.
    metrics: of the evaluation at the step, for retention.
    folder: of the objects.
    files: by their names in the directory, and in the folder.
  """

  step: int
  metrics: dict[str, float]
  folder: str
  files: dict[str, File]

  @property
  def bytes(self) -> int:
    return sum(file.bytes for file in self.files.values())


def table_name(step: int) -> str:
  return f"{step:06d}.json"


def fresh(name: str) -> str:
  """A name for the folder of a table that no other has."""
  return f"{name.removesuffix('.json')}-{secrets.token_hex(6)}"


def encode(table: Table) -> bytes:
  values = dataclasses.asdict(table) | {"format": _FORMAT}
  values = json.loads(json.dumps(values))
  text = json.dumps(values | {"sha256": _own_hash(values)}, indent=1)
  return text.encode() + b"\n"


def decode(data: bytes) -> Table:
  """The table that `encode` wrote.

  Raises:
    Damaged: it is not what was written.
  """
  try:
    values = strict_json.parse(data)
    if values.pop("sha256") != _own_hash(values):
      raise ValueError("it has another hash")
    if values.pop("format") != _FORMAT:
      raise ValueError("it has another format")
    files = {name: File(**file) for name, file in values.pop("files").items()}
    table = Table(**values, files=files)
    metrics = {name: float(x) for name, x in table.metrics.items()}
    numbers = [table.step, *(file.bytes for file in files.values())]
    if any(type(number) is not int or number < 0 for number in numbers):
      raise ValueError("a step or a size is no whole number")
    for name in (table.folder, *files):
      path = pathlib.PurePosixPath(name)
      if (
        not path.parts
        or path.is_absolute()
        or {"..", "\0"}
        & {
          *path.parts,
          *name,
        }
      ):
        raise ValueError(f"the file {name!r:.80} would leave the directory")
    return dataclasses.replace(table, metrics=metrics)
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
  ) as error:
    raise Damaged(f"the table is not what was written ({error})") from error


def _own_hash(values: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()


# --- Buckets, as file systems whose paths are relative to the address


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
  """The file system of an address.

  Raises:
    ValueError: its client is not installed.
  """
  import fsspec
  from fsspec.implementations import dirfs

  check(address)
  # It logs a traceback for each request that fails.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  own = {"gs": {"requests_timeout": _TIMEOUT_S}, "file": {"auto_mkdir": True}}
  options = own.get(address.partition(":")[0], {})
  with reaching(address):
    bucket, path = fsspec.core.url_to_fs(
      address.rstrip("/"),
      use_listings_cache=False,
      skip_instance_cache=True,
      **options,
    )
  return dirfs.DirFileSystem(path, bucket, skip_instance_cache=True)


@contextlib.contextmanager
def reaching(address: str) -> Iterator[None]:
  """Turns the errors of clients and networks into one that says what to do.

  Raises:
    ValueError: the bucket could not be reached, or refused.
  """
  try:
    yield
  except (ValueError, errors.Stopped):
    raise
  # No list of them would be whole.
  except Exception as error:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise ValueError(
      f"{address}: {short(error)}; gs:// needs the extra gcs (pip install"
      " 'dpo-jax[gcs]'), the bucket must exist, and the credentials of this"
      " machine (a service account's, or `gcloud auth application-default"
      " login`) must let objects be listed, read, created and deleted"
    ) from error


def short(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


@dataclasses.dataclass(frozen=True)
class Listing:
  """What a bucket holds.

  Attributes:
    tables: by their names.
    damaged: why tables cannot be used, by their names.
    names: of all objects.
  """

  tables: dict[str, Table]
  damaged: dict[str, str]
  names: list[str]

  @property
  def steps(self) -> dict[int, Table]:
    return {t.step: t for name, t in self.tables.items() if name != FINISHED}

  def foreign(self) -> list[str]:
    """Objects that no run uploaded."""
    forms = (_TABLE, _OBJECT, _REJECTED)
    return [x for x in self.names if not any(y.fullmatch(x) for y in forms)]

  def rejected(self) -> set[str]:
    """The steps of tables that were put aside, as folders begin with them."""
    return {x[1] for x in map(_REJECTED.fullmatch, self.names) if x}

  def stale(self) -> list[str]:
    """Objects of no table.

    Not those newer than the newest table, which may be another process's upload
    in progress, nor those of damaged tables, which stay to be looked at.
    """
    live = {table.folder for table in self.tables.values()}
    newest = max(map(_order, self.tables), default=-1)
    damaged = {name.removesuffix(".json") for name in self.damaged}
    return [
      x[0]
      for x in map(_OBJECT.fullmatch, self.names)
      if x
      and x[0].partition("/")[0] not in live
      and x[1] not in damaged | self.rejected()
      and _order(x[1]) <= newest
    ]


def _order(name: str) -> float:
  """The step of a table or a folder; what is finished comes after all."""
  label = name.removesuffix(".json")
  return math.inf if label == "finished" else int(label)


def look(bucket: Any, known: Mapping[str, Table]) -> Listing:
  """Lists a bucket and reads the tables that are not `known`."""
  names = sorted(bucket.find(""))
  tables, damaged = {}, {}
  for name in filter(_TABLE.fullmatch, names):
    try:
      table = known.get(name) or decode(bucket.cat_file(name))
      if name not in (FINISHED, table_name(table.step)):
        raise Damaged(f"the table is of step {table.step}")
      tables[name] = table
    except Damaged as error:
      damaged[name] = str(error)
  return Listing(tables, damaged, names)


def delete(bucket: Any, names: Iterable[str]) -> None:
  def one(name):
    # Another process may have deleted it.
    with contextlib.suppress(FileNotFoundError):
      bucket.rm_file(name)

  each(one, names)


# --- Download


def verify(bucket: Any, table: Table, names: Iterable[str]) -> None:
  """Compares objects of a table with their hashes.

  Raises:
    Damaged: one is gone, or is not what was written.
  """

  def one(name):
    with (
      _compared(table, name) as found,
      bucket.open(f"{table.folder}/{name}", "rb") as stream,
    ):
      found.append(hashlib.file_digest(stream, "sha256").hexdigest())

  each(one, names)


@contextlib.contextmanager
def _compared(table: Table, name: str) -> Iterator[list[str]]:
  """Takes the hash that was found of an object."""
  found: list[str] = []
  try:
    yield found
  except FileNotFoundError as error:
    raise Damaged(f"{table.folder}/{name} is gone") from error
  wanted = table.files.get(name)
  if wanted is None or found != [wanted.sha256]:
    raise Damaged(f"{table.folder}/{name} is not what was written")


def bring(bucket: Any, table: Table, workdir: pathlib.Path) -> None:
  """Downloads the files of a table into a run's directory.

  Raises:
    Damaged: see `verify`; the directory is as it was.
  """
  # Hidden, so that a killed download leaves a directory that is still empty.
  arriving = workdir / ".download"
  shutil.rmtree(arriving, ignore_errors=True)

  def one(name):
    path = arriving / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with _compared(table, name) as found:
      bucket.get_file(f"{table.folder}/{name}", str(path))
      atomic.sync(path)
      found.append(hashing.file_hash(path))

  try:
    each(one, table.files)
    checkpoint = arriving / "checkpoints" / str(table.step)
    # The first makes the directory this run's, the last makes it finished.
    ends = ("config.json", FINISHED)
    for name in (ends[0], *(table.files.keys() - set(ends)), ends[1]):
      source, target = arriving / name, workdir / name
      if name in table.files and checkpoint not in source.parents:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    if checkpoint.exists():
      staged = step_files.staged(workdir / "checkpoints", table.step)
      shutil.rmtree(staged, ignore_errors=True)
      staged.parent.mkdir(parents=True, exist_ok=True)
      checkpoint.rename(staged)
      step_files.install(staged.parent, table.step)
  finally:
    shutil.rmtree(arriving, ignore_errors=True)


def each(act, items: Iterable) -> list:
  """Acts on items, several at a time."""
  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    return list(pool.map(act, items))
