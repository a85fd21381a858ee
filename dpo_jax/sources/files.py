"""Rows of JSONL files on this machine, each with its file and line.

A line that cannot be decoded is handed on as the `Malformed` error that it is,
so that whoever counts rows decides whether it is one too many. A broken file
is an error at once.
"""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from dpo_jax import comparisons

_ENDINGS = (".jsonl", ".jsonl.gz", ".json")
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_POINTER = b"version https://git-lfs.github.com/spec/"


def rows(path: pathlib.Path, counts: dict[str, int]) -> Iterator:
  """(file:line, decoded row or Malformed) for each line that is not blank.

  Args:
    path: a .jsonl file, or one whose name ends with .gz.
    counts: takes what was accepted although it is not plain JSONL: byte order
      marks, and lines that end as on Windows.

  Raises:
    ValueError: a broken gzip, a gzip of another name, or a pointer of git-LFS
      in the place of the rows.
  """
  zipped = path.suffix == ".gz"
  _check_start(path, zipped)
  number = 0
  try:
    with (gzip.open if zipped else open)(path, "rb") as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        if line.startswith(_BOM):
          _count(counts, "accepted: byte order mark")
        if line.endswith(b"\r\n"):
          _count(counts, "accepted: CRLF at the end of a line")
        yield f"{path}:{number}", _decode(line)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f"{path}: broken gzip after line {number} ({error}); fetch it again"
    ) from error


def layout(
  directory: pathlib.Path, split: str, subsets: tuple[str, ...]
) -> list[pathlib.Path]:
  """The file of a split of each subset, `<subset>/<split>.jsonl(.gz)`.

  Without subsets it is `<split>.jsonl(.gz)` of the directory itself. `.json`
  stands for lines of JSON too, as in SHP. The list is empty if the directory
  holds no such file of any split, so that another reader may try.

  Raises:
    ValueError: a file is missing where there are others, or stands twice.
  """
  folders = [directory / subset for subset in subsets] or [directory]
  files, missing = [], []
  for folder in folders:
    found = [name for name in names(folder, split) if name.is_file()]
    if len(found) > 1:
      raise ValueError(
        f"both {found[0]} and {found[1].name} are there: remove one"
      )
    files += found
    missing += [] if found else [folder]
  there = [file.name for folder in folders for file in _of_any_split(folder)]
  if missing and there:
    raise ValueError(
      f"{missing[0]} holds none of"
      f" {[name.name for name in names(missing[0], split)]}; there are"
      f" {sorted(set(there))}"
    )
  return files


def names(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
  """The files that may hold a split of a folder."""
  return [folder / f"{split}{end}" for end in _ENDINGS]


def _of_any_split(folder: pathlib.Path) -> list[pathlib.Path]:
  if not folder.is_dir():
    return []
  return [p for p in folder.iterdir() if p.name.endswith(_ENDINGS)]


def _check_start(path: pathlib.Path, zipped: bool) -> None:
  """Refuses what is known by its first bytes to be no file of rows."""
  with path.open("rb") as file:
    start = file.read(len(_POINTER))
  if start == _POINTER:
    raise ValueError(
      f"{path} is a pointer of git-LFS and holds no rows: fetch the file"
      " itself with `git lfs pull`"
    )
  if start.startswith(_GZIP) and not zipped:
    raise ValueError(f"{path} is a gzip file: name it {path.name}.gz")


def _decode(line: bytes) -> Any:
  try:
    return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
  except UnicodeDecodeError:
    return comparisons.Malformed("not UTF-8")
  except comparisons.Malformed as error:
    return error
  except (ValueError, RecursionError):
    return comparisons.Malformed("not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object's fields; one that stands twice has no value to go by."""
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise comparisons.Malformed(f"field {twice!r} stands more than once")
  return fields


def _count(counts: dict[str, int], reason: str) -> None:
  counts[reason] = counts.get(reason, 0) + 1
