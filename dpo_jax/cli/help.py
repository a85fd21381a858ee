"""Config files: loading, and the field reference that --help prints.

The files of configs/ document each field by the comment above the line that
sets it, `c.beta = 0.1`, or above its key in a dict. All fields that a function
sets on one variable, and all keys of a dict, form a block. A group of fields is
documented by the block with most of its names, of several by the one with more
comments; so a recipe that overrides values needs no comments.
"""

import ast
import collections
import difflib
import pathlib
import runpy
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import config_dict

from dpo_jax.core import settings

# Comments by field name, in the order of the lines; "" if there is none.
Block = dict[str, str]


def root() -> pathlib.Path:
  """Directory of configs/ and scripts: the clone, or shipped/ of a wheel."""
  package = pathlib.Path(__file__).resolve().parent.parent
  shipped = package / "shipped"
  return shipped if shipped.is_dir() else package.parent


def find(name: str) -> str:
  """FILE:VARIANT of "demo:tiny" or "configs/demo.py:tiny", else `name` itself.

  The user's own files come first.
  """
  path, colon, variant = name.partition(":")
  for short in (path, f"configs/{path}.py"):
    for file in (short, str(root() / short)):
      if pathlib.Path(file).is_file():
        return file + colon + variant
  return name


def load(name: str) -> config_dict.ConfigDict:
  """The config of a file and variant, see `find`."""
  path, colon, variant = find(name).partition(":")
  if not pathlib.Path(path).is_file():
    known = sorted(file.stem for file in (root() / "configs").glob("*.py"))
    hint = near(pathlib.Path(path).stem, known)
    raise ValueError(
      f"--config: there is no file {path!r}; {hint} configs/ has {known}"
    )
  # Files of configs/ import each other as configs.NAME; the user's come first.
  for place, directory in ((len(sys.path), str(root())), (0, "")):
    if directory not in sys.path:
      sys.path.insert(place, directory)
  found = runpy.run_path(path)
  if "get_config" not in found:
    raise ValueError(f"{path} has no function get_config")
  return found["get_config"](*([variant] if colon else []))


def names(config: Any, name: str = "config") -> Iterator[str]:
  """Dotted names of all fields and groups of fields."""
  for key in config:
    yield f"{name}.{key}"
    if _is_group(config[key]):
      yield from names(config[key], f"{name}.{key}")


def page(name: str, section: str = "config") -> str:
  """Reference of a config's fields: `--config.name=value` and the comment.

  A group with the fields of an earlier one, such as a second source of pairs,
  is shown by its differences.
  """
  config: Any = load(name)
  sections = {field.rpartition(".")[0] for field in names(config)}
  if section not in sections:
    raise ValueError(
      f"--help={section}: no such section; {near(section, sections)}"
    )
  for key in section.split(".")[1:]:
    config = config[key]
  files = [find(name).partition(":")[0]]
  for module in [*sys.modules]:
    if module.startswith("configs."):
      files.append(sys.modules[module].__file__)
  blocks = [block for file in files for block in _blocks(file)]
  return "\n".join(_lines(config, section, blocks, {}))


def near(name: str, known: Iterable[str]) -> str:
  """A hint at known names that are similar or end in the same field."""
  leaf = name.rpartition(".")[2]
  same = [one for one in known if one.rpartition(".")[2] == leaf]
  close = difflib.get_close_matches(name, same, 3, cutoff=0)
  close = close or difflib.get_close_matches(name, [*known], 1)
  return f"did you mean {' or '.join(close)}?" if close else "see --help"


def _is_group(value: Any) -> bool:
  return isinstance(value, config_dict.ConfigDict) and len(value) > 0


def _lines(
  config: Any, name: str, blocks: list[Block], earlier: dict
) -> Iterator[str]:
  """Lines of `page`; `earlier` holds groups by the names of their fields."""

  def overlap(block: Block) -> tuple[int, int]:
    both = block.keys() & config.keys()
    return len(both), sum(bool(block[key]) for key in both)

  block = max(blocks, key=overlap, default={})
  order = [*block, *config]
  for key in sorted(config, key=order.index):
    full, value = f"{name}.{key}", config[key]
    if not _is_group(value):
      yield f"  --{full}={value!r}"
      yield from textwrap.wrap(
        block.get(key, ""),
        79,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
      )
      continue
    like, twin = earlier.setdefault(tuple(names(value, "")), (full, value))
    if like == full:
      yield from _lines(value, full, blocks, earlier)
    else:
      yield f"  {full}: like {like}, but"
      for line in settings.differing(twin.to_dict(), value.to_dict(), full):
        yield f"    {line}"


def _blocks(file: str) -> Iterator[Block]:
  """The blocks of a file, see the module's docstring."""
  text = pathlib.Path(file).read_text("utf-8")
  lines = text.splitlines()
  for function in ast.parse(text).body:
    # By target: "c" of `c.beta = 0.1`, or the line of a dict.
    blocks: dict[str | int, Block] = collections.defaultdict(dict)
    for node in ast.walk(function):
      if isinstance(node, ast.Dict):
        for key in node.keys:
          if isinstance(key, ast.Constant):
            blocks[node.lineno][str(key.value)] = _comment(lines, key.lineno)
      elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        block = blocks[ast.unparse(node.value)]
        block[node.attr] = block.get(node.attr) or _comment(lines, node.lineno)
    yield from blocks.values()


def _comment(lines: list[str], line: int) -> str:
  """The comment that ends on the line above `line`, joined into one."""
  above = []
  for text in reversed(lines[: line - 1]):
    if not text.strip().startswith("#"):
      break
    above.append(text.strip().removeprefix("#").strip())
  return " ".join(reversed(above))
