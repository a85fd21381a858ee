"""What keeps a file of answers honest across interruptions and new settings.

A row says which prompt, temperature, sample and parameters it belongs to. What
it does not say (which weights, which tokenizer) stands in a small JSON file
beside it, as hashes of the files' contents. Going on with a file is refused as
soon as either differs.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from dpo_jax import records
from dpo_jax.interface import settings as settings_lib
from dpo_jax.storage import atomic, remote, strict_json

# What of a row is the answer, and not the question.
_ANSWER = ("response", "token_count", "finish_reason", "mean_logp")


def match(
  path: pathlib.Path,
  rows: Sequence[records.Response],
  wanted: Sequence[records.Response],
) -> dict[int, records.Response]:
  """Rows on disk by the index of the wanted row that they answer.

  Args:
    path: the file, for error messages.
    rows: what it holds, in any order.
    wanted: every row that it is to hold, without its answer.

  Raises:
    ValueError: a row is not wanted, or was made with other parameters.
  """
  places = {_key(row): index for index, row in enumerate(wanted)}
  done = {}
  for row in rows:
    index = places.get(_key(row))
    if index is None:
      raise ValueError(
        f"{path} holds an answer to prompt {row.prompt_id} at temperature"
        f" {row.temperature}, sample {row.sample_id}, which these settings do"
        " not ask for: use another --workdir, or move the file away"
      )
    for field in dataclasses.fields(row):
      want = getattr(wanted[index], field.name)
      have = getattr(row, field.name)
      if field.name in _ANSWER or have == want:
        continue
      if have is None and field.default is None:
        # A version that did not write it yet.
        row = dataclasses.replace(row, **{field.name: want})
      else:
        raise ValueError(
          f"{path} was written with {field.name}={have!r}, not {want!r}: use"
          " another --workdir, or move the file away"
        )
    done[index] = row
  return done


def claim(path: pathlib.Path, origin: dict[str, Any], begun: bool) -> None:
  """Writes down what a file's answers come from, or checks it.

  Args:
    path: the file of answers; `origin` is kept beside it, ending in .json.
    origin: what the answers depend on and do not say themselves.
    begun: whether the file holds answers.

  Raises:
    ValueError: the file was begun from something else, or nobody knows what
      from.
  """
  manifest = path.with_suffix(".json")
  if not begun:
    atomic.write_text(manifest, json.dumps(origin, indent=2) + "\n")
    return
  try:
    before = strict_json.read_object(manifest)
  except ValueError as error:
    raise ValueError(
      f"{path} holds answers, but {manifest.name}, which says what they come"
      f" from, cannot be read ({error}): move the file away"
    ) from error
  changed = settings_lib.differing(before, origin, path.stem)
  if changed:
    raise ValueError(
      f"{path} was begun from something else:\n  "
      + "\n  ".join(changed)
      + "\nuse another --workdir, or move the file away"
    )


def part(path: pathlib.Path, number: int) -> pathlib.Path:
  """Where another process than the first keeps its rows of a file.

  It lies in a directory of its own: who reads all files of answers, reads no
  row twice.
  """
  return path.parent / "parts" / f"{path.stem}.part-{number}.jsonl"


def parts(path: pathlib.Path) -> list[pathlib.Path]:
  """The parts of a file that are there."""
  name = re.compile(rf"{re.escape(path.stem)}\.part-\d+\.jsonl")
  return sorted(
    found
    for found in (path.parent / "parts").glob("*.jsonl")
    if name.fullmatch(found.name)
  )


class Seconds:
  """How long each answer took, beside the file of answers.

  Times are not reproducible, and the file of answers is, to the byte: so they
  stand in NAME.seconds, a line {"prompt_id", "temperature", "sample_id",
  "seconds"} an answer, from entering a slot to leaving it. A line is written
  before its answer is, and nothing is ever read from it.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path.with_suffix(".seconds")

  def append(self, rows: Sequence[tuple[int, records.Response, float]]) -> None:
    """Adds the answers (index, row, seconds)."""
    lines = []
    for _, row, seconds in rows:
      prompt_id, temperature, sample_id = _key(row)
      line = {
        "prompt_id": prompt_id,
        "temperature": temperature,
        "sample_id": sample_id,
        "seconds": round(seconds, 3),
      }
      lines.append(json.dumps(line) + "\n")
    with open(self._path, "a", encoding="utf-8") as file:
      file.write("".join(lines))

  def take(self, part: pathlib.Path) -> None:
    """Adds the lines beside a part of the file, and removes them there."""
    theirs = part.with_suffix(".seconds")
    if theirs.exists():
      with open(self._path, "a", encoding="utf-8") as file:
        file.write(theirs.read_text("utf-8"))
      theirs.unlink()


def weights(path: str) -> str:
  """Hash of a model's or an adapter's weights and their config."""
  return _digest(
    remote.fetch(path), ("*.safetensors", "config.json", "adapter_config.json")
  )


def tokenizer(path: str) -> str:
  """Hash of a directory's, or a hub id's, tokenizer."""
  return _digest(remote.fetch(path, weights=False), ("tokenizer.json",))


def _digest(directory: pathlib.Path, patterns: tuple[str, ...]) -> str:
  files = sorted(
    {file for pattern in patterns for file in directory.glob(pattern)}
  )
  digests = (_file_digest(file, file.stat().st_mtime_ns) for file in files)
  return records.content_hash(*digests)


@functools.cache
def _file_digest(path: pathlib.Path, changed_ns: int) -> str:
  """SHA-256; one base that serves many adapters is read once."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _key(row: records.Response) -> tuple[str, float, int]:
  return row.prompt_id, row.temperature, row.sample_id
