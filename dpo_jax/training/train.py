"""One run of SFT or DPO, in the order in which things happen.

The same command resumes from the newest checkpoint; another config in the same
directory is refused.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax

from dpo_jax.core import console, distributed, preemption, settings, sharding
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.hub import push as push_lib
from dpo_jax.io import atomic, locks, rundir, upload
from dpo_jax.model import hf, lora
from dpo_jax.training import checkpoints as checkpoints_lib
from dpo_jax.training import config as config_lib
from dpo_jax.training import (
  eval_samples,
  guards,
  input_pipeline,
  loop,
  manifest,
  optimizer,
  setup,
  step,
  trackers,
)
from dpo_jax.training import reference as reference_lib


def run(
  config: config_lib.TrainSettings,
  workdir: pathlib.Path,
  root: pathlib.Path | None = None,
) -> pathlib.Path:
  """Trains, or resumes, in `workdir`; returns the exported model's directory.

  Paths of the config below `root`, by default `workdir`, may be others at the
  next start if `root` was moved.

  Raises:
    ValueError: settings or input are wrong; nothing was compiled.
    errors.Stopped: for any other reason; what was saved is whole.
  """
  setup.keep_freed_memory()
  setup.use_compilation_cache()
  with preemption.watching(config.grace_s) as watch:
    with distributed.raise_on_all("preparing the directory"):
      if distributed.is_main():
        rundir.prepare(workdir, "checkpoints")
    with distributed.on_main(locks.Lock(workdir / "lock")):
      try:
        if distributed.is_main():
          atomic.clear(workdir)
        values = rundir.portable(settings.to_dict(config), root or workdir)
        return _run(config, values, workdir, watch)
      except (jax.errors.JaxRuntimeError, OSError) as error:
        if explained := guards.explained(error, workdir):
          raise explained from error
        raise


def _run(
  config: config_lib.TrainSettings,
  values: dict[str, Any],
  workdir: pathlib.Path,
  watch: preemption.Watch,
) -> pathlib.Path:
  """`run` in a locked directory: what it holds, the bucket, the hub."""
  export = workdir / "export"
  with distributed.raise_on_all("looking at the directory"):
    distributed.require_shared(workdir / "lock")
    rundir.refuse_foreign(workdir)
    rundir.check(workdir, values, config.changeable)
    trackers.check(config.trackers)
    if (push := config.push()) and distributed.is_main():
      push_lib.check(push)
  distributed.assert_equal("the config", json.dumps(values))
  with contextlib.ExitStack() as stack:
    uploader = None
    with distributed.raise_on_all("looking at the bucket"):
      if config.checkpoint_bucket and distributed.is_main():
        uploader = stack.enter_context(
          upload.Uploader(
            config.checkpoint_bucket, workdir, config.keep_checkpoints
          )
        )
        uploader.fetch(values, config.changeable)
    with distributed.raise_on_all("looking at the directory"):
      changed = rundir.check(workdir, values, config.changeable)
      finished = rundir.finished(workdir)
      if finished and (late := rundir.beyond(changed, config_lib.FREE)):
        raise ValueError(
          f"{workdir} is finished, so these would have no effect:\n  "
          + "\n  ".join(late)
          + "\nuse another --workdir"
        )
    if finished:
      text = f"{workdir.name} is finished: its model is in {export}"
      console.say(text, "finished", path=str(export))
    else:
      _train(config, values, workdir, watch, changed, uploader)
    try:
      if push and distributed.is_main():
        push_lib.push(push, workdir)
    finally:
      if uploader:
        uploader.finish()
  return export


def _train(
  config: config_lib.TrainSettings,
  values: dict[str, Any],
  workdir: pathlib.Path,
  watch: preemption.Watch,
  changed: list[str],
  uploader: upload.Uploader | None,
) -> None:
  """Mesh, tokenizer, data, model, reference, state, steps, loop, export."""
  checkpoints = checkpoints_lib.Checkpoints(
    workdir / "checkpoints", config.keep_checkpoints, uploader
  )
  found = checkpoints.inputs()
  with distributed.raise_on_all("reading the data"):
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    tokenizer = tokenizer_lib.load(config.tokenizer)
    position = found["position"] if found else None
    pipeline = input_pipeline.make(config, tokenizer, mesh, position)
  distributed.assert_equal("the data", json.dumps(pipeline.items.report))

  with distributed.raise_on_all("reading the model"):
    model, base = setup.load_model(config, tokenizer, mesh)
    adapters = setup.load_adapters(config.lora, model, base, mesh)
  base_hash, fingerprint = hf.content_hash(base), hf.fingerprint(base)
  weights_hash = setup.weights_hash(base_hash, adapters)
  param_dtype = config.model.param_dtype
  if param_dtype == "int8":
    base = setup.quantize(base, mesh)

  # With fresh adapters the reference is the base without them; in full
  # fine-tuning it is a second tree. Precomputed log-probs may replace either.
  reference = base if config.keeps_reference else None
  if config.precompute_reference:
    directory = pathlib.Path(config.reference_cache or workdir / "reference")
    pipeline = reference_lib.precompute(
      pipeline, directory, model, (base, adapters), weights_hash, param_dtype
    )

  trainable = step.trainable(model)
  tx = optimizer.make(config.optimizer, pipeline.steps, trainable)
  state = setup.make_state(
    model, base, adapters, tx, config.seed, mesh, donate=reference is None
  )
  del base
  objective = config.step_objective()
  train_step, eval_step = setup.jit_steps(
    model,
    objective,
    config.eval_batch_size,
    tx,
    config.seed,
    state,
    mesh,
  )

  inputs = functools.partial(
    checkpoints_lib.inputs, pipeline, tokenizer, weights_hash, config.seed
  )
  start = 0
  if found is not None:
    state = checkpoints.restore(state, trainable)
    start = int(jax.device_get(state.step))
    changed = changed + checkpoints_lib.changed_inputs(
      workdir, found, inputs(start), config.allow_changes
    )

  with distributed.raise_on_all("reading the prompts of samples"):
    sampler = eval_samples.make(config, model, tokenizer, mesh, workdir)
  rates = optimizer.rates(config.optimizer, pipeline.steps)
  if distributed.is_main():
    manifest.write(
      workdir, config, state, reference, pipeline, weights_hash, changed
    )
    # Not before: settings that were refused must not bind the directory.
    rundir.claim(workdir, values, config.changeable)

  log = setup.step_log(config, workdir, model, mesh, rates, start)

  def save(state, number, export):
    params, name = state.params, f"step-{number:06d}"
    with jax.transfer_guard("allow"):
      if export and config.export_adapters:
        path = workdir / "adapters" / name
        source = config.model.path
        hf.export_adapter(path, model, params["lora"], source, fingerprint)
      # A checkpoint must not outlive the rows of its steps.
      log.writer.sync()
      checkpoints.save(state, trainable, inputs(number))

  try:
    with (
      watch.deferred(),
      contextlib.closing(checkpoints),
      contextlib.closing(log),
      jax.set_mesh(mesh),
      jax.transfer_guard("disallow"),
    ):
      # Ahead of the loop, in which no step waits for a compiler.
      if start < pipeline.steps:
        shapes, eval_shapes = pipeline.shapes()
        arguments = (state.params, reference)
        eval_step = setup.compile_ahead(eval_step, arguments, eval_shapes)
        train_step = setup.compile_ahead(train_step, (state, reference), shapes)
      state = loop.train(
        state,
        lambda state, batch: train_step(state, reference, batch),
        lambda params, batch: eval_step(params, reference, batch),
        objective,
        pipeline,
        log,
        sampler,
        checkpoints,
        save,
        watch,
        eval_every=config.eval_every,
        save_every=config.checkpoint_every,
      )
  except preemption.Interrupted:
    # All stop at the same step: none leaves while another still writes.
    distributed.barrier("interrupted")
    raise

  base = state.params["base"]
  if param_dtype == "int8":
    # Adapters are merged into the weights before quantization.
    base = setup.reload_base(config.model, mesh, base_hash)
  if model.lora is not None:
    base = lora.merge(model, base, state.params["lora"])
  hf.export(workdir / "export", model, base, tokenizer)
  if distributed.is_main():
    rundir.finish(workdir, pipeline.steps)
  distributed.barrier("finished")
