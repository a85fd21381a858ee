"""Memory and a lower bound of the time of a run, before renting a machine.

  python -m dpo_jax plan --topology=v5e:2x4 --config=configs/dpo.py:pythia-2.8b

compiles the run's own training, evaluation and sampling programs for an absent
TPU slice, or without --topology for the local devices, and prints bytes per
device, whether they fit, the most rows that do, and a lower bound of a step's
time. Programs are compiled from shapes, with HH's mean lengths for a batch: no
weights or data are read.

If the config's mesh does not fit, meshes that split the weights further are
tried, and the first that fits is planned and named. --config can also be a
sampling config, such as configs/sample.py:paper.

A compilation of a large model takes one to three minutes on two cores;
--search=0 and --sampling= skip parts.
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
  lower_bound,
  mean_batch,
  topology,
)
from dpo_jax.sampling import jobs, sampler
from dpo_jax.training import config as config_lib

SAMPLING = "configs/sample.py:paper"


def meshes(
  wanted: sharding.MeshSettings, axis: str, devices: list[jax.Device]
) -> Iterator[jax.sharding.Mesh]:
  """The config's mesh, then others with larger powers of two on an axis."""
  first = sharding.make_mesh(**dataclasses.asdict(wanted), devices=devices)
  yield first
  size = 2 * first.shape[axis]
  while size <= len(devices):
    sizes = dict(first.shape) | {axis: size}
    rest = len(devices) // (sizes["fsdp"] * sizes["tensor"])
    if rest and rest * sizes["fsdp"] * sizes["tensor"] == len(devices):
      yield sharding.make_mesh(**sizes | {"data": rest}, devices=devices)
    size *= 2


def plan_training(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  devices: list[jax.Device],
  search: int,
) -> bool:
  """Prints the plan of a training run; False if no mesh fits."""
  chip = hardware.chip(devices[0].device_kind)
  for number, mesh in enumerate(meshes(config.mesh, "fsdp", devices)):
    items = config.batch_size // config.microbatches
    rows = mean_batch.rows_of(config, items, sharding.data_shards(mesh))
    try:
      programs = compile_training.compile_steps(
        config, shape, mesh, rows, ("train",)
      )
      if programs[0].fits(chip):
        programs += compile_training.compile_steps(
          config, shape, mesh, rows, ("eval",)
        )
    except ValueError as error:
      if not number:
        raise
      console.result(f"{_flags(mesh)}: {error}")
      continue
    fits = all(one.fits(chip) for one in programs)
    if fits and number:
      console.result(f"with {_flags(mesh)}:")
    console.result(describe_training(config, shape, mesh, programs, rows))
    if fits:
      if search and chip:
        print_most_rows(config, shape, mesh, rows, search)
      return True
  return False


def print_most_rows(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  rows: int,
  limit: int,
) -> None:
  """Prints the most rows per device and micro-batch that fit, up to `limit`.

  Tried are 1, 2, 4, ... and those of a run's widest batches, beyond `rows`,
  which fit; the batch size grows with them.
  """
  chip = hardware.chip(mesh.devices.flat[0].device_kind)
  shards = sharding.data_shards(mesh)
  items = config.batch_size // config.microbatches
  widest = mean_batch.widest_rows(config, items, shards)
  counts = {2**power for power in range(limit.bit_length())}
  refused = ""
  for count in sorted(x for x in counts | {widest} if rows < x <= limit):
    items = mean_batch.items_of(config, count, shards) * config.microbatches
    wider = dataclasses.replace(config, batch_size=items)
    (program,) = compile_training.compile_steps(
      wider, shape, mesh, count, ("train",)
    )
    if not program.fits(chip):
      refused = f", {count} do not"
      break
    rows = count
  items = mean_batch.items_of(config, rows, shards)
  console.result(
    f"{rows} row(s) a device fit ({items} items a micro-batch){refused}"
  )
  if rows < min(widest, limit):
    console.result(
      f"THE WIDEST BATCHES DO NOT FIT: they take about {widest} row(s) a"
      " device. Try more --config.microbatches"
    )


def plan_sampling(
  config: jobs.SamplingSettings,
  shape: gpt_neox.ModelConfig,
  devices: list[jax.Device],
  name: str,
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
      found = compile_sampling.compile_programs(config, shape, mesh, hbm)
    except ValueError as error:
      console.result(f"sampling, {_flags(mesh)}: {error}")
      continue
    if number:
      console.result(f"sampling with {_flags(mesh)}:")
    console.result(describe_sampling(found, mesh, name))
    if all(one.fits(chip) for one in found.programs):
      return True
  return False


def describe_training(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  programs: list[compile_training.Compiled],
  rows: int,
) -> str:
  """A training run's programs and the lower bound of a step, as text."""
  device = mesh.devices.flat[0]
  chip = hardware.chip(device.device_kind)
  shards = sharding.data_shards(mesh)
  mean = mean_batch.lengths(config)
  bound = lower_bound.of_step(config, shape, mesh, rows)
  lines = [
    f"{mesh.size} x {device.device_kind}, mesh {dict(mesh.shape)}; batches of"
    f" {config.batch_size}, by HH's means: {mean.tokens:.0f} tokens,"
    f" {mean.completion:.0f} of them predicted, in {mean.places:.0f} places",
    _describe_split(config, bound, shards, rows, chip),
  ]
  items = config.batch_size // config.microbatches
  widest = mean_batch.widest_rows(config, items, shards)
  if widest > rows:
    lines.append(
      f"the widest batches of a run take about {widest} row(s) a device"
    )
  eval_rows = mean_batch.rows_of(config, config.eval_batch_size, shards)
  if eval_rows != rows:
    lines.append(
      f"evaluations of {config.eval_batch_size}, at once: {eval_rows} row(s) a"
      " device"
    )
  for program in programs:
    less = "more --config.microbatches"
    if program.name == "eval":
      less = "a lower --config.eval_batch_size"
    fix = f"Try a greater --config.mesh.fsdp or .tensor, or {less}"
    lines.append(_describe_program(program, chip, fix))
  if chip is None:
    lines.append(
      f"no bound and no more rows: {device.device_kind!r} is not in"
      " dpo_jax/core/hardware.py"
    )
  elif all(program.fits(chip) for program in programs):
    lines.append(_describe_bound(bound, chip))
  return "\n".join(lines)


def _describe_split(config, bound, shards: int, rows: int, chip) -> str:
  many = config.microbatches
  text = (
    f"{many} micro-batch(es) of {config.batch_size / many / shards:.3g} item(s)"
    f" in {rows} row(s) of {config.row_length} tokens a device:"
    f" {bound.fill:.0%} of the token positions hold a token, the weights are"
    f" read {many} time(s) a step"
  )
  if chip is not None:
    text += f"; at best {bound.utilization(chip):.0%} of peak"
  return text


def _describe_bound(bound: lower_bound.Bound, chip: hardware.Chip) -> str:
  compute, read, gathered = bound.seconds(chip)
  many = bound.microbatches
  return (
    f"lower bound, no prediction: a step takes {max(bound.seconds(chip)):.3g} s"
    f" at best, the longest of {compute:.3g} s to compute"
    f" ({bound.flops:.3g} flops / {bound.peak(chip) / 1e12:.0f} Tflop/s),"
    f" {read:.3g} s to read the weights ({many} x {bound.read / 1e9:.3g} GB /"
    f" {chip.hbm_bandwidth / 1e9:.0f} GB/s), {gathered:.3g} s to gather them"
    f" ({many} x {bound.gathered / 1e9:.3g} GB /"
    f" {chip.link_bandwidth / 1e9:.0f} GB/s)"
  )


def describe_sampling(
  found: compile_sampling.SamplingPrograms, mesh: jax.sharding.Mesh, name: str
) -> str:
  """A sampling run's programs and shapes, as text."""
  chip = hardware.chip(mesh.devices.flat[0].device_kind)
  program, batch = found.shapes.program, found.shapes.prefills[0]
  shared = program.shared
  prompts = ""
  if shared is not None:
    each = shared.prompts // shared.shards
    prompts = f" and {each} prompts of {shared.slots}"
  lines = [
    f"sampling as in {name}, mesh {dict(mesh.shape)}: {found.rows} rows a"
    f" device of {program.slots} slots{prompts}, prefill of"
    f" {batch.size} prompts of {batch.padded} tokens; {_gib(found.weights)}"
    f" GiB of weights and {_gib(found.cache)} GiB of {program.cache} KV"
    " cache a device",
  ]
  fix = "Try a lower batch_size in the sampling config, or its mesh"
  lines += [_describe_program(one, chip, fix) for one in found.programs]
  return "\n".join(lines)


def _describe_program(
  program: compile_training.Compiled, chip: hardware.Chip | None, fix: str
) -> str:
  memory, name = program.memory, program.name
  if not program.fits(chip):
    why = program.refusal
    if memory is not None:
      why = f"{_gib(memory.total)} of {_gib(chip.hbm_bytes)} GiB a device"
    return f"{name}: DOES NOT FIT ({why}). {fix}"
  available = f" of {_gib(chip.hbm_bytes)}" if chip else ""
  parts = ", ".join(
    f"{field.name} {_gib(getattr(memory, field.name))}"
    for field in dataclasses.fields(memory)
  )
  return f"{name}: {_gib(memory.total)}{available} GiB a device ({parts})"


def _flags(mesh: jax.sharding.Mesh) -> str:
  return " ".join(
    f"--config.mesh.{axis}={size}" for axis, size in mesh.shape.items()
  )


def _gib(number: float) -> str:
  return f"{number / hardware.GIB:.2f}"


def main(config: dict[str, Any], workdir: pathlib.Path, **options: Any) -> int:
  del workdir  # Nothing is written.
  devices = topology.devices(options["topology"])
  name, search = options["model"], options["search"]
  if "policies" in config:
    built = settings.build(jobs.SamplingSettings, config)
    shape = compile_training.shape_named(name, built.tokenizer)
    fits = plan_sampling(built, shape, devices, "the config")
    return 0 if fits else 1
  built = settings.build(config_lib.TrainSettings, config)
  shape = compile_training.shape_of(built, name)
  fits = plan_training(built, shape, devices, search)
  if options["sampling"]:
    values = help_lib.load(options["sampling"]).to_dict()
    sampling = settings.build(jobs.SamplingSettings, values)
    fits &= plan_sampling(sampling, shape, devices, options["sampling"])
  return 0 if fits else 1


if __name__ == "__main__":
  flags.run(
    main,
    example="configs/dpo.py",
    topology=("", "a TPU slice such as v5e:2x4; the local devices by default"),
    model=("", "a size of configs/models.py, where the config names none"),
    search=(64, "the most rows per device to try; 0 skips the search"),
    sampling=(SAMPLING, "a sampling config to plan too; empty skips it"),
  )
