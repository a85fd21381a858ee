"""The training loop of SFT and DPO: one run, one directory, resumable.

Running the same command again goes on from the newest checkpoint; running it
with another config in the same directory is refused. Metrics are read from the
device one step late, so that the device never waits for the host, and nothing
else crosses between the two inside the loop.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dpo_jax import (
  checkpoint,
  errors,
  feed,
  hf,
  lora,
  losses,
  metrics,
  model,
  optim,
  partitioning,
  recipe,
  records,
  rundir,
  settings,
  steps,
)
from dpo_jax import tokenizer as tokenizer_lib

# How far the loss of an untrained policy may be from its known value. On CPU
# both are exact; an accelerator may choose other bfloat16 kernels for the
# reference than for the policy.
START_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


# By how many nats the mean h may be off where the reference's log-probs were
# computed in other batches, whose shapes round otherwise.
KEPT_ROUNDING = {"float32": 1e-4, "bfloat16": 0.1}


class TrainingError(errors.Stopped):
  """The run had to stop; what it had saved before is whole."""


def run(config: recipe.TrainSettings, workdir: pathlib.Path) -> pathlib.Path:
  """Trains, or goes on training, in `workdir`.

  Returns:
    The directory of the exported model, adapters merged, in Hugging Face form.

  Raises:
    ValueError: settings or input are wrong; nothing was compiled.
    TrainingError: the loss at step 0 is not what theory says, or a loss or
      gradient is not finite.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with records.Lock(workdir / "lock"):
    values = settings.to_dict(config)
    rundir.check(workdir, values)
    export = workdir / "export"
    if (workdir / "finished.json").exists():
      return export
    prepared = _Run(config, workdir)
    # Not before: settings that were refused must not bind the directory.
    rundir.claim(workdir, values)
    prepared.train()
    return export


class _Run:
  """What lives through one run: data, compiled steps, state, files."""

  def __init__(self, config: recipe.TrainSettings, workdir: pathlib.Path):
    self.config, self.workdir = config, workdir
    self.mesh = partitioning.make_mesh(**dataclasses.asdict(config.mesh))
    self.tokenizer = tokenizer_lib.load(config.tokenizer)
    self.feed = feed.make(config, self.tokenizer, self.mesh)
    self.steps = self.feed.steps
    self._load_model()
    self.objective = steps.Objective(
      config.objective,
      config.loss if config.objective == "dpo" else None,
      config.batch_size // config.microbatches,
    )
    self.checkpoints = checkpoint.Checkpoints(
      workdir / "checkpoints", config.keep_checkpoints
    )
    self._make_state()
    self._write_manifest()

  def _load_model(self) -> None:
    config = self.config
    self.model, self.base = hf.load(
      config.model.path,
      dtype=config.model.dtype,
      remat=config.model.remat,
      lora=config.lora.config(),
      param_dtype=config.model.param_dtype,
      mesh=self.mesh,
    )
    if self.tokenizer.vocab_size > self.model.vocab_size:
      raise ValueError(
        f"tokenizer {config.tokenizer} has {self.tokenizer.vocab_size} tokens,"
        f" but model {config.model.path} only {self.model.vocab_size}"
      )
    if config.data.max_length > self.model.max_positions:
      raise ValueError(
        f"data.max_length={config.data.max_length} is more than the"
        f" {self.model.max_positions} positions of {config.model.path}"
      )
    self.name = steps.trainable(self.model)
    self.fingerprint = hf.content_hash(self.base)

  def _make_state(self) -> None:
    """The state on the mesh, restored if there is a checkpoint."""
    config = self.config
    self.tx = optim.make(config.optimizer, self.steps, self.name)
    rates = optim.schedule(config.optimizer, self.steps)
    self.rates = np.asarray(jax.vmap(rates)(jnp.arange(self.steps)))

    def make(base, key):
      adapters = model.init_lora(self.model, key) if self.model.lora else {}
      return steps.init_state(base, adapters, self.tx)

    # Another stream than the one of dropout, which folds steps into the seed.
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
    shapes = jax.eval_shape(make, self.base, key)
    lying = partitioning.shardings(shapes, self.mesh)
    # First, and the base given away after it: there are never two of them
    # unless one is the reference.
    self._prepare_reference()
    given = () if self.reference is not None else (0,)
    make = jax.jit(make, out_shardings=lying, donate_argnums=given)
    self.state = make(self.base, key)
    del self.base
    if self.checkpoints.latest() is not None:
      self.state, meta = self.checkpoints.restore(self.state, self.name)
      self._check_meta(meta)
    self.start = int(jax.device_get(self.state.step))
    here = partitioning.replicated(self.mesh)
    self.train_step = jax.jit(
      steps.make_train_step(self.model, self.objective, self.tx, config.seed),
      donate_argnums=0,
      out_shardings=(lying, here),
      compiler_options=steps.COMPILER_OPTIONS,
    )
    evaluated = dataclasses.replace(
      self.objective, items=config.eval_batch_size
    )
    self.eval_step = jax.jit(
      steps.make_eval_step(self.model, evaluated),
      out_shardings=here,
      compiler_options=steps.COMPILER_OPTIONS,
    )

  def _prepare_reference(self) -> None:
    """The reference's weights, or its log-probs where they are asked for."""
    self.reference = None
    if self.config.precompute_reference:
      self.feed = feed.with_reference(
        self.feed,
        self.config,
        self.model,
        self.base,
        self.fingerprint,
        self.workdir,
      )
    elif self.name == "base" and self.config.objective == "dpo":
      # Full fine-tuning moves the base: the reference is a second tree.
      self.reference = self.base

  def _meta(self, step: int) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that reads it."""
    return {
      "train_data": self.feed.items.report["train"]["tokens"],
      "held_out_data": self.feed.items.report["held_out"]["tokens"],
      "model": self.fingerprint,
      "position": self.feed.schedule.state(step),
    }

  def _check_meta(self, meta: dict[str, Any]) -> None:
    for key, value in self._meta(meta["step"]).items():
      if meta.get(key) != value:
        raise ValueError(
          f"{self.workdir}: the checkpoint was made with {key}={meta.get(key)},"
          f" but it is now {value}; restore the files, or use another workdir"
        )

  def train(self) -> None:
    config = self.config
    self.writer = metrics.Writer(self.workdir, self.start)
    self.clock = metrics.Throughput()
    self.bar = tqdm.tqdm(
      total=self.steps,
      initial=self.start,
      desc=f"{config.objective} {self.workdir.name}",
      unit="step",
    )
    try:
      with jax.set_mesh(self.mesh), jax.transfer_guard("disallow"):
        self._loop()
      self._export()
    finally:
      self.bar.close()
      self.writer.close()
      self.checkpoints.close()
    records.write_atomic(
      self.workdir / "finished.json", json.dumps({"step": self.steps}) + "\n"
    )

  def _loop(self) -> None:
    config = self.config
    if self.start == 0:
      self._evaluate(0)
    fed = self.feed.training(self.start)
    now = next(fed, None)
    waiting = None
    for done in range(self.start + 1, self.steps + 1):
      self.state, values = self.train_step(
        self.state, self.reference, now.batch
      )
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
      "learning_rate": float(self.rates[done - 1]),
      "row_fill": counts.tokens / counts.slots,
      "data_wait_seconds": fed.waited_s,
    }
    bad = [k for k in ("loss", "grad_norm") if not math.isfinite(row[k])]
    self.writer.write({"step": done} | row | rate | rates)
    if bad:
      raise TrainingError(
        f"step {done}: {bad[0]} is {row[bad[0]]}; the update was not made. Its"
        f" items: {', '.join(counts.ids)}"
      )
    if done == 1 and self.config.objective == "dpo":
      self._check_start(row["loss"])
    self.bar.update()
    self.bar.set_postfix(
      loss=f"{row['loss']:.4f}",
      tokens_s=f"{rates['tokens_per_second']:.0f}",
      refresh=False,
    )

  def _check_start(self, loss: float) -> None:
    """An untrained policy equals its reference, so its loss is known."""
    wanted = losses.loss_at_start(self.config.loss)
    dtype = self.config.model.dtype
    tolerance = START_TOLERANCE[dtype] * max(wanted, 1)
    if self.config.precompute_reference:
      slope = losses.slope_at_start(self.config.loss)
      tolerance += slope * KEPT_ROUNDING[dtype]
    if abs(loss - wanted) > tolerance:
      raise TrainingError(
        f"the loss of step 0 is {loss:.8f}, not {wanted:.8f}: policy and"
        " reference differ before training, so their rewards mean nothing"
      )

  def _evaluate(self, done: int) -> None:
    """Means over all held-out items, written as eval_* metrics."""
    totals: dict[str, float] = {}
    for batch in self.feed.evaluation():
      sums = self.eval_step(self.state.params, self.reference, batch)
      for key, value in jax.device_get(sums).items():
        totals[key] = totals.get(key, 0.0) + float(value)
    weight = totals.pop("weight")
    row = {f"eval_{key}": value / weight for key, value in totals.items()}
    count = {"eval_items": len(self.feed.items.held_out.table)}
    self.writer.write({"step": done} | row | count)
    self.clock = metrics.Throughput()

  def _save(self, done: int) -> None:
    with jax.transfer_guard("allow"):
      self._write_checkpoint(done)

  def _write_checkpoint(self, done: int) -> None:
    if self.config.export_adapters:
      hf.export_adapter(
        self.workdir / "adapters" / f"step-{done:06d}",
        self.model,
        self.state.params["lora"],
        self.config.model.path,
        self.state.params["base"],
      )
    self.checkpoints.save(self.state, self.name, self._meta(done))

  def _export(self) -> None:
    """Writes the final model, adapters merged, as a Hugging Face directory."""
    params = self.state.params
    base = params["base"]
    if self.model.lora is not None:
      base = lora.merge(self.model, base, params["lora"])
    hf.export(self.workdir / "export", self.model, base, self.tokenizer)

  def _write_manifest(self) -> None:
    counts = {
      key: lora.count(self.state.params[key]) for key in ("base", "lora")
    }
    manifest = {
      "objective": self.config.objective,
      "steps": self.steps,
      "devices": [str(device) for device in self.mesh.devices.flat],
      "mesh": dict(self.mesh.shape),
      "parameters": counts | {"trained": counts[self.name]},
      "versions": {"jax": jax.__version__},
      "data": self.feed.items.report | {"packing": self.feed.report()},
    }
    records.write_atomic(
      self.workdir / "manifest.json", json.dumps(manifest, indent=2) + "\n"
    )
    print(
      f"{self.workdir.name}: {counts[self.name]:,} of {sum(counts.values()):,}"
      f" parameters train on {self.mesh.size} {jax.default_backend()}"
      f" device(s), mesh {dict(self.mesh.shape)}, {self.steps} steps of"
      f" {self.config.batch_size}"
    )
