"""The few shapes that hold all batches of a run, chosen for the least waste.

Each shape is a compilation, and each row that a batch leaves empty is wasted.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from dpo_jax.rows import placement, tables


def settled(
  table: tables.Table,
  how: placement.Packing,
  steps: Iterable[np.ndarray],
  count: int,
) -> placement.Packing:
  """`how` with at most `count` shapes, chosen so that all `steps` fit in.

  Each row count that occurs costs what the next greater chosen one costs; the
  choice that wastes the fewest rows in sum is found exactly.

  Args:
    table: the items.
    how: the layout; its shapes are replaced.
    steps: the items of each step, as indices into the table.
    count: how many shapes there may be.
  """
  needs = []
  free = dataclasses.replace(how, shapes=())
  for indices in steps:
    taken = table.take(indices)
    taken = taken.take(placement.dealt(taken.lengths, how))
    shape = placement.shape_of(placement.plans(taken, how), free, growth=1.0)
    needs.append((shape.rows, shape.width, shape.seen))
  rows, *others = np.asarray(needs).T
  values, numbers = np.unique(rows, return_counts=True)
  chosen = values[_cuts(values, numbers, count)]
  taken = chosen[np.searchsorted(chosen, rows)]
  shapes = tuple(
    placement.Shape(int(value), *(int(x[taken == value].max()) for x in others))
    for value in chosen
  )
  return dataclasses.replace(how, shapes=shapes)


def _cuts(values: np.ndarray, numbers: np.ndarray, count: int) -> list[int]:
  """Which values to keep, the last among them, at the least cost.

  A value costs, as often as `numbers` says, the least kept value that is not
  below it; at most `count` are kept. All [V], ascending.
  """
  total = len(values)
  many = np.concatenate([[0], np.cumsum(numbers)])
  # best[i]: least cost of the first i values with value i - 1 kept.
  best = np.append(0.0, np.full(total, np.inf))
  kept: list[list[int]] = [[]] * (total + 1)
  for _ in range(min(count, total)):
    cost, chosen = best.copy(), list(kept)
    for end in range(1, total + 1):
      for start in range(end):
        new = best[start] + values[end - 1] * (many[end] - many[start])
        if new < cost[end]:
          cost[end], chosen[end] = new, [*kept[start], end - 1]
    best, kept = cost, chosen
  return kept[total]
