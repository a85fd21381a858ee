"""What collective operations send from one device to the others.

Bytes are those of a ring, which is also the least that an all-gather, a
reduce-scatter or an all-reduce can send: n - 1 shares of n, twice for an
all-reduce. A group of one sends nothing.

An asynchronous operation is one that the compiler began before and ended after
other work: a pair of -start and -done, or, on a TPU, a chain of fusions each of
which carries a part of the operation along with its own work. All links of a
chain name the same channel, and are one operation.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from dpo_jax.planning import hlo_text

_KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
Computations = Mapping[str, Sequence[hlo_text.Instruction]]


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation.

  Attributes:
    kind: as XLA calls it, without -start.
    times: how often it runs.
    bytes: what a device sends each time, on a ring.
    shape: the first result's axes.
    looped: whether it stands within a loop.
    asynchronous: whether other work may run meanwhile.
    chain: the channel of one within a fusion, which others may continue.
  """

  kind: str
  times: float
  bytes: float
  shape: tuple[int, ...]
  looped: bool
  asynchronous: bool = False
  chain: str = ""


def collectives(
  computations: Computations, one: hlo_text.Instruction, devices: int
) -> Iterator[Collective]:
  """The collectives of an instruction, of a fusion those within; one run each.

  Args:
    computations: of the program.
    one: an instruction.
    devices: how many a group holds that is not spelt out.
  """
  if one.op == "fusion":
    body = computations[hlo_text.called(one, "calls")[0]]
    for inner in body:
      for found in collectives(computations, inner, devices):
        channel = re.search(r"channel_id=(\d+)", inner.attributes)
        chain = channel[1] if channel else ""
        if found.kind == "all-reduce" and _sliced(body, inner):
          # Nobody needs the other shares, and half of the sending is spared.
          kept = dataclasses.replace(found, bytes=found.bytes / 2)
          found = dataclasses.replace(kept, kind="reduce-scatter")
        yield dataclasses.replace(found, chain=chain)
  kind = one.op.removesuffix("-start")
  if kind not in _KINDS:
    return
  results = _results(one, kind)
  size = sum(array.bytes for array in results)
  count = _group(one.attributes, devices)
  share = (count - 1) / count
  factor = {
    "all-reduce": 2 * share,
    # Its result is a share already.
    "reduce-scatter": count - 1,
    "collective-permute": 1,
  }.get(kind, share)
  started = one.op.endswith("-start")
  yield Collective(kind, 1.0, size * factor, results[0].shape, False, started)


def goes_on(
  body: Sequence[hlo_text.Instruction], one: hlo_text.Instruction
) -> bool:
  """Whether a fusion of this body is a later link of a chain.

  It hands buffers on.
  """
  if not any(inner.op in _KINDS for inner in body):
    return False
  ends = any("AsyncCollectiveDone" in inner.attributes for inner in body)
  return ends or "output_to_operand_aliasing" in one.attributes


def is_carried(inner: hlo_text.Instruction) -> bool:
  """Whether an instruction of a later link stands for the chain itself."""
  return inner.op in _KINDS or "AsyncCollectiveDone" in inner.attributes


def _sliced(body, one) -> bool:
  """Whether all that a fusion does with a result is to take a slice."""
  users = [other for other in body if one.name in other.operands]
  return bool(users) and all(u.op == "dynamic-slice" for u in users)


def _results(one, kind) -> tuple[hlo_text.Array, ...]:
  """What it makes; a -start holds its operands, and flags, beside that."""
  if not one.op.endswith("-start") or kind == "all-reduce":
    return one.arrays
  arrays = tuple(a for a in one.arrays if a.shape or a.dtype != "u32")
  return arrays[len(arrays) // 2 :]


def _group(attributes: str, devices: int) -> int:
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
  return len(listed[1].split(",")) if listed else devices
