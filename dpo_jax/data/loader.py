"""Data order and prefetching: the items of each step, packed in a thread.

The order is a function of (seed, epoch, item) alone: a run resumes anywhere
without state, and all hosts see one global order. Every host packs the whole
batch, which takes about a millisecond, and places the rows of its own devices.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from dpo_jax.data import batch, token_table
from dpo_jax.data import packing as packing_lib

_PREFETCHED_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Items of every step of a run, as indices into one table.

  The table holds the sources one after the other. An epoch takes `weight` times
  the items of a source: all of them at 1, half at 0.5, each twice at 2. Every
  item is taken once before any is taken again.

  Attributes:
    sizes: items of each source.
    weights: passes over each source in an epoch, positive.
    batch_size: items of a step.
    seed: of the order, with the epoch.
    epochs: their number.
    origin: (step, epoch, item of the epoch) from which batches have this size;
      see `resumed`.
  """

  sizes: tuple[int, ...]
  weights: tuple[float, ...]
  batch_size: int
  seed: int
  epochs: int
  origin: tuple[int, int, int] = (0, 0, 0)

  def __post_init__(self):
    if not self.per_epoch:
      raise ValueError(
        f"an epoch has {sum(self.shares)} items, fewer than"
        f" batch_size={self.batch_size}"
      )

  @functools.cached_property
  def shares(self) -> tuple[int, ...]:
    """Items of each source in an epoch."""
    return tuple(
      math.floor(size * weight + 0.5)
      for size, weight in zip(self.sizes, self.weights, strict=True)
    )

  @property
  def per_epoch(self) -> int:
    """Steps of an epoch, without its last incomplete batch."""
    return sum(self.shares) // self.batch_size

  @property
  def left_out(self) -> int:
    """Items of an epoch's incomplete batch; others in each epoch."""
    return sum(self.shares) % self.batch_size

  @property
  def steps(self) -> int:
    """Steps of the run, those before `origin` included."""
    step, epoch, _ = self.origin
    later = max(0, self.epochs - epoch - 1)
    return step + self._first_steps + later * self.per_epoch

  @property
  def _first_steps(self) -> int:
    """Steps from `origin` to the end of its epoch."""
    return max(0, sum(self.shares) - self.origin[2]) // self.batch_size

  def _position(self, step: int) -> tuple[int, int]:
    """The epoch of a step from `origin` on, and its first item's place."""
    first_step, epoch, item = self.origin
    done = step - first_step
    if done < self._first_steps:
      return epoch, item + done * self.batch_size
    later, place = divmod(done - self._first_steps, self.per_epoch)
    return epoch + 1 + later, place * self.batch_size

  def items(self, step: int) -> np.ndarray:
    """Indices of a step's items, [batch_size]; steps count from 0."""
    epoch, start = self._position(step)
    return _epoch_order(self, epoch)[start : start + self.batch_size]

  def state(self, step: int) -> dict[str, Any]:
    """The position before a step as a JSON value, for a checkpoint."""
    epoch, item = self._position(step)
    values = dataclasses.asdict(self) | {
      "step": step,
      "epoch": epoch,
      "item": item,
    }
    return json.loads(json.dumps(values))

  def resumed(self, state: dict[str, Any]) -> "Schedule":
    """The schedule after a checkpoint's `state`.

    With another batch size it begins at the first item that is not trained on
    yet, so that each item of that epoch is taken once.
    """
    origin = state["origin"]
    if state["batch_size"] != self.batch_size:
      origin = (state["step"], state["epoch"], state["item"])
    return dataclasses.replace(self, origin=tuple(origin))


@functools.lru_cache(maxsize=2)
def _epoch_order(schedule: Schedule, epoch: int) -> np.ndarray:
  """All indices of an epoch in their order."""
  parts, first = [], 0
  for number, (size, share) in enumerate(
    zip(schedule.sizes, schedule.shares, strict=True)
  ):
    own = _source_items(schedule.seed, number, size, epoch * share, share)
    parts.append(first + np.sort(own))
    first += size
  taken = np.concatenate(parts)
  rng = np.random.default_rng((schedule.seed, epoch))
  return taken[rng.permutation(len(taken))]


def _source_items(
  seed: int, number: int, size: int, start: int, share: int
) -> np.ndarray:
  """Items [start, start + share) of repeated permutations of a source."""
  passes = range(start // size, -(-(start + share) // size))
  orders = [
    # The 1 keeps these apart from the orders of epochs: NumPy pads shorter
    # seeds with zeros.
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
  packing: packing_lib.Packing,
  *,
  start_step: int,
  steps: int,
  reference: np.ndarray | None = None,
) -> Iterator[tuple[batch.Batch, batch.Counts]]:
  """The batches of steps [start_step, steps), prefetched in a thread.

  Args:
    table: all items.
    schedule: the items of each step.
    packing: the layout.
    start_step: the first step, that of a resumed run.
    steps: steps of the whole run, at most `schedule.steps`.
    reference: see `batch.pack`.
  """
  import grain

  def pack(step):
    return batch.pack(table.take(schedule.items(step)), packing, reference)

  batches = grain.MapDataset.range(start_step, steps).map(pack)
  options = grain.ReadOptions(
    num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES
  )
  return iter(batches.to_iter_dataset(options))


def in_order(
  table: token_table.Table,
  packing: packing_lib.Packing,
  *,
  batch_size: int,
  reference: np.ndarray | None = None,
) -> Iterator[tuple[batch.Batch, batch.Counts]]:
  """Batches of all items in order, for evaluation; the last may be smaller."""
  for indices in consecutive(len(table), batch_size):
    yield batch.pack(table.take(indices), packing, reference)


def consecutive(count: int, batch_size: int) -> list[np.ndarray]:
  """The indices of `in_order`'s batches."""
  return [
    np.arange(start, min(start + batch_size, count))
    for start in range(0, count, batch_size)
  ]
