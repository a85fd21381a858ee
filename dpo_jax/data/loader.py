"""Which items each step holds, and their batches ahead of time.

The order is a function of (seed, epoch, step) and of nothing else: no state is
carried from step to step, so that a run goes on from any step, and any number
of hosts see one and the same global order. Every host packs the whole batch,
which takes about a millisecond, and places the rows of its own devices.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dpo_jax.data import batch, packing, token_table

# Batches that are packed ahead of the step that takes them.
_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The items of every step of a run, as indices into one table.

  The table holds the sources one after the other. In each epoch a source gives
  `weight` times its items: all of them at 1, at 0.5 a half, at 2 each twice.
  Whatever the weight, every item is taken once before any is taken again.

  Attributes:
    sizes: items of each source.
    weights: passes over each source in an epoch, positive.
    batch_size: items of a step.
    seed: decides the order, with the epoch.
    epochs: how many there are.
  """

  sizes: tuple[int, ...]
  weights: tuple[float, ...]
  batch_size: int
  seed: int
  epochs: int

  def __post_init__(self):
    if not self.per_epoch:
      raise ValueError(
        f"an epoch has {sum(self.shares)} items, fewer than"
        f" batch_size={self.batch_size}"
      )

  @functools.cached_property
  def shares(self) -> tuple[int, ...]:
    """Items that each source gives to an epoch."""
    return tuple(
      math.floor(size * weight + 0.5)
      for size, weight in zip(self.sizes, self.weights, strict=True)
    )

  @property
  def per_epoch(self) -> int:
    """Steps of an epoch, whose last incomplete batch is left out."""
    return sum(self.shares) // self.batch_size

  @property
  def left_out(self) -> int:
    """Items of every epoch that fill no batch; others in each epoch."""
    return sum(self.shares) % self.batch_size

  @property
  def steps(self) -> int:
    return self.per_epoch * self.epochs

  def items(self, step: int) -> np.ndarray:
    """Indices of a step's items, [batch_size]; steps count from 0."""
    epoch, place = divmod(step, self.per_epoch)
    start = place * self.batch_size
    return _epoch(self, epoch)[start : start + self.batch_size]

  def state(self, step: int) -> dict[str, Any]:
    """The position before a step, as a small JSON value for a checkpoint."""
    epoch, place = divmod(step, self.per_epoch)
    return dataclasses.asdict(self) | {
      "sizes": list(self.sizes),
      "weights": list(self.weights),
      "step": step,
      "epoch": epoch,
      "step_of_epoch": place,
    }


@functools.lru_cache(maxsize=2)
def _epoch(schedule: Schedule, epoch: int) -> np.ndarray:
  """All indices of an epoch in their order."""
  parts, first = [], 0
  for number, (size, share) in enumerate(
    zip(schedule.sizes, schedule.shares, strict=True)
  ):
    taken = _taken(schedule.seed, number, size, epoch * share, share)
    parts.append(first + np.sort(taken))
    first += size
  taken = np.concatenate(parts)
  rng = np.random.default_rng((schedule.seed, epoch))
  return taken[rng.permutation(len(taken))]


def _taken(
  seed: int, number: int, size: int, start: int, share: int
) -> np.ndarray:
  """Places [start, start + share) of a source's endless run of passes."""
  passes = range(start // size, -(-(start + share) // size))
  orders = [
    # Its last number keeps it apart from the epochs' own orders: NumPy fills
    # shorter seeds up with zeros.
    np.random.default_rng((seed, number, index, 1)).permutation(size)
    for index in passes
  ]
  if not orders:
    return np.zeros(0, np.int64)
  skipped = start - passes.start * size
  return np.concatenate(orders)[skipped : skipped + share]


def stream(
  table: token_table.Table,
  schedule: Schedule,
  how: packing.Packing,
  *,
  start_step: int,
  steps: int,
  reference: np.ndarray | None = None,
) -> Iterator[tuple[batch.Batch, batch.Counts]]:
  """The batches of steps [start_step, steps), packed ahead in a thread.

  Args:
    table: all items.
    schedule: the items of each step.
    how: the layout.
    start_step: the first step, where a resumed run goes on.
    steps: how many steps the whole run has, at most `schedule.steps`.
    reference: see `batch.pack`.
  """
  import grain

  def at(step):
    return batch.pack(table.take(schedule.items(step)), how, reference)

  batches = grain.MapDataset.range(start_step, steps).map(at)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
  return iter(batches.to_iter_dataset(options))


def in_order(
  items: Sequence[token_table.Item],
  how: packing.Packing,
  *,
  batch_size: int,
  reference: np.ndarray | None = None,
) -> Iterator[tuple[batch.Batch, batch.Counts]]:
  """All items in order, for evaluation; the last batch may hold fewer."""
  table = token_table.from_items(items)
  for indices in consecutive(len(table), batch_size):
    yield batch.pack(table.take(indices), how, reference)


def consecutive(count: int, batch_size: int) -> list[np.ndarray]:
  """The indices of `in_order`'s batches."""
  return [
    np.arange(start, min(start + batch_size, count))
    for start in range(0, count, batch_size)
  ]
