"""Files of configs/: where they are, and what their fields mean.

The files of configs/ are the one place that explains a field: the comment above
the line that sets it, `c.beta = 0.1`, or above its key in a dict. The lines of
one function that set fields of one group form a block. A group of a config is
explained by the block that sets most of its fields, and of several by the one
with more comments; so a recipe that changes some values needs none.
"""

import ast
import collections
import dataclasses
import difflib
import pathlib
import runpy
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from ml_collections import config_dict

# Comments by field, in the order of the lines; "" for a field without one.
Block = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a config: its dotted name, value and explanation."""

  name: str
  value: Any
  comment: str


def root() -> pathlib.Path:
  """The directory that holds configs/, train.py, sample.py and judge.py.

  In a clone they lie beside the package; a wheel carries them in
  dpo_jax/shipped/.
  """
  package = pathlib.Path(__file__).resolve().parent.parent
  shipped = package / "shipped"
  return shipped if shipped.is_dir() else package.parent


def find(name: str) -> str:
  """The "FILE:VARIANT" that a --config names; one's own files come first.

  Args:
    name: "configs/demo.py", "configs/demo.py:tiny", or "demo:tiny" for short.

  Returns:
    The name as it was if there is no such file.
  """
  path, colon, variant = name.partition(":")
  for short in (path, f"configs/{path}.py"):
    for file in (short, str(root() / short)):
      if pathlib.Path(file).is_file():
        return file + colon + variant
  return name


def load(name: str) -> config_dict.ConfigDict:
  """The config of a "FILE:VARIANT", see `find`.

  Raises:
    ValueError: there is no such file, or none that can be read, it has no
      `get_config`, or the variant is unknown.
  """
  path, colon, variant = find(name).partition(":")
  if not pathlib.Path(path).is_file():
    known = sorted(file.stem for file in (root() / "configs").glob("*.py"))
    near = difflib.get_close_matches(pathlib.Path(path).stem, known, 1)
    hint = (
      f"did you mean configs/{near[0]}.py?" if near else f"there are {known}"
    )
    raise ValueError(f"--config: there is no file {path!r}; {hint}")
  # Files of configs/ import each other as configs.NAME.
  for place, directory in ((len(sys.path), str(root())), (0, "")):
    if directory not in sys.path:
      sys.path.insert(place, directory)
  try:
    found = runpy.run_path(path)
  except OSError as error:
    raise ValueError(f"--config={name}: {error}") from None
  if "get_config" not in found:
    raise ValueError(f"{path} has no function get_config")
  return found["get_config"](*([variant] if colon else []))


def names(config: Any, name: str = "config") -> Iterator[str]:
  """The dotted names of all fields and groups of fields."""
  for key in config:
    yield f"{name}.{key}"
    if isinstance(config[key], config_dict.ConfigDict):
      yield from names(config[key], f"{name}.{key}")


def fields(name: str) -> list[Field]:
  """The fields of the config that `load` reads, in the order of its files."""
  config = load(name)
  files = [find(name).partition(":")[0]]
  for module in [*sys.modules]:
    if module.startswith("configs."):
      files.append(sys.modules[module].__file__)
  blocks = [block for file in files for block in _blocks(file)]
  return list(_walk(config, "config", blocks))


def page(found: list[Field]) -> str:
  """The fields as text: `--config.name=value` and below it what it means.

  A group that repeats an earlier one, such as a second source of pairs, is
  shown by the values that differ from it.
  """
  groups = collections.defaultdict(dict)
  for field in found:
    for group, rest in _groups(field.name):
      groups[group][rest] = field
  first, like = {}, {}
  for group, members in groups.items():
    key = tuple((rest, field.comment) for rest, field in members.items())
    like[group] = first.setdefault(key, group)
  lines, shown = [], set()
  for field in found:
    line = f"  --{field.name}={field.value!r}"
    repeats = [pair for pair in _groups(field.name) if like[pair[0]] != pair[0]]
    if not repeats:
      text = textwrap.fill(field.comment, 73, break_on_hyphens=False)
      lines += [line, *textwrap.indent(text, " " * 6).splitlines()]
      continue
    group, rest = repeats[0]
    if group not in shown:
      shown.add(group)
      lines.append(f"  {group}: like {like[group]}")
    if field.value != groups[like[group]][rest].value:
      lines.append(line)
  return "\n".join(lines)


def _groups(name: str) -> Iterator[tuple[str, str]]:
  """The groups that a field is in, outermost first, and its name in each."""
  parts = name.split(".")
  for count in range(2, len(parts)):
    yield ".".join(parts[:count]), ".".join(parts[count:])


def _walk(
  config: config_dict.ConfigDict, name: str, blocks: list[Block]
) -> Iterator[Field]:
  def fits(block: Block) -> tuple[int, int]:
    both = block.keys() & config.keys()
    return len(both), sum(bool(block[key]) for key in both)

  block = max(blocks, key=fits, default={})
  order = [*block, *config]
  for key in sorted(config, key=order.index):
    value = config[key]
    if isinstance(value, config_dict.ConfigDict) and len(value):
      yield from _walk(value, f"{name}.{key}", blocks)
    else:
      yield Field(f"{name}.{key}", value, block.get(key, ""))


def _blocks(file: str) -> Iterator[Block]:
  """The blocks of a file of configs/, see the top."""
  text = pathlib.Path(file).read_text("utf-8")
  lines = text.splitlines()
  for function in ast.parse(text).body:
    # By what is set: "c" of `c.beta = 0.1`, or the line of a dict.
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
  """The comment that ends just above a line, its lines joined."""
  above = []
  for text in reversed(lines[: line - 1]):
    if not text.strip().startswith("#"):
      break
    above.append(text.strip().removeprefix("#").strip())
  return " ".join(reversed(above))
