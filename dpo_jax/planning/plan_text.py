"""What the planner found, in words."""

import dataclasses

import jax

from dpo_jax import flops, hardware, model, partitioning
from dpo_jax.planning import compiling, compiling_answers, mean_items, roofline
from dpo_jax.running import recipe

# Pairs of HH's training split, all four subsets.
HH_PAIRS = 160_800


def training(
  config: recipe.TrainSettings,
  shape: model.ModelConfig,
  mesh: jax.sharding.Mesh,
  compiled: list[compiling.Compiled],
  rows: int,
) -> str:
  """A training run's programs, and an estimate of an epoch."""
  device = mesh.devices.flat[0]
  chip = hardware.chip(device.device_kind)
  mean = mean_items.lengths(config)
  lines = [
    f"{mesh.size} x {device.device_kind}, mesh {dict(mesh.shape)};"
    f" {rows} row(s) of {config.row_length} tokens a device, in"
    f" {config.microbatches} micro-batch(es)",
    f"batches of {config.batch_size}, by HH's means: {mean.tokens:.0f} tokens,"
    f" {mean.completion:.0f} of them predicted, in {mean.places:.0f} places",
  ]
  widest = mean_items.widest_rows(
    config,
    config.batch_size // config.microbatches,
    partitioning.data_shards(mesh),
  )
  if widest > rows:
    lines.append(
      f"the widest batches of a run take about {widest} row(s) a device"
    )
  eval_rows = mean_items.eval_rows(config, mesh)
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
    lines += program(one, chip, mend)
  train = next((c for c in compiled if c.name == "train" and c.cost), None)
  # Why it is None was said in its own lines.
  if train is None:
    return "\n".join(lines)
  if chip is None:
    return "\n".join([*lines, _no_times(device)])
  return "\n".join([*lines, *_epoch(config, shape, mesh, train, chip)])


def _epoch(config, shape, mesh, train, chip) -> list[str]:
  useful = useful_flops(config, shape)
  found = roofline.estimate(train.cost, chip)
  lines = [
    _assumptions(chip),
  ]
  for name, seconds in (
    ("hidden as compiled", found.best),
    ("nothing hidden", found.worst),
    (f"the same at {roofline.EFFICIENCY:.0%} of the peaks", found.planned),
  ):
    hours = HH_PAIRS / config.batch_size * seconds / 3600
    share = hardware.mfu(useful, seconds, mesh.size, chip)
    lines.append(
      f"  {name}: {seconds:.4g} s a step, {config.batch_size / seconds:.4g}"
      f" items/s, MFU {share:.1%}, {hours:.3g} hours and"
      f" {hours * mesh.size:.3g} device-hours for {HH_PAIRS:,} items"
    )
  return lines


def useful_flops(
  config: recipe.TrainSettings, shape: model.ModelConfig
) -> float:
  """Useful flops of an update, by the means that stand for its items."""
  mean = mean_items.lengths(config)
  work = flops.Work(
    *(
      config.batch_size * x
      for x in (mean.tokens, mean.completion, mean.visible)
    )
  )
  computes = config.objective == "dpo" and not config.precompute_reference
  return flops.step(shape, work, reference=computes)


def answers(
  found: compiling_answers.Answering, mesh: jax.sharding.Mesh, name: str
) -> str:
  """A sampling run's programs, and how fast they could decode."""
  device = mesh.devices.flat[0]
  chip = hardware.chip(device.device_kind)
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
  for one in found.programs:
    lines += program(
      one, chip, "Try fewer rows, --answers with another file, or its mesh"
    )
  decode = next((c for c in found.programs if c.name == "decode"), None)
  if decode is None or decode.cost is None:
    return "\n".join(lines)
  least = found.least_bytes
  lines.append(
    f"a call of decode is {found.steps} steps here; each must read"
    f" {least / 1e9:.4g} GB a device: the weights but for the embedding, and"
    " keys and values of rows at their full length"
  )
  if chip is None:
    return "\n".join([*lines, _no_times(device)])
  lines.append(_assumptions(chip))
  compiled = roofline.estimate(decode.cost, chip)
  for what, seconds in (
    ("those bytes alone", least / chip.hbm_bandwidth),
    ("as compiled", compiled.best / found.steps),
    (
      f"nothing hidden, at {roofline.EFFICIENCY:.0%} of the peaks",
      compiled.planned / found.steps,
    ),
  ):
    lines.append(
      f"  {what}: {1e3 * seconds:.3g} ms a step,"
      f" {layout.size / seconds:,.0f} tokens/s of {layout.size} rows"
    )
  return "\n".join(lines)


def program(
  one: compiling.Compiled, chip: hardware.Chip | None, mend: str
) -> list[str]:
  """One program's bytes, flops and traffic, or that it does not fit."""
  memory, cost = one.memory, one.cost
  if memory is None or (chip and memory.total > chip.hbm_bytes):
    why = one.refusal
    if memory is not None:
      why = f"{_gib(memory.total)} of {_gib(chip.hbm_bytes)} GiB a device"
    return [f"{one.name}: DOES NOT FIT ({why}). {mend}"]
  room = f" of {_gib(chip.hbm_bytes)}" if chip else ""
  parts = ", ".join(
    f"{field.name} {_gib(getattr(memory, field.name))}"
    for field in dataclasses.fields(memory)
  )
  needs = f"{one.name}: {_gib(memory.total)}{room} GiB a device ({parts});"
  if cost is None:
    return [
      f"{needs} compiled in {one.seconds:.0f} s",
      "  no flops, traffic or times: XLA cannot read the compiled program"
      f" ({one.unread})",
    ]
  lines = [
    f"{needs} {cost.flops:.4g} flops and {cost.bytes:.4g} bytes a device;"
    f" compiled in {one.seconds:.0f} s"
  ]
  if one.twin:
    lines.append(
      "  all but the bytes a device is of a twin whose scatters stay off the"
      " SparseCores: XLA cannot read the program itself"
    )
  for kind, (times, sent) in cost.traffic().items():
    lines.append(f"  {kind}: {times:.0f} times, {sent / 1e6:,.1f} MB sent")
  if cost.sent:
    share = cost.sent_meanwhile / cost.sent
    lines.append(
      f"  of which {share:.0%} begun early, beside other work"
      if cost.sent_meanwhile
      else "  none of it beside other work"
    )
  return lines


def _assumptions(chip) -> str:
  return (
    "estimate, not measured: every instruction at the peak of what bounds it"
    f" ({chip.bf16_flops / 1e12:.0f} Tflop/s, of float32"
    f" {chip.float32_flops / 1e12:.0f}, {chip.hbm_bandwidth / 1e9:.0f} GB/s),"
    f" {chip.link_bandwidth / 1e9:.0f} GB/s of links; a host that is"
    " never waited for"
  )


def _no_times(device) -> str:
  return f"no times: {device.device_kind!r} is not in dpo_jax/hardware.py"


def _gib(number: float) -> str:
  return f"{number / hardware.GIB:.2f}"
