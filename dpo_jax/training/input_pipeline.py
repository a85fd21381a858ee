"""What a run's steps are fed with: items in order, packed, on the mesh.

All that the host does for a step happens here, ahead of it: a thread packs
batches while the device computes, and the next one is on its way to the device
before it is needed.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dpo_jax.core import console, distributed, sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import batch_shapes, dataset, loader, packing
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.model import gpt_neox
from dpo_jax.training import config as config_lib
from dpo_jax.training import reference

# Steps whose shapes are looked at beforehand, spread over the run.
_PLANNED = 4096


@dataclasses.dataclass(frozen=True)
class Fed:
  """A batch on the mesh, what it holds, and how long the host waited for it."""

  batch: batch_lib.Batch
  counts: batch_lib.Counts
  waited_s: float


@dataclasses.dataclass(frozen=True)
class Feed:
  """The items of a run and how they are laid out.

  Attributes:
    items: training and held-out items.
    schedule: the training items of each step.
    steps: how many updates the run makes.
    train: layout of training batches, with the shapes that hold them.
    held_out: layout of evaluation batches.
    eval_batch_size: items of an evaluation batch.
    train_reference: log-probs of the training items under the reference, laid
      out as their tokens are; None where the step computes them.
    held_out_reference: those of the held-out items.
    mesh: where batches are laid.
  """

  items: dataset.Prepared
  schedule: loader.Schedule
  steps: int
  train: packing.Packing
  held_out: packing.Packing
  eval_batch_size: int
  train_reference: np.ndarray | None
  held_out_reference: np.ndarray | None
  mesh: jax.sharding.Mesh

  def training(self, start: int) -> Iterator[Fed]:
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
      yield Fed(_placed(batch, self.mesh), counts, waited_s)

  def evaluation(self) -> Iterator[batch_lib.Batch]:
    """All held-out items in order."""
    for batch, _ in loader.in_order(
      self.items.held_out.table,
      self.held_out,
      batch_size=self.eval_batch_size,
      reference=self.held_out_reference,
    ):
      yield _placed(batch, self.mesh)

  def shapes(self) -> tuple[list[batch_lib.Batch], list[batch_lib.Batch]]:
    """The shapes of training batches, and of evaluation batches."""
    lying = sharding.batch_sharding(self.mesh, leading=1)
    train, held_out = (
      batch_lib.shapes(how, reference is not None, lying)
      for how, reference in (
        (self.train, self.train_reference),
        (self.held_out, self.held_out_reference),
      )
    )
    return train, held_out

  def report(self) -> dict[str, Any]:
    """How an epoch is made up, and the shapes that hold its batches."""
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
) -> Feed:
  """Reads, tokenizes and plans everything; no model is needed for it.

  Raises:
    ValueError: see `dataset.prepare`; or an epoch has fewer items than a batch.
  """
  items = dataset.prepare(config.data, config.objective, tokenizer)
  schedule = items.schedule(
    batch_size=config.batch_size, seed=config.seed, epochs=config.epochs
  )
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
  planned = np.linspace(0, steps - 1, min(steps, _PLANNED)).astype(int)
  return Feed(
    items=items,
    schedule=schedule,
    steps=steps,
    train=batch_shapes.choose(
      items.train.table,
      layout,
      (schedule.items(int(step)) for step in planned),
      config.data.shapes,
    ),
    held_out=_in_order(layout, items.held_out, config.eval_batch_size),
    eval_batch_size=config.eval_batch_size,
    train_reference=None,
    held_out_reference=None,
    mesh=mesh,
  )


def with_reference(
  feed: Feed,
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  base: Any,
  fingerprint: str,
  workdir: pathlib.Path,
) -> Feed:
  """The feed with the reference's log-probs, read or computed now.

  Args:
    feed: from `make`.
    config: of the run.
    shape: the reference's config.
    base: its weights, on the mesh.
    fingerprint: of those weights.
    workdir: where they are kept unless the config names a place.

  Raises:
    ValueError: kept log-probs are damaged, or of other items or weights.
  """
  directory = pathlib.Path(config.reference_cache or workdir / "reference")
  found = {}
  for side in ("train", "held_out"):
    items: dataset.Side = getattr(feed.items, side)
    path = directory.expanduser() / f"{side}.safetensors"
    made_of = {
      "data": items.report["tokens"],
      "model": fingerprint,
      "shape": repr(shape.shape()),
      "dtype": f"{config.model.dtype} of {config.model.param_dtype}",
    }
    # All hosts take the same branch.
    if distributed.all_gather(path.exists()).all():
      logps = reference.load(path, items.table, made_of)
    else:
      how = _in_order(feed.held_out, items, feed.eval_batch_size)
      packed = loader.in_order(
        items.table, how, batch_size=feed.eval_batch_size
      )
      total = -(-len(items.table) // feed.eval_batch_size)
      bar = console.track(packed, total, f"reference of {side}", "batch")
      logps = reference.token_logps(shape, base, None, bar, feed.mesh)
      if distributed.is_main():
        reference.save(path, logps, made_of)
    found[f"{side}_reference"] = reference.spread(items.table, logps)
  return dataclasses.replace(feed, **found)


def _in_order(
  layout: packing.Packing, items: dataset.Side, batch_size: int
) -> packing.Packing:
  """The layout of batches in order: one micro-batch, one shape."""
  return batch_shapes.choose(
    items.table,
    dataclasses.replace(layout, microbatches=1),
    loader.consecutive(len(items.table), batch_size),
    1,
  )


def _placed(batch: batch_lib.Batch, mesh: jax.sharding.Mesh) -> batch_lib.Batch:
  with jax.transfer_guard("allow"):
    return sharding.put(batch, mesh, leading=1)
