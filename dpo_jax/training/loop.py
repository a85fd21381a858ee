"""The training loop: updates, evaluations, samples and saves in their order.

Metrics are fetched one step late, so that the device never waits for the host;
nothing else crosses between the two inside the loop.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpo_jax.core import console, distributed, hardware, preemption
from dpo_jax.io import metrics
from dpo_jax.model import flops
from dpo_jax.training import checkpoints as checkpoints_lib
from dpo_jax.training import eval_samples, guards, input_pipeline, step


class StepLog:
  """Rows of metrics.jsonl, and the progress bar.

  Args:
    writer: of the rows.
    rates: the learning rate of each update.
    start: updates of earlier starts.
    what: of the bar, such as "dpo run1".
    items: of a batch, "pairs" or "examples".
    settings: of updates that are skipped.
    check_first: checks the metrics of the first update.
    flops_of: model flops of an update.
    devices: that it runs on.
  """

  def __init__(
    self,
    writer: Any,
    rates: np.ndarray,
    start: int,
    what: str,
    items: str,
    settings: guards.GuardSettings,
    check_first: Callable[[dict[str, float]], None],
    flops_of: Callable[[flops.Work], float],
    devices: np.ndarray,
  ):
    self.writer, self._rates, self._items = writer, rates, items
    self._settings, self._check_first = settings, check_first
    self._flops_of, self._devices = flops_of, devices.flat
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
    counts = batch.counts
    row = {key: float(value) for key, value in jax.device_get(values).items()}
    applied, skipped = bool(row.pop("applied")), int(row.pop("skipped"))
    # The optimizer's schedule counts applied updates.
    earlier = number - skipped - applied
    speed = self._clock(counts.tokens, len(counts.ids))
    per_second = speed["tokens_per_second"]
    work = flops.Work(counts.tokens, counts.completion_tokens, counts.visible)
    mfu = hardware.mfu(
      self._flops_of(work),
      counts.tokens / per_second,
      len(self._devices),
      hardware.chip(self._devices[0].device_kind),
    )
    if mfu is not None:
      speed["mfu"] = mfu
    about = {
      "learning_rate": float(self._rates[earlier]),
      "row_fill": counts.tokens / counts.slots,
      "data_wait_seconds": batch.waited_s,
    }
    if not applied:
      about["skipped_items"] = " ".join(counts.ids)
    self.writer.write({"step": number} | row | about | speed)
    if not applied:
      guards.skip_or_stop(self._settings, number, row, skipped, counts.ids)
    elif earlier == 0:
      self._check_first(row)
    self._bar.update(1, {"loss": row["loss"], "tokens/s": per_second})

  def close(self) -> None:
    self._bar.close()
    self.writer.close()


def train(
  state: step.TrainState,
  train_step: Callable[[step.TrainState, Any], tuple[step.TrainState, Any]],
  eval_step: Callable[[step.Tree, Any], step.Metrics],
  objective: step.Objective,
  pipeline: input_pipeline.InputPipeline,
  log: StepLog,
  sampler: eval_samples.Sampler,
  checkpoints: checkpoints_lib.Checkpoints,
  save: Callable[[step.TrainState, int, bool], None],
  watch: preemption.Watch,
  *,
  eval_every: int,
  save_every: int,
) -> step.TrainState:
  """Trains from the state's step to the last one.

  `save` takes the state, its step, and whether to export, too.

  Raises:
    preemption.Interrupted: a signal came, and the state is saved.
    guards.TrainingError: see `StepLog.write`.
    checkpoints.SaveError: the last save failed.
  """
  start, last = int(jax.device_get(state.step)), pipeline.steps

  def due(number, every):
    return number == last or bool(every and number % every == 0)

  def evaluate(number):
    return _evaluate(
      number, state.params, eval_step, objective, pipeline, log, watch
    )

  # The evaluation before the first update, or one that was interrupted; the
  # first process has the file, and decides.
  found = any("eval_items" in row for row in log.writer.at(start))
  found = distributed.all_gather(found)[0]
  missing = not found and (start == 0 or due(start, eval_every))
  if missing and not evaluate(start):
    raise watch.interrupted(f"in the evaluation at step {start}")
  if sampler.rows:
    wanted = start == 0 or due(start, sampler.every)
    sampler.catch_up(start, wanted, state.params, watch)

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
    samples = bool(sampler.rows) and due(number, sampler.every)
    at_once = number == 1 or _is_synchronous()
    if not (at_once or evaluates or saves or samples or stop):
      continue
    log.write(*pending)
    pending = None
    if evaluates and not stop:
      stop = not evaluate(number)
    if samples and not stop:
      stop = not sampler.write(number, state.params, watch)
    if saves or stop:
      save(state, number, saves)
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
  objective: step.Objective,
  pipeline: input_pipeline.InputPipeline,
  log: StepLog,
  watch: preemption.Watch,
) -> bool:
  """Writes means over all held-out items, as eval_* metrics.

  False if it was abandoned for a signal.
  """
  totals: dict[str, float] = {}
  pending: step.Metrics = {}
  for batch in pipeline.eval_batches():
    sums = eval_step(params, batch)
    # As with steps, the device has this batch before the last one is fetched.
    _add(totals, pending)
    pending = sums
    if watch.requested():
      return False
  _add(totals, pending)
  means = objective.means(totals)
  row = {f"eval_{key}": value for key, value in means.items()}
  count = {"eval_items": len(pipeline.items.held_out.table)}
  log.writer.write({"step": number} | row | count)
  return True


def _add(totals: dict[str, float], sums: step.Metrics) -> None:
  """Fetches the sums of a batch and adds them to the totals."""
  for key, value in jax.device_get(sums).items():
    totals[key] = totals.get(key, 0.0) + float(value)
