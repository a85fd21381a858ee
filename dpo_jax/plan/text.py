"""What the planner found, in words."""

import dataclasses

import jax

from dpo_jax.core import hardware, sharding
from dpo_jax.model import gpt_neox
from dpo_jax.plan import (
  compile_sampling,
  compile_training,
  lower_bound,
  mean_batch,
)
from dpo_jax.training import config as config_lib


def training(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  compiled: list[compile_training.Compiled],
  rows: int,
) -> str:
  """A training run's programs, and the lower bound of a step."""
  device = mesh.devices.flat[0]
  chip = hardware.chip(device.device_kind)
  mean = mean_batch.lengths(config)
  lines = [
    f"{mesh.size} x {device.device_kind}, mesh {dict(mesh.shape)}; batches of"
    f" {config.batch_size}, by HH's means: {mean.tokens:.0f} tokens,"
    f" {mean.completion:.0f} of them predicted, in {mean.places:.0f} places",
  ]
  shards = sharding.data_shards(mesh)
  bound = lower_bound.of_step(config, shape, mesh, rows)
  lines.append(_split(config, bound, shards, rows, chip))
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
  for one in compiled:
    less = "more --config.microbatches"
    if one.name == "eval":
      less = "a lower --config.eval_batch_size"
    mend = f"Try a greater --config.mesh.fsdp or .tensor, or {less}"
    lines.append(program(one, chip, mend))
  if chip is None:
    lines.append(
      f"no bound and no more rows: {device.device_kind!r} is not in"
      " dpo_jax/core/hardware.py"
    )
  elif all(one.fits(chip) for one in compiled):
    lines.append(_time(bound, chip))
  return "\n".join(lines)


def _split(config, bound, shards: int, rows: int, chip) -> str:
  """How a batch is split, what that wastes, and what to change."""
  many = config.microbatches
  said = (
    f"{many} micro-batch(es) of {config.batch_size / many / shards:.3g} item(s)"
    f" in {rows} row(s) of {config.row_length} tokens a device:"
    f" {bound.fill:.0%} of the token positions hold a token, the weights are"
    f" read {many} time(s) a step"
  )
  if chip is not None:
    said += f"; at best {bound.utilization(chip):.0%} of peak"
  return said + _mend(config, shards, rows, bound.fill)


def _time(bound: lower_bound.Bound, chip: hardware.Chip) -> str:
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


def _mend(config, shards: int, rows: int, fill: float) -> str:
  """The setting to change where rows are half empty or weights read in vain."""
  for fewer in range(1, config.microbatches):
    items, rest = divmod(config.batch_size, fewer)
    if not rest and mean_batch.rows_of(config, items, shards) <= rows:
      return f". --config.microbatches={fewer} takes no more rows a device"
  if fill < 0.5:
    return ". Fewer devices or a greater --config.batch_size fill the rows"
  return ""


def answers(
  found: compile_sampling.Answering, mesh: jax.sharding.Mesh, name: str
) -> str:
  """A sampling run's programs, and what they work on."""
  chip = hardware.chip(mesh.devices.flat[0].device_kind)
  layout = found.layout
  reading, shared = layout.readings[0], layout.program.shared
  lie = ""
  if shared is not None:
    each = shared.prompts // shared.shards
    lie = f" beside {each} prompts of {shared.slots}"
  lines = [
    f"answers as in {name}, mesh {dict(mesh.shape)}: {found.rows} rows a device"
    f" of {layout.program.slots} slots{lie}, prompts read by {reading.size} of"
    f" {reading.padded} tokens; {_gib(found.weights)} GiB of weights and"
    f" {_gib(found.cache)} GiB of {layout.program.cache} keys and values a"
    " device",
  ]
  mend = "Try fewer rows, --answers with another file, or its mesh"
  return "\n".join(lines + [program(one, chip, mend) for one in found.programs])


def program(
  one: compile_training.Compiled, chip: hardware.Chip | None, mend: str
) -> str:
  """One program's bytes, or that it does not fit."""
  memory = one.memory
  if not one.fits(chip):
    why = one.refusal
    if memory is not None:
      why = f"{_gib(memory.total)} of {_gib(chip.hbm_bytes)} GiB a device"
    return f"{one.name}: DOES NOT FIT ({why}). {mend}"
  room = f" of {_gib(chip.hbm_bytes)}" if chip else ""
  parts = ", ".join(
    f"{field.name} {_gib(getattr(memory, field.name))}"
    for field in dataclasses.fields(memory)
  )
  return f"{one.name}: {_gib(memory.total)}{room} GiB a device ({parts})"


def _gib(number: float) -> str:
  return f"{number / hardware.GIB:.2f}"
