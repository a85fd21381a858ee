"""Response files: reading, appending, merging, and refusal of other origins.

Each process appends to a file of its own: the first one to NAME.jsonl itself,
process k to NAME@k.part. A continued run, with any number of processes, reads
the rows of all of them; at the end the first process writes NAME.jsonl in order
and removes the parts.

A row has its prompt, temperature, sample id and parameters. What it depends on
besides (weights, tokenizer) is in NAME.json as content hashes. A run that
differs in either is refused.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dpo_jax.core import distributed, errors
from dpo_jax.core import settings as settings_lib
from dpo_jax.io import atomic, hashing, jsonl, records, remote, strict_json
from dpo_jax.sampling import draw
from dpo_jax.sampling import jobs as jobs_lib

# Fields of a row that are generated.
_GENERATED = ("response", "token_count", "finish_reason", "mean_logp")


@dataclasses.dataclass(eq=False)
class File:
  """One job's response file, as a process sees it.

  Attributes:
    path: NAME.jsonl.
    origin: see `origins`.
    wanted: every row of the file, in order, without its response.
    done: rows that are on disk, by their index.
    store: for appending; None if this process writes nothing.
  """

  path: pathlib.Path
  origin: dict[str, Any]
  wanted: Sequence[records.Response]
  done: dict[int, records.Response] = dataclasses.field(default_factory=dict)
  store: jsonl.Store | None = None

  def append(self, rows: dict[int, records.Response]) -> None:
    """Adds rows by their index, on disk if this process writes them."""
    if self.store is not None:
      self.store.append_many(rows.values())
    self.done |= rows


def open_all(
  stack: contextlib.ExitStack, files: Sequence[File], writes: bool
) -> None:
  """Opens and reads the files; all processes must call it.

  No process appends before all have read, so that all find the same rows.

  Args:
    stack: closes this process's stores, which are locked.
    files: on return with `done` and `store`.
    writes: whether this process appends rows; the first one must.

  Raises:
    ValueError: a file holds rows of other weights, another tokenizer or other
      parameters.
    locks.Held: another run writes the same files.
    errors.Stopped: another process failed.
  """
  with distributed.raise_on_all("opening the response files"):
    for file in files if writes else ():
      path = file.path
      if not distributed.is_main():
        path = path.with_name(f"{path.stem}@{jax.process_index()}.part")
      store = jsonl.Store(path, records.Response)
      file.store = stack.enter_context(store)
  with distributed.raise_on_all("reading the response files"):
    for file in files:
      distributed.require_shared(file.path)
      found = _read(file.path, *_parts(file.path))
      if distributed.is_main():
        claim(file.path, file.origin, any(found.values()))
      for path, rows in found.items():
        file.done = match(path, rows, file.wanted) | file.done


def merge(file: File) -> list[records.Response]:
  """Writes a complete file in order and removes its parts; its rows.

  Only the first process calls it, when all have appended their last row.

  Raises:
    errors.Stopped: the file is not complete.
  """
  done, parts = file.done, _parts(file.path)
  for path, rows in _read(*parts).items():
    done = match(path, rows, file.wanted) | done
  missing = len(file.wanted) - len(done)
  if missing:
    raise errors.Stopped(
      f"{file.path} lacks {missing} responses of another process:"
      " run the same command again"
    )
  ordered = [done[index] for index in range(len(file.wanted))]
  text = b"".join(map(records.encode, ordered))
  if file.path.read_bytes() != text:
    atomic.write_text(file.path, text.decode())
  for part in parts:
    part.unlink()
  return ordered


def _parts(path):
  # A policy's name holds no "@": no other file's part matches.
  return sorted(path.parent.glob(f"{path.stem}@*.part"))


def _read(*paths):
  """The rows of each file; a last line that was cut is none."""
  return {
    path: jsonl.Store(path, records.Response).peek().rows for path in paths
  }


def match(
  path: pathlib.Path,
  rows: Sequence[records.Response],
  wanted: Sequence[records.Response],
) -> dict[int, records.Response]:
  """Rows on disk by the index of their wanted row.

  Args:
    path: the file, for error messages.
    rows: of the file, in any order.
    wanted: every row of a complete file, without its response.

  Raises:
    ValueError: a row is not wanted, or has other parameters.
  """
  places = {_key(row): index for index, row in enumerate(wanted)}
  done = {}
  for row in rows:
    index = places.get(_key(row))
    if index is None:
      raise ValueError(
        f"{path} holds a response to prompt {row.prompt_id} at temperature"
        f" {row.temperature}, sample {row.sample_id}, which these settings do"
        " not ask for: use another --workdir, or move the file away"
      )
    for field in dataclasses.fields(row):
      want = getattr(wanted[index], field.name)
      have = getattr(row, field.name)
      if field.name not in _GENERATED and have != want:
        raise ValueError(
          f"{path} was written with {field.name}={have!r}, not {want!r}: use"
          " another --workdir, or move the file away"
        )
    done[index] = row
  return done


def claim(path: pathlib.Path, origin: dict[str, Any], begun: bool) -> None:
  """Writes the origin of a file's responses, or checks it if there are any.

  Args:
    path: the response file; its origin is in NAME.json.
    origin: see `origins`.
    begun: whether the file holds responses.

  Raises:
    ValueError: the file has another origin, or none that can be read.
  """
  manifest = path.with_suffix(".json")
  if not begun:
    atomic.write_text(manifest, json.dumps(origin, indent=2) + "\n")
    return
  try:
    before = strict_json.read_object(manifest)
  except ValueError as error:
    raise ValueError(
      f"{path} holds responses, but {manifest.name}, which says what they come"
      f" from, cannot be read ({error}): move the file away"
    ) from error
  changed = settings_lib.differing(before, origin, path.stem)
  if changed:
    raise ValueError(
      f"{path} was begun from something else:\n  "
      + "\n  ".join(changed)
      + "\nuse another --workdir, or move the file away"
    )


def origins(
  settings: jobs_lib.SamplingSettings, jobs: Sequence[jobs_lib.Job]
) -> list[dict[str, Any]]:
  """What the rows of each job depend on besides their fields."""
  # A base of many adapters is hashed once.
  paths = dict.fromkeys(
    x for job in jobs for x in (job.policy.path, job.adapter)
  )
  hashes = {path: weights(path) if path else "" for path in paths}
  words = tokenizer(settings.tokenizer)
  return [
    {
      "model": hashes[job.policy.path],
      "adapter": hashes[job.adapter],
      "tokenizer": words,
      "max_prompt_tokens": settings.max_prompt_tokens,
      "dtype": settings.dtype,
      "cache": settings.cache,
      "merge_adapters": settings.merge_adapters and bool(job.adapter),
      "noise": draw.SCHEME,
    }
    for job in jobs
  ]


def weights(path: str) -> str:
  """Hash of a model's or an adapter's weights and their config.

  Not of an adapter's path to its base, which may have moved.
  """
  directory = remote.fetch(path)
  found = _digest(directory, ("*.safetensors", "config.json"))
  config = directory / "adapter_config.json"
  if not config.is_file():
    return found
  values = strict_json.read_object(config)
  values.pop("base_model_name_or_path", None)
  return hashing.content_hash(found, json.dumps(values, sort_keys=True))


def tokenizer(path: str) -> str:
  """Hash of a directory's, or a hub id's, tokenizer."""
  return _digest(remote.fetch(path, weights=False), ("tokenizer.json",))


def _digest(directory: pathlib.Path, patterns: tuple[str, ...]) -> str:
  files = sorted(
    {file for pattern in patterns for file in directory.glob(pattern)}
  )
  return hashing.content_hash(*map(hashing.file_hash, files))


def _key(row: records.Response) -> tuple[str, float, int]:
  return row.prompt_id, row.temperature, row.sample_id
