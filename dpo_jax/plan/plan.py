"""What a run will need, before a machine is rented for it.

  python -m dpo_jax plan --topology=v5e:2x4 --config=configs/dpo.py:pythia-2.8b

compiles the run's own training, evaluation and sampling programs for a TPU
slice that need not be there, or without --topology for the devices that are,
and prints the bytes of a device, whether that fits, the rows that do, and a
lower bound of a step's time (`lower_bound`). Nothing runs, and weights are
neither read nor made: everything is shapes. The items of a batch are not read
either; what stands for them is in `mean_batch`, the means of HH.

Where the config's own mesh does not fit, meshes that split the weights further
are tried, and the first that fits is planned and named. --config may also be a
sampling config, such as configs/sample.py:paper.

A compilation of a large model for a slice takes one to three minutes of two
cores; --search=0 and --answers= leave parts out.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from dpo_jax.cli import flags
from dpo_jax.cli import help as help_lib
from dpo_jax.core import console, hardware, settings, sharding
from dpo_jax.model import gpt_neox
from dpo_jax.plan import (
  compile_sampling,
  compile_training,
  mean_batch,
  text,
  topology,
)
from dpo_jax.sampling import jobs, sampler
from dpo_jax.training import config as config_lib

ANSWERS = "configs/sample.py:paper"


def meshes(
  wanted: sharding.MeshSettings, axis: str, devices: list[jax.Device]
) -> Iterator[jax.sharding.Mesh]:
  """The mesh of the config, then others that split the weights further.

  Args:
    wanted: of the config.
    axis: what splits them, "fsdp" or "tensor".
    devices: of the mesh.
  """
  first = sharding.make_mesh(**dataclasses.asdict(wanted), devices=devices)
  yield first
  size = 2 * first.shape[axis]
  while size <= len(devices):
    sizes = dict(first.shape) | {axis: size}
    rest = len(devices) // (sizes["fsdp"] * sizes["tensor"])
    if rest and rest * sizes["fsdp"] * sizes["tensor"] == len(devices):
      yield sharding.make_mesh(**sizes | {"data": rest}, devices=devices)
    size *= 2


def _flags(mesh: jax.sharding.Mesh) -> str:
  return " ".join(
    f"--config.mesh.{axis}={size}" for axis, size in mesh.shape.items()
  )


def plan_training(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  devices: list[jax.Device],
  search: int,
) -> bool:
  """Prints the plan of a training run; False if no mesh fits."""
  chip = hardware.chip(devices[0].device_kind)
  for number, mesh in enumerate(meshes(config.mesh, "fsdp", devices)):
    shards = sharding.data_shards(mesh)
    items = config.batch_size // config.microbatches
    rows = mean_batch.rows_of(config, items, shards)
    try:
      found = compile_training.compile_steps(
        config, shape, mesh, rows, ("train",)
      )
      if found[0].fits(chip):
        found += compile_training.compile_steps(
          config, shape, mesh, rows, ("eval",)
        )
    except ValueError as error:
      if not number:
        raise
      console.result(f"{_flags(mesh)}: {error}")
      continue
    fits = all(one.fits(chip) for one in found)
    if fits and number:
      console.result(f"with {_flags(mesh)}:")
    console.result(text.training(config, shape, mesh, found, rows))
    if fits:
      if search and chip:
        most_rows(config, shape, mesh, rows, search)
      return True
  return False


def most_rows(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  rows: int,
  limit: int,
) -> int:
  """Finds and prints the most rows of a device and micro-batch that fit.

  1, 2, 4, ... and those of a run's widest batches are compiled, in this order,
  until some do not fit.

  Args:
    config: of the run; its batches grow with the rows.
    shape: its model.
    mesh: of devices whose memory is known.
    rows: that are known to fit.
    limit: more rows are not tried.
  """
  chip = hardware.chip(mesh.devices.flat[0].device_kind)
  shards = sharding.data_shards(mesh)
  items = config.batch_size // config.microbatches
  widest = mean_batch.widest_rows(config, items, shards)
  counts = {2**power for power in range(limit.bit_length())}
  refused = ""
  for count in sorted(counts | {widest}):
    if not rows < count <= limit:
      continue
    items = mean_batch.items_of(config, count, shards) * config.microbatches
    wider = dataclasses.replace(config, batch_size=items)
    (one,) = compile_training.compile_steps(
      wider, shape, mesh, count, ("train",)
    )
    if not one.fits(chip):
      refused = f", {count} do not"
      break
    rows = count
  console.result(
    f"{rows} row(s) a device fit"
    f" ({mean_batch.items_of(config, rows, shards)} items a micro-batch)"
    f"{refused}"
  )
  if rows < min(widest, limit):
    console.result(
      f"THE WIDEST BATCHES DO NOT FIT: they take about {widest} row(s) a"
      " device. Try more --config.microbatches"
    )
  return rows


def plan_answers(
  config: jobs.SamplingSettings,
  shape: gpt_neox.ModelConfig,
  devices: list[jax.Device],
  name: str,
  search: int,
) -> bool:
  """Prints the plan of a sampling run; False if no mesh fits.

  Raises:
    ValueError: the model has too few positions for it.
  """
  sampler.check_positions(
    shape, config.max_prompt_tokens, config.max_new_tokens
  )
  chip = hardware.chip(devices[0].device_kind)
  hbm = chip.hbm_bytes if chip else None
  for number, mesh in enumerate(meshes(config.mesh, "tensor", devices)):
    try:
      found = compile_sampling.compile_answers(config, shape, mesh, hbm)
    except ValueError as error:
      console.result(f"answers, {_flags(mesh)}: {error}")
      continue
    if number:
      console.result(f"answers with {_flags(mesh)}:")
    console.result(text.answers(found, mesh, name))
    if all(one.fits(chip) for one in found.programs):
      return True
    fewer = None
    if search and chip:
      fewer = most_answers(config, shape, mesh, found.rows)
    if fewer:
      console.result(
        f"{fewer.rows} rows a device fit: with batch_size={fewer.layout.size}"
        " in the sampling config,"
      )
      console.result(text.answers(fewer, mesh, name))
      return True
  return False


def most_answers(
  config: jobs.SamplingSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  limit: int,
) -> compile_sampling.Answering | None:
  """The programs of the most of 8, 16, 32, ... rows a device that fit.

  Args:
    config: of the sampling run; its batch size is what is looked for.
    shape: the model.
    mesh: of devices whose memory is known.
    limit: fewer rows than this are tried.
  """
  chip = hardware.chip(mesh.devices.flat[0].device_kind)
  most, rows = None, 8
  while rows < limit:
    size = rows * sharding.data_shards(mesh)
    fewer = dataclasses.replace(config, batch_size=size)
    found = compile_sampling.compile_answers(fewer, shape, mesh, chip.hbm_bytes)
    if not all(one.fits(chip) for one in found.programs):
      break
    most, rows = found, 2 * rows
  return most


def main(config: dict[str, Any], workdir: pathlib.Path, **options: Any) -> int:
  del workdir  # Nothing is written.
  devices = topology.devices(options["topology"])
  name, search = options["model"], options["search"]
  if "policies" in config:
    built = settings.build(jobs.SamplingSettings, config)
    shape = compile_training.shape_named(name, built.tokenizer)
    fits = plan_answers(built, shape, devices, "the config", search)
    return 0 if fits else 1
  built = settings.build(config_lib.TrainSettings, config)
  shape = compile_training.shape_of(built, name)
  fits = plan_training(built, shape, devices, search)
  if options["answers"]:
    values = help_lib.load(options["answers"]).to_dict()
    how = settings.build(jobs.SamplingSettings, values)
    fits &= plan_answers(how, shape, devices, options["answers"], search)
  return 0 if fits else 1


if __name__ == "__main__":
  flags.run(
    main,
    example="configs/dpo.py",
    topology=("", "a TPU slice such as v5e:2x4; this machine by default"),
    model=("", "a size of configs/models.py, where the config names none"),
    search=(
      64,
      "find the most rows a device that fit, up to so many; 0: do not",
    ),
    answers=(
      ANSWERS,
      "how the model would answer: a sampling config; nothing: do not plan it",
    ),
  )
