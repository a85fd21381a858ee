"""Lock of a file or a directory, with its holder's pid and host."""

import fcntl
import json
import logging
import os
import pathlib
import socket

from dpo_jax.core import errors
from dpo_jax.io import atomic

_log = logging.getLogger(__name__)


class Held(errors.Stopped):
  """Another process works on the same file or directory."""


class Lock:
  """Lock file of one process; a context manager.

  The operating system drops the lock when its holder dies, so that a file left
  by a killed process of this host is taken over. A file left by another host
  may be a live holder's and is refused.

  filelock does not do: its FileLock names no holder and takes over other hosts'
  files; its SoftFileLock stays held by a killed process until that is reaped.

  Raises:
    Held: on entering, by another process; pid and host are named.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._fd = -1

  def __enter__(self) -> "Lock":
    while self._fd < 0:
      fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        if self._take(fd):
          self._fd = fd
      finally:
        if self._fd < 0:
          os.close(fd)
    return self

  def _take(self, fd: int) -> bool:
    """False when the file was removed by its last holder meanwhile."""
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise Held(
        f"{self.path} is held by {_holder(fd)}: wait for it to end, or use"
        " another directory"
      ) from None
    try:
      if os.fstat(fd).st_ino != os.stat(self.path).st_ino:
        return False
    except FileNotFoundError:
      return False
    if os.fstat(fd).st_size:
      holder = _holder(fd)
      if not holder.endswith(f" on {socket.gethostname()}"):
        raise Held(
          f"{self.path} was left by {holder}, another host: if that process"
          " has ended, delete this file"
        )
      _log.warning("%s: taking over a stale lock of %s", self.path, holder)
    os.ftruncate(fd, 0)
    mark = {"pid": os.getpid(), "host": socket.gethostname()}
    data = json.dumps(mark).encode()
    with atomic.naming(self.path, data):
      os.pwrite(fd, data, 0)
    return True

  def __exit__(self, *exc_info) -> None:
    self.path.unlink(missing_ok=True)
    os.close(self._fd)
    self._fd = -1


def _holder(fd: int) -> str:
  try:
    mark = json.loads(os.pread(fd, 4096, 0))
    return f"pid {mark['pid']} on {mark['host']}"
  except (ValueError, KeyError, TypeError):
    return "an unnamed process"
