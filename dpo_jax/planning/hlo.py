"""What a compiled program does, counted from its text: flops, bytes, traffic.

XLA's own cost analysis visits the body of a loop once, however often it runs,
and the layers of a model are a loop. Here every instruction counts as often as
the loops around it go round. All numbers are one device's.

Flops are those of matrix products, and what a Pallas kernel says that it costs;
what else is computed is bounded by bytes.
Bytes are what passes to and from memory (`hlo_bytes`), and what is sent is
counted by `hlo_traffic`.
"""

import collections
import dataclasses
import functools
import math
import re

from dpo_jax.planning import hlo_bytes, hlo_text, hlo_traffic

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


@dataclasses.dataclass(frozen=True)
class Work:
  """What one instruction costs each time, and how often it runs.

  `exact` is the part of `flops` whose operands are float32 and not rounded.
  """

  times: float
  flops: float
  bytes: float
  exact: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
  """All that a program does in one call.

  Attributes:
    work: every instruction that computes or moves something.
    collectives: every collective operation.
    open_loops: loops whose rounds the text does not tell; see `cost`.
  """

  work: tuple[Work, ...]
  collectives: tuple[hlo_traffic.Collective, ...]
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

  @property
  def sent(self) -> float:
    """Bytes that a device sends."""
    return sum(one.times * one.bytes for one in self.collectives)

  @property
  def sent_meanwhile(self) -> float:
    """Those of them that other work may hide."""
    return sum(
      one.times * one.bytes for one in self.collectives if one.asynchronous
    )

  def seconds(self, flops: float, exact: float, bandwidth: float) -> float:
    """Time at peak rates: each instruction takes what bounds it."""

    def products(one):
      return (one.flops - one.exact) / flops + one.exact / exact

    return sum(
      w.times * max(products(w), w.bytes / bandwidth) for w in self.work
    )


def cost(text: str, rounds: int = 1) -> Cost:
  """Counts a program.

  Args:
    text: `compiled.as_text()`.
    rounds: how often a loop goes round whose end depends on data.
  """
  computations, entry = hlo_text.parse(text)
  return _Counter(computations, rounds, hlo_text.devices(text)).run(entry)


class _Counter:
  """Walks a program from its entry, multiplying as loops are entered."""

  def __init__(
    self, computations: hlo_traffic.Computations, rounds: int, devices: int
  ):
    self.computations, self.rounds = computations, rounds
    self.devices = devices
    self.by_name = {
      name: {i.name: i for i in body} for name, body in computations.items()
    }
    self.work: list[Work] = []
    self.collectives: list[hlo_traffic.Collective] = []
    self.open_loops = 0

  def run(self, entry: str) -> Cost:
    self._walk(entry, 1.0, looped=False)
    return Cost(tuple(self.work), tuple(self.collectives), self.open_loops)

  def _walk(self, name: str, times: float, *, looped: bool) -> None:
    chains: dict[str, int] = {}
    for one in self.computations[name]:
      if one.op == "while":
        again = self._rounds(one)
        self._walk(hlo_text.called(one, "body")[0], times * again, looped=True)
      elif one.op == "conditional":
        for branch in _branches(one):
          self._walk(branch, times, looped=looped)
      elif one.op == "call":
        self._walk(hlo_text.called(one, "to_apply")[0], times, looped=looped)
      elif one.op == "async-start":
        before = len(self.collectives)
        self._walk(hlo_text.called(one, "calls")[0], times, looped=looped)
        for at in range(before, len(self.collectives)):
          self._overlap(at)
      elif one.op not in _FREE and not one.op.endswith(("-done", "-update")):
        flops, exact = self._flops(name, one)
        moved = hlo_bytes.moved(self.by_name, name, one)
        if flops or moved:
          self.work.append(Work(times, flops, moved, exact))
      for found in hlo_traffic.collectives(
        self.computations, one, self.devices
      ):
        if found.chain in chains:
          self._overlap(chains[found.chain])
          continue
        if found.chain:
          chains[found.chain] = len(self.collectives)
        self.collectives.append(
          dataclasses.replace(found, times=times, looped=looped)
        )

  def _overlap(self, at: int) -> None:
    self.collectives[at] = dataclasses.replace(
      self.collectives[at], asynchronous=True
    )

  def _rounds(self, loop: hlo_text.Instruction) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    condition = hlo_text.called(loop, "condition")[0]
    inside = self.by_name[condition]
    root = next(i for i in self.computations[condition] if i.is_root)
    if root.op == "compare" and "direction=LT" in root.attributes:
      index, bound = (inside.get(name) for name in root.operands)
      if bound and bound.op == "constant" and index.op == "get-tuple-element":
        place = int(re.search(r"index=(\d+)", index.attributes)[1])
        step = self._step(hlo_text.called(loop, "body")[0], place)
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

  def _flops(self, name: str, one: hlo_text.Instruction) -> tuple[float, float]:
    """Flops, and those of them whose operands are float32 and not rounded."""
    if one.op == "fusion":
      called = hlo_text.called(one, "calls")[0]
      parts = [self._flops(called, i) for i in self.computations[called]]
      return sum(part for part, _ in parts), sum(part for _, part in parts)
    if one.op == "custom-call":
      # A kernel of Pallas says itself what it costs; its inside is not text.
      said = re.search(r'"cost_estimate":\{"flops":"(\d+)"', one.attributes)
      return (float(said[1]) if said else 0.0), 0.0
    if one.op not in ("dot", "convolution"):
      return 0.0, 0.0
    left, right = (self._array(name, o) for o in one.operands[:2])
    if one.op == "dot":
      axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
      contracted = [left.shape[int(a)] for a in axes[1].split(",") if a]
      flops = 2 * math.prod(one.arrays[0].shape) * math.prod(contracted)
    else:
      flops = _convolution(one, left.shape, right.shape)
    whole = "operand_precision={highest" in one.attributes
    return flops, flops if whole and left.dtype == "f32" else 0.0

  def _array(self, name: str, operand: str) -> hlo_text.Array:
    return self.by_name[name][operand].arrays[0]


def _branches(one: hlo_text.Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
  if listed:
    return [name.strip().lstrip("%") for name in listed[1].split(",")]
  return hlo_text.called(one, "true_computation") + hlo_text.called(
    one, "false_computation"
  )


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
