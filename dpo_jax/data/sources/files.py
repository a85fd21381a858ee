"""Raw rows of a path: a JSONL file, a directory, a bucket, or a hub dataset.

Rows come with their origin. A line that cannot be decoded is yielded as the
`Malformed` error that it is, so that the caller counts it or raises it; a
broken file is an error at once.
"""

import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from dpo_jax.data import preferences
from dpo_jax.data.sources import hub
from dpo_jax.io import remote, strict_json

# `.json` holds JSON lines too, as in SHP.
_ENDINGS = (".jsonl", ".jsonl.gz", ".json")
_FETCHED = ("*.jsonl", "*.jsonl.gz", "*.json", "*.parquet")
_BOM = b"\xef\xbb\xbf"


def read(
  path: str,
  split: str,
  subsets: tuple[str, ...],
  *,
  subset_is: Literal["data_dir", "name"],
  subsets_required: bool,
  streaming: bool,
  counts: dict[str, int],
) -> Iterator:
  """(origin, row or Malformed, subset) for each row, in the files' order.

  `subset` is one of `subsets`, or "" without any.

  Args:
    path: a JSONL file; a directory of `<subset>/<split>.jsonl(.gz)` or of
      `<split>.jsonl(.gz)`; a directory of parquet files; one of these in a
      bucket, gs://bucket/path; or a hub id.
    split: a split of a directory or dataset; a file is one split.
    subsets: parts of a directory or dataset, in this order.
    subset_is: see `hub.rows`.
    subsets_required: whether a directory's parts must be named.
    streaming: see `hub.rows`.
    counts: see `rows`.

  Raises:
    ValueError: nothing is there, or it cannot be read.
  """
  if remote.is_address(path):
    path = str(remote.fetch_objects(path, _FETCHED, deep=True))
  local = pathlib.Path(path)
  found = []
  if path and local.is_file():
    if subsets:
      raise ValueError(
        f"subsets={subsets} are parts of a directory or dataset, and {path} is"
        " one file: set them to ()"
      )
    found = [local]
  elif path and local.is_dir():
    if subsets_required and not subsets:
      raise ValueError(
        f"{path} is a directory: name its subsets, such as harmless-base"
      )
    found = _split_files(local, split, subsets)
    subset_is = "data_dir"
  elif hub.is_id(path):
    remote.refuse_missing(path)
  else:
    raise ValueError(
      f"{path!r} is neither a file, a directory nor a hub id (user/name)"
    )
  if found and streaming:
    raise ValueError(
      f"streaming=True changes nothing for {path}, which is read line by line"
      " anyway: set it to False"
    )
  for number, subset in enumerate(subsets or ("",)):
    of_subset = (
      rows(found[number], counts)
      if found
      else hub.rows(path, split, subset, subset_is, streaming)
    )
    for origin, row in of_subset:
      yield origin, row, subset


def rows(path: pathlib.Path, counts: dict[str, int]) -> Iterator:
  """(file:line, decoded row or Malformed) for each line that is not blank.

  Args:
    path: a .jsonl file, or one whose name ends with .gz.
    counts: of byte order marks and CRLF line ends, which are accepted.

  Raises:
    ValueError: as `strict_json.lines`.
  """
  for number, line in strict_json.lines(path):
    if not line.strip():
      continue
    for reason, is_so in (
      ("accepted: byte order mark", line.startswith(_BOM)),
      ("accepted: CRLF at the end of a line", line.endswith(b"\r\n")),
    ):
      if is_so:
        counts[reason] = counts.get(reason, 0) + 1
    yield f"{path}:{number}", _decode(line)


def _decode(line: bytes) -> Any:
  try:
    return strict_json.parse(line)
  except preferences.Malformed as error:
    return error


def _split_files(
  directory: pathlib.Path, split: str, subsets: tuple[str, ...]
) -> list[pathlib.Path]:
  """The JSONL file of a split of each subset, or of the directory itself.

  Empty for a directory of parquet files.

  Raises:
    ValueError: a file is missing, or there are two of one split.
  """
  found, missing, others = [], [], set()
  for folder in [directory / subset for subset in subsets] or [directory]:
    names = [f"{split}{end}" for end in _ENDINGS]
    files = [folder / name for name in names if (folder / name).is_file()]
    if len(files) > 1:
      raise ValueError(
        f"both {files[0]} and {files[1].name} are there: remove one"
      )
    found += files
    if folder.is_dir():
      others |= {p.name for p in folder.iterdir() if p.name.endswith(_ENDINGS)}
    if not files:
      missing.append((folder, names))
  for folder, names in missing:
    if others or next(folder.rglob("*.parquet"), None) is None:
      raise ValueError(
        f"{folder} holds none of {names}, and"
        + (f" there are {sorted(others)}" if others else " no parquet files")
      )
  return found
