"""The training of SFT and DPO: one run, one directory, resumable.

Running the same command again goes on from the newest checkpoint; running it
with another config in the same directory is refused. The steps themselves are
`running.loop`'s.
"""

import contextlib
import errno
import json
import pathlib

import jax

from dpo_jax import checkpoint, hub, mirror, trackers
from dpo_jax.interface import console, settings
from dpo_jax.running import (
  assembly,
  checks,
  interruption,
  loop,
  manifest,
  processes,
  programs,
  recipe,
  samples,
)
from dpo_jax.storage import locks, rundir


def run(config: recipe.TrainSettings, workdir: pathlib.Path) -> pathlib.Path:
  """Trains, or goes on training, in `workdir`.

  Returns:
    The directory of the exported model, adapters merged, in Hugging Face form.

  Raises:
    ValueError: settings or input are wrong; nothing was compiled.
    checks.TrainingError: the loss at step 0 is not what theory says, or a loss
      or gradient is not finite.
    checkpoint.SaveError: a checkpoint could not be written.
    interruption.Interrupted: a signal asked for it.
    hub.NotPushed: all is done, but not all of it is on the hub.
    mirror.NotCopied: all is done, but not all of it is in the bucket.
    lease.Held: another process writes to the bucket; lease.Lost: now it does.
  """
  # First, as a backend begins with threads.
  if config.keep_freed_memory:
    programs.keep_freed_memory()
  programs.keep(config.compilation_cache)
  with interruption.Watch(config.grace_s) as watch:
    with processes.together("preparing the directory"):
      if processes.first():
        rundir.prepare(workdir, "checkpoints")
    with processes.owned(locks.Lock(workdir / "lock")):
      try:
        return _run(config, workdir, watch)
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
          raise checks.out_of_memory(config, error) from error
        raise
      except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
          raise checks.disk_full(workdir, error) from error
        raise


def _run(
  config: recipe.TrainSettings, workdir: pathlib.Path, watch: interruption.Watch
) -> pathlib.Path:
  values = settings.to_dict(config)
  allowed = (*config.allow_changes, *recipe.FREE)
  with processes.together("looking at the directory"):
    processes.shared(workdir / "lock")
    rundir.refuse_foreign(workdir)
    rundir.check(workdir, values, allowed)
    if (push := config.push()) and processes.first():
      hub.check(push)
  processes.agree("the config", json.dumps(values))
  trackers.check(config.trackers)
  with contextlib.ExitStack() as stack:
    publisher = copies = None
    if push:
      publisher = stack.enter_context(hub.Publisher(push, workdir))
    with processes.together("looking at the bucket"):
      if config.checkpoint_bucket and processes.first():
        copies = stack.enter_context(
          mirror.Mirror(config.checkpoint_bucket, workdir, config.retention())
        )
        copies.fetch(values, allowed)
    with processes.together("looking at the directory"):
      changed = rundir.check(workdir, values, allowed)
      finished = (workdir / "finished.json").exists()
      if finished and (late := rundir.beyond(changed, recipe.FREE)):
        raise ValueError(
          f"{workdir} is finished, and nothing would come of\n  "
          + "\n  ".join(late)
          + "\nuse another --workdir"
        )
    if finished:
      model = workdir / "export"
      console.say(
        f"{workdir.name} is finished: its model is in {model}",
        "finished",
        path=str(model),
      )
    else:
      _train(config, workdir, watch, changed, publisher, copies)
    try:
      if publisher and processes.first():
        publisher.finish()
    finally:
      if copies:
        copies.finish()
  return workdir / "export"


def _train(
  config: recipe.TrainSettings,
  workdir: pathlib.Path,
  watch: interruption.Watch,
  changed: list[str],
  publisher: hub.Publisher | None,
  copies: mirror.Mirror | None,
) -> None:
  checkpoints = checkpoint.Checkpoints(
    workdir / "checkpoints", config.retention(), copies
  )
  made, state, inputs = assembly.assemble(config, workdir, checkpoints)
  with processes.together("reading the prompts of samples"):
    sampler = samples.make(config, made, workdir / samples.FILE)
  if processes.first():
    manifest.write(workdir, config, made, state, changed + inputs)
    # Not before: settings that were refused must not bind the directory.
    allowed = (*config.allow_changes, *recipe.FREE)
    rundir.claim(workdir, settings.to_dict(config), allowed)
  loop.Loop(
    config, workdir, made, checkpoints, state, watch, publisher, sampler
  ).train()
