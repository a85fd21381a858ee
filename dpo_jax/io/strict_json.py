"""JSON and JSON lines of foreign files.

Strict UTF-8, strict JSON, finite numbers, and texts that UTF-8 can carry. At
most `MAX_BYTES` of a JSON file, or of a line, are held in memory, compressed or
not.
"""

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

# The record of a batch of 50,000 comparisons takes some 7 MiB; rows of HH and
# result files stay below 0.2 MiB.
MAX_BYTES = 32 * 2**20

T = TypeVar("T")

_POINTER = b"version https://git-lfs.github.com/spec/"
_GZIP = b"\x1f\x8b"


class Refused(ValueError):
  """Bytes that are no strict JSON; `reason` is without the file's details."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(reason + detail)
    self.reason = reason
    self.detail = detail


def read(path: str | os.PathLike) -> Any:
  """Value of a JSON file.

  Raises:
    ValueError: naming the file, if it cannot be read, is larger than
      `MAX_BYTES`, a Git LFS pointer, or refused by `parse`.
  """
  data = read_bytes(path)
  try:
    return parse(data)
  except Refused as error:
    raise ValueError(f"{path}: {error}") from error


def read_object(path: str | os.PathLike) -> dict[str, Any]:
  """`read` of a file that must hold an object."""
  value = read(path)
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
  return value


def read_bytes(path: str | os.PathLike) -> bytes:
  """Bytes of a file of at most `MAX_BYTES`; ValueError as `read`."""
  try:
    if os.path.getsize(path) > MAX_BYTES:
      raise ValueError(f"{path}: longer than {MAX_BYTES >> 20} MiB")
    with open(path, "rb") as file:
      data = file.read()
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
  _check_start(path, data)
  return data


def refuse_pointer(path: str | os.PathLike) -> None:
  """Raises ValueError if a file is a Git LFS pointer."""
  with open(path, "rb") as file:
    _check_start(path, file.read(len(_POINTER)))


def _check_start(path: str | os.PathLike, data: bytes) -> None:
  if data.startswith(_POINTER):
    raise ValueError(
      f"{path} is a pointer of git-LFS, without the file's content: fetch it"
      " with `git lfs pull`"
    )
  if data.startswith(_GZIP) and not str(path).endswith(".gz"):
    raise ValueError(f"{path} is a gzip file: add .gz to its name")


def lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
  """(number, line with its end) of a file, gzip if named `.gz`.

  Only the byte 0x0a ends a line: texts hold other separators (U+2028, U+0085, a
  carriage return).

  Raises:
    ValueError: the file is a Git LFS pointer or a gzip of another name, the
      gzip is broken, or a line is longer than `MAX_BYTES`.
  """
  refuse_pointer(path)
  number = 0
  with (
    gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file
  ):
    try:
      while line := file.readline(MAX_BYTES + 1):
        number += 1
        if len(line) > MAX_BYTES:
          limit = MAX_BYTES >> 20
          raise ValueError(f"{path}:{number}: longer than {limit} MiB")
        yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(
        f"{path}: broken gzip after line {number} ({error}); fetch it again"
      ) from error


def scan(
  path: str | os.PathLike, decode: Callable[[bytes], T]
) -> tuple[list[T], bytes, int]:
  """Lines of an append-only file.

  A line is committed when its newline is on disk: an interrupted append leaves
  a last line without one, and all lines before it whole. Every stage resumes
  from this.

  Args:
    path: the file.
    decode: of a line, such as `parse`.

  Returns:
    The committed lines, decoded; the bytes after them, b"" without an
    interruption; and their size in bytes.

  Raises:
    ValueError: by `decode`, with file and line.
  """
  values, size = [], 0
  for number, line in lines(path):
    if not line.endswith(b"\n"):
      return values, line, size
    try:
      values.append(decode(line))
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
    size += len(line)
  return values, b"", size


def parse(data: bytes) -> Any:
  """Value of JSON text in UTF-8, with or without a byte order mark.

  Raises:
    Refused: it is not UTF-8, not JSON, nested deeper than Python's stack, or
      holds a number that is not finite or half of a surrogate pair.
  """
  try:
    value = json.loads(
      data.decode("utf-8-sig"), parse_constant=_constant, parse_float=_finite
    )
    check_texts(value)
  except UnicodeDecodeError as error:
    raise Refused("not UTF-8", f" at byte {error.start}") from None
  except RecursionError:
    raise Refused("nested too deeply") from None
  except Refused:
    raise
  except ValueError as error:
    raise Refused("not JSON", f": {error}") from None
  return value


def _constant(name: str) -> Any:
  raise Refused(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
  value = float(digits)
  if not math.isfinite(value):
    raise Refused("a number is too large to be finite", f": {digits:.40}")
  return value


def check_texts(value: Any, name: str = "") -> None:
  """Raises Refused, naming the field, if UTF-8 cannot encode a text.

  JSON can escape half of a surrogate pair.
  """
  if isinstance(value, str):
    try:
      value.encode()
    except UnicodeEncodeError:
      raise Refused(f"field {name!r:.80} holds a lone surrogate") from None
  elif isinstance(value, dict):
    for key, item in value.items():
      check_texts(key, key)
      check_texts(item, key)
  elif isinstance(value, list):
    for item in value:
      check_texts(item, name)
