"""The files of answers while they are written, by one process or several.

The first process writes the files themselves, every other one a part of each,
beside them, or nothing, if all have the same answers. The first takes the parts
in: at the end, or when the run goes on, with however many processes.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from dpo_jax import records
from dpo_jax.answering import answer_files, grid
from dpo_jax.engine import draw
from dpo_jax.interface import errors
from dpo_jax.running import processes
from dpo_jax.storage import atomic, row_store


@dataclasses.dataclass
class File:
  """One job's file while it is written.

  Attributes:
    store: where this process appends rows: a `row_store.Store` of the file, or
      of a part of it.
    seconds: takes how long they took, see `answer_files.Seconds`.
    wanted: every row of the file, in order, without its answer.
    done: those that are answered, by their index.
  """

  store: Any
  seconds: Any
  wanted: list[records.Response]
  done: dict[int, records.Response]


class _Unwritten:
  """In place of a store and of seconds, where the first process writes."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def append(self, rows: Any) -> None:
    del rows

  def append_many(self, rows: Any) -> None:
    del rows


def open_all(
  stack: contextlib.ExitStack,
  settings: grid.AnswerSettings,
  jobs: Sequence[grid.Job],
  prompts: list[grid.Prompt],
  directory: pathlib.Path,
) -> dict[grid.Job, File]:
  """The file that this process writes of every job, locked.

  What is there is read by all before anybody writes.
  """
  opened = {}
  with processes.together("opening the files of answers"):
    if processes.first():
      for job in jobs:
        opened[job] = stack.enter_context(
          _opened(settings, job, prompts, directory)
        )
        take_parts(opened[job])
  with processes.together("reading the files of answers"):
    if not processes.first():
      for job in jobs:
        opened[job] = stack.enter_context(
          _part(settings, job, prompts, directory)
        )
  return opened


@contextlib.contextmanager
def _opened(settings, job, prompts, directory) -> Iterator[File]:
  """A job's file, locked, with what it holds checked against what it is to."""
  path = directory / f"{job.stem}.jsonl"
  wanted, _ = grid.wanted(settings, job, prompts, -1)
  with row_store.Store(path, records.Response) as store:
    begun = bool(store.rows or answer_files.parts(path))
    answer_files.claim(path, origin(settings, job), begun)
    done = answer_files.match(path, store.rows, wanted)
    yield File(store, answer_files.Seconds(path), wanted, done)


@contextlib.contextmanager
def _part(settings, job, prompts, directory) -> Iterator[File]:
  """What this process writes of a job's file, which the first one has."""
  path = directory / f"{job.stem}.jsonl"
  processes.shared(path)
  wanted, _ = grid.wanted(settings, job, prompts, -1)
  done = answer_files.match(path, records.read(path, records.Response), wanted)
  if settings.mesh_over == "all":
    yield File(_Unwritten(path), _Unwritten(path), wanted, done)
    return
  own = answer_files.part(path, jax.process_index())
  with row_store.Store(own, records.Response) as store:
    yield File(store, answer_files.Seconds(own), wanted, done)


def take_parts(file: File) -> None:
  """Takes the parts of other processes into a file, and removes them."""
  for part in answer_files.parts(file.store.path):
    with row_store.Store(part, records.Response) as store:
      found = answer_files.match(part, store.rows, file.wanted)
      new = {at: row for at, row in found.items() if at not in file.done}
      file.seconds.take(part)
      file.store.append_many(new.values())
      file.done |= new
      part.unlink()
  # Those of other files may still lie there.
  with contextlib.suppress(OSError):
    answer_files.part(file.store.path, 0).parent.rmdir()


def order(file: File) -> None:
  """Rewrites a complete file in order, if it is not.

  Raises:
    errors.Stopped: it is not complete.
  """
  missing = len(file.wanted) - len(file.done)
  if missing:
    raise errors.Stopped(
      f"{file.store.path} lacks {missing} answers that another process was to"
      " give: run the same command again"
    )
  ordered = [file.done[index] for index in range(len(file.wanted))]
  text = b"".join(map(records.encode, ordered)).decode()
  if file.store.path.read_bytes() != text.encode():
    atomic.write_text(file.store.path, text)


def share(places: Sequence[tuple[File, int]], left: Sequence[int]) -> list[int]:
  """Of the requests that are left, those of this process's prompts."""
  ids = {at: places[at][0].wanted[places[at][1]].prompt_id for at in left}
  prompts = list(dict.fromkeys(ids.values()))
  mine = set(prompts[jax.process_index() :: jax.process_count()])
  return [at for at in left if ids[at] in mine]


def origin(settings: grid.AnswerSettings, job: grid.Job) -> dict[str, Any]:
  """What rows depend on and do not say themselves."""
  return {
    "model": answer_files.weights(job.policy.path),
    "adapter": answer_files.weights(job.adapter) if job.adapter else "",
    "tokenizer": answer_files.tokenizer(settings.tokenizer),
    "max_prompt_tokens": settings.max_prompt_tokens,
    "dtype": settings.dtype,
    "cache": settings.cache,
    "merge_adapters": settings.merge_adapters and bool(job.adapter),
    "noise": draw.SCHEME,
  }
