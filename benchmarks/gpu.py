"""DPO with LoRA and sampling on one accelerator, against what it can do.

  python -m benchmarks.gpu --output=gpu.json
  python -m benchmarks.gpu --size=tiny --output=tiny.json

The second is a check of this script on any machine. Nothing is downloaded:
weights are random, and tokens are random in the real lengths of HH's pairs,
which stand in benchmarks/hh_lengths.csv (prompt, chosen, rejected; harmless-
base, profile "paper", 512 tokens). What is measured, all in one process:

- the rate of a dense bfloat16 matrix product and of copying memory, the best of
  several: the peaks that the rest is compared with;
- updates of configs/dpo.py's LoRA recipe with the reference's log-probs kept,
  through the product's own step, packing and feed: pairs and tokens a second,
  and MFU: useful flops of unpadded tokens (dpo_jax/flops.py, recomputation not
  counted) over the measured rate. The first loss must be ln 2;
- answers of 256 tokens to real prompt lengths through the product's own
  sampler: tokens a second, against the time to read all weights but the
  embedding and every row's keys and values once a step at the measured rate;
- peak memory after each, where the device tells;
- with --trl=PYTHON, the same updates by TRL in that Python (that of an
  environment with trl, peft and a GPU build of torch), as a ratio.

--profile=DIR also writes a trace of three updates and of one wave of answers.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import dpo, models, sample
from dpo_jax import (
  batches,
  compiling,
  flops,
  grid,
  hf,
  kv_cache,
  model,
  optim,
  partitioning,
  placement,
  programs,
  recipe,
  reference,
  sampling,
  settings,
  steps,
  tables,
  tokenizer,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
LENGTHS = pathlib.Path(__file__).with_name("hh_lengths.csv")
# Sizes of configs/models.py, and one for a check of this script.
TINY = model.ModelConfig(
  vocab_size=512,
  width=64,
  layers=2,
  heads=4,
  mlp_width=128,
  rotary_fraction=0.25,
  rotary_base=10000.0,
  norm_eps=1e-5,
  max_positions=2048,
)
# Updates left out of the times.
WARM = 2


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument(
    "--size", default="2.8b", choices=["tiny", *models.PYTHIA]
  )
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--microbatches", type=int, default=4)
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--rows", type=int, default=128, help="answers at once")
  parser.add_argument("--new_tokens", type=int, default=256)
  parser.add_argument("--set", default="{}", help="settings, as JSON")
  parser.add_argument("--trl", default="")
  parser.add_argument(
    "--trl_flags", default="--micro_batch=8 --padding_free --device=gpu"
  )
  parser.add_argument("--profile", type=pathlib.Path)
  parser.add_argument("--case", type=pathlib.Path, help="made for --trl")
  flags = parser.parse_args()
  if flags.steps <= WARM:
    parser.error(f"--steps={flags.steps} must be more than {WARM}")
  if flags.trl:
    return both(flags)
  print(json.dumps(ours(flags), indent=2))


def ours(flags: argparse.Namespace) -> dict:
  """All measurements but TRL's, also written to --output."""
  found = {"flags": {k: str(v) for k, v in vars(flags).items()}}
  found["device"] = jax.devices()[0].device_kind
  found["versions"] = {
    name: importlib.metadata.version(name) for name in ("jax", "jaxlib")
  }
  small = flags.size == "tiny"
  found["matmul_flops"] = matmul_rate(512 if small else 8192)
  found["copy_bytes"] = copy_rate(2**20 if small else 2**31)
  run = config(flags)
  shape = shape_of(flags, run)
  found["training"] = train(flags, run, shape, found["matmul_flops"])
  found["sampling"] = answer(flags, shape, found["copy_bytes"])
  flags.output.write_text(json.dumps(found, indent=2) + "\n")
  return found


def both(flags: argparse.Namespace) -> None:
  """Ours in a child, which gives the device's memory back, and then TRL."""
  with tempfile.TemporaryDirectory() as case:
    own = [a for a in sys.argv[1:] if not a.startswith("--trl")]
    command = [sys.executable, "-m", "benchmarks.gpu", *own, f"--case={case}"]
    subprocess.run(command, check=True, cwd=ROOT)
    found = json.loads(flags.output.read_text())
    found["trl"] = trl(flags, pathlib.Path(case), found["training"])
  flags.output.write_text(json.dumps(found, indent=2) + "\n")
  print(json.dumps(found["trl"], indent=2))


def best(run, repeats: int = 5) -> float:
  """The least seconds of one call, the first left out."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - started)
  return min(times)


def matmul_rate(size: int) -> float:
  """Flops a second of [size, size] products in bfloat16, ten in one call."""
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

  @jax.jit
  def many(x):
    return jax.lax.fori_loop(0, 10, lambda _, y: (x @ y) * 0.01, x)

  return 10 * 2 * size**3 / best(lambda: many(x))


def copy_rate(size: int) -> float:
  """Bytes a second, read and written, of copying `size` bytes."""
  x = jnp.zeros((size // 2,), jnp.bfloat16)
  copy = jax.jit(lambda x: x + 1)
  return 2 * size / best(lambda: copy(x))


def config(flags: argparse.Namespace) -> recipe.TrainSettings:
  """The LoRA recipe of configs/dpo.py; its memory is what --set is for."""
  size = "14m" if flags.size == "tiny" else flags.size
  c = dpo.get_config(f"pythia-{size}-lora")
  c.batch_size = c.eval_batch_size = flags.batch_size
  c.microbatches = flags.microbatches
  c.model.dtype = c.model.param_dtype = "bfloat16"
  c.model.remat, c.model.attention = "full", "dense"
  c.precompute_reference = True
  # As TRL has it unless told otherwise.
  c.lora.dropout = 0.0
  c.optimizer.schedule, c.optimizer.warmup_steps = "constant", 0
  with c.unlocked():
    c.update_from_flattened_dict(json.loads(flags.set))
  return settings.build(recipe.TrainSettings, c.to_dict())


def shape_of(flags, run) -> model.ModelConfig:
  found = compiling.shape_of(run, "14m" if flags.size == "tiny" else flags.size)
  if flags.size != "tiny":
    return found
  return dataclasses.replace(
    TINY,
    dtype=found.dtype,
    remat=found.remat,
    lora=found.lora,
    attention=found.attention,
  )


def pairs(count: int, words: int) -> tables.Table:
  """Random tokens in the lengths of real pairs, over and over."""
  lengths = np.loadtxt(LENGTHS, int, delimiter=",", skiprows=1)
  rng = np.random.default_rng(0)
  order = rng.permutation(len(lengths))
  chosen = lengths[order[np.arange(count) % len(lengths)]]
  return tables.from_items(
    [
      tables.Pair(
        f"pair-{i}",
        *(tuple(map(int, rng.integers(2, words, size))) for size in sizes),
      )
      for i, sizes in enumerate(chosen)
    ]
  )


def train(flags, run, shape, peak):
  """What the updates of the product's own step did, and how fast."""
  mesh = partitioning.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  programs.check(run, shape, mesh)
  table = pairs(flags.steps * run.batch_size, shape.vocab_size)
  schedule = batches.Schedule((len(table),), (1.0,), run.batch_size, 0, 1)
  how = placement.Packing(
    layout=run.data.layout,
    row_length=run.row_length,
    shards=1,
    microbatches=run.microbatches,
    loss_on_prompt=False,
    pad_id=1,
    runs_on=run.runs_on,
  )
  one = dataclasses.replace(how, microbatches=1)
  group = run.batch_size // run.microbatches
  one = placement.settled(table, one, batches.consecutive(len(table), group), 1)
  how = placement.settled(
    table, how, map(schedule.items, range(flags.steps)), run.data.shapes
  )
  base, adapters = weights(run, shape, mesh)
  packed = batches.in_order(table, one, batch_size=group)
  kept = reference.spread(table, reference.compute(shape, base, packed, mesh))
  tx = optim.make(run.optimizer, flags.steps, steps.trainable(shape))
  start = jax.jit(programs.initial(shape, tx, run.guards), donate_argnums=0)
  if flags.case:
    write_case(flags, run, shape, base, adapters, table, schedule)
  state = start(base, jax.random.key(1))
  update, _ = programs.training(run, shape, tx, state, mesh)
  stream = batches.stream(
    table, schedule, how, start_step=0, steps=flags.steps, reference=kept
  )
  ready = [
    (partitioning.place(batch, mesh, leading=1), counts)
    for batch, counts in stream
  ]
  seconds, losses = [], []
  with jax.set_mesh(mesh):
    # Each shape is compiled before the clock starts.
    compiled = {
      shape: update.lower(state, None, batch).compile()
      for shape, batch in {b.tokens.shape: b for b, _ in ready}.items()
    }
    if flags.profile:
      jax.profiler.start_trace(str(flags.profile / "training"))
    for number, (batch, _) in enumerate(ready):
      started = time.perf_counter()
      state, values = compiled[batch.tokens.shape](state, None, batch)
      losses.append(float(values["loss"]))
      seconds.append(time.perf_counter() - started)
      if number == 2 and flags.profile:
        jax.profiler.stop_trace()
  if abs(losses[0] - math.log(2)) > 1e-2:
    raise SystemExit(f"the loss of step 0 is {losses[0]}, not ln 2")
  counts = [counts for _, counts in ready][WARM:]
  took = sum(seconds[WARM:])
  work = flops.Work(
    sum(c.tokens for c in counts),
    sum(c.completion_tokens for c in counts),
    sum(c.visible for c in counts),
  )
  useful = flops.step(shape, work, reference=False)
  pairs_done = run.batch_size * len(counts)
  return {
    "pairs_per_second": pairs_done / took,
    "tokens_per_second": work.tokens / took,
    "tokens_a_pair": work.tokens / pairs_done,
    "row_fill": work.tokens / sum(c.slots for c in counts),
    "mfu_of_measured_rate": useful / took / peak,
    "median_step_seconds": statistics.median(seconds[WARM:]),
    "step_seconds": seconds,
    "losses": losses,
    "shapes": sorted({str(b.tokens.shape) for b, _ in ready}),
    "peak_bytes": peak_memory(),
  }


def weights(run, shape, mesh):
  """Random weights, made on the device in what they are kept in."""
  kept = run.model.param_dtype
  make = jax.jit(
    lambda key: model.init(shape, key, kept),
    out_shardings=partitioning.shardings(
      jax.eval_shape(lambda: model.init(shape, jax.random.key(0), kept)), mesh
    ),
  )
  # Those of `programs.initial` with the same key.
  return make(jax.random.key(0)), model.init_lora(shape, jax.random.key(1))


def peak_memory() -> int | None:
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use")


def small_tokenizer(directory) -> tokenizer.Tokenizer:
  """Its text is of no matter here; its ids are the model's first ones."""
  texts = ["\n\nHuman: Hello there!\n\nAssistant: Good day to you."] * 3
  return tokenizer.train(texts, 300, directory)


def answer(flags, shape, copy_bytes):
  """Tokens a second of one wave of rows that all enter together."""
  c = sample.get_config("paper")
  c.batch_size, c.max_new_tokens = flags.rows, flags.new_tokens
  c.cache_gib = 64.0
  how = settings.build(grid.AnswerSettings, c.to_dict())
  mesh = partitioning.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  shape = dataclasses.replace(shape, dtype=how.dtype, lora=None)
  base = jax.jit(lambda key: model.init(shape, key, how.dtype))(
    jax.random.key(0)
  )
  sizes = np.loadtxt(LENGTHS, int, delimiter=",", skiprows=1)[:, 0]
  rng = np.random.default_rng(1)
  sizes = np.minimum(rng.choice(sizes, flags.rows), c.max_prompt_tokens)
  with tempfile.TemporaryDirectory() as directory:
    words = small_tokenizer(pathlib.Path(directory))
  requests = [
    sampling.Request(
      prompt=tuple(map(int, rng.integers(2, 250, size))),
      stream=i,
      sample_id=0,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      max_new_tokens=flags.new_tokens,
    )
    for i, size in enumerate(sizes)
  ]

  def wave():
    tokens = 0
    for ended in sampling.generate(
      shape, base, None, words, requests, how.engine(), mesh
    ):
      tokens += sum(len(one.tokens) for _, one in ended)
    return tokens

  wave()
  if flags.profile:
    with jax.profiler.trace(str(flags.profile / "sampling")):
      wave()
  times, tokens = [], 0
  for _ in range(3):
    started = time.perf_counter()
    tokens = wave()
    times.append(time.perf_counter() - started)
  least = floor_bytes(shape, base, sizes, flags.new_tokens, how.engine().cache)
  seconds = statistics.median(times)
  return {
    "rows": flags.rows,
    "tokens": tokens,
    "tokens_per_second": tokens / seconds,
    "seconds": times,
    "floor_bytes": least,
    "floor_seconds": least / copy_bytes,
    "share_of_floor": least / copy_bytes / seconds,
    "peak_bytes": peak_memory(),
  }


def floor_bytes(shape, base, sizes, new_tokens, cache) -> int:
  """Bytes that `new_tokens` steps must read, if no row ends early."""
  read = sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves({k: v for k, v in base.items() if k != "embed"})
  )
  slot = kv_cache.bytes_of(shape.layers, shape.heads, 1, shape.head_dim, cache)
  slots = sum(int(size) + step for size in sizes for step in range(new_tokens))
  return new_tokens * read + slots * slot


def write_case(flags, run, shape, base, adapters, table, schedule):
  """Model, adapters and token ids as benchmarks/dpo_step_trl.py reads them."""
  case = flags.case
  words = small_tokenizer(case / "tokenizer")
  hf.export(case / "model", shape, base, words)
  hf.export_adapter(
    case / "adapter", shape, adapters, str(case / "model"), base
  )
  updates = [
    [
      [list(map(int, part)) for part in (p.prompt, p.chosen, p.rejected)]
      for p in table.take(schedule.items(step))
    ]
    for step in range(flags.steps)
  ]
  text = {
    "model": str(case / "model"),
    "max_length": run.data.max_length,
    "settings": dataclasses.asdict(run.optimizer)
    | dataclasses.asdict(run.lora)
    | {"beta": run.loss.beta},
    "steps": updates,
  }
  (case / "case.json").write_text(json.dumps(text))


def trl(flags, case, ours):
  """The same updates by TRL, in a process of its own."""
  output = case / "trl.json"
  command = [
    *shlex.split(flags.trl),
    str(ROOT / "benchmarks" / "dpo_step_trl.py"),
    f"--case={case}",
    f"--output={output}",
    f"--threads={os.cpu_count()}",
    "--attention=sdpa",
    *shlex.split(flags.trl_flags),
  ]
  subprocess.run(command, check=True)
  found = json.loads(output.read_text())
  took = sum(found["seconds"][WARM:])
  speed = flags.batch_size * (flags.steps - WARM) / took
  return found | {
    "pairs_per_second": speed,
    "ours_is_so_many_times_as_fast": ours["pairs_per_second"] / speed,
  }


if __name__ == "__main__":
  main()
