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

from dpo_jax.core import console, distributed, preemption, settings
from dpo_jax.hub import push as push_lib
from dpo_jax.io import locks, rundir, upload
from dpo_jax.training import checkpoints as checkpoints_lib
from dpo_jax.training import (
  checks,
  eval_samples,
  loop,
  manifest,
  setup,
  trackers,
)
from dpo_jax.training import compile as compile_lib
from dpo_jax.training import config as config_lib


def run(
  config: config_lib.TrainSettings, workdir: pathlib.Path
) -> pathlib.Path:
  """Trains, or goes on training, in `workdir`.

  Returns:
    The directory of the exported model, adapters merged, in Hugging Face form.

  Raises:
    ValueError: settings or input are wrong; nothing was compiled.
    checks.TrainingError: the loss at step 0 is not what theory says, or a loss
      or gradient is not finite.
    checkpoint.SaveError: a checkpoint could not be written.
    preemption.Interrupted: a signal asked for it.
    hub.NotPushed: all is done, but not all of it is on the hub.
    upload.NotCopied: all is done, but not all of it is in the bucket.
  """
  # First, as a backend begins with threads.
  if config.keep_freed_memory:
    compile_lib.keep_freed_memory()
  compile_lib.keep(config.compilation_cache)
  with preemption.watching(config.grace_s) as watch:
    with distributed.raise_on_all("preparing the directory"):
      if distributed.is_main():
        rundir.prepare(workdir, "checkpoints")
    with distributed.on_main(locks.Lock(workdir / "lock")):
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
  config: config_lib.TrainSettings,
  workdir: pathlib.Path,
  watch: preemption.Watch,
) -> pathlib.Path:
  values = settings.to_dict(config)
  allowed = (*config.allow_changes, *config_lib.FREE)
  with distributed.raise_on_all("looking at the directory"):
    distributed.require_shared(workdir / "lock")
    rundir.refuse_foreign(workdir)
    rundir.check(workdir, values, allowed)
    if (push := config.push()) and distributed.is_main():
      push_lib.check(push)
  distributed.assert_equal("the config", json.dumps(values))
  trackers.check(config.trackers)
  with contextlib.ExitStack() as stack:
    publisher = copies = None
    if push:
      publisher = stack.enter_context(push_lib.Publisher(push, workdir))
    with distributed.raise_on_all("looking at the bucket"):
      if config.checkpoint_bucket and distributed.is_main():
        copies = stack.enter_context(
          upload.Uploader(config.checkpoint_bucket, workdir, config.retention())
        )
        copies.fetch(values, allowed)
    with distributed.raise_on_all("looking at the directory"):
      changed = rundir.check(workdir, values, allowed)
      finished = (workdir / "finished.json").exists()
      if finished and (late := rundir.beyond(changed, config_lib.FREE)):
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
      if publisher and distributed.is_main():
        publisher.finish()
    finally:
      if copies:
        copies.finish()
  return workdir / "export"


def _train(
  config: config_lib.TrainSettings,
  workdir: pathlib.Path,
  watch: preemption.Watch,
  changed: list[str],
  publisher: push_lib.Publisher | None,
  copies: upload.Uploader | None,
) -> None:
  checkpoints = checkpoints_lib.Checkpoints(
    workdir / "checkpoints", config.retention(), copies
  )
  made, state, inputs = setup.prepare(config, workdir, checkpoints)
  with distributed.raise_on_all("reading the prompts of samples"):
    sampler = eval_samples.make(config, made, workdir / eval_samples.FILE)
  if distributed.is_main():
    manifest.write(workdir, config, made, state, changed + inputs)
    # Not before: settings that were refused must not bind the directory.
    allowed = (*config.allow_changes, *config_lib.FREE)
    rundir.claim(workdir, settings.to_dict(config), allowed)
  loop.Loop(
    config, workdir, made, checkpoints, state, watch, publisher, sampler
  ).train()
