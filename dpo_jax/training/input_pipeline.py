"""The input pipeline of a run: items in order, packed, sharded over the mesh.

A thread packs batches while the device computes, and the next batch is sent to
the device before it is needed.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dpo_jax.core import sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import (
  batch_shapes,
  dataset,
  loader,
  packing,
  token_table,
)
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.training import config as config_lib

# Steps, spread over the run, whose batches choose the shapes.
_SAMPLED_STEPS = 4096


@dataclasses.dataclass(frozen=True)
class StepBatch:
  """A batch on the mesh, its counts, and how long the host waited for it."""

  batch: batch_lib.Batch
  counts: batch_lib.Counts
  waited_s: float


@dataclasses.dataclass(frozen=True)
class InputPipeline:
  """The items of a run and how they are packed.

  Attributes:
    items: training and held-out items.
    schedule: the training items of each step.
    steps: updates of the whole run.
    train: packing of training batches, with their shapes.
    held_out: packing of evaluation batches.
    eval_batch_size: items of an evaluation batch.
    mesh: over which batches are sharded.
    train_reference: log-probs of the training items under the reference, one a
      token of their table; None where the step computes them.
    held_out_reference: those of the held-out items.
  """

  items: dataset.Prepared
  schedule: loader.Schedule
  steps: int
  train: packing.Packing
  held_out: packing.Packing
  eval_batch_size: int
  mesh: jax.sharding.Mesh
  train_reference: np.ndarray | None = None
  held_out_reference: np.ndarray | None = None

  def train_batches(self, start: int) -> Iterator[StepBatch]:
    """The batches of steps [start, steps)."""
    stream = loader.stream(
      self.items.train.table,
      self.schedule,
      self.train,
      start_step=start,
      steps=self.steps,
      reference=self.train_reference,
    )
    for _ in range(start, self.steps):
      started = time.perf_counter()
      batch, counts = next(stream)
      waited_s = time.perf_counter() - started
      yield StepBatch(_to_device(batch, self.mesh), counts, waited_s)

  def eval_batches(self) -> Iterator[batch_lib.Batch]:
    """All held-out items in order."""
    for batch, _ in loader.in_order(
      self.items.held_out.table,
      self.held_out,
      batch_size=self.eval_batch_size,
      reference=self.held_out_reference,
    ):
      yield _to_device(batch, self.mesh)

  def shapes(self) -> tuple[list[batch_lib.Batch], list[batch_lib.Batch]]:
    """The shapes of training batches, and of evaluation batches."""
    sharded = sharding.batch_sharding(self.mesh, leading=1)
    train, held_out = (
      batch_lib.shapes(
        packed, reference is not None, self.items.labeled, sharded
      )
      for packed, reference in (
        (self.train, self.train_reference),
        (self.held_out, self.held_out_reference),
      )
    )
    return train, held_out

  def report(self) -> dict[str, Any]:
    """Composition of an epoch and the shapes of its batches."""
    return {
      "items of an epoch by source": list(self.schedule.shares),
      "steps of an epoch": self.schedule.per_epoch,
      "items left out of each epoch": self.schedule.left_out,
      "shapes": [
        f"{shape.rows} x {self.train.row_length} tokens, {shape.width}"
        " completion tokens a shard"
        for shape in self.train.shapes
      ],
    }


def make(
  config: config_lib.TrainSettings,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
  position: dict[str, Any] | None = None,
) -> InputPipeline:
  """Reads and tokenizes all items, and chooses the shapes of batches.

  `position` is that of a checkpoint, see `loader.Schedule.resumed`.

  Raises:
    ValueError: see `dataset.prepare`; or an epoch has fewer items than a batch.
  """
  labeled = config.objective == "dpo" and config.loss.labeled
  items = dataset.prepare(config.data, config.objective, tokenizer, labeled)
  schedule = items.schedule(
    batch_size=config.batch_size, seed=config.seed, epochs=config.epochs
  )
  if position is not None:
    schedule = schedule.resumed(position)
  steps = min(schedule.steps, config.max_steps or schedule.steps)
  layout = packing.Packing(
    layout=config.data.layout,
    row_length=config.row_length,
    shards=sharding.data_shards(mesh),
    microbatches=config.microbatches,
    loss_on_prompt=config.data.loss_on_prompt,
    pad_id=tokenizer.pad_id,
    spans_rows=config.spans_rows,
  )
  first = min(schedule.origin[0], steps - 1)
  count = min(steps - first, _SAMPLED_STEPS)
  sampled = np.linspace(first, steps - 1, count).astype(int)
  return InputPipeline(
    items=items,
    schedule=schedule,
    steps=steps,
    train=batch_shapes.choose(
      items.train.table,
      layout,
      (schedule.items(int(step)) for step in sampled),
      config.data.shapes,
    ),
    held_out=in_order(layout, items.held_out.table, config.eval_batch_size),
    eval_batch_size=config.eval_batch_size,
    mesh=mesh,
  )


def in_order(
  layout: packing.Packing, table: token_table.Table, batch_size: int
) -> packing.Packing:
  """The packing of batches in order: one micro-batch, one shape."""
  return batch_shapes.choose(
    table,
    dataclasses.replace(layout, microbatches=1),
    loader.consecutive(len(table), batch_size),
    1,
  )


def _to_device(
  batch: batch_lib.Batch, mesh: jax.sharding.Mesh
) -> batch_lib.Batch:
  with jax.transfer_guard("allow"):
    return sharding.put(batch, mesh, leading=1)
