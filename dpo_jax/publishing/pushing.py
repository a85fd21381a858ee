"""Pushing a run's models while it trains: a process of its own at a time."""

import os
import pathlib
import subprocess
import sys

from dpo_jax.interface import console, errors
from dpo_jax.publishing import revisions
from dpo_jax.storage import remote

# Checkpoints of all weights that may wait to be pushed: each takes as much disk
# as the model.
_WAITING = 2


class NotPushed(errors.Stopped):
  """Training is done and its files are whole, but some are not on the hub."""


def check(settings: revisions.PushSettings) -> None:
  """ValueError if nothing could be pushed for want of a token."""
  import huggingface_hub

  if not settings.dry_run and not huggingface_hub.get_token():
    raise ValueError(
      f"push_to_hub={settings.repo!r} needs a token that may write: put it into"
      " HF_TOKEN, or run `hf auth login`; push_dry_run=True needs none"
    )


class Publisher:
  """Pushes a run's models beside its training; a context manager.

  Each push is a process of its own: whatever happens to it, training goes on,
  and leaving the context ends it at once. Only the first process of a run may
  push; the others ask `room` alone.
  """

  def __init__(self, settings: revisions.PushSettings, directory: pathlib.Path):
    self.settings, self.directory = settings, directory
    self._child: subprocess.Popen | None = None

  def __enter__(self) -> "Publisher":
    return self

  def __exit__(self, *exc_info) -> None:
    if self._child is not None and self._child.poll() is None:
      self._child.kill()
      self._child.wait()

  def room(self) -> bool:
    """Whether one more checkpoint of all weights may wait on the disk."""
    waiting = remote.steps(str(self.directory / "models"))
    return self.settings.checkpoints and len(waiting) < _WAITING

  def checkpoint(self) -> None:
    """There is something new to push; returns at once.

    While an earlier push goes on, this one is left to the next call.
    """
    busy = self._child is not None and self._child.poll() is None
    if self.settings.checkpoints and not self.settings.dry_run and not busy:
      self._start(tries=1)

  def finish(self) -> None:
    """Pushes what is missing, and what failed once more.

    Raises:
      NotPushed: something could not be pushed, twice.
    """
    if self._child is not None:
      self._child.wait()
    if self._start(tries=2).wait():
      raise NotPushed(
        f"the run is finished, but not all of it is on the hub as"
        f" {self.settings.repo}; the same command, or python -m dpo_jax.hub"
        f" {self.directory} --repo={self.settings.repo}, pushes what is missing"
      )

  def _start(self, tries: int) -> subprocess.Popen:
    settings = self.settings
    flags = [f"--repo={settings.repo}", f"--licence={settings.licence}"]
    for name in ("public", "dry_run"):
      if getattr(settings, name):
        flags.append(f"--{name}")
    if not settings.checkpoints:
      flags.append("--no_checkpoints")
    log = console.mode() if console.mode() != "bar" else "plain"
    flags += [f"--tries={tries}", f"--log={log}"]
    root = str(pathlib.Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    self._child = subprocess.Popen(
      [sys.executable, "-m", "dpo_jax.hub", str(self.directory), *flags],
      stdin=subprocess.DEVNULL,
      env=os.environ | {"PYTHONPATH": path},
    )
    return self._child
