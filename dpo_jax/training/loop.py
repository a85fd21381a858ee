"""The training loop: updates, evaluations, samples and saves in their order.

Metrics are fetched one step late, so that the device never waits for the host;
nothing else crosses between the two inside the loop.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpo_jax.core import console, distributed, hardware, preemption
from dpo_jax.data import batch as batch_lib
from dpo_jax.io import metrics
from dpo_jax.model import flops, gpt_neox
from dpo_jax.training import checkpoints as checkpoints_lib
from dpo_jax.training import config as config_lib
from dpo_jax.training import (
  eval_samples,
  guards,
  input_pipeline,
  step,
  trackers,
)

_ITEMS = {"sft": "examples", "dpo": "pairs"}


class StepLog:
  """metrics.jsonl, trackers and progress bar, written by the first process."""

  def __init__(
    self,
    config: config_lib.TrainSettings,
    workdir: pathlib.Path,
    model: gpt_neox.ModelConfig,
    mesh: jax.sharding.Mesh,
    rates: np.ndarray,
    start: int,
  ):
    """Opens the files; `rates` has the learning rate of each update."""
    self._config, self._rates = config, rates
    self._model, self._mesh = model, mesh
    self._items = _ITEMS[config.objective]
    if distributed.is_main():
      self.writer = trackers.Writer(config.trackers, workdir, start)
    else:
      self.writer = metrics.Silent(workdir, start)
      console.mute()
    what = f"{config.objective} {workdir.name}"
    self._bar = console.Bar(len(rates), what, "step", start)
    self.restart_clock()

  def restart_clock(self) -> None:
    """Leaves what happened since the last step out of the next step's rates."""
    self._clock = metrics.Throughput(self._items)

  def write(
    self, number: int, values: Any, batch: input_pipeline.StepBatch
  ) -> None:
    """Fetches, writes and checks the metrics of a step.

    Raises:
      guards.TrainingError: the first loss is wrong, or the update was skipped
        and the run is to stop.
    """
    config, counts = self._config, batch.counts
    row = {key: float(value) for key, value in jax.device_get(values).items()}
    applied, skipped = bool(row.pop("applied")), int(row.pop("skipped"))
    # The optimizer's schedule counts applied updates.
    earlier = number - skipped - applied
    rates = self._clock(counts.tokens, len(counts.ids))
    rates |= self._mfu(counts, rates["tokens_per_second"])
    about = {
      "learning_rate": float(self._rates[earlier]),
      "row_fill": counts.tokens / counts.slots,
      "data_wait_seconds": batch.waited_s,
    }
    if not applied:
      about["skipped_items"] = " ".join(counts.ids)
    self.writer.write({"step": number} | row | about | rates)
    if not applied:
      guards.skip_or_stop(config.guards, number, row, skipped, counts.ids)
    elif earlier == 0 and config.objective == "dpo":
      guards.check_first_loss(
        row["loss"],
        config.loss,
        config.model.dtype,
        precomputed=config.precompute_reference,
      )
    shown = {
      "loss": row["loss"],
      "tokens/s": rates["tokens_per_second"],
      f"{self._items}/s": rates[f"{self._items}_per_second"],
    }
    if "mfu" in rates:
      shown["MFU"] = rates["mfu"]
    self._bar.update(1, shown)

  def _mfu(
    self, counts: batch_lib.Counts, tokens_per_second: float
  ) -> dict[str, float]:
    """The step's MFU; {} on devices whose peak is unknown."""
    peak = hardware.chip(self._mesh.devices.flat[0].device_kind)
    if peak is None:
      return {}
    config = self._config
    work = flops.Work(counts.tokens, counts.completion_tokens, counts.visible)
    reference = config.objective == "dpo" and not config.precompute_reference
    useful = flops.step(self._model, work, reference=reference)
    seconds = counts.tokens / tokens_per_second
    return {"mfu": hardware.mfu(useful, seconds, self._mesh.size, peak)}

  def close(self) -> None:
    self._bar.close()
    self.writer.close()


def train(
  state: step.TrainState,
  train_step: Callable[[step.TrainState, Any], tuple[step.TrainState, Any]],
  eval_step: Callable[[step.Tree, Any], step.Metrics],
  pipeline: input_pipeline.InputPipeline,
  log: StepLog,
  sampler: eval_samples.Sampler,
  checkpoints: checkpoints_lib.Checkpoints,
  save: Callable[[step.TrainState, int, dict[str, float], bool], None],
  watch: preemption.Watch,
  *,
  eval_every: int,
  save_every: int,
) -> step.TrainState:
  """Trains from the state's step to the last one.

  `save` takes the state, its step, the metrics of an evaluation there or {},
  and whether to export, too.

  Raises:
    preemption.Interrupted: a signal came, and the state is saved.
    guards.TrainingError: see `StepLog.write`.
    checkpoints.SaveError: the last save failed.
  """
  start, last = int(jax.device_get(state.step)), pipeline.steps

  def due(number, every):
    return number == last or bool(every and number % every == 0)

  def evaluate(number):
    return _evaluate(number, state.params, eval_step, pipeline, log, watch)

  evaluated = {}
  # The evaluation before the first update, or one that was interrupted; the
  # first process has the file, and decides.
  found = any("eval_items" in row for row in log.writer.at(start))
  found = distributed.all_gather(found)[0]
  if not found and (start == 0 or due(start, eval_every)):
    evaluated = evaluate(start)
    if evaluated is None:
      raise watch.interrupted(f"in the evaluation at step {start}")
    if start:
      checkpoints.note(evaluated)
  sampler.catch_up(start, state.params, log.writer, watch)

  batches = pipeline.train_batches(start)
  batch, pending = next(batches, None), None
  log.restart_clock()
  for number in range(start + 1, last + 1):
    state, metrics = train_step(state, batch.batch)
    checkpoints.check()
    if pending:
      log.write(*pending)
    pending = number, metrics, batch
    # The next batch goes to the device while this step is computed.
    batch = next(batches, None)
    stop = watch.requested()
    evaluates, saves = due(number, eval_every), due(number, save_every)
    samples = sampler.due(number)
    at_once = number == 1 or _is_synchronous()
    if not (at_once or evaluates or saves or samples or stop):
      continue
    log.write(*pending)
    pending, evaluated = None, {}
    if evaluates and not stop:
      evaluated = evaluate(number)
      stop = evaluated is None
    if samples and not stop:
      stop = not sampler.write(number, state.params, log.writer, watch)
    if saves or stop:
      save(state, number, evaluated or {}, saves)
    if stop:
      raise watch.interrupted(f"after step {number}, which is saved")
    log.restart_clock()
  return state


def _is_synchronous() -> bool:
  """Whether a step is computed when its call returns: nothing to wait for."""
  dispatches = jax.config.read("jax_cpu_enable_async_dispatch")
  return jax.default_backend() == "cpu" and not dispatches


def _evaluate(
  number: int,
  params: step.Tree,
  eval_step: Callable[[step.Tree, Any], step.Metrics],
  pipeline: input_pipeline.InputPipeline,
  log: StepLog,
  watch: preemption.Watch,
) -> dict[str, float] | None:
  """Writes and returns means over all held-out items, as eval_* metrics.

  None if it was abandoned for a signal.
  """
  totals: dict[str, float] = {}
  pending: step.Metrics = {}
  for batch in pipeline.eval_batches():
    sums = eval_step(params, batch)
    # As with steps, the device has this batch before the last one is fetched.
    _add(totals, pending)
    pending = sums
    if watch.requested():
      return None
  _add(totals, pending)
  row = {f"eval_{key}": value for key, value in step.means(totals).items()}
  count = {"eval_items": len(pipeline.items.held_out.table)}
  log.writer.write({"step": number} | row | count)
  return row


def _add(totals: dict[str, float], sums: step.Metrics) -> None:
  """Fetches the sums of a batch and adds them to the totals."""
  for key, value in jax.device_get(sums).items():
    totals[key] = totals.get(key, 0.0) + float(value)
