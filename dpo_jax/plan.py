"""What a run will need, before a machine is rented for it.

  python -m dpo_jax.plan --topology=v5e:2x4 --config=configs/dpo.py:pythia-2.8b

compiles the run's own training, evaluation and sampling programs for a TPU
slice that need not be there, or without --topology for the devices that are,
and prints bytes, flops, traffic and an estimate of the time. Nothing runs, and
weights are neither read nor made: everything is shapes. The items of a batch
are not read either; what stands for them is in `compiling`, the means of HH.

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

from dpo_jax import hardware, model, partitioning, sampling
from dpo_jax.answering import grid
from dpo_jax.interface import cli, config_help, console, settings
from dpo_jax.planning import (
  compiling,
  compiling_answers,
  mean_items,
  plan_text,
  row_search,
  topology,
)
from dpo_jax.running import recipe

ANSWERS = "configs/sample.py:paper"


def meshes(
  wanted: partitioning.MeshSettings, axis: str, devices: list[jax.Device]
) -> Iterator[jax.sharding.Mesh]:
  """The mesh of the config, then others that split the weights further.

  Args:
    wanted: of the config.
    axis: what splits them, "fsdp" or "tensor".
    devices: of the mesh.
  """
  first = partitioning.make_mesh(**dataclasses.asdict(wanted), devices=devices)
  yield first
  size = 2 * first.shape[axis]
  while size <= len(devices):
    sizes = dict(first.shape) | {axis: size}
    rest = len(devices) // (sizes["fsdp"] * sizes["tensor"])
    if rest and rest * sizes["fsdp"] * sizes["tensor"] == len(devices):
      yield partitioning.make_mesh(**sizes | {"data": rest}, devices=devices)
    size *= 2


def flags_of(mesh: jax.sharding.Mesh) -> str:
  return " ".join(
    f"--config.mesh.{axis}={size}" for axis, size in mesh.shape.items()
  )


def plan_training(
  config: recipe.TrainSettings,
  shape: model.ModelConfig,
  devices: list[jax.Device],
  search: int,
) -> bool:
  """Prints the plan of a training run; False if no mesh fits."""
  for number, mesh in enumerate(meshes(config.mesh, "fsdp", devices)):
    shards = partitioning.data_shards(mesh)
    rows = mean_items.rows_of(
      config, config.batch_size // config.microbatches, shards
    )
    try:
      (train,) = compiling.compile_steps(config, shape, mesh, rows, ("train",))
    except ValueError as error:
      if not number:
        raise
      console.result(f"{flags_of(mesh)}: {error}")
      continue
    found = [train]
    if _fits(train, mesh):
      found += compiling.compile_steps(config, shape, mesh, rows, ("eval",))
    fits = all(_fits(one, mesh) for one in found)
    if fits and number:
      console.result(f"with {flags_of(mesh)}:")
    console.result(plan_text.training(config, shape, mesh, found, rows))
    if fits:
      if search:
        _search(config, shape, mesh, rows, train, search)
      return True
  return False


def _fits(one: compiling.Compiled, mesh: jax.sharding.Mesh) -> bool:
  chip = hardware.chip(mesh.devices.flat[0].device_kind)
  if one.memory is None:
    return False
  return chip is None or one.memory.total <= chip.hbm_bytes


def most_rows(
  config: recipe.TrainSettings,
  shape: model.ModelConfig,
  mesh: jax.sharding.Mesh,
  known: dict[int, int],
  limit: int,
) -> tuple[int, dict[int, int | None]]:
  """The most rows of a device and micro-batch that fit, by compiling.

  Args:
    config: of the run; its batches grow with the rows.
    shape: its model.
    mesh: of devices whose memory is known.
    known: bytes for a count of rows that was compiled already.
    limit: more rows are not tried.

  Returns:
    The rows, and the bytes of every count that was tried, None if refused.
  """
  chip = hardware.chip(mesh.devices.flat[0].device_kind)
  tried: dict[int, int | None] = dict(known)

  def needs(count):
    if count not in tried:
      items = _items(config, mesh, count) * config.microbatches
      wider = dataclasses.replace(config, batch_size=items)
      (one,) = compiling.compile_steps(wider, shape, mesh, count, ("train",))
      tried[count] = one.memory and one.memory.total
    return tried[count]

  (start,) = known
  most = row_search.largest_rows(needs, start, limit, chip.hbm_bytes)
  return most, tried


def _items(config, mesh, rows) -> int:
  """Items of a micro-batch that fill so many rows a device."""
  places = rows * partitioning.data_shards(mesh) * config.row_length
  return max(int(places / mean_items.lengths(config).places), 1)


def _search(config, shape, mesh, rows, train, limit) -> None:
  """Prints the most rows a device that fit."""
  if hardware.chip(mesh.devices.flat[0].device_kind) is None:
    console.result("no search for more rows: the device's memory is not known")
    return
  most, tried = most_rows(
    config, shape, mesh, {rows: train.memory.total}, limit
  )
  looked = ", ".join(
    f"{count}: {f'{size / hardware.GIB:.2f} GiB' if size else 'refused'}"
    for count, size in sorted(tried.items())
  )
  how = "at least" if most == limit else "at most"
  console.result(
    f"{how} {most} row(s) a device fit: {_items(config, mesh, most)} items a"
    f" micro-batch (compiled for {looked})"
  )
  widest = mean_items.widest_rows(
    config,
    config.batch_size // config.microbatches,
    partitioning.data_shards(mesh),
  )
  if most < min(widest, limit):
    console.result(
      f"THE WIDEST BATCHES DO NOT FIT: they take about {widest} row(s) a"
      " device. Try more --config.microbatches"
    )


def plan_answers(
  config: grid.AnswerSettings,
  shape: model.ModelConfig,
  devices: list[jax.Device],
  name: str,
  search: bool,
) -> bool:
  """Prints the plan of a sampling run; False if no mesh fits.

  Raises:
    ValueError: the model has too few positions for it.
  """
  sampling.check_positions(
    shape, config.max_prompt_tokens, config.max_new_tokens
  )
  chip = hardware.chip(devices[0].device_kind)
  hbm = chip.hbm_bytes if chip else None
  for number, mesh in enumerate(meshes(config.mesh, "tensor", devices)):
    try:
      found = compiling_answers.compile_answers(config, shape, mesh, hbm)
    except ValueError as error:
      console.result(f"answers, {flags_of(mesh)}: {error}")
      continue
    if number:
      console.result(f"answers with {flags_of(mesh)}:")
    console.result(plan_text.answers(found, mesh, name))
    if all(_fits(one, mesh) for one in found.programs):
      return True
    if search and hbm:
      rows = most_answers(config, shape, mesh, found.rows // 8)
      if rows:
        _answer_fewer(config, shape, mesh, rows, name)
        return True
  return False


def _answer_fewer(config, shape, mesh, rows, name) -> None:
  """Prints the plan of a sampling run with so many rows a device."""
  size = rows * partitioning.data_shards(mesh)
  console.result(
    f"{rows} rows a device fit: with batch_size={size} in the sampling config,"
  )
  hbm = hardware.chip(mesh.devices.flat[0].device_kind).hbm_bytes
  fewer = dataclasses.replace(config, batch_size=size)
  found = compiling_answers.compile_answers(fewer, shape, mesh, hbm)
  console.result(plan_text.answers(found, mesh, name))


def most_answers(
  config: grid.AnswerSettings,
  shape: model.ModelConfig,
  mesh: jax.sharding.Mesh,
  limit: int,
) -> int:
  """The most rows a device with which all fits, in whole eights.

  The program that reads the prompts takes the same at any count of rows: it is
  not looked at.

  Args:
    config: of the sampling run; its batch size is what is looked for.
    shape: the model.
    mesh: of devices whose memory is known.
    limit: more eights are not tried.
  """
  hbm = hardware.chip(mesh.devices.flat[0].device_kind).hbm_bytes
  shards = partitioning.data_shards(mesh)

  def needs(eights):
    fewer = dataclasses.replace(config, batch_size=8 * eights * shards)
    found = compiling_answers.compile_answers(
      fewer, shape, mesh, hbm, ("enter", "decode")
    )
    sizes = [one.memory and one.memory.total for one in found.programs]
    return None if None in sizes else max(sizes)

  if limit < 1:
    return 0
  return 8 * row_search.largest_rows(needs, limit // 2, limit, hbm)


def main(config: dict[str, Any], workdir: pathlib.Path, **options: Any) -> int:
  del workdir  # Nothing is written.
  devices = topology.devices(options["topology"])
  name = options["model"]
  if "policies" in config:
    built = settings.build(grid.AnswerSettings, config)
    shape = compiling.shape_named(name, built.tokenizer)
    fits = plan_answers(
      built, shape, devices, "the config", bool(options["search"])
    )
    return 0 if fits else 1
  built = settings.build(recipe.TrainSettings, config)
  shape = compiling.shape_of(built, name)
  fits = plan_training(built, shape, devices, options["search"])
  if options["answers"]:
    values = config_help.load(options["answers"]).to_dict()
    how = settings.build(grid.AnswerSettings, values)
    fits &= plan_answers(
      how, shape, devices, options["answers"], bool(options["search"])
    )
  return 0 if fits else 1


if __name__ == "__main__":
  cli.run(
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
