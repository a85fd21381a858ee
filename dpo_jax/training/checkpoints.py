"""A run's checkpoints: trainable weights, optimizer state and position.

The frozen base is never saved: its source and its hash stand in the metadata.
Trees are stored as flat dicts by path, so that a checkpoint does not depend on
the classes of the optimizer that wrote it.

Orbax writes in the background and makes a step visible when it is whole; a
thread then hashes its files, writes its manifest, and only after that deletes
the steps that are no longer kept. What goes wrong there is raised by the next
call of `check`, `save` or `close`.
"""

import concurrent.futures
import dataclasses
import logging
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpo_jax.core import distributed, errors, sharding
from dpo_jax.io import mirror, step_files
from dpo_jax.training import step as step_lib

_log = logging.getLogger(__name__)

# Bytes that a save needs beside its arrays.
_MARGIN = 2**20


class SaveError(errors.Stopped):
  """A checkpoint could not be written; the one before it is whole."""


class Checkpoints:
  """The checkpoints of one run's directory, which the caller has locked."""

  def __init__(
    self,
    directory: pathlib.Path,
    retention: step_files.Retention,
    copies: mirror.Mirror | None = None,
  ):
    """Opens or makes `directory` and finds its newest whole step.

    `copies` is told of each step that is whole; the first process may have it.

    What is wrong with later steps is told on stderr, and they are put aside.

    Raises:
      ValueError: a step was whole once, but none is now; or the directory
        holds what no run wrote.
    """
    self._directory, self._retention = directory.resolve(), retention
    self._copies = copies
    latest = None
    with distributed.together("looking at the checkpoints"):
      if distributed.first():
        self._directory.mkdir(parents=True, exist_ok=True)
        latest, problems = step_files.newest(self._directory)
        for problem in problems:
          _log.warning("%s", problem)
        if problems:
          _log.warning("going on from step %d", latest or 0)
        step_files.tidy(self._directory, latest)
    # The others must not look for themselves: a disk may show them less.
    found = int(distributed.everywhere(-1 if latest is None else latest)[0])
    self._latest = None if found < 0 else found
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._completer = concurrent.futures.ThreadPoolExecutor(1, "complete")
    self._completing: concurrent.futures.Future | None = None

  def latest(self) -> int | None:
    """The newest step that was whole when it was last looked at, or None."""
    return self._latest

  def save(
    self,
    state: step_lib.TrainState,
    name: str,
    position: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float],
  ) -> None:
    """Saves a state in the background, under its step.

    Args:
      state: what to save.
      name: the trained subtree, "base" or "lora".
      position: where the data goes on, JSON values.
      meta: what made the state, JSON values.
      metrics: of the evaluation at this step; {} if there was none.

    Raises:
      SaveError: the save before it failed, or the disk has no room.
    """
    self._finish()
    step = int(jax.device_get(state.step))
    if step == self._latest:
      return
    flat = {key: _flat(tree) for key, tree in _trees(state, name).items()}
    flat = jax.tree.map(_one_copy, flat)
    self.make_room(flat)
    try:
      self._orbax.save(
        self._directory / str(step),
        args=ocp.args.Composite(
          position=ocp.args.JsonSave(position),
          meta=ocp.args.JsonSave(
            meta | {"step": step, "arrays": _described(flat)}
          ),
          **{key: ocp.args.StandardSave(tree) for key, tree in flat.items()},
        ),
      )
    except Exception as error:
      raise self._failed(step, error) from error
    self._latest = step
    self._completing = self._completer.submit(self._complete, step, metrics)

  def _complete(self, step: int, metrics: dict[str, float]) -> None:
    try:
      self._orbax.wait_until_finished()
      if distributed.first():
        step_files.complete(self._directory, step, metrics)
        self._copy(step)
        held = self._copies.held() if self._copies else frozenset()
        step_files.prune(self._directory, self._retention, held)
    except Exception as error:
      raise self._failed(step, error) from error

  def _copy(self, step: int) -> None:
    if self._copies is not None:
      self._copies.completed(step)

  def note(self, metrics: dict[str, float]) -> None:
    """Puts the evaluation of the newest step into its manifest, if whole."""
    self._finish()
    if distributed.first() and self._latest is not None:
      step_files.note(self._directory, self._latest, metrics)
      self._copy(self._latest)

  def make_room(self, tree: Any) -> None:
    """Checks that the disk has room for a tree of arrays.

    Raises:
      SaveError: it has not.
    """
    needed = _MARGIN + sum(x.nbytes for x in jax.tree.leaves(tree))
    free = shutil.disk_usage(self._directory).free
    if free < needed:
      raise SaveError(
        f"{self._directory}: a checkpoint needs {needed:,} bytes, but the disk"
        f" has {free:,} free; make room and run the same command again"
      )

  def _failed(self, step: int, error: Exception) -> SaveError:
    free = shutil.disk_usage(self._directory).free
    return SaveError(
      f"{self._directory / str(step)} could not be saved ({free:,} bytes are"
      f" free): {type(error).__name__}: {error}"
    )

  def check(self) -> None:
    """Raises, without waiting, what went wrong in the last save.

    So does it if another process has taken over where the copies go.
    """
    if self._copies is not None:
      self._copies.check()
    if self._completing is not None and self._completing.done():
      self._finish()

  def _finish(self) -> None:
    if self._completing is not None:
      completing, self._completing = self._completing, None
      completing.result()

  def restore(
    self, state: step_lib.TrainState, name: str
  ) -> tuple[step_lib.TrainState, dict[str, Any], dict[str, Any]]:
    """The newest checkpoint, laid out as `state` is, its meta and position.

    Args:
      state: a state of the run's shapes and shardings; all but its frozen
        weights are replaced.
      name: the trained subtree.

    Raises:
      ValueError: the checkpoint's arrays are of other names or shapes.
    """
    assert self._latest is not None
    path = self._directory / str(self._latest)
    current = _trees(state, name)
    wanted = {
      key: _flat(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
      for key, tree in current.items()
    }
    jsons = ocp.args.Composite(
      meta=ocp.args.JsonRestore(), position=ocp.args.JsonRestore()
    )
    about = self._orbax.restore(path, args=jsons)
    _check_arrays(path, about["meta"]["arrays"], _described(wanted))
    found = self._orbax.restore(
      path,
      args=ocp.args.Composite(
        **{key: ocp.args.StandardRestore(tree) for key, tree in wanted.items()}
      ),
    )
    trained = _unflat(current["trainable"], found["trainable"])
    restored = dataclasses.replace(
      state,
      step=jax.device_put(jax.numpy.int32(self._latest), state.step.sharding),
      params=state.params | {name: trained},
      opt_state=_unflat(current["opt_state"], found["opt_state"]),
      guard=_unflat(current["guard"], found["guard"]),
    )
    return restored, about["meta"], about["position"]

  def close(self) -> None:
    """Waits for the save in progress and raises what went wrong in it."""
    try:
      self._finish()
    finally:
      self._completer.shutdown()
      self._orbax.close()


def _trees(state: step_lib.TrainState, name: str) -> dict[str, Any]:
  """What a checkpoint holds of a state, an item each."""
  return {
    "trainable": state.params[name],
    "opt_state": state.opt_state,
    "guard": state.guard,
  }


def _one_copy(array: jax.Array) -> jax.Array:
  """Of an array that every device of the only process holds, one device's.

  Orbax would have each device write a share of it, and compile a program for
  every cut: all in one step of the loop. Several processes do write shares.
  """
  if jax.process_count() > 1 or not array.is_fully_replicated:
    return array
  return array.addressable_shards[0].data


def _described(flat: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
  return {
    key: {path: f"{x.dtype}{list(x.shape)}" for path, x in tree.items()}
    for key, tree in flat.items()
  }


def _check_arrays(path, found, wanted) -> None:
  if found != wanted:
    differ = [
      f"{key}/{name}: {found.get(key, {}).get(name)} -> {tree.get(name)}"
      for key, tree in wanted.items()
      for name in sorted({*tree, *found.get(key, {})})
      if found.get(key, {}).get(name) != tree.get(name)
    ]
    raise ValueError(
      f"{path} holds other arrays than this config trains:\n  "
      + "\n  ".join(differ[:8])
      + "\nuse the config that it was made with, or another --workdir"
    )


def _flat(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {sharding.path_name(path): leaf for path, leaf in leaves}


def _unflat(like: Any, flat: dict[str, Any]) -> Any:
  return jax.tree.map_with_path(
    lambda path, _: flat[sharding.path_name(path)], like
  )
