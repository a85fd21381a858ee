"""Collective operations and matrix products of a program."""

import dataclasses
import math
import re

from jax.extend import core
from jax.interpreters import partial_eval

_COMPUTATION = re.compile(
  r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S
)
_CALLED = re.compile(r"\b(?:body|calls|to_apply)=%?([\w.\-]+)")
_COLLECTIVE = re.compile(
  r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute"
  r"|reduce-scatter)(?:-start)?\((?:.*channel_id=(\d+))?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation.

  Attributes:
    kind: XLA's name for it.
    dtype: of its largest result.
    shape: of its largest result.
    looped: whether it is within a loop.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  looped: bool


def collectives(text: str) -> list[Collective]:
  """The collective operations in the text of a compiled program.

  The TPU compiler may spread one over several fusions, which then name the same
  channel: it counts once.
  """
  bodies = dict(_COMPUTATION.findall(text))
  looped = new = set(re.findall(r"\bbody=%?([\w.\-]+)", text))
  while new:
    called = {one for name in new for one in _CALLED.findall(bodies[name])}
    new = called - looped
    looped = looped | new
  fused = set(re.findall(r" fusion\(.*\bcalls=%?([\w.\-]+)", text))
  found = {}
  for name, body in bodies.items():
    for line, (result, kind, channel) in enumerate(_COLLECTIVE.findall(body)):
      shapes = [
        (dtype, tuple(int(x) for x in sizes.split(",") if x))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", result)
      ]
      largest = max(shapes, key=lambda x: (len(x[1]), x[1]))
      key = channel if channel and name in fused else (name, line)
      found[key] = Collective(kind, *largest, name in looped)
  return list(found.values())


def flops(jaxpr: core.Jaxpr) -> int:
  """Flops of the dot_generals whose results are used, scans unrolled."""
  used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _flops(used)


def _flops(jaxpr: core.Jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      left = equation.invars[0].aval.shape
      (contracted, _), _ = equation.params["dimension_numbers"]
      made = math.prod(equation.outvars[0].aval.shape)
      total += 2 * made * math.prod(left[axis] for axis in contracted)
    for inner in core.jaxprs_in_params(equation.params):
      times = equation.params.get("length", 1)
      total += times * _flops(inner)
  return total
