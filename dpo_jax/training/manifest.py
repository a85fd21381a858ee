"""manifest.json of a run: what it is made of, and where and when it started."""

import datetime
import json
import logging
import pathlib
import shlex
import sys
from typing import Any

import jax

from dpo_jax.core import console, redaction, versions
from dpo_jax.io import atomic, strict_json
from dpo_jax.model import lora
from dpo_jax.training import config as config_lib
from dpo_jax.training import setup, step

_log = logging.getLogger(__name__)


def write(
  workdir: pathlib.Path,
  config: config_lib.TrainSettings,
  made: setup.Run,
  state: step.TrainState,
  changed: list[str],
) -> None:
  """Writes manifest.json, what the run is made of, and says a line of it.

  Each start of the run adds an entry to "starts": when, on what, and what of
  config or inputs changed since the one before.
  """
  path = workdir / "manifest.json"
  starts = strict_json.read(path).get("starts", []) if path.exists() else []
  counts = {key: lora.count(state.params[key]) for key in ("base", "lora")}
  mesh = made.mesh
  start = {
    "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "step": int(jax.device_get(state.step)),
    "command": _command(),
    "devices": [str(device) for device in mesh.devices.flat],
    "processes": jax.process_count(),
    "mesh": dict(mesh.shape),
    "versions": versions.versions(),
    "changed": changed,
  }
  sizes = {
    "weights": _bytes(state.params),
    "optimizer": _bytes(state.opt_state),
    "a_device": sum(
      leaf.addressable_shards[0].data.nbytes
      for leaf in jax.tree.leaves((state, made.reference))
    ),
  }
  manifest = {
    "objective": config.objective,
    "steps": made.feed.steps,
    "devices": start["devices"],
    "mesh": start["mesh"],
    "parameters": counts | {"trained": counts[made.name]},
    "base": {"source": config.model.path, "hash": made.fingerprint},
    "versions": start["versions"],
    "bytes": sizes,
    "data": made.feed.items.report | {"packing": made.feed.report()},
    "starts": [*starts, start],
  }
  atomic.write_text(path, json.dumps(manifest, indent=2) + "\n")
  kind = mesh.devices.flat[0].device_kind
  axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  total = sum(counts.values())
  console.say(
    f"{workdir.name}: {mesh.size} x {kind} in {jax.process_count()}"
    f" process(es), mesh {axes}; {total:,} parameters, {counts[made.name]:,}"
    f" train; weights {_mib(sizes['weights'])}, optimizer"
    f" {_mib(sizes['optimizer'])}, {_mib(sizes['a_device'])} a device before"
    f" activations; {made.feed.steps:,} steps of {config.batch_size}",
    "run",
    **{
      key: manifest[key]
      for key in ("devices", "mesh", "parameters", "bytes", "steps")
    },
  )
  optimizer = config.optimizer
  if optimizer.warmup_steps > made.feed.steps:
    _log.warning(
      "optimizer.warmup_steps=%d is more than the run's %d updates: the"
      " learning rate ends at %.3g and never reaches %.3g",
      optimizer.warmup_steps,
      made.feed.steps,
      made.rates[-1],
      optimizer.learning_rate,
    )


def _command() -> str:
  """What was typed to start this process, as far as it can be told."""
  script, *rest = sys.orig_argv[1:] or [""]
  # An installed command is a script of Python's with a path of this machine.
  installed = pathlib.Path(script).name == "dpo-jax"
  words = ["dpo-jax", *rest] if installed else ["python", script, *rest]
  return redaction.clean(shlex.join(words))


def _bytes(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _mib(size: int) -> str:
  return f"{size / 2**20:,.1f} MiB"
