"""Files that are there whole or not at all, and what killed writers left.

A file is written beside its place and moved there. While it is written its
temporary is locked, and the operating system drops the lock when its writer
dies, however it dies: so whoever next writes in the directory knows which
temporaries nobody will ever finish, and removes those. One of a live process
is never touched, nor one of another host, whose locks may not be seen here.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import re
import socket
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary file to fill, which takes its place when the block ends.

  It does not if the block raises; then it is removed. The block flushes what
  it writes. The caller flushes the directory if the name must survive a power
  cut.

  Raises:
    OSError: the directory cannot be written.
  """
  _sweep(path.parent)
  temporary, handle = _begin(path)
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
    os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes the whole file or nothing: a reader never sees half of it."""
  path = pathlib.Path(path)
  data = text.encode()
  with (
    naming(path, data),
    replacing(path) as temporary,
    open(temporary, "wb") as file,
  ):
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
  sync(path.parent)


@contextlib.contextmanager
def naming(path: pathlib.Path, data: bytes):
  """Gives the errors of a write, which name no file, the path and size."""
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


def _begin(path: pathlib.Path) -> tuple[pathlib.Path, int]:
  """A new temporary of this process, and the handle that holds its lock."""
  while True:
    # Short, since the names of files are too.
    name = f".{path.name}.{_host()}.{uuid.uuid4().hex[:12]}.tmp"
    temporary = path.with_name(name)
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    # A file system without locks: nobody else can take it either.
    with contextlib.suppress(OSError):
      fcntl.flock(handle, fcntl.LOCK_EX)
    # Between the two calls another process may have taken it for left.
    if temporary.exists():
      return temporary, handle
    os.close(handle)


def _sweep(directory: pathlib.Path) -> None:
  """Removes the temporaries of this host that no process holds."""
  ours = re.compile(rf"\..+\.{_host()}\.[0-9a-f]{{12}}\.tmp")
  for name in os.listdir(directory):
    if ours.fullmatch(name):
      _remove_if_left(directory / name)


def _remove_if_left(temporary: pathlib.Path) -> None:
  try:
    handle = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW)
  except OSError:
    return
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    temporary.unlink(missing_ok=True)
  except OSError:
    pass
  finally:
    os.close(handle)


def _host() -> str:
  return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
