"""Raw rows of any path: a file, a directory, or a dataset of the hub."""

import pathlib
from collections.abc import Iterator
from typing import Literal

from dpo_jax.data.sources import files, hub
from dpo_jax.io import remote

_DATA = ("*.jsonl", "*.jsonl.gz", "*.json", "*.parquet")


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

  `subset` is one of `subsets`, or "" where there are none.

  Args:
    path: a JSONL file; a directory of `<subset>/<split>.jsonl(.gz)` or of
      `<split>.jsonl(.gz)`; a directory of parquet files; one of these in a
      bucket, gs://bucket/path; or a hub id.
    split: a split of a directory or dataset; a file is one split.
    subsets: parts of a directory or dataset, in this order.
    subset_is: how `datasets` is told of a part; see `hub.rows`.
    subsets_required: whether a directory's parts must be named.
    streaming: see `hub.rows`.
    counts: see `files.rows`.

  Raises:
    ValueError: nothing is there, or it cannot be read.
  """
  if remote.is_address(path):
    path = str(remote.fetch_objects(path, _DATA, deep=True))
  local = pathlib.Path(path)
  if path and local.is_file():
    if subsets:
      raise ValueError(
        f"subsets={subsets} are parts of a directory or dataset, and {path} is"
        " one file: set them to ()"
      )
    _refuse_streaming(path, streaming)
    yield from _of("", files.rows(local, counts))
  elif path and local.is_dir():
    if subsets_required and not subsets:
      raise ValueError(
        f"{path} is a directory: name its subsets, such as harmless-base"
      )
    yield from _directory(local, split, subsets, streaming, counts)
  elif hub.is_id(path):
    remote.refuse_missing(path)
    yield from _of_hub(path, split, subsets, subset_is, streaming)
  else:
    raise ValueError(
      f"{path!r} is neither a file, a directory nor a hub id (user/name)"
    )


def _directory(directory, split, subsets, streaming, counts) -> Iterator:
  found = files.layout(directory, split, subsets)
  if found:
    _refuse_streaming(str(directory), streaming)
    for subset, file in zip(subsets or ("",), found, strict=True):
      yield from _of(subset, files.rows(file, counts))
    return
  folders = [directory / subset for subset in subsets] or [directory]
  for folder in folders:
    if next(folder.rglob("*.parquet"), None) is None:
      raise ValueError(
        f"{folder} holds none of"
        f" {[name.name for name in files.names(folder, split)]}, and no parquet"
        " files"
      )
  yield from _of_hub(str(directory), split, subsets, "data_dir", streaming)


def _of_hub(path, split, subsets, subset_is, streaming) -> Iterator:
  for subset in subsets or ("",):
    one = (subset,) if subset else ()
    yield from _of(subset, hub.rows(path, split, one, subset_is, streaming))


def _of(subset: str, rows: Iterator) -> Iterator:
  for origin, row in rows:
    yield origin, row, subset


def _refuse_streaming(path: str, streaming: bool) -> None:
  if streaming:
    raise ValueError(
      f"streaming=True changes nothing for {path}, which is read line by line"
      " anyway: set it to False"
    )
