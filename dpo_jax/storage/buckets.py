"""Models and data of Google Cloud Storage, gs://bucket/path, as local copies.

An object is copied before it is read, into ~/.cache/dpo_jax/buckets, and again
only when its size or its time of change is another. So everything that reads
files keeps its checks, and maps them where they lie.

Nothing is written there. A run's directory needs locks, renames and appends,
and object stores have none of them: `refuse` says what to do instead.
"""

import contextlib
import fnmatch
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dpo_jax.storage import atomic

_SCHEME = "gs://"


def is_address(name: str) -> bool:
  """Whether a name is gs://bucket/path."""
  return name.startswith(_SCHEME)


def refuse(what: str, name: str) -> None:
  """Refuses an address where something is to be written.

  Raises:
    ValueError: `name`, the value of `what`, has a scheme.
  """
  if "://" in name:
    raise ValueError(
      f"{what}={name!r}: an object store has neither locks nor renames, which"
      " keep these files whole. Name a directory of this machine, or of a file"
      " system that its hosts share, and copy from it: gcloud storage rsync -r"
      " DIR gs://..."
    )


def fetch(
  address: str, patterns: Sequence[str], *, deep: bool = False
) -> pathlib.Path:
  """A local copy of an object, or of those of a folder that are wanted.

  Args:
    address: gs://bucket/path of one object or of a folder.
    patterns: which names of a folder are wanted, such as "*.json".
    deep: whether those of its folders are, too.

  Returns:
    The copy; a folder's holds what the folder holds now, and nothing else.

  Raises:
    ValueError: there is no such thing, or it was not copied.
  """
  digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
  copies = pathlib.Path.home() / ".cache" / "dpo_jax" / "buckets" / digest
  with _reachable(address):
    source = _open(address)
    if source.is_file():
      _copy(source, copies / source.name)
      return copies / source.name
    names = {}
    for file in _files(source, deep):
      if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
        names[_relative(file, source)] = file
    if not names:
      raise FileNotFoundError(f"no object like {', '.join(patterns)}")
    for name, file in names.items():
      _copy(file, copies / name)
  for left in copies.rglob("*"):
    if left.is_file() and str(left.relative_to(copies)) not in names:
      left.unlink()
  return copies


def folders(address: str) -> list[str]:
  """The names of a folder's folders; [] if it is none."""
  with _reachable(address):
    source = _open(address)
    if not source.is_dir():
      return []
    return sorted(path.name for path in source.iterdir() if path.is_dir())


def _open(address: str) -> Any:
  from etils import epath

  return epath.Path(address)


def _files(source: Any, deep: bool) -> Iterable[Any]:
  for path in source.iterdir():
    if path.is_file():
      yield path
    elif deep and path.is_dir():
      yield from _files(path, deep)


def _relative(file: Any, source: Any) -> str:
  """A file's name below a folder; an object may be called anything."""
  name = pathlib.PurePosixPath(os.fspath(file)).relative_to(os.fspath(source))
  if ".." in name.parts or "\0" in str(name):
    raise ValueError(f"the object {str(name)!r} would leave the folder")
  return str(name)


def _copy(source: Any, target: pathlib.Path) -> None:
  """Copies an object, unless the copy is of the same size and time."""
  about = source.stat()
  changed = float(about.mtime or 0)
  if target.is_file():
    found = target.stat()
    if (found.st_size, int(found.st_mtime)) == (about.length, int(changed)):
      return
  target.parent.mkdir(parents=True, exist_ok=True)
  with atomic.replacing(target) as staged:
    with source.open("rb") as reader, staged.open("wb") as writer:
      shutil.copyfileobj(reader, writer, 2**20)
    if (size := staged.stat().st_size) != about.length:
      raise OSError(f"{source} has {about.length} bytes, but {size} came")
  os.utime(target, (changed, changed))


@contextlib.contextmanager
def _reachable(address: str) -> Iterator[None]:
  """Turns the errors of many libraries into one that says what to do."""
  try:
    yield
  # gcsfs's, the network's, the disk's: no list of them would be whole.
  except Exception as error:
    raise ValueError(
      f"{address} was not read ({type(error).__name__}: {error}); it needs the"
      " extra gcs (pip install 'dpo-jax[gcs]') and credentials of Google Cloud,"
      " or copy it to this machine: gcloud storage cp -r"
    ) from error
