"""What a run will need, before a machine is rented for it.

  python -m dpo_jax.plan --topology=v5e:2x4 \\
    --config=configs/dpo.py:pythia-2.8b-lora --config.mesh.data=1 \\
    --config.mesh.fsdp=8

compiles the run's own training and evaluation step for a TPU slice that need
not be there, or without --topology for the devices that are, and prints bytes,
flops, traffic and an estimate of the time. Weights are neither read nor made:
everything is shapes. The items of a batch are not read either; what stands for
them is in `compiling`, the means of HH.
"""

import dataclasses
import pathlib
from typing import Any

import jax

from dpo_jax import (
  cli,
  compiling,
  console,
  flops,
  hardware,
  hlo,
  model,
  partitioning,
  recipe,
  settings,
  topology,
)

# Pairs of HH's training split, all four subsets.
HH_PAIRS = 160_800


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A roofline of one update, in seconds; no measurement.

  Attributes:
    compute: each instruction at the peak rate of what bounds it.
    links: sent bytes at the peak rate of a device's links.
  """

  compute: float
  links: float

  @property
  def best(self) -> float:
    """All traffic hidden behind the computation."""
    return max(self.compute, self.links)

  @property
  def worst(self) -> float:
    """None of it hidden."""
    return self.compute + self.links


def estimate(cost: hlo.Cost, chip: hardware.Chip) -> Estimate:
  sent = sum(number for _, number in cost.traffic().values())
  compute = cost.seconds(chip.bf16_flops, chip.hbm_bandwidth)
  return Estimate(compute, sent / chip.link_bandwidth)


def describe(
  config: recipe.TrainSettings,
  shape: model.ModelConfig,
  mesh: jax.sharding.Mesh,
  compiled: list[compiling.Compiled],
  rows: int,
) -> str:
  """The plan as text."""
  device = mesh.devices.flat[0]
  chip = hardware.chip(device.device_kind)
  mean = compiling.lengths(config)
  lines = [
    f"{mesh.size} x {device.device_kind}, mesh {dict(mesh.shape)};"
    f" {rows} row(s) of {config.data.row_length} tokens a device, in"
    f" {config.microbatches} micro-batch(es)",
    f"batches of {config.batch_size}, by HH's means: {mean.tokens:.0f} tokens,"
    f" {mean.completion:.0f} of them predicted, in {mean.places:.0f} places",
  ]
  for one in compiled:
    if one.memory is None:
      lines.append(
        f"{one.name}: DOES NOT FIT ({one.refusal}). Try a greater"
        " --config.mesh.fsdp or .tensor, or more --config.microbatches"
      )
      continue
    lines += _program(one, chip)
  train = next((c for c in compiled if c.name == "train" and c.cost), None)
  if train is None:
    return "\n".join(lines)
  if chip is None:
    lines.append(
      f"no times: {device.device_kind!r} is not in dpo_jax/hardware.py"
    )
    return "\n".join(lines)
  work = flops.Work(
    *(
      config.batch_size * x
      for x in (mean.tokens, mean.completion, mean.visible)
    )
  )
  computes = config.objective == "dpo" and not config.precompute_reference
  useful = flops.step(shape, work, reference=computes)
  found = estimate(train.cost, chip)
  lines.append(
    "estimate, not measured: every instruction at the peak of what bounds it"
    f" ({chip.bf16_flops / 1e12:.0f} Tflop/s, {chip.hbm_bandwidth / 1e9:.0f}"
    f" GB/s), {chip.link_bandwidth / 1e9:.0f} GB/s of links; the traffic hidden"
    " wholly, or not at all; a host that is never waited for"
  )
  for name, seconds in (("hidden", found.best), ("not", found.worst)):
    hours = HH_PAIRS // config.batch_size * seconds / 3600
    share = hardware.mfu(useful, seconds, mesh.size, chip)
    lines.append(
      f"  {name}: {seconds:.4g} s a step, {config.batch_size / seconds:.4g}"
      f" items/s, MFU {share:.1%}, {hours:.3g} hours and"
      f" {hours * mesh.size:.3g} device-hours for {HH_PAIRS:,} items"
    )
  return "\n".join(lines)


def _program(one: compiling.Compiled, chip: hardware.Chip | None) -> list[str]:
  memory, cost = one.memory, one.cost
  gib = {
    field.name: getattr(memory, field.name) / hardware.GIB
    for field in dataclasses.fields(memory)
  }
  room = f" of {chip.hbm_bytes / hardware.GIB:.2f}" if chip else ""
  parts = ", ".join(f"{name} {value:.2f}" for name, value in gib.items())
  lines = [
    f"{one.name}: {memory.total / hardware.GIB:.2f}{room} GiB a device"
    f" ({parts}); {cost.flops:.4g} flops and {cost.bytes:.4g} bytes a device;"
    f" compiled in {one.seconds:.0f} s"
  ]
  for kind, (times, sent) in cost.traffic().items():
    lines.append(f"  {kind}: {times:.0f} times, {sent / 1e6:,.1f} MB sent")
  return lines


def main(config: dict[str, Any], workdir: pathlib.Path, **options: Any) -> int:
  del workdir  # Nothing is written.
  built = settings.build(recipe.TrainSettings, config)
  shape = compiling.shape_of(built, options["model"])
  devices = topology.devices(options["topology"])
  mesh = partitioning.make_mesh(
    **dataclasses.asdict(built.mesh), devices=devices
  )
  shards = partitioning.data_shards(mesh)
  rows = compiling.rows_of(
    built, built.batch_size // built.microbatches, shards
  )
  compiled = compiling.compile_steps(built, shape, mesh, rows)
  console.result(describe(built, shape, mesh, compiled, rows))
  if options["search"]:

    def fits(count):
      items = (
        count * shards * built.data.row_length / compiling.lengths(built).places
      )
      wider = dataclasses.replace(
        built, batch_size=max(int(items), 1) * built.microbatches
      )
      (one,) = compiling.compile_steps(wider, shape, mesh, count, ("train",))
      return one.memory is not None

    most = compiling.largest_rows(fits, rows, options["search"])
    items = int(
      most * shards * built.data.row_length / compiling.lengths(built).places
    )
    console.result(
      f"at most {most} row(s) a device fit: {items} items a micro-batch"
    )
  return 0


if __name__ == "__main__":
  cli.run(
    main,
    example="configs/dpo.py",
    topology=("", "a TPU slice such as v5e:2x4; this machine by default"),
    model=("", "a size of configs/models.py, where the config names none"),
    search=(
      0,
      "find the most rows a device that fit, up to so many; 0: do not",
    ),
  )
