"""The steps of one run, and all that happens between them.

Metrics are read from the device one step late, so that the device never waits
for the host, and nothing else crosses between the two inside the loop.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from dpo_jax.core import (
  console,
  distributed,
  hardware,
  preemption,
  settings,
  versions,
)
from dpo_jax.data import batch as batch_lib
from dpo_jax.hub import push as push_lib
from dpo_jax.io import atomic, metrics
from dpo_jax.model import flops, hf, lora
from dpo_jax.training import checkpoints as checkpoints_lib
from dpo_jax.training import (
  checks,
  eval_samples,
  guards,
  input_pipeline,
  setup,
  step,
  trackers,
)
from dpo_jax.training import compile as compile_lib
from dpo_jax.training import config as config_lib

# What a batch is made of.
_ITEMS = {"sft": "examples", "dpo": "pairs"}


class Loop:
  """What lives through one run: the state, and the files it is written to."""

  def __init__(
    self,
    config: config_lib.TrainSettings,
    workdir: pathlib.Path,
    made: setup.Run,
    checkpoints: checkpoints_lib.Checkpoints,
    state: step.TrainState,
    watch: preemption.Watch,
    publisher: push_lib.Publisher | None,
    sampler: eval_samples.Sampler,
  ):
    self.watch, self.publisher, self.sampler = watch, publisher, sampler
    self.items = _ITEMS[config.objective]
    self.config, self.workdir = config, workdir
    self.made, self.checkpoints, self.state = made, checkpoints, state
    self.steps = made.feed.steps
    self.start = int(jax.device_get(state.step))
    self.at_call = compile_lib.computed_at_call()
    # The last evaluation, by its step.
    self.evaluated: dict[int, dict[str, float]] = {}

  def train(self) -> None:
    config = self.config
    if distributed.is_main():
      self.writer = trackers.Writer(config.trackers, self.workdir, self.start)
      self.incidents = guards.SkippedUpdateLog(self.workdir, self.start)
    else:
      self.writer = metrics.Silent(self.workdir, self.start)
      console.mute()
    what = f"{config.objective} {self.workdir.name}"
    self.bar = console.Bar(self.steps, what, "step", self.start)
    try:
      self._guarded()
    except preemption.Interrupted:
      # All stop at the same step: none leaves while another still writes.
      distributed.barrier("interrupted")
      raise
    self._export()
    if distributed.is_main():
      atomic.write_text(
        self.workdir / "finished.json", json.dumps({"step": self.steps}) + "\n"
      )
    distributed.barrier("finished")

  def _guarded(self) -> None:
    """The loop, with its files closed after it however it ends."""
    with self.watch.deferred():
      try:
        with jax.set_mesh(self.made.mesh), jax.transfer_guard("disallow"):
          if self.start < self.steps:
            self._compile()
          self._loop()
      finally:
        self.bar.close()
        self.writer.close()
        self.checkpoints.close()

  def _compile(self) -> None:
    """All that the loop runs, so that no step waits for a compiler."""
    made, params = self.made, self.state.params
    train, held_out = made.feed.shapes()
    self.made = dataclasses.replace(
      made,
      train_step=compile_lib.ahead(
        made.train_step, (self.state, made.reference), train
      ),
      eval_step=compile_lib.ahead(
        made.eval_step, (params, made.reference), held_out
      ),
    )

  def _loop(self) -> None:
    self._catch_up()
    self.sampler.catch_up(
      self.start, self.state.params, self.writer, self.watch
    )
    fed = self.made.feed.training(self.start)
    now = next(fed, None)
    self.clock = metrics.Throughput(self.items)
    waiting = None
    for done in range(self.start + 1, self.steps + 1):
      self.state, values = self.made.train_step(
        self.state, self.made.reference, now.batch
      )
      self.checkpoints.check()
      if waiting:
        self._record(*waiting)
      waiting = (done, values, now)
      # The next batch goes to the device while this step is computed.
      now = next(fed, None)
      stop = self.watch.requested()
      evaluate = self._due(done, self.config.eval_every)
      sample = self.sampler.due(done)
      save = self._due(done, self.config.checkpoint_every)
      # Where it is computed there is nothing to wait for.
      at_once = self.at_call or done == 1
      if evaluate or sample or save or stop or at_once:
        self._record(*waiting)
        waiting = None
      if evaluate and not stop:
        stop = not self._evaluate(done)
      if sample and not stop:
        stop = not self.sampler.write(
          done, self.state.params, self.writer, self.watch
        )
        self.clock = metrics.Throughput(self.items)
      if save or stop:
        self._save(done, export=save)
      if stop:
        raise self.watch.interrupted(f"after step {done}, which is saved")

  def _due(self, done: int, every: int) -> bool:
    return done == self.steps or bool(every and done % every == 0)

  def _catch_up(self) -> None:
    """The evaluation before the first step, or one that was interrupted."""
    start = self.start
    if start and not self._due(start, self.config.eval_every):
      return
    there = any("eval_items" in row for row in self.writer.at(start))
    # The first process has the file, and decides.
    if distributed.all_gather(there)[0]:
      return
    if not self._evaluate(start):
      raise self.watch.interrupted(f"in the evaluation at step {start}")
    if start:
      self.checkpoints.note(self.evaluated[start])

  def _record(self, done: int, values: Any, fed: input_pipeline.Fed) -> None:
    """Checks and writes one step's metrics."""
    counts = fed.counts
    row = {key: float(value) for key, value in jax.device_get(values).items()}
    told = guards.told(row)
    made = bool(told["made"])
    # The updates that were made before this step: the optimizer counts those.
    before = done - int(told["skipped"]) - made
    rates = self.clock(counts.tokens, len(counts.ids))
    rate = {
      "learning_rate": float(self.made.rates[before]),
      "row_fill": counts.tokens / counts.slots,
      "data_wait_seconds": fed.waited_s,
    }
    rates |= self._utilisation(counts, rates)
    self.writer.write({"step": done} | row | rate | rates)
    if not made:
      found = checks.incident(done, row, int(told["skipped"]), counts.ids)
      if distributed.is_main():
        self.incidents.write(found)
      checks.stop(self.config.guards, found)
    elif before == 0:
      checks.start(self.config, row["loss"])
    shown = {
      "loss": row["loss"],
      "tokens/s": rates["tokens_per_second"],
      f"{self.items}/s": rates[f"{self.items}_per_second"],
    }
    if "mfu" in rates:
      shown["MFU"] = rates["mfu"]
    self.bar.update(1, shown)

  def _utilisation(
    self, counts: batch_lib.Counts, rates: dict[str, float]
  ) -> dict[str, float]:
    """The step's MFU; {} on devices whose peak is not known."""
    made, config = self.made, self.config
    peak = hardware.chip(made.mesh.devices.flat[0].device_kind)
    if peak is None:
      return {}
    asks = config.objective == "dpo" and not config.precompute_reference
    work = flops.Work(counts.tokens, counts.completion_tokens, counts.visible)
    useful = flops.step(made.model, work, reference=asks)
    seconds = counts.tokens / rates["tokens_per_second"]
    return {"mfu": hardware.mfu(useful, seconds, made.mesh.size, peak)}

  def _evaluate(self, done: int) -> bool:
    """Means over all held-out items, written as eval_* metrics.

    False if it was abandoned because the run is to stop.
    """
    made = self.made
    totals: dict[str, float] = {}
    waiting: dict[str, Any] = {}
    for batch in made.feed.evaluation():
      sums = made.eval_step(self.state.params, made.reference, batch)
      # As with steps, the device has the next batch before this is asked for.
      _add(totals, waiting)
      waiting = sums
      if self.watch.requested():
        return False
    _add(totals, waiting)
    row = {f"eval_{key}": value for key, value in step.means(totals).items()}
    count = {"eval_items": len(made.feed.items.held_out.table)}
    self.writer.write({"step": done} | row | count)
    self.evaluated = {done: row}
    self.clock = metrics.Throughput(self.items)
    return True

  def _save(self, done: int, *, export: bool) -> None:
    with jax.transfer_guard("allow"):
      if export:
        self._export_step(f"step-{done:06d}")
      self._write_checkpoint(done)
    if export and self.publisher and distributed.is_main():
      self.publisher.checkpoint()
    self.clock = metrics.Throughput(self.items)

  def _export_step(self, name: str) -> None:
    """Adapters, to sample from or to push; or all weights, only to push."""
    config, made, params = self.config, self.made, self.state.params
    push = self.publisher is not None and self.publisher.settings.checkpoints
    if config.export_adapters or (push and config.lora.rank):
      hf.export_adapter(
        self.workdir / "adapters" / name,
        made.model,
        params["lora"],
        config.model.path,
        made.adapted,
      )
    # The first process sees which of them are still there, and decides.
    elif push and distributed.all_gather(self.publisher.room())[0]:
      directory = self.workdir / "models" / name
      hf.export(directory, made.model, params["base"], made.tokenizer)
    elif push:
      console.say(
        f"{name} is not kept for the hub: earlier ones still wait", "push"
      )

  def _write_checkpoint(self, done: int) -> None:
    config, made = self.config, self.made
    # A checkpoint must not outlive the rows of its steps.
    self.writer.sync()
    self.checkpoints.save(
      self.state,
      made.name,
      {
        "made_of": made.made_of(config.seed)
        | {"position": made.feed.schedule.state(done)},
        "base": {"source": config.model.path, "hash": made.fingerprint},
        "config": settings.to_dict(config),
        "versions": versions.versions(),
      },
      self.evaluated.get(done, {}),
    )

  def _export(self) -> None:
    """Writes the final model, adapters merged, as a Hugging Face directory."""
    model, params = self.made.model, self.state.params
    base = params["base"]
    if self.config.model.param_dtype == "int8":
      # The adapters go into the weights as they were read.
      base = setup.weights_as_read(self.config, self.made)
    if model.lora is not None:
      base = lora.merge(model, base, params["lora"])
    hf.export(self.workdir / "export", model, base, self.made.tokenizer)


def _add(totals: dict[str, float], sums: dict[str, Any]) -> None:
  """Fetches sums of one batch and adds them."""
  for key, value in jax.device_get(sums).items():
    totals[key] = totals.get(key, 0.0) + float(value)
