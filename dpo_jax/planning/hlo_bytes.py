"""Bytes that an instruction of a compiled program moves to and from memory.

They are what it reads and writes outside of fusions. An operand that is only
sliced counts as its slices, one that is written in place as what is written,
and an array that the compiler keeps on the chip (memory space S(n)) not at all.
Fusions lie within fusions: the slice of one layer's weights from a stack of all
layers is often taken by one fusion for the product of another.
"""

import math
import re
from collections.abc import Mapping

from dpo_jax.planning import hlo_text, hlo_traffic

# Instructions that read a part of their first operand, as large as the result.
_SLICES = ("dynamic-slice", "gather", "slice")
# Those that write a part of it in place, and which operand is the part.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# What stands for each element of its operand by itself: within a fusion, a
# slice of one needs no more than that slice.
_SAME = ("convert", "copy", "transpose")
# Calls that name a place, and move nothing to it.
_PLACES = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
Named = Mapping[str, Mapping[str, hlo_text.Instruction]]


def moved(by_name: Named, name: str, one: hlo_text.Instruction) -> float:
  """Bytes that an instruction moves each time it runs.

  Args:
    by_name: the instructions of each computation by their names.
    name: of the computation that holds it.
    one: the instruction.
  """
  if one.op == "custom-call" and _PLACES.search(one.attributes):
    return 0.0
  made = [a.bytes if a.in_memory else 0.0 for a in one.arrays]
  sources = [by_name[name].get(operand) for operand in one.operands]
  read = [_held(source) for source in sources]
  if one.op in _SLICES:
    # A source on the chip is not read from memory, however large it is.
    return sum(made) + min(read[0], sum(a.bytes for a in one.arrays))
  if one.op in _UPDATES:
    return read[_UPDATES[one.op]] + min(
      made[0], sources[_UPDATES[one.op]].arrays[0].bytes
    )
  if one.op == "slice-start":
    # It makes a tuple of its operand, the slice, and a flag.
    part = one.arrays[len(one.operands)]
    return min(read[0], part.bytes) + (part.bytes if part.in_memory else 0.0)
  if one.op.endswith("-start"):
    # The result stands in the tuple beside what it was made of.
    return sum(made)
  if one.op == "fusion":
    return _fusion(by_name, one, made, read)
  return sum(made) + sum(read)


def _held(source: hlo_text.Instruction | None) -> float:
  arrays = source.arrays if source is not None else ()
  return sum(a.bytes for a in arrays if a.in_memory)


def _fusion(by_name, one, made, read) -> float:
  (name,) = hlo_text.called(one, "calls")
  body = by_name[name]
  # A later link of a chain: what it carries along is no work of its own.
  carries = hlo_traffic.goes_on(list(body.values()), one)
  total = sum(
    size * _share(by_name, name, at, carries) if size else 0.0
    for at, size in enumerate(read)
  )
  root = next(i for i in body.values() if i.is_root)
  outputs = [body.get(o) for o in root.operands]
  if root.op != "tuple" or len(outputs) != len(made):
    outputs = [root]
  for at, output in enumerate(outputs):
    made[at] = _written(by_name, name, output, made[at], carries)
  return total + sum(made)


def _share(by_name, name: str, at: int, carries: bool) -> float:
  """Which share of its operand number `at` a fusion's computation reads."""
  for one in by_name[name].values():
    if one.op == "parameter" and int(one.literal) == at:
      return _used(by_name, name, one, carries)
  return 0.0


def _used(by_name, name, value, carries) -> float:
  """Which share of a value the instructions read that use it."""
  share = 0.0
  for user in by_name[name].values():
    if value.name not in user.operands:
      continue
    first = user.operands[0] == value.name
    if user.op == "tuple" or (carries and hlo_traffic.is_carried(user)):
      # What is only handed on is not read.
      continue
    if user.op in _UPDATES and first:
      continue
    if user.op == "bitcast" or (user.op in _SAME and not user.is_root):
      share += _used(by_name, name, user, carries)
    elif user.op in _SLICES and first:
      share += _size(user) / max(_size(value), 1)
    elif user.op == "fusion":
      (inner,) = hlo_text.called(user, "calls")
      share += sum(
        _share(by_name, inner, at, carries)
        for at, operand in enumerate(user.operands)
        if operand == value.name
      )
    else:
      return 1.0
  return min(share, 1.0)


def _size(one: hlo_text.Instruction) -> int:
  return math.prod(one.arrays[0].shape)


def _written(by_name, name, output, size: float, carries: bool) -> float:
  """Bytes that a fusion writes of one of its outputs, of `size` at most."""
  inside = by_name[name]
  while output.op in ("bitcast", "copy") and output.operands[0] in inside:
    output = inside[output.operands[0]]
  if output.op == "fusion" and len(output.arrays) == 1:
    (inner,) = hlo_text.called(output, "calls")
    root = next(i for i in by_name[inner].values() if i.is_root)
    return _written(by_name, inner, root, size, carries)
  if output.op in _UPDATES:
    update = output.operands[_UPDATES[output.op]]
    return min(size, inside[update].arrays[0].bytes)
  if carries and hlo_traffic.is_carried(output):
    return 0.0
  return 0.0 if output.op == "parameter" else size
