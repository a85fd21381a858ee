"""Rows of a dataset that the `datasets` library reads: the hub's, or parquet.

A hub id may carry a revision, as in `user/name@0123abc`: a commit makes a run
repeatable, and `@refs/convert/parquet` is the hub's own conversion of a dataset
that is still defined by a script, which is never run here.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Literal

_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
# The hub's own conversion of a dataset to parquet, for any dataset.
_CONVERTED = "refs/convert/parquet"
# A missing file's name must not be asked for on the hub.
_FILES = (".jsonl", ".json", ".gz", ".parquet")


def is_id(path: str) -> bool:
  """Whether a path looks like a hub id: user/name, user/name@revision."""
  found = _ID.fullmatch(path)
  return bool(found) and not found[1].endswith(_FILES)


def rows(
  path: str,
  split: str,
  subsets: tuple[str, ...],
  subset_is: Literal["data_dir", "name"],
  streaming: bool,
) -> Iterator:
  """(origin, row) for each row of a split, of one subset after another.

  Args:
    path: a hub id, or a directory that `datasets` can read.
    split: its split.
    subsets: its parts; () for a dataset without any.
    subset_is: whether a part is a directory of the dataset or one of its
      named configurations.
    streaming: read row by row over the network, rather than all of it into the
      cache beforehand.

  Raises:
    ValueError: it could not be read.
  """
  name, revision = path, None
  if is_id(path):
    name, revision = _ID.fullmatch(path).groups()
  if revision == _CONVERTED:
    # There each configuration is a directory, and its name is not known.
    subset_is = "data_dir"
  for subset in subsets or (None,):
    what = f"{path!r}, subset {subset!r}, split {split!r}"
    with _readable(what):
      loaded = _load(name, revision, split, subset, subset_is, streaming)
      remaining = iter(loaded)
    number = 0
    while True:
      with _readable(what):
        row = next(remaining, None)
      if row is None:
        break
      number += 1
      yield f"{path}/{subset or ''}:{split}:{number}", row


def _load(name, revision, split, subset, subset_is, streaming):
  import datasets

  return datasets.load_dataset(
    name,
    revision=revision,
    split=split,
    streaming=streaming,
    **({subset_is: subset} if subset else {}),
  )


@contextlib.contextmanager
def _readable(what: str):
  """Turns the library's many errors into one that says what to do."""
  try:
    yield
  # Its own, the network client's, pyarrow's: no list of them would be whole.
  except Exception as error:
    raise ValueError(
      f"{what} was not read ({type(error).__name__}: {error}); {_mend(error)}"
    ) from error


def _mend(error: Exception) -> str:
  if "scripts are no longer supported" in str(error):
    return f"add @{_CONVERTED} to the id for the hub's own conversion of it"
  return (
    "check its name, subset and split, the network and HF_HUB_OFFLINE, or give"
    " the path of a local copy"
  )
