"""Append-only file of rows, locked by one process."""

import logging
import os
import pathlib
from collections.abc import Iterable
from typing import Generic

from dpo_jax.io import atomic, locks, records

_log = logging.getLogger(__name__)


class Store(Generic[records.Row]):
  """Append-only file of rows, held by one process; a context manager.

  Entering takes the lock `<path>.lock` and reads `rows`: all rows of the file,
  replaced verdicts too. A last line cut by an interrupted append is removed
  with a warning; one that lacks only its newline is kept.
  """

  def __init__(self, path: str | os.PathLike, cls: type[records.Row]):
    self.path = pathlib.Path(path)
    self.cls = cls
    self.rows: list[records.Row] = []
    self._lock = locks.Lock(self.path.with_name(self.path.name + ".lock"))
    self._fd = -1
    self._size = 0

  def __enter__(self) -> "Store[records.Row]":
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._lock.__enter__()
    try:
      self._open()
    except BaseException:
      self.__exit__()
      raise
    return self

  def peek(self) -> "Store[records.Row]":
    """Reads `rows` without a lock; a missing file or a cut line is no row."""
    if self.path.exists():
      self.rows, _, _ = records.scan(self.path, self.cls)
    return self

  def _open(self) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    self._fd = os.open(self.path, flags, 0o644)
    atomic.sync(self.path.parent)
    # Every whole line is checked before anything is changed.
    self.rows, rest, self._size = records.scan(self.path, self.cls)
    if not rest:
      return
    try:
      row = records.decode(rest, self.cls)
    except ValueError:
      os.ftruncate(self._fd, self._size)
      os.fsync(self._fd)
      _log.warning(
        "%s: removed %d bytes of a line cut by an interrupted append",
        self.path,
        len(rest),
      )
    else:
      self._size += len(rest)
      self._write(b"\n")
      self.rows.append(row)

  def __exit__(self, *exc_info) -> None:
    if self._fd >= 0:
      os.close(self._fd)
      self._fd = -1
    self._lock.__exit__()

  def append(self, row: records.Row) -> None:
    """Commits one row: on disk when this returns."""
    self._write(records.encode(row))

  def append_many(self, rows: Iterable[records.Row]) -> None:
    """Commits rows with one flush; an interruption keeps the first of them."""
    self._write(b"".join(map(records.encode, rows)))

  def _write(self, data: bytes) -> None:
    try:
      with atomic.naming(self.path, data):
        view = memoryview(data)
        while view:
          view = view[os.write(self._fd, view) :]
        os.fsync(self._fd)
    except BaseException:
      # A full disk takes a part of the line: what was committed stays whole.
      os.ftruncate(self._fd, self._size)
      raise
    self._size += len(data)
