"""JSON of unknown origin, read with every doubt resolved against it."""

import json
import os
import pathlib
from typing import Any

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 32


def read(path: str | os.PathLike) -> Any:
  """The value in a JSON file.

  Raises:
    ValueError: naming the file, if it is larger than `MAX_BYTES`, is not
      UTF-8, not JSON, nested deeper than `MAX_DEPTH`, holds a number that is
      not finite, or a name twice in one object.
  """
  try:
    return parse(read_bytes(path))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def read_bytes(path: str | os.PathLike) -> bytes:
  """The bytes of a file of at most `MAX_BYTES`; ValueError if it has more."""
  # One byte more than is allowed: a file may grow, or be a device.
  with pathlib.Path(path).open("rb") as file:
    data = file.read(MAX_BYTES + 1)
  if len(data) > MAX_BYTES:
    raise ValueError(f"more than {MAX_BYTES >> 20} MiB: too large to be read")
  return data


def parse(data: bytes) -> Any:
  """As `read`, of bytes, whose errors name no file."""
  try:
    text = data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8 at byte {error.start}") from None
  try:
    value = json.loads(
      text, object_pairs_hook=_unique, parse_constant=_refuse_constant
    )
  except RecursionError:
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
  _check_depth(value)
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) != len(pairs):
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    raise ValueError(f"field {twice[0]!r:.80} stands more than once")
  return values


def _refuse_constant(name: str) -> Any:
  raise ValueError(f"{name} is not a JSON number")


def _check_depth(value: Any) -> None:
  level = [value]
  for _ in range(MAX_DEPTH):
    level = [
      child
      for item in level
      if isinstance(item, dict | list)
      for child in (item.values() if isinstance(item, dict) else item)
    ]
  if any(isinstance(item, dict | list) for item in level):
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
