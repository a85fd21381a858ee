"""A run's checkpoints: trained weights, optimizer state and position.

The frozen base is not saved: its hash is among the inputs. The
arrays are one flat dict by path, so that a checkpoint does not depend on the
classes of the optimizer that wrote it.

Orbax writes in the background and makes a step visible once it is whole; a
thread then hashes its files, writes its manifest, and only after that deletes
the steps that are not kept. Not by Orbax's CheckpointManager: it
deletes in place, so that a kill leaves half a step under its name, and reports
a past step to jax's preemption service from a thread.
"""

import concurrent.futures
import dataclasses
import logging
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpo_jax.core import distributed, errors, settings, sharding
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.io import step_files, upload
from dpo_jax.training import input_pipeline
from dpo_jax.training import step as step_lib

_log = logging.getLogger(__name__)


class SaveError(errors.Stopped):
  """A checkpoint could not be written; the one before it is whole."""


class Checkpoints:
  """The checkpoints of one run's directory, which the caller has locked."""

  def __init__(
    self,
    directory: pathlib.Path,
    keep: int,
    uploader: upload.Uploader | None = None,
  ):
    """Opens or makes `directory` and finds its newest whole step.

    Later steps are moved aside with a warning.

    Args:
      directory: of the checkpoints.
      keep: the number of newest steps that are kept; 0 for all.
      uploader: of the first process; copies each whole step to a bucket.

    Raises:
      ValueError: a step was whole once, but none is now; or the directory
        holds foreign files.
    """
    self._directory, self._keep = directory.resolve(), keep
    self._uploader = uploader
    latest = None
    with distributed.raise_on_all("looking at the checkpoints"):
      if distributed.is_main():
        self._directory.mkdir(parents=True, exist_ok=True)
        latest, problems = step_files.newest(self._directory)
        for problem in problems:
          _log.warning("%s; resuming from step %d", problem, latest or 0)
        step_files.tidy(self._directory, latest)
    # Shared disks may show the other processes less.
    found = int(distributed.all_gather(-1 if latest is None else latest)[0])
    self._latest = None if found < 0 else found
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._completer = concurrent.futures.ThreadPoolExecutor(1, "complete")
    self._completing: concurrent.futures.Future | None = None

  def save(
    self,
    state: step_lib.TrainState,
    name: str,
    inputs: dict[str, Any],
  ) -> None:
    """Saves a state in the background, under its step.

    Args:
      state: of the run.
      name: the trained subtree, "base" or "lora".
      inputs: of the run at this step; see `inputs`.

    Raises:
      SaveError: this save or the one before it failed.
    """
    self._finish()
    step = int(jax.device_get(state.step))
    if step == self._latest:
      return
    arrays = jax.tree.map(_one_copy, _flat(_saved(state, name)))
    try:
      self._orbax.save(
        self._directory / str(step),
        args=ocp.args.Composite(
          arrays=ocp.args.StandardSave(arrays),
          meta=ocp.args.JsonSave(
            {"inputs": inputs, "arrays": _described(arrays)}
          ),
        ),
      )
    except Exception as error:
      raise self._failed(step, error) from error
    self._latest = step
    self._completing = self._completer.submit(self._complete, step)

  def _complete(self, step: int) -> None:
    try:
      self._orbax.wait_until_finished()
      if distributed.is_main():
        step_files.complete(self._directory, step)
        held = frozenset()
        if self._uploader is not None:
          self._uploader.completed(step)
          held = self._uploader.held()
        step_files.prune(self._directory, self._keep, held)
    except Exception as error:
      raise self._failed(step, error) from error

  def _failed(self, step: int, error: Exception) -> SaveError:
    free = shutil.disk_usage(self._directory).free
    return SaveError(
      f"{self._directory / str(step)} could not be saved ({free:,} bytes are"
      f" free): {type(error).__name__}: {error}"
    )

  def check(self) -> None:
    """Raises the error of the last save, without waiting for it."""
    if self._completing is not None and self._completing.done():
      self._finish()

  def _finish(self) -> None:
    if self._completing is not None:
      completing, self._completing = self._completing, None
      completing.result()

  def inputs(self) -> dict[str, Any] | None:
    """What the newest checkpoint was saved with; None without any."""
    return None if self._latest is None else self._meta()["inputs"]

  def _meta(self) -> dict[str, Any]:
    json = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return self._orbax.restore(self._directory / str(self._latest), args=json)[
      "meta"
    ]

  def restore(
    self, state: step_lib.TrainState, name: str
  ) -> step_lib.TrainState:
    """The newest checkpoint, sharded like `state`.

    Args:
      state: of step 0; all but its frozen weights are replaced.
      name: the trained subtree.

    Raises:
      ValueError: the checkpoint's arrays have other names or shapes.
    """
    path = self._directory / str(self._latest)
    saved = _saved(state, name)
    wanted = _flat(jax.tree.map(ocp.utils.to_shape_dtype_struct, saved))
    # Orbax does not name arrays of other shapes and dtypes.
    others = settings.differing(
      self._meta()["arrays"], _described(wanted), "arrays"
    )
    if others:
      raise ValueError(
        f"{path} holds other arrays than this config trains:\n  "
        + "\n  ".join(others[:8])
        + "\nuse the config that it was made with, or another --workdir"
      )
    found = self._orbax.restore(
      path, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(wanted))
    )["arrays"]
    restored = jax.tree.unflatten(
      jax.tree.structure(saved), [found[key] for key in wanted]
    )
    params = state.params | restored.params
    return dataclasses.replace(restored, params=params)

  def close(self) -> None:
    """Waits for the save in progress and raises its error."""
    try:
      self._finish()
    finally:
      self._completer.shutdown()
      self._orbax.close()


def inputs(
  pipeline: input_pipeline.InputPipeline,
  tokenizer: tokenizer_lib.Tokenizer,
  base_hash: str,
  seed: int,
  number: int,
) -> dict[str, Any]:
  """Fingerprints that a checkpoint of step `number` shares with its run."""
  report = pipeline.items.report
  return {
    "train_data": report["train"]["tokens"],
    "held_out_data": report["held_out"]["tokens"],
    "tokenizer": tokenizer.fingerprint,
    "base": base_hash,
    # All random numbers of a run follow from it.
    "randomness": {
      "seed": seed,
      "generator": jax.config.jax_default_prng_impl,
      "partitionable": jax.config.jax_threefry_partitionable,
    },
    "position": pipeline.schedule.state(number),
  }


def changed_inputs(
  workdir: pathlib.Path,
  found: dict[str, Any],
  wanted: dict[str, Any],
  allowed: tuple[str, ...],
) -> list[str]:
  """Lines "inputs.tokenizer: a -> b" of the run's inputs that differ and may.

  Raises:
    ValueError: inputs that are not `allowed` to differ from the checkpoint's.
  """
  lines = settings.differing(found, wanted, "inputs")
  refused = [
    line for line in lines if line.split(".")[1].split(":")[0] not in allowed
  ]
  if refused:
    raise ValueError(
      f"{workdir}: the checkpoint was made with other inputs:\n  "
      + "\n  ".join(refused)
      + "\nrestore them, use another --workdir, or name them in allow_changes"
    )
  return lines


def _saved(state: step_lib.TrainState, name: str) -> step_lib.TrainState:
  """A state without its frozen weights."""
  return dataclasses.replace(state, params={name: state.params[name]})


def _flat(state: step_lib.TrainState) -> dict[str, Any]:
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return {sharding.path_name(path): leaf for path, leaf in leaves}


def _one_copy(array: jax.Array) -> jax.Array:
  """One device's copy of an array that is replicated in the only process.

  Orbax would have each device write a slice of it, and compile a program for
  each slice within the loop. Several processes do write slices.
  """
  if jax.process_count() > 1 or not array.is_fully_replicated:
    return array
  return array.addressable_shards[0].data


def _described(arrays: dict[str, Any]) -> dict[str, str]:
  return {path: f"{x.dtype}{list(x.shape)}" for path, x in arrays.items()}
