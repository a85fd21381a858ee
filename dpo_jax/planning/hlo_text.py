"""The text of a compiled program, as instructions by computation."""

import dataclasses
import math
import re
from collections.abc import Iterator

_SIZES = {"pred": 1, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
  """An array in the text: its type, its axes, and whether it is in HBM."""

  dtype: str
  shape: tuple[int, ...]
  in_memory: bool

  @property
  def bytes(self) -> float:
    if self.dtype in _SIZES:
      size = _SIZES[self.dtype]
    else:
      size = int(re.search(r"\d+", self.dtype)[0]) / 8
    return size * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: what it makes, of what, and the text of its attributes."""

  name: str
  op: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str
  is_root: bool
  literal: str


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Instructions by computation, and the name of the entry.

  Raises:
    ValueError: the text is none of a compiled program.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, body = "", None
  for line in text.splitlines():
    if body is None:
      head = _COMPUTATION.match(line)
      if head:
        body = computations[head[2]] = []
        entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      body = None
    else:
      head = _HEAD.match(line)
      if head:
        body.append(_instruction(head, line[head.end() :]))
  if not entry:
    raise ValueError("the text holds no ENTRY computation: is it HLO?")
  return computations, entry


def called(one: Instruction, attribute: str) -> list[str]:
  """The computations that an attribute names, such as a loop's "body"."""
  return re.findall(rf"\b{attribute}=%?([\w.\-]+)", one.attributes)


def _instruction(head: re.Match, rest: str) -> Instruction:
  """`rest` is "shape op(operands), attributes"."""
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  at = rest.index("(")
  end = _closing(rest, at)
  inner = rest[at + 1 : end - 1]
  operands = re.findall(r"%([\w.\-]+)", inner)
  return Instruction(
    name=head[2],
    op=rest[:at],
    arrays=tuple(_arrays(shape)),
    operands=tuple(operands),
    attributes=rest[end:],
    is_root=bool(head[1]),
    literal=inner,
  )


def _arrays(text: str) -> Iterator[Array]:
  text = re.sub(r"/\*.*?\*/", "", text)
  for found in _ARRAY.finditer(text):
    axes = tuple(int(x) for x in found[2].split(",") if x)
    space = re.search(r"S\((\d+)\)", found[3] or "")
    # S(5) is the host's memory, the others are on the chip.
    yield Array(found[1], axes, space is None)


def devices(text: str) -> int:
  """How many devices run the program together."""
  found = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text[: 10**6])
  return math.prod(map(int, found))


def _closing(text: str, start: int) -> int:
  """The place after the bracket that closes the one at `start`."""
  depth = 0
  for at in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[at], 0)
    if not depth:
      return at + 1
  raise ValueError(f"unbalanced brackets in {text[:80]!r}")
