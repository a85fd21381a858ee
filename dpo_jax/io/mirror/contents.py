"""Files in a bucket, as parts that are called what they hold.

A part is an object named by the SHA-256 of its bytes, so no write ever changes
what another file is made of: an upload that was cut leaves parts that nothing
speaks of, and what is sent again is the same. A table of contents says which
files there are and what they are made of; it holds its own hash, is written
after all parts, and only with it are they anything.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_jax.io import atomic, strict_json
from dpo_jax.io.mirror import objects

FOLDER = "objects/"
PART_BYTES = 64 * 2**20
# At one time; each holds a part in memory.
_WORKERS = 8
_FORMAT = 1
# How often a part that is not what its name says is fetched.
_LOOKS = 3


class Damaged(ValueError):
  """What a bucket holds is not what was put there."""


@dataclasses.dataclass(frozen=True)
class File:
  """A file's size, the SHA-256 of it, and those of its parts in order."""

  bytes: int
  sha256: str
  parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a run's directory held when a step had been saved.

  Attributes:
    step: updates that were done.
    metrics: of the evaluation at the step, for retention.
    files: by their names in the directory.
  """

  step: int
  metrics: dict[str, float]
  files: dict[str, File]

  def parts(self) -> set[str]:
    """The names of the objects that it speaks of."""
    return {
      FOLDER + part for file in self.files.values() for part in file.parts
    }

  @property
  def bytes(self) -> int:
    return sum(file.bytes for file in self.files.values())


def encode(contents: Contents) -> bytes:
  values = dataclasses.asdict(contents) | {"format": _FORMAT}
  values = json.loads(json.dumps(values))
  text = json.dumps(values | {"sha256": _hash(values)}, indent=1)
  return text.encode() + b"\n"


def decode(data: bytes | None) -> Contents:
  """The contents that `encode` wrote.

  Raises:
    Damaged: they are not what was written, or not there.
  """
  if data is None:
    raise Damaged("it is gone")
  try:
    values = strict_json.parse(data)
    own = values.pop("sha256")
    if own != _hash(values) or values["format"] != _FORMAT:
      raise ValueError("it is of another hash or format")
    files = {
      _inside(name): _file(**file) for name, file in values["files"].items()
    }
    metrics = {name: float(x) for name, x in values["metrics"].items()}
    if type(values["step"]) is not int or values["step"] < 0:
      raise ValueError(f"its step is {values['step']!r:.40}")
    return Contents(values["step"], metrics, files)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise Damaged(f"its table is not what was written ({error})") from error


def put(
  store: objects.Store,
  files: Mapping[str, pathlib.Path],
  known: set[str],
  wanted: Mapping[str, str],
) -> tuple[dict[str, File], int]:
  """Puts the parts of files into a bucket.

  Args:
    store: the bucket.
    files: what to put, by the names that they get. Those that go on growing
      are put as they are found.
    known: parts that need not be put again; what is put is added.
    wanted: the SHA-256 that files must have, by name; {} for any.

  Returns:
    The files, and the bytes that were sent.

  Raises:
    objects.Failed: not all could be put.
    Damaged: a file is not of its hash.
  """
  made: dict[str, File] = {}
  sent = 0
  # The parts that are on their way, the one that was sent first in front.
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    for name, path in files.items():
      whole, parts, size = hashlib.sha256(), [], 0
      with path.open("rb") as file:
        while data := file.read(PART_BYTES):
          whole.update(data)
          size += len(data)
          parts.append(hashlib.sha256(data).hexdigest())
          if parts[-1] in known:
            continue
          if len(waiting) == _WORKERS:
            waiting.popleft().result()
          waiting.append(pool.submit(_send, store, parts[-1], data, known))
          sent += len(data)
      made[name] = File(size, whole.hexdigest(), tuple(parts))
      if wanted.get(name, made[name].sha256) != made[name].sha256:
        raise Damaged(f"{path} is not what was written")
    for sending in waiting:
      sending.result()
  return made, sent


def get(
  store: objects.Store, files: Mapping[str, File], target: pathlib.Path
) -> None:
  """Fetches files into a directory; each is there whole or not at all.

  Raises:
    objects.Failed: the bucket was not reached.
    Damaged: a part is gone, or not what its name says.
  """
  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    for name, file in files.items():
      path = target / name
      path.parent.mkdir(parents=True, exist_ok=True)
      with atomic.replacing(path) as temporary, temporary.open("wb") as out:
        for part in _fetched(store, pool, file.parts):
          out.write(part)
        out.flush()
        os.fsync(out.fileno())
        if temporary.stat().st_size != file.bytes:
          raise Damaged(f"{name} is not of {file.bytes} bytes")
      atomic.sync(path.parent)


def verify(store: objects.Store, table: Contents) -> None:
  """Compares each part that a table speaks of with its hash; see `get`."""
  parts = sorted({x for file in table.files.values() for x in file.parts})
  with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
    for _ in _fetched(store, pool, parts):
      pass


def read(store: objects.Store, file: File) -> bytes:
  """A small file's content; see `get`."""
  return b"".join(_part(store, part) for part in file.parts)


def _send(store, part: str, data: bytes, known: set[str]) -> None:
  store.write(FOLDER + part, data)
  known.add(part)


def _fetched(store, pool, parts: Iterable[str]) -> Iterable[bytes]:
  """The parts in order, some of them fetched ahead."""
  left = iter(parts)
  ahead: list[concurrent.futures.Future] = []
  while True:
    while len(ahead) < _WORKERS and (part := next(left, None)):
      ahead.append(pool.submit(_part, store, part))
    if not ahead:
      return
    yield ahead.pop(0).result()


def _part(store: objects.Store, part: str) -> bytes:
  why = ""
  for _ in range(_LOOKS):
    data, _ = store.read(FOLDER + part)
    if data is None:
      why = "is gone"
    elif hashlib.sha256(data).hexdigest() != part:
      why = "is not what its name says"
    else:
      return data
  raise Damaged(f"{FOLDER}{part} {why}")


def _file(bytes: int, sha256: str, parts: list[str]) -> File:
  for digest in (sha256, *parts):
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
      raise ValueError(f"{digest!r:.80} is no SHA-256")
  # Sizes are what room is made for.
  if type(bytes) is not int or not 0 <= bytes <= len(parts) * PART_BYTES:
    raise ValueError(f"{len(parts)} parts are not {bytes!r:.40} bytes")
  return File(bytes, sha256, tuple(parts))


def _inside(name: str) -> str:
  path = pathlib.PurePosixPath(name)
  if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
    raise ValueError(f"the file {name!r} would leave the directory")
  return name


def _hash(values: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()
