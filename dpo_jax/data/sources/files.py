"""Rows of JSONL files on this machine, each with its file and line.

A line that cannot be decoded is handed on as the `Malformed` error that it is,
so that whoever counts rows decides whether it is one too many. A broken file
is an error at once.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from dpo_jax.data import preferences
from dpo_jax.io import strict_json

_ENDINGS = (".jsonl", ".jsonl.gz", ".json")
_BOM = b"\xef\xbb\xbf"


def rows(path: pathlib.Path, counts: dict[str, int]) -> Iterator:
  """(file:line, decoded row or Malformed) for each line that is not blank.

  Args:
    path: a .jsonl file, or one whose name ends with .gz.
    counts: takes what was accepted although it is not plain JSONL: byte order
      marks, and lines that end as on Windows.

  Raises:
    ValueError: as `strict_json.lines`.
  """
  for number, line in strict_json.lines(path):
    if not line.strip():
      continue
    if line.startswith(_BOM):
      _count(counts, "accepted: byte order mark")
    if line.endswith(b"\r\n"):
      _count(counts, "accepted: CRLF at the end of a line")
    yield f"{path}:{number}", _decode(line)


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


def _decode(line: bytes) -> Any:
  try:
    return strict_json.parse(line)
  except strict_json.Refused as error:
    return preferences.Malformed(error.reason, error.detail)


def _count(counts: dict[str, int], reason: str) -> None:
  counts[reason] = counts.get(reason, 0) + 1
