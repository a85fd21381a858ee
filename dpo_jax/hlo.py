"""What a compiled program does, counted from its text: flops, bytes, traffic.

XLA's own cost analysis visits the body of a loop once, however often it runs,
and the layers of a model are a loop. Here every instruction counts as often as
the loops around it go round. All numbers are one device's.

Flops are those of matrix products; what else is computed is bounded by bytes.
Bytes are what an instruction reads and writes outside of fusions, where an
operand that is only sliced counts as its slices, and an array that the compiler
keeps on the chip (memory space S(n)) not at all.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_SIZES = {"pred": 1, "token": 0, "opaque": 0}
_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# Instructions that move nothing by themselves.
_FREE = frozenset(
  {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
  }
)
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


@dataclasses.dataclass(frozen=True)
class Work:
  """What one instruction costs each time, and how often it runs."""

  times: float
  flops: float
  bytes: float


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation.

  Attributes:
    kind: as XLA calls it, without -start.
    times: how often it runs.
    bytes: what a device sends each time, on a ring.
    shape: the result's axes.
    looped: whether it stands within a loop.
  """

  kind: str
  times: float
  bytes: float
  shape: tuple[int, ...]
  looped: bool


@dataclasses.dataclass(frozen=True)
class Cost:
  """All that a program does in one call.

  Attributes:
    work: every instruction that computes or moves something.
    collectives: every collective operation.
    open_loops: loops whose rounds the text does not tell; see `cost`.
  """

  work: tuple[Work, ...]
  collectives: tuple[Collective, ...]
  open_loops: int

  @property
  def flops(self) -> float:
    return sum(w.times * w.flops for w in self.work)

  @property
  def bytes(self) -> float:
    return sum(w.times * w.bytes for w in self.work)

  def traffic(self) -> dict[str, tuple[float, float]]:
    """Operations and sent bytes of each kind of collective."""
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for one in self.collectives:
      found[one.kind][0] += one.times
      found[one.kind][1] += one.times * one.bytes
    return {kind: (a, b) for kind, (a, b) in sorted(found.items())}

  def seconds(self, flops: float, bandwidth: float) -> float:
    """Time at peak rates: each instruction takes what bounds it."""
    return sum(
      w.times * max(w.flops / flops, w.bytes / bandwidth) for w in self.work
    )


def cost(text: str, rounds: int = 1) -> Cost:
  """Counts a program.

  Args:
    text: `compiled.as_text()`.
    rounds: how often a loop goes round whose end depends on data.
  """
  computations, entry = _parse(text)
  return _Counter(computations, rounds).run(entry)


class _Counter:
  """Walks a program from its entry, multiplying as loops are entered."""

  def __init__(self, computations: dict[str, list[Instruction]], rounds: int):
    self.computations, self.rounds = computations, rounds
    self.by_name = {
      name: {i.name: i for i in body} for name, body in computations.items()
    }
    self.work: list[Work] = []
    self.collectives: list[Collective] = []
    self.open_loops = 0

  def run(self, entry: str) -> Cost:
    self._walk(entry, 1.0, looped=False)
    return Cost(tuple(self.work), tuple(self.collectives), self.open_loops)

  def _walk(self, name: str, times: float, *, looped: bool) -> None:
    for one in self.computations[name]:
      if one.op == "while":
        again = self._rounds(one)
        self._walk(_called(one, "body")[0], times * again, looped=True)
      elif one.op == "conditional":
        for branch in _branches(one):
          self._walk(branch, times, looped=looped)
      elif one.op == "call":
        self._walk(_called(one, "to_apply")[0], times, looped=looped)
      elif one.op == "async-start":
        self._walk(_called(one, "calls")[0], times, looped=looped)
      elif one.op not in _FREE and not one.op.endswith(("-done", "-update")):
        flops = self._flops(name, one)
        moved = self._bytes(name, one)
        if flops or moved:
          self.work.append(Work(times, flops, moved))
      for found in self._communicated(name, one):
        self.collectives.append(
          dataclasses.replace(found, times=times, looped=looped)
        )

  def _communicated(self, name: str, one: Instruction) -> Iterator[Collective]:
    if one.op == "fusion":
      called = _called(one, "calls")[0]
      for inner in self.computations[called]:
        yield from self._communicated(called, inner)
    kind = one.op.removesuffix("-start")
    if kind not in _COLLECTIVES:
      return
    result = one.arrays[-1] if one.op.endswith("-start") else None
    if kind == "collective-permute" and result is not None:
      # (operand, result, and two contexts)
      result = one.arrays[1]
    size = result.bytes if result else sum(a.bytes for a in one.arrays)
    count = _group(one.attributes)
    share = (count - 1) / count
    factor = {
      "all-reduce": 2 * share,
      "reduce-scatter": count - 1,
      "collective-permute": 1,
    }.get(kind, share)
    shape = (result or one.arrays[0]).shape
    yield Collective(kind, 1.0, size * factor, shape, False)

  def _rounds(self, loop: Instruction) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    condition = _called(loop, "condition")[0]
    inside = self.by_name[condition]
    root = next(i for i in self.computations[condition] if i.is_root)
    if root.op == "compare" and "direction=LT" in root.attributes:
      index, bound = (inside.get(name) for name in root.operands)
      if bound and bound.op == "constant" and index.op == "get-tuple-element":
        place = int(re.search(r"index=(\d+)", index.attributes)[1])
        step = self._step(_called(loop, "body")[0], place)
        if step:
          # jax's scans and XLA's windowed products count up from zero.
          return -(-int(bound.literal) // step)
    self.open_loops += 1
    return self.rounds

  def _step(self, body: str, place: int) -> int:
    """What a body adds to one of its values each time; 0 if that is unclear."""
    inside = self.by_name[body]
    root = next(i for i in self.computations[body] if i.is_root)
    if root.op != "tuple":
      return 0
    value, step = inside[root.operands[place]], 0
    while value.op in ("add", "copy", "bitcast"):
      parts = [inside[name] for name in value.operands]
      fixed = [int(x.literal) for x in parts if x.op == "constant"]
      moving = [x for x in parts if x.op != "constant"]
      if len(moving) != 1:
        return 0
      step, value = step + sum(fixed), moving[0]
    same = f"index={place}" in value.attributes
    return step if value.op == "get-tuple-element" and same else 0

  def _flops(self, name: str, one: Instruction) -> float:
    if one.op == "fusion":
      called = _called(one, "calls")[0]
      return sum(self._flops(called, i) for i in self.computations[called])
    if one.op == "dot":
      left = self._array(name, one.operands[0])
      axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
      contracted = [left.shape[int(a)] for a in axes[1].split(",") if a]
      return 2 * math.prod(one.arrays[0].shape) * math.prod(contracted)
    if one.op == "convolution":
      left, right = (self._array(name, o) for o in one.operands[:2])
      return _convolution(one, left.shape, right.shape)
    return 0.0

  def _array(self, name: str, operand: str) -> Array:
    return self.by_name[name][operand].arrays[0]

  def _bytes(self, name: str, one: Instruction) -> float:
    made = sum(a.bytes for a in one.arrays if a.in_memory)
    read = []
    for operand in one.operands:
      source = self.by_name[name].get(operand)
      arrays = source.arrays if source is not None else ()
      read.append(sum(a.bytes for a in arrays if a.in_memory))
    if one.op == "dynamic-slice":
      return made * 2
    if one.op == "dynamic-update-slice":
      return 2 * read[1]
    if one.op.endswith("-start"):
      # The result stands in the tuple beside what it was made of.
      return made
    if one.op == "fusion":
      return self._fusion_bytes(_called(one, "calls")[0], made, read)
    return made + sum(read)

  def _fusion_bytes(self, name: str, made: float, read: list[float]) -> float:
    body = self.computations[name]
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for one in body:
      for operand in one.operands:
        users[operand].append(one)
    total = 0.0
    for one in body:
      if one.op != "parameter":
        continue
      size = read[int(one.literal)] if int(one.literal) < len(read) else 0.0
      used = _through_bitcasts(users, one.name)
      if size and used and all(u.op == "dynamic-slice" for u, _ in used):
        size = min(size, sum(u.arrays[0].bytes for u, _ in used))
      elif used and all(
        u.op == "dynamic-update-slice" and u.operands[0] == by for u, by in used
      ):
        size = 0.0
      total += size
    root = next(i for i in body if i.is_root)
    while (
      root.op in ("bitcast", "copy")
      and root.operands[0] in (self.by_name[name])
    ):
      root = self.by_name[name][root.operands[0]]
    if root.op == "dynamic-update-slice":
      made = min(made, self._array(name, root.operands[1]).bytes)
    return total + made


def _through_bitcasts(users, name):
  """(user, the operand it uses) of a value and of its bitcasts."""
  found = []
  for one in users[name]:
    if one.op == "bitcast":
      found += _through_bitcasts(users, one.name)
    else:
      found.append((one, name))
  return found


def _called(one: Instruction, attribute: str) -> list[str]:
  return re.findall(rf"\b{attribute}=%?([\w.\-]+)", one.attributes)


def _branches(one: Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
  if listed:
    return [name.strip().lstrip("%") for name in listed[1].split(",")]
  return _called(one, "true_computation") + _called(one, "false_computation")


def _group(attributes: str) -> int:
  """How many devices take part in one collective."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    names = re.findall(r"'([^']+)'", mesh[2])
    return math.prod(int(sizes[name]) for name in names)
  tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
  if tiled:
    return int(tiled[2])
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  return len(listed[1].split(",")) if listed else 1


def _convolution(one, left, right) -> float:
  """Flops, counting the places of the window that lie on real input.

  The TPU compiler writes matrix products as convolutions whose batch or
  contracted axes are spatial ones.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(one.attributes)))
  spatial = sorted(c for c in labels[1] if c.isdigit())
  sizes = [right[labels[2].index(c)] for c in spatial]

  def each(key, default):
    return (window[key].split("x") if key in window else [default]) * (
      1 if key in window else len(spatial)
    )

  total = 1
  for at, size in enumerate(sizes):
    axis = spatial[at]
    low = int(each("pad", "0_0")[at].split("_")[0])
    total *= _taps(
      left[labels[1].index(axis)],
      one.arrays[0].shape[labels[3].index(axis)],
      size,
      int(each("stride", "1")[at]),
      low,
      int(each("lhs_dilate", "1")[at]),
      int(each("rhs_dilate", "1")[at]),
    )
  batch = one.arrays[0].shape[labels[3].index("b")]
  features = one.arrays[0].shape[labels[3].index("f")]
  return 2 * total * batch * features * right[labels[2].index("i")]


def _window(attributes: str) -> str:
  found = re.search(r"window=\{([^}]*)\}", attributes)
  return found[1] if found else ""


@functools.lru_cache(maxsize=4096)
def _taps(size, out, window, stride, low, dilate_in, dilate_window) -> int:
  """Products along one axis of a convolution."""
  reach = (size - 1) * dilate_in + 1
  count = 0
  for place in range(out):
    for tap in range(window):
      at = place * stride + tap * dilate_window - low
      count += 0 <= at < reach and at % dilate_in == 0
  return count


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Instructions by computation, and the name of the entry."""
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


def _closing(text: str, start: int) -> int:
  """The place after the bracket that closes the one at `start`."""
  depth = 0
  for at in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[at], 0)
    if not depth:
      return at + 1
  raise ValueError(f"unbalanced brackets in {text[:80]!r}")
