"""The training loop of SFT and DPO: one run, one directory, resumable.

Running the same command again goes on from the newest checkpoint; running it
with another config in the same directory is refused. Metrics are read from the
device one step late, so that the device never waits for the host, and nothing
else crosses between the two inside the loop.
"""

import json
import pathlib
from typing import Any

import jax
import tqdm

from dpo_jax import (
  assembly,
  checkpoint,
  checks,
  feed,
  hf,
  lora,
  metrics,
  processes,
  provenance,
  recipe,
  records,
  rundir,
  settings,
  steps,
)


def run(config: recipe.TrainSettings, workdir: pathlib.Path) -> pathlib.Path:
  """Trains, or goes on training, in `workdir`.

  Returns:
    The directory of the exported model, adapters merged, in Hugging Face form.

  Raises:
    ValueError: settings or input are wrong; nothing was compiled.
    checks.TrainingError: the loss at step 0 is not what theory says, or a loss
      or gradient is not finite.
    checkpoint.SaveError: a checkpoint could not be written.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with processes.owned(records.Lock(workdir / "lock")):
    values = settings.to_dict(config)
    with processes.together("looking at the directory"):
      processes.shared(workdir / "lock")
      rundir.check(workdir, values)
    processes.agree("the config", json.dumps(values))
    export = workdir / "export"
    if (workdir / "finished.json").exists():
      return export
    checkpoints = checkpoint.Checkpoints(
      workdir / "checkpoints", config.retention()
    )
    made, state = assembly.assemble(config, workdir, checkpoints)
    if processes.first():
      assembly.write_manifest(workdir, config, made, state)
      # Not before: settings that were refused must not bind the directory.
      rundir.claim(workdir, values)
    _Loop(config, workdir, made, checkpoints, state).train()
    return export


class _Loop:
  """What lives through one run: the state, and the files it is written to."""

  def __init__(
    self,
    config: recipe.TrainSettings,
    workdir: pathlib.Path,
    made: assembly.Assembled,
    checkpoints: checkpoint.Checkpoints,
    state: steps.TrainState,
  ):
    self.config, self.workdir = config, workdir
    self.made, self.checkpoints, self.state = made, checkpoints, state
    self.steps = made.feed.steps
    self.start = int(jax.device_get(state.step))
    # The last evaluation, by its step.
    self.evaluated: dict[int, dict[str, float]] = {}

  def train(self) -> None:
    config = self.config
    make = metrics.Writer if processes.first() else metrics.Silent
    self.writer = make(self.workdir, self.start)
    self.clock = metrics.Throughput()
    self.bar = tqdm.tqdm(
      total=self.steps,
      initial=self.start,
      desc=f"{config.objective} {self.workdir.name}",
      unit="step",
      disable=not processes.first(),
    )
    try:
      with jax.set_mesh(self.made.mesh), jax.transfer_guard("disallow"):
        self._loop()
      self._export()
    finally:
      self.bar.close()
      self.writer.close()
      self.checkpoints.close()
    if processes.first():
      records.write_atomic(
        self.workdir / "finished.json", json.dumps({"step": self.steps}) + "\n"
      )
    processes.wait("finished")

  def _loop(self) -> None:
    config = self.config
    if self.start == 0:
      self._evaluate(0)
    fed = self.made.feed.training(self.start)
    now = next(fed, None)
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
      last = done == self.steps
      evaluate = last or (config.eval_every and done % config.eval_every == 0)
      save = last or (
        config.checkpoint_every and done % config.checkpoint_every == 0
      )
      if evaluate or save or done == 1:
        self._record(*waiting)
        waiting = None
      if evaluate:
        self._evaluate(done)
      if save:
        self._save(done)

  def _record(self, done: int, values: Any, fed: feed.Fed) -> None:
    """Checks and writes one step's metrics."""
    counts = fed.counts
    row = {key: float(value) for key, value in jax.device_get(values).items()}
    rates = self.clock(counts.tokens, len(counts.ids))
    rate = {
      "learning_rate": float(self.made.rates[done - 1]),
      "row_fill": counts.tokens / counts.slots,
      "data_wait_seconds": fed.waited_s,
    }
    self.writer.write({"step": done} | row | rate | rates)
    checks.finite(done, row, counts.ids)
    if done == 1:
      checks.start(self.config, row["loss"])
    self.bar.update()
    self.bar.set_postfix(
      loss=f"{row['loss']:.4f}",
      tokens_s=f"{rates['tokens_per_second']:.0f}",
      refresh=False,
    )

  def _evaluate(self, done: int) -> None:
    """Means over all held-out items, written as eval_* metrics."""
    made = self.made
    totals: dict[str, float] = {}
    for batch in made.feed.evaluation():
      sums = made.eval_step(self.state.params, made.reference, batch)
      for key, value in jax.device_get(sums).items():
        totals[key] = totals.get(key, 0.0) + float(value)
    weight = totals.pop("weight")
    row = {f"eval_{key}": value / weight for key, value in totals.items()}
    count = {"eval_items": len(made.feed.items.held_out.table)}
    self.writer.write({"step": done} | row | count)
    self.evaluated = {done: row}
    self.clock = metrics.Throughput()

  def _save(self, done: int) -> None:
    with jax.transfer_guard("allow"):
      self._write_checkpoint(done)

  def _write_checkpoint(self, done: int) -> None:
    if self.config.export_adapters:
      hf.export_adapter(
        self.workdir / "adapters" / f"step-{done:06d}",
        self.made.model,
        self.state.params["lora"],
        self.config.model.path,
        self.state.params["base"],
      )
    config, made = self.config, self.made
    self.checkpoints.save(
      self.state,
      made.name,
      made.feed.schedule.state(done),
      {
        "made_of": made.made_of(config.seed),
        "base": {"source": config.model.path, "hash": made.fingerprint},
        "config": settings.to_dict(config),
        "versions": provenance.versions(),
      },
      self.evaluated.get(done, {}),
    )

  def _export(self) -> None:
    """Writes the final model, adapters merged, as a Hugging Face directory."""
    model, params = self.made.model, self.state.params
    base = params["base"]
    if model.lora is not None:
      base = lora.merge(model, base, params["lora"])
    hf.export(self.workdir / "export", model, base, self.made.tokenizer)
