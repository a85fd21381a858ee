"""The smallest v5e slice for DPO of each Pythia, from real compilations.

  python -m benchmarks.scaling --output=scaling.jsonl
  python -m benchmarks.scaling --table=scaling.jsonl

The first compiles the training step of configs/dpo.py with batches of 64 pairs
for slices of 1, 4, 8, 16 and 32 chips, smallest first, until one fits, for each
size and recipe; a minute or two each. Lines are appended to the file and what
is there is skipped, so that it can be made in pieces: --size and --kind choose.
The second prints the table of benchmarks/scaling.md. Nothing runs on a TPU.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import time

import jax

from configs import dpo, models
from dpo_jax.core import hardware, settings, sharding
from dpo_jax.plan import compile_training, mean_batch, topology
from dpo_jax.training import config, step

KINDS = ("lora", "full")
# Weights are split over up to 16 chips; 64 pairs have 14 rows, and would leave
# more of them idle. Beyond, heads and the MLP are split by two.
SLICES = {
  "v5e:1x1": (1, 1),
  "v5e:2x2": (4, 1),
  "v5e:2x4": (8, 1),
  "v5e:4x4": (16, 1),
  "v5e:4x8": (16, 2),
}
BATCH = 64
# Rows of a device and micro-batch, at most.
ROWS = 2


def run_of(size: str, kind: str, shards: int) -> config.TrainSettings:
  """The recipe, in the fewest micro-batches of at most two rows a device."""
  c = dpo.get_config(f"pythia-{size}" + ("-lora" if kind == "lora" else ""))
  c.batch_size = c.eval_batch_size = BATCH
  # Those of the recipes for accelerators, for the smallest sizes too.
  c.model.dtype, c.model.remat, c.model.attention = "bfloat16", "full", "dense"
  c.model.logit_chunk, c.model.vocab_tile = 1024, 0
  c.precompute_reference = False
  c.microbatches = 1
  run = settings.build(config.TrainSettings, c.to_dict())
  while mean_batch.rows_of(run, BATCH // run.microbatches, shards) > ROWS:
    run = dataclasses.replace(run, microbatches=2 * run.microbatches)
  return run


def compile_for(size: str, kind: str, name: str) -> dict:
  """What the compiler says of one size on one slice."""
  fsdp, tensor = SLICES[name]
  devices = topology.devices(name)
  mesh = sharding.make_mesh(1, fsdp, tensor, devices=devices)
  chip = hardware.chip(devices[0].device_kind)
  run = run_of(size, kind, fsdp)
  shape = compile_training.shape_of(run, size)
  rows = mean_batch.rows_of(run, BATCH // run.microbatches, fsdp)
  (found,) = compile_training.compile_steps(run, shape, mesh, rows, ("train",))
  row = {
    "size": size,
    "kind": kind,
    "slice": name,
    "devices": len(devices),
    "mesh": dict(mesh.shape),
    "rows": rows,
    "microbatches": run.microbatches,
    "hbm_bytes": chip.hbm_bytes,
    "refusal": found.refusal,
    "trains": step.trainable(shape),
    "versions": {
      name: importlib.metadata.version(name) for name in ("jax", "libtpu")
    },
  }
  if found.memory is None:
    return row
  return row | {
    "memory": dataclasses.asdict(found.memory),
    "total_bytes": found.memory.total,
  }


def smallest(size: str, kind: str, first: str, output: pathlib.Path) -> None:
  """Compiles for ever larger slices and notes each, to the first that fits."""
  names = list(SLICES)
  for name in names[names.index(first) :]:
    started = time.perf_counter()
    row = compile_for(size, kind, name)
    with output.open("a") as file:
      file.write(json.dumps(row) + "\n")
    took = time.perf_counter() - started
    said = row["refusal"] or f"{row['total_bytes'] / hardware.GIB:.2f} GiB"
    print(f"{size} {kind} {name}: {said} ({took:.0f} s)", flush=True)
    if fits(row):
      return
  raise SystemExit(f"{size} {kind} fits none of {names}")


def fits(row: dict) -> bool:
  return not row["refusal"] and row["total_bytes"] <= row["hbm_bytes"]


def table(rows: list[dict]) -> str:
  """The smallest slice of each size and kind, as Markdown."""
  lines = [
    "| model | trained | smallest slice | GiB a chip, of 15.75 |",
    "|---" * 4 + "|",
  ]
  for size in models.PYTHIA:
    for kind in KINDS:
      own = [r for r in rows if (r["size"], r["kind"]) == (size, kind)]
      row = next((r for r in own if fits(r)), None)
      if row is None:
        continue
      lines.append(
        f"| {size} | {'LoRA' if kind == 'lora' else 'all'} | {row['slice']}"
        f" | {row['total_bytes'] / hardware.GIB:.2f} |"
      )
  return "\n".join(lines)


def read(path: pathlib.Path) -> list[dict]:
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--output", type=pathlib.Path)
  parser.add_argument("--table", type=pathlib.Path)
  parser.add_argument("--size", action="append", choices=list(models.PYTHIA))
  parser.add_argument("--kind", action="append", choices=KINDS)
  parser.add_argument("--first", default="v5e:1x1", choices=list(SLICES))
  flags = parser.parse_args()
  if flags.table:
    return print(table(read(flags.table)))
  if not flags.output:
    parser.error("--output or --table is missing")
  # Shapes are made here, programs for devices that are elsewhere.
  jax.config.update("jax_platforms", "cpu")
  for size in flags.size or models.PYTHIA:
    for kind in flags.kind or KINDS:
      done = [
        r
        for r in read(flags.output)
        if (r["size"], r["kind"]) == (size, kind) and fits(r)
      ]
      if not done:
        smallest(size, kind, flags.first, flags.output)


if __name__ == "__main__":
  main()
