"""Preference pairs from their files: what each row must hold, and what is bad.

Two row forms are read: HH's two transcripts, {"chosen", "rejected"}, which
share everything up to the last "\\n\\nAssistant:"; and {"prompt", "chosen",
"rejected"}. A pair that cannot be trained on is quarantined and counted by its
reason; a row that is not of either form is an error unless `skip_bad` allows a
number of them.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

# A missing file's name must not be asked for on the hub.
_FILES = (".jsonl", ".json", ".gz")


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A prompt and two answers, of which people preferred `chosen`.

  A prompt of HH ends with "\\n\\nAssistant:"; answers keep their leading space.
  `id` is a hash of the three texts: the same row has it in any file.
  """

  id: str
  prompt: str
  chosen: str
  rejected: str


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Kept rows in file order; `counts` by reason, `fingerprint` of the rows."""

  rows: tuple[Comparison, ...]
  counts: dict[str, int]
  fingerprint: str


def load(
  path: str | os.PathLike,
  *,
  split: str,
  subsets: tuple[str, ...] = (),
  skip_bad: int = 0,
  single_turn: bool = False,
  limit: int = 0,
) -> Loaded:
  """Reads the comparisons of a file, a directory or a hub dataset.

  Args:
    path: a .jsonl or .jsonl.gz file; a directory in the dataset's own layout,
      `<subset>/<split>.jsonl.gz`; or the id of a dataset on the hub.
    split: "train" or "test", for a directory or a hub id. A file is one split.
    subsets: HH's subsets, such as "harmless-base", for a directory or hub id.
    skip_bad: how many malformed rows may be left out, each counted.
    single_turn: keep only prompts with one human turn.
    limit: keep the first so many rows, after filters; 0 keeps all.

  Raises:
    ValueError: nothing is at `path`, more than `skip_bad` rows are malformed
      (file, line and field are named), or nothing is left.
  """
  counts: dict[str, int] = {}
  kept: list[Comparison] = []
  bad = 0
  for origin, row in _rows(path, split, subsets):
    if limit and len(kept) == limit:
      break
    _count(counts, "read")
    try:
      parsed = parse(row)
    except Malformed as error:
      bad += 1
      if bad > skip_bad:
        raise ValueError(
          f"{origin}: {error}; {bad} malformed rows, skip_bad={skip_bad}"
        ) from error
      _count(counts, f"malformed: {error.reason}")
      continue
    except Quarantined as error:
      _count(counts, f"quarantined: {error}")
      continue
    if single_turn and parsed.prompt.count(HUMAN) != 1:
      _count(counts, "filtered: several turns")
      continue
    kept.append(parsed)
  _count(counts, "kept", len(kept))
  repeated = len(kept) - len({row.id for row in kept})
  if repeated:
    _count(counts, "kept, repeating an earlier pair", repeated)
  if not kept:
    raise ValueError(f"{path}: no comparison is left of {counts}")
  return Loaded(tuple(kept), counts, fingerprint(kept))


class Malformed(ValueError):
  """A row that is of no known form; `reason` leaves out the row's values."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(reason + detail)
    self.reason = reason


class Quarantined(ValueError):
  """A well-formed row that no preference can be learned from."""


def parse(row: Any) -> Comparison:
  """The comparison of one decoded JSON row.

  Raises:
    Malformed: a field is missing or not a string.
    Quarantined: the transcripts share no prompt, or an answer is empty, or
      both answers are the same.
  """
  if isinstance(row, _BadLine):
    raise Malformed(str(row))
  if not isinstance(row, dict):
    raise Malformed("row is not an object", f": {type(row).__name__}")
  for field in (
    "chosen",
    "rejected",
    *(("prompt",) if "prompt" in row else ()),
  ):
    if field not in row:
      raise Malformed(f"field {field!r} is missing")
    if not isinstance(row[field], str):
      kind = type(row[field]).__name__
      raise Malformed(f"field {field!r} is not a string", f" but {kind}")
    if not _encodable(row[field]):
      raise Malformed(f"field {field!r} holds a lone surrogate")
  if "prompt" in row:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
  else:
    prompt, chosen, rejected = _split(row["chosen"], row["rejected"])
  if not prompt.strip():
    raise Quarantined("empty prompt")
  if not chosen.strip():
    raise Quarantined("empty chosen response")
  if not rejected.strip():
    raise Quarantined("empty rejected response")
  if chosen == rejected:
    raise Quarantined("identical responses")
  return Comparison(
    content_id(prompt, chosen, rejected), prompt, chosen, rejected
  )


def content_id(*texts: str) -> str:
  """Sixteen hex digits that depend on every text and on their borders."""
  digest = hashlib.sha256()
  for text in texts:
    data = text.encode()
    digest.update(len(data).to_bytes(8, "big") + data)
  return digest.hexdigest()[:16]


def fingerprint(rows: Iterable[Comparison]) -> str:
  """A hash of the rows and their order."""
  return content_id(*(row.id for row in rows))


def leaks(train: Iterable[Comparison], held_out: Iterable[Comparison]) -> int:
  """How many held-out rows have a prompt that is trained on."""
  prompts = {row.prompt for row in train}
  return sum(row.prompt in prompts for row in held_out)


def _split(chosen: str, rejected: str) -> tuple[str, str, str]:
  """Two transcripts into the prompt that they share and their last answers."""
  at = chosen.rfind(ASSISTANT)
  if at < 0:
    raise Quarantined(f"no {ASSISTANT!r} in chosen")
  end = at + len(ASSISTANT)
  prompt = chosen[:end]
  if not rejected.startswith(prompt):
    raise Quarantined("rejected does not share chosen's prompt")
  if ASSISTANT in rejected[end:]:
    raise Quarantined("rejected goes on for more turns than chosen")
  return prompt, chosen[end:], rejected[end:]


def _rows(path, split, subsets) -> Iterator[tuple[str, Any]]:
  local, name = pathlib.Path(path), str(path)
  if local.is_file():
    yield from _file_rows(local)
  elif name and local.is_dir():
    for file in _layout(local, split, subsets):
      yield from _file_rows(file)
  elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not name.endswith(_FILES):
    yield from _hub_rows(name, split, subsets)
  else:
    raise ValueError(
      f"{name!r} is neither a file, a directory nor a hub id (user/name)"
    )


def _layout(
  directory: pathlib.Path, split: str, subsets: tuple[str, ...]
) -> list[pathlib.Path]:
  if not subsets:
    raise ValueError(
      f"{directory} is a directory: name its subsets, such as harmless-base"
    )
  files = []
  for subset in subsets:
    names = [directory / subset / f"{split}.jsonl{end}" for end in (".gz", "")]
    found = [name for name in names if name.is_file()]
    if not found:
      raise ValueError(f"neither {names[0]} nor {names[1].name} is a file")
    files.append(found[0])
  return files


def _file_rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  opener = gzip.open if path.suffix == ".gz" else open
  number = 0
  try:
    with opener(path, "rb") as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield f"{path}:{number}", _decode(line)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f"{path}: broken gzip after line {number} ({error})"
    ) from error


def _decode(line: bytes) -> Any:
  """The JSON value of a line; `parse` names what could not be decoded."""
  try:
    return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
  except UnicodeDecodeError:
    return _BadLine("not UTF-8")
  except Malformed as error:
    return _BadLine(error.reason)
  except (ValueError, RecursionError):
    return _BadLine("not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object's fields; one that stands twice has no value to go by."""
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise Malformed(f"field {twice!r} stands more than once")
  return fields


class _BadLine(str):
  """What stands for a line that could not be decoded."""


def _hub_rows(name, split, subsets) -> Iterator[tuple[str, Any]]:
  import datasets

  for subset in subsets or (None,):
    try:
      rows = datasets.load_dataset(name, data_dir=subset, split=split)
    except (OSError, ValueError) as error:
      raise ValueError(
        f"{name!r} is not a local path, and subset {subset!r}, split {split!r}"
        f" of it was not read from the hub ({type(error).__name__}: {error})"
      ) from error
    for number, row in enumerate(rows, 1):
      yield f"{name}/{subset or ''}:{split}:{number}", row


def _encodable(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _count(counts: dict[str, int], reason: str, number: int = 1) -> None:
  counts[reason] = counts.get(reason, 0) + number
