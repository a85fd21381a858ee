"""What the fields of a config mean, from the comments beside them.

The files of configs/ are the one place where a field is explained: in the
comment above the line that sets it. A config is built while the lines that
set its fields are noted; the first such line with a comment explains the
field, so that a recipe which changes a value keeps its meaning.
"""

import ast
import contextlib
import dataclasses
import functools
import pathlib
import runpy
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from dpo_jax.cli import config_files


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a config: its dotted name, value and explanation."""

  name: str
  value: Any
  comment: str


def load(name: str) -> config_dict.ConfigDict:
  """The config of a file, or of a "FILE:VARIANT"; see `config_files.find`.

  Raises:
    ValueError: there is no such file, it has no `get_config`, or the variant
      is unknown.
    OSError: the file cannot be read.
  """
  config_files.importable()
  path, colon, variant = config_files.find(name).partition(":")
  if not pathlib.Path(path).is_file():
    raise ValueError(config_files.missing(path))
  found = runpy.run_path(path)
  if "get_config" not in found:
    raise ValueError(f"{path} has no function get_config")
  return found["get_config"](*([variant] if colon else []))


def names(config: Any, name: str = "config") -> Iterator[str]:
  """The dotted names of all fields and groups of fields."""
  for key in config:
    yield f"{name}.{key}"
    if isinstance(config[key], config_dict.ConfigDict):
      yield from names(config[key], f"{name}.{key}")


def fields(make: Callable[[], Any]) -> list[Field]:
  """The fields of the config that `make` builds, in their order.

  Args:
    make: builds a ConfigDict anew; it is called once.
  """
  with _noted() as sites:
    config = make()
  return list(_walk(config, "config", sites))


def page(found: list[Field], width: int = 79) -> str:
  """The fields as text: `--config.name=value` and below it what it means."""
  lines = []
  for field in found:
    lines.append(f"  --{field.name}={field.value!r}")
    if field.comment:
      lines += textwrap.wrap(
        field.comment,
        width,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
      )
  return "\n".join(lines)


@contextlib.contextmanager
def _noted():
  """Notes, for each (id of a ConfigDict, key), the lines that set it.

  The dicts are kept too, so that no id is used twice.
  """
  sites: dict[tuple[int, str], list[tuple[str, int]]] = {}
  kept = []
  originals = {
    name: getattr(config_dict.ConfigDict, name)
    for name in ("__init__", "__setattr__")
  }

  def note(owner, key, frame):
    kept.append(owner)
    where = (frame.f_code.co_filename, frame.f_lineno)
    sites.setdefault((id(owner), key), []).append(where)

  def set_attribute(self, key, value):
    frame = sys._getframe(1)
    if not key.startswith("_") and frame.f_globals["__name__"] != _LIBRARY:
      note(self, key, frame)
    originals["__setattr__"](self, key, value)

  def begin(self, initial=None, *args, **kwargs):
    originals["__init__"](self, initial, *args, **kwargs)
    frame = sys._getframe(1)
    if isinstance(initial, Mapping) and frame.f_globals["__name__"] != _LIBRARY:
      for key in initial:
        note(self, str(key), frame)

  config_dict.ConfigDict.__setattr__ = set_attribute
  config_dict.ConfigDict.__init__ = begin
  try:
    yield sites
  finally:
    for name, original in originals.items():
      setattr(config_dict.ConfigDict, name, original)


_LIBRARY = config_dict.__name__


def _walk(config, name: str, sites) -> Iterator[Field]:
  # As first set, not by name as a ConfigDict would give them.
  order = [key for owner, key in sites if owner == id(config)]
  for key in sorted(config, key=order.index):
    value = config[key]
    path = f"{name}.{key}"
    found = sites.get((id(config), key), ())
    comments = (_comment(file, line, key) for file, line in found)
    comment = next(filter(None, comments), "")
    if isinstance(value, config_dict.ConfigDict) and len(value):
      yield from _walk(value, path, sites)
    else:
      yield Field(path, value, comment)


def _comment(file: str, line: int, key: str) -> str:
  """The comment above a statement, or above a key of its dict literal."""
  lines, starts = _source(file)
  start = starts.get((line, key), line)
  above = []
  for number in range(start - 1, 0, -1):
    text = lines[number - 1].strip()
    if not text.startswith("#"):
      break
    above.append(text.removeprefix("#").strip())
  return " ".join(reversed(above))


@functools.cache
def _source(file: str) -> tuple[list[str], dict[tuple[int, str], int]]:
  """A file's lines, and where the keys of its dict literals stand.

  The second maps (any line of the statement with the literal, key) to the
  line of the key.
  """
  text = pathlib.Path(file).read_text("utf-8")
  starts = {}
  for node in ast.walk(ast.parse(text)):
    if not isinstance(node, ast.Assign | ast.Return | ast.Expr):
      continue
    for inner in ast.walk(node):
      if isinstance(inner, ast.Dict):
        for key in inner.keys:
          if isinstance(key, ast.Constant):
            for number in range(node.lineno, node.end_lineno + 1):
              starts[number, str(key.value)] = key.lineno
  return text.splitlines(), starts
