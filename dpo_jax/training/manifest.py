"""manifest.json: the contents of a run, and where and when it was started."""

import datetime
import json
import logging
import pathlib
import shlex
import sys
from typing import Any

import jax

from dpo_jax.core import console, redaction, settings, versions
from dpo_jax.io import atomic, strict_json
from dpo_jax.model import lora
from dpo_jax.training import config as config_lib
from dpo_jax.training import input_pipeline, step

_log = logging.getLogger(__name__)


def write(
  workdir: pathlib.Path,
  config: config_lib.TrainSettings,
  state: step.TrainState,
  reference: Any,
  pipeline: input_pipeline.InputPipeline,
  base_hash: str,
  changed: list[str],
) -> None:
  """Writes manifest.json and prints a summary of the run.

  Each start of the run appends to "starts": time, command, devices, versions,
  and the config fields and inputs that changed since the start before.
  """
  path, mesh = workdir / "manifest.json", pipeline.mesh
  starts = (
    strict_json.read_object(path).get("starts", []) if path.exists() else []
  )
  now = versions.versions()
  if starts and (
    other := settings.differing(starts[-1]["versions"], now, "versions")
  ):
    _log.warning(
      "%s resumes with other software, whose numbers may differ in their last"
      " digits:\n  %s",
      workdir.name,
      "\n  ".join(other),
    )
  counts = {key: lora.count(state.params[key]) for key in ("base", "lora")}
  trained = counts["lora" if config.lora.rank else "base"]
  start = {
    "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "step": int(jax.device_get(state.step)),
    "command": _command(),
    "devices": [str(device) for device in mesh.devices.flat],
    "processes": jax.process_count(),
    "mesh": dict(mesh.shape),
    "versions": now,
    "changed": changed,
  }
  on_a_device = sum(
    leaf.addressable_shards[0].data.nbytes
    for leaf in jax.tree.leaves((state, reference))
  )
  manifest = {
    "objective": config.objective,
    "steps": pipeline.steps,
    "mesh": start["mesh"],
    "parameters": counts | {"trained": trained},
    "base": {"source": config.model.path, "hash": base_hash},
    "versions": start["versions"],
    "bytes_on_a_device": on_a_device,
    "data": pipeline.items.report | {"packing": pipeline.report()},
    "starts": [*starts, start],
  }
  atomic.write_text(path, json.dumps(manifest, indent=2) + "\n")
  axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  console.say(
    f"{workdir.name}: {mesh.size} x {mesh.devices.flat[0].device_kind} in"
    f" {jax.process_count()} process(es), mesh {axes};"
    f" {sum(counts.values()):,} parameters, {trained:,} trainable;"
    f" {on_a_device / 2**20:,.1f} MiB a device before activations;"
    f" {pipeline.steps:,} steps of {config.batch_size}",
    "run",
    **{key: manifest[key] for key in ("parameters", "steps")},
  )


def _command() -> str:
  """The command line of this process, secrets redacted."""
  script, *rest = sys.orig_argv[1:] or [""]
  # An installed command is a script of Python's with a path of this machine.
  installed = pathlib.Path(script).name == "dpo-jax"
  words = ["dpo-jax", *rest] if installed else ["python", script, *rest]
  return redaction.clean(shlex.join(words))
