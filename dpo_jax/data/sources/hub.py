"""Rows through the `datasets` library: of the hub, or of parquet files.

A hub id may have a revision, as in `user/name@0123abc`: a commit makes a run
repeatable, and `@refs/convert/parquet` is the hub's own conversion of a dataset
that is still defined by a script; scripts are never run here.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import Any, Literal

_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_CONVERTED = "refs/convert/parquet"
# The name of a missing file is no hub id.
_FILES = (".jsonl", ".json", ".gz", ".parquet")


def is_id(path: str) -> bool:
  """Whether a path has the form user/name or user/name@revision."""
  found = _ID.fullmatch(path)
  return bool(found) and not found[1].endswith(_FILES)


def rows(
  path: str,
  split: str,
  subset: str,
  subset_is: Literal["data_dir", "name"],
  streaming: bool,
) -> Iterator:
  """(origin, row) for each row of a split.

  Args:
    path: a hub id, or a directory that `datasets` can read.
    split: its split.
    subset: a part of the dataset; "" for all of it.
    subset_is: whether a part is a directory of the dataset or one of its
      named configurations.
    streaming: read row by row over the network instead of fetching the whole
      dataset into the cache first.

  Raises:
    ValueError: it could not be read.
  """
  name, revision = path, None
  if is_id(path):
    name, revision = _ID.fullmatch(path).groups()
  if revision == _CONVERTED:
    # There each configuration is a directory, and its name is not known.
    subset_is = "data_dir"
  part: dict[str, Any] = {subset_is: subset} if subset else {}
  what = f"{path!r}, subset {subset!r}, split {split!r}"
  with _readable(what):
    import datasets

    remaining = iter(
      datasets.load_dataset(
        name,
        revision=revision,
        split=split,
        streaming=streaming,
        **part,
      )
    )
  for number in itertools.count(1):
    with _readable(what):
      row = next(remaining, None)
    if row is None:
      return
    yield f"{path}/{subset}:{split}:{number}", row


@contextlib.contextmanager
def _readable(what: str):
  """Any error of the library as a ValueError that says what to do."""
  try:
    yield
  # Its own, the network client's, pyarrow's: there is no common class.
  except Exception as error:
    raise ValueError(
      f"{what} was not read ({type(error).__name__}: {error}); "
      + (
        f"add @{_CONVERTED} to the id for the hub's own conversion of it"
        if "scripts are no longer supported" in str(error)
        else "check its name, subset and split, the network and HF_HUB_OFFLINE,"
        " or give the path of a local copy"
      )
    ) from error
