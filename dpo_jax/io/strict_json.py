"""JSON of unknown origin, read with every doubt resolved against it.

All readers of files that this program did not write in the same run go through
here: whole files (`read`), files of lines (`lines`, then `parse` of each), and
the first look at anything (`refuse_pointer`). What is read is bounded before it
is held, so that a hostile file costs a bounded amount of memory.
"""

import collections
import gzip
import json
import math
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

# Of a file that is one JSON value. Published result files have 0.2 MiB, the
# record of a batch of 50,000 questions some 7 MiB; the values of 32 MiB of
# empty lists within lists take 1.3 GiB.
MAX_BYTES = 32 * 2**20
# Of one line. The longest row of 1,812 of HH has 8 kB; a question with all its
# answers, which is one line too, may have a hundred times that.
MAX_LINE_BYTES = 16 * 2**20
# Our deepest file, a replication's config, has 6 levels, a row of messages 3.
MAX_DEPTH = 32
# How many bytes one byte of gzip may become. HH's rows give 4.4, a bomb up to
# 1,032, the most that the format can.
MAX_GZIP_RATIO = 200
# What a gzip may become in any case: too little to do harm.
FREE_GZIP_BYTES = 16 * 2**20

T = TypeVar("T")

_POINTER = b"version https://git-lfs.github.com/spec/"
_IS_POINTER = (
  "is a pointer of git-LFS and holds nothing of the file itself: fetch it with"
  " `git lfs pull`"
)
_GZIP = b"\x1f\x8b"


class Refused(ValueError):
  """Bytes that are not taken; `reason` leaves out what is special to them."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(reason + detail)
    self.reason = reason
    self.detail = detail


def read(path: str | os.PathLike) -> Any:
  """The value in a JSON file.

  Raises:
    ValueError: naming the file, if it cannot be opened, is larger than
      `MAX_BYTES`, a pointer of git-LFS, or refused by `parse`.
  """
  try:
    return parse(read_bytes(path))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def read_object(path: str | os.PathLike) -> dict[str, Any]:
  """As `read`, of a file that must hold an object."""
  value = read(path)
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
  return value


def read_bytes(path: str | os.PathLike) -> bytes:
  """The bytes of a file of at most `MAX_BYTES`; ValueError if it has more."""
  # Piece by piece: the file may grow, be a device, or be small.
  data = bytearray()
  try:
    with pathlib.Path(path).open("rb") as file:
      while len(data) <= MAX_BYTES and (piece := file.read(2**18)):
        data += piece
  except OSError as error:
    raise ValueError(f"cannot be read ({error.strerror})") from error
  if len(data) > MAX_BYTES:
    raise ValueError(f"more than {MAX_BYTES >> 20} MiB: too large to be read")
  if data.startswith(_POINTER):
    raise ValueError(f"it {_IS_POINTER}")
  return bytes(data)


def refuse_pointer(path: str | os.PathLike) -> None:
  """Raises ValueError if a file is what git-LFS leaves in a file's place."""
  with open(path, "rb") as file:
    if file.read(len(_POINTER)) == _POINTER:
      raise ValueError(f"{path} {_IS_POINTER}")


def lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
  """(number, line with its end) of a file of lines, gzip if named `.gz`.

  Lines end with the byte 0x0a alone, since texts hold other line separators
  (U+2028, U+0085, a carriage return) that belong to them. Of one that is too
  long only so much is given as makes `parse_line` refuse it; its rest is passed
  over.

  Raises:
    ValueError: the file is a pointer of git-LFS, a gzip of another name, or a
      gzip that is broken or becomes too large for its size.
  """
  path = pathlib.Path(path)
  zipped = path.suffix == ".gz"
  refuse_pointer(path)
  number = 0
  with path.open("rb") as raw:
    if not zipped:
      if raw.read(len(_GZIP)) == _GZIP:
        raise ValueError(f"{path} is a gzip file: name it {path.name}.gz")
      raw.seek(0)
    file = gzip.GzipFile(fileobj=raw) if zipped else raw
    try:
      for number, line in _bounded(path, raw, file):
        yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(
        f"{path}: broken gzip after line {number} ({error}); fetch it again"
      ) from error


def scan(
  path: str | os.PathLike, decode: Callable[[bytes], T]
) -> tuple[list[T], bytes, int]:
  """The lines of a file that is appended to.

  A line is committed when its newline is on disk. An interrupted append leaves
  a last line without one, and everything before it is whole: this is what makes
  every stage resumable.

  Args:
    path: the file.
    decode: `parse_line`, or what checks a row, too.

  Returns:
    Whole lines, decoded; what follows the last of them, b"" after no
    interruption; and the bytes of the whole lines.

  Raises:
    ValueError: `decode` raised it; file and line are named.
  """
  values, size = [], 0
  for number, line in lines(path):
    # No append was ever that long: an interrupted one cannot have left it.
    if not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES:
      return values, line, size
    try:
      values.append(decode(line))
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
    size += len(line)
  return values, b"", size


def appended(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
  """Numbers, from 1, and values of the whole lines of a file; see `scan`."""
  return iter(enumerate(scan(path, parse_line)[0], 1))


def _bounded(path, raw, file) -> Iterator[tuple[int, bytes]]:
  """The lines of `file`, which reads `raw`; both are open."""
  number, total, allowed = 0, 0, FREE_GZIP_BYTES
  starts = True
  while line := file.readline(MAX_LINE_BYTES + 1):
    total += len(line)
    if file is not raw and total > allowed:
      allowed = FREE_GZIP_BYTES + MAX_GZIP_RATIO * raw.tell()
      if total > allowed:
        raise ValueError(
          f"{path} becomes more than {MAX_GZIP_RATIO} times its size when it"
          " is unpacked: that is no file of texts"
        )
    if starts:
      number += 1
      yield number, line
    # What follows is the rest of a line that is refused already.
    starts = line.endswith(b"\n")


def parse_line(line: bytes) -> Any:
  """As `parse`, of a line of at most `MAX_LINE_BYTES`."""
  if len(line) > MAX_LINE_BYTES:
    raise Refused(f"longer than {MAX_LINE_BYTES >> 20} MiB")
  return parse(line.removesuffix(b"\n"))


def parse(data: bytes) -> Any:
  """The value of some JSON text in UTF-8; a byte order mark may precede it.

  Raises:
    Refused: it is not UTF-8, not JSON, nested deeper than `MAX_DEPTH`, or
      holds a number that is not finite, half of a surrogate pair, which UTF-8
      cannot carry, or a name twice in one object.
  """
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise Refused("not UTF-8", f" at byte {error.start}") from None
  try:
    value = json.loads(
      text,
      object_pairs_hook=_unique,
      parse_constant=_refuse_constant,
      parse_float=_finite,
    )
  except RecursionError:
    raise Refused(f"nested deeper than {MAX_DEPTH} levels") from None
  except Refused:
    raise
  except ValueError as error:
    raise Refused("not JSON", f": {error}") from None
  _check_depth(value)
  # Halves of surrogate pairs can only be written as escapes.
  if b"\\ud" in data or b"\\uD" in data:
    _check_halves(value)
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) != len(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    twice = min(name for name, count in counts.items() if count > 1)
    raise Refused(f"field {twice!r:.80} stands more than once")
  return values


def _refuse_constant(name: str) -> Any:
  raise Refused(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
  value = float(digits)
  if not math.isfinite(value):
    raise Refused("a number is too large to be finite", f": {digits:.40}")
  return value


def _check_depth(value: Any) -> None:
  """Walks level by level, since a value may be deeper than calls may be."""
  level = [value]
  for _ in range(MAX_DEPTH):
    level = [
      child
      for item in level
      for _, child in _children("", item)
      if isinstance(child, dict | list)
    ]
    if not level:
      return
  raise Refused(f"nested deeper than {MAX_DEPTH} levels")


def _check_halves(value: Any) -> None:
  waiting = [("", value)]
  while waiting:
    name, item = waiting.pop()
    for text in (name, item):
      if isinstance(text, str):
        try:
          text.encode()
        except UnicodeEncodeError:
          raise Refused(f"field {name!r:.80} holds a lone surrogate") from None
    waiting.extend(_children(name, item))


def _children(name: str, item: Any) -> Iterable[tuple[str, Any]]:
  """The members of a value, an item of a list under the list's own name."""
  if isinstance(item, dict):
    return item.items()
  if isinstance(item, list):
    return ((name, child) for child in item)
  return ()
