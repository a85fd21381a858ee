"""The few shapes that hold all batches of a run, chosen for the least waste.

Each shape is a compilation. What a batch leaves empty is wasted: of its rows,
of the places for predicted tokens, whose logits are made all the same, and of
the pairs of rows that look at each other.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from dpo_jax.data import packing, token_table

# Shares of a step that rows, predicted tokens and pairs of rows have. A large
# model's is nearly all rows, which go through every layer. Where pieces run on,
# which is for small models on a CPU, the shares are those of 14m in a trace.
_SHARES = np.array([0.9, 0.1, 0.0])
_SHARES_RUNNING_ON = np.array([0.45, 0.31, 0.21])


def choose(
  table: token_table.Table,
  how: packing.Packing,
  steps: Iterable[np.ndarray],
  count: int,
) -> packing.Packing:
  """`how` with at most `count` shapes, chosen so that all `steps` fit in.

  Steps in the order of their costs are cut into groups, of which each costs, as
  often as it has steps, a shape that holds them all; the cuts that cost least
  are found exactly.

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
    taken = taken.take(packing.dealt(taken.lengths, how))
    shape = packing.shape_of(packing.plans(taken, how), free, growth=1.0)
    needs.append((shape.rows, shape.width, shape.block_pairs))
  shares = _SHARES_RUNNING_ON if how.spans_rows else _SHARES
  found = _shapes(np.asarray(needs), shares, count)
  shapes = tuple(packing.Shape(*map(int, shape)) for shape in found)
  return dataclasses.replace(how, shapes=shapes)


def _shapes(needs: np.ndarray, shares: np.ndarray, count: int) -> np.ndarray:
  """At most `count` shapes, [n, 3], cheapest first, for needs [N, 3].

  Args:
    needs: rows, predicted tokens and pairs of each step.
    shares: of a step's cost, what these have at their means, [3].
    count: how many shapes.
  """
  prices = shares / np.maximum(needs.mean(axis=0), 1)
  kinds, numbers = np.unique(needs, axis=0, return_counts=True)
  order = np.argsort(kinds @ prices, kind="stable")
  kinds, numbers = kinds[order], numbers[order]
  ends = _cuts(kinds, numbers, prices, count)
  starts = [0, *ends[:-1]]
  shapes = [kinds[i:j].max(axis=0) for i, j in zip(starts, ends, strict=True)]
  shapes = np.unique(shapes, axis=0)
  return shapes[np.argsort(shapes @ prices, kind="stable")]


def _cuts(
  kinds: np.ndarray, numbers: np.ndarray, prices: np.ndarray, count: int
) -> list[int]:
  """Where each of at most `count` groups of `kinds` [V, 3] ends, ascending.

  A group costs its greatest need of each sort at its price, as often as
  `numbers` [V] says in all.
  """
  total = len(kinds)
  many = np.concatenate([[0], np.cumsum(numbers)])
  # best[n, i]: least cost of the first i kinds in n groups; start[n, i]: where
  # the last of them starts.
  most = min(count, total)
  best = np.full((most + 1, total + 1), np.inf)
  best[0, 0] = 0
  start = np.zeros((most + 1, total + 1), int)
  for end in range(1, total + 1):
    greatest = np.maximum.accumulate(kinds[:end][::-1])[::-1]
    last = (greatest @ prices) * (many[end] - many[:end])
    for groups in range(1, most + 1):
      costs = best[groups - 1, :end] + last
      start[groups, end] = costs.argmin()
      best[groups, end] = costs.min()
  groups = int(best[:, total].argmin())
  ends = [total]
  for group in range(groups, 1, -1):
    ends.append(int(start[group, ends[-1]]))
  return ends[::-1]
