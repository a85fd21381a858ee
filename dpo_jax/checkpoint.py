"""A run's checkpoints: trainable weights, optimizer state and position.

The frozen base is never saved: its source stands in the run's config. Trees
are stored as flat dicts by path, so that a checkpoint does not depend on the
classes of the optimizer that wrote it. Orbax writes in the background and
makes a step visible only when it is whole.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpo_jax import partitioning, steps


class Checkpoints:
  """The checkpoints of one run's directory."""

  def __init__(self, directory: pathlib.Path, keep: int):
    """Opens or makes `directory`.

    Args:
      directory: where the steps lie.
      keep: how many of the newest steps are kept; 0 keeps all.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep or None)
    self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

  def latest(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, state: steps.TrainState, name: str, meta: dict) -> None:
    """Saves a state in the background, under its step.

    Args:
      state: what to save.
      name: the trained subtree, "base" or "lora".
      meta: JSON values to keep with it.
    """
    step = int(jax.device_get(state.step))
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        trainable=ocp.args.StandardSave(_flat(state.params[name])),
        opt_state=ocp.args.StandardSave(_flat(state.opt_state)),
        meta=ocp.args.JsonSave(meta | {"step": step}),
      ),
    )

  def restore(
    self, state: steps.TrainState, name: str
  ) -> tuple[steps.TrainState, dict[str, Any]]:
    """The newest checkpoint, laid out as `state` is, and its meta.

    Args:
      state: a state of the run's shapes and shardings; its trainable weights
        and optimizer state are replaced.
      name: the trained subtree.
    """
    step = self.latest()
    current = (state.params[name], state.opt_state)
    wanted = [jax.tree.map(ocp.utils.to_shape_dtype_struct, x) for x in current]
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        trainable=ocp.args.StandardRestore(_flat(wanted[0])),
        opt_state=ocp.args.StandardRestore(_flat(wanted[1])),
        meta=ocp.args.JsonRestore(),
      ),
    )
    params = state.params | {name: _unflat(current[0], found["trainable"])}
    restored = steps.TrainState(
      jax.device_put(jax.numpy.int32(step), state.step.sharding),
      params,
      _unflat(current[1], found["opt_state"]),
    )
    return restored, found["meta"]

  def close(self) -> None:
    """Waits for the save in progress and raises what went wrong in it."""
    self._manager.wait_until_finished()
    self._manager.close()


def _flat(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {partitioning.path_name(path): leaf for path, leaf in leaves}


def _unflat(like: Any, flat: dict[str, Any]) -> Any:
  return jax.tree.map_with_path(
    lambda path, _: flat[partitioning.path_name(path)], like
  )
