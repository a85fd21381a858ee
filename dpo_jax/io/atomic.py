"""Atomic writes: a file is written under a temporary name and renamed.

The temporary file of a killed writer is removed by the next writer in that
directory, once it is a day old.
"""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterator

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_LEFT_S = 24 * 3600


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary file to fill, which replaces `path` when the block ends.

  If the block raises, it is removed and `path` stays as it was. The new content
  and its name survive a power cut.

  Raises:
    OSError: the directory cannot be written; found on entry.
  """
  _sweep(path.parent)
  # Short, since the names of files are too.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
  temporary.touch()
  try:
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  sync(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Replaces a file's text; a reader sees the old or the new one."""
  path = pathlib.Path(path)
  data = text.encode()
  with naming(path, data), replacing(path) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def naming(path: pathlib.Path, data: bytes):
  """Adds path and size to the OSError of a write, which names no file."""
  try:
    yield
  except OSError as error:
    message = f"{error.strerror} (writing {len(data)} bytes)"
    code = error.errno or errno.EIO
    raise OSError(code, message, str(path)) from error


def sync(path: pathlib.Path) -> None:
  """Makes a file's bytes, or a directory's entries, survive a power cut."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def clear(directory: pathlib.Path) -> None:
  """Removes what killed writers left beneath a directory with no other user."""
  for path in directory.rglob(".*.tmp"):
    if _TEMPORARY.fullmatch(path.name):
      path.unlink(missing_ok=True)


def _sweep(directory: pathlib.Path) -> None:
  """Removes temporaries that are a day old."""
  oldest = time.time() - _LEFT_S
  for name in filter(_TEMPORARY.fullmatch, os.listdir(directory)):
    # Another process may sweep at the same time.
    with contextlib.suppress(OSError):
      if os.lstat(directory / name).st_mtime < oldest:
        os.unlink(directory / name)
