"""The few batch shapes of a run: exact least-waste grouping of its steps.

Each shape is a compilation. What a batch leaves empty of its shape is computed
in vain: rows, places for predicted tokens (their logits), and pairs of rows
that attend to each other.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from dpo_jax.data import packing as packing_lib
from dpo_jax.data import token_table

# Shares of a step's time that rows, predicted tokens and pairs of rows have: of
# a large model, where rows go through every layer, and with segments that span
# rows, which is for small models on a CPU, as in a trace of 14m.
_SHARES = np.array([0.9, 0.1, 0.0])
_SHARES_SPANNING = np.array([0.45, 0.31, 0.21])


def choose(
  table: token_table.Table,
  packing: packing_lib.Packing,
  steps: Iterable[np.ndarray],
  count: int,
) -> packing_lib.Packing:
  """`packing` with at most `count` shapes that hold all `steps`.

  Steps in the order of their cost are cut into groups; every step of a group
  costs the least shape that holds the whole group. The cuts of least total cost
  are found by dynamic programming.

  Args:
    table: the items.
    packing: the layout; its shapes are replaced.
    steps: the items of each step, as indices into the table.
    count: the largest number of shapes.
  """
  needs = []
  free = dataclasses.replace(packing, shapes=())
  for indices in steps:
    items = table.take(indices)
    items = items.take(packing_lib.microbatch_order(items.lengths, packing))
    plans = packing_lib.plans(items, packing)
    shape = packing_lib.shape_of(plans, free, growth=1.0)
    needs.append((shape.rows, shape.width, shape.block_pairs))
  shares = _SHARES_SPANNING if packing.spans_rows else _SHARES
  shapes = _shapes(np.asarray(needs), shares, count)
  return dataclasses.replace(
    packing,
    shapes=tuple(packing_lib.Shape(*map(int, shape)) for shape in shapes),
  )


def _shapes(needs: np.ndarray, shares: np.ndarray, count: int) -> np.ndarray:
  """At most `count` shapes, [n, 3], cheapest first, for needs [N, 3].

  Args:
    needs: rows, predicted tokens and pairs of rows of each step.
    shares: of a step's cost, at the mean of each need, [3].
    count: the largest number of shapes.
  """
  prices = shares / np.maximum(needs.mean(axis=0), 1)
  distinct, steps = np.unique(needs, axis=0, return_counts=True)
  order = np.argsort(distinct @ prices, kind="stable")
  distinct, steps = distinct[order], steps[order]
  ends = _cuts(distinct, steps, prices, count)
  shapes = np.unique(
    [
      distinct[i:j].max(axis=0)
      for i, j in zip([0, *ends[:-1]], ends, strict=True)
    ],
    axis=0,
  )
  return shapes[np.argsort(shapes @ prices, kind="stable")]


def _cuts(
  needs: np.ndarray, steps: np.ndarray, prices: np.ndarray, count: int
) -> list[int]:
  """Ends of at most `count` groups of consecutive needs, ascending.

  Args:
    needs: distinct needs in the order of their cost, [V, 3].
    steps: how many steps have each, [V].
    prices: cost of one row, predicted token and pair of rows, [3].
    count: the largest number of groups.
  """
  total = len(needs)
  before = np.concatenate([[0], np.cumsum(steps)])
  # best[n, i]: least cost of the first i needs in n groups; start[n, i]: where
  # the last of these groups starts.
  most = min(count, total)
  best = np.full((most + 1, total + 1), np.inf)
  best[0, 0] = 0
  start = np.zeros((most + 1, total + 1), int)
  for end in range(1, total + 1):
    greatest = np.maximum.accumulate(needs[:end][::-1])[::-1]
    last = (greatest @ prices) * (before[end] - before[:end])
    for groups in range(1, most + 1):
      costs = best[groups - 1, :end] + last
      start[groups, end] = costs.argmin()
      best[groups, end] = costs.min()
  groups = int(best[:, total].argmin())
  ends = [total]
  for group in range(groups, 1, -1):
    ends.append(int(start[group, ends[-1]]))
  return ends[::-1]
