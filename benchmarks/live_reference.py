"""What it is worth that policy and reference share a pass of the base.

  JAX_NUM_CPU_DEVICES=8 python -m benchmarks.live_reference --layers=4
  python -m benchmarks.live_reference --topology=v5e:2x4 --layers=4
  python -m benchmarks.live_reference --model=DIR --pairs=FILE

All compare the steps of LoRA DPO whose reference is computed as they go, as
they are and with a pass for each of the two. The first two compile them, for
this machine's devices or for a slice that need not be there: Pythia-2.8B with
so many layers, weights split over all devices. The third runs the training step
here in turn, and gives the ratio of processor times; DIR is a model in Hugging
Face form with its tokenizer, FILE a JSONL of pairs, as HH's own files are.
"""

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from unittest import mock

import jax

from benchmarks import dpo_step_jax
from configs import dpo
from dpo_jax.core import settings, sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import dataset, packing, tokenizer
from dpo_jax.plan import compile_training, mean_batch, topology
from dpo_jax.training import config as config_lib
from dpo_jax.training import optimizer, setup
from dpo_jax.training import step as step_lib

PASSES = ("apart", "shared")


def apart(config, base, lora, batch, dropout_key=None):
  """`step.both_token_stats` as two passes: the slow twin."""
  policy = step_lib.token_stats(config, base, lora, batch, dropout_key)
  reference = step_lib.token_stats(config, base, None, batch)
  return policy, jax.lax.stop_gradient(reference)


@contextlib.contextmanager
def passes(how: str) -> Iterator[None]:
  """While steps are made and traced: "shared", or "apart"."""
  if how == "shared":
    yield
    return
  with mock.patch.object(step_lib, "both_token_stats", apart):
    yield


def compiled(flags: argparse.Namespace) -> None:
  devices = topology.devices(flags.topology)
  mesh = sharding.make_mesh(
    1, len(devices) // flags.tensor, flags.tensor, devices=devices
  )
  print(
    f"{devices[0].device_kind}, fsdp={mesh.shape['fsdp']},"
    f" tensor={flags.tensor}, {flags.layers} layers,"
    f" {flags.rows} row(s) a device, remat={flags.remat}"
  )
  print("| base | step | passes | MiB held |")
  print("|---" * 4 + "|")
  c = dpo.get_config("pythia-2.8b-lora")
  c.microbatches = 1
  # As many as fill the rows.
  places = flags.rows * sharding.data_shards(mesh) * c.data.row_length
  c.eval_batch_size = int(places / mean_batch.PAIRS[c.data.layout].places)
  c.model.remat = flags.remat
  for kept in flags.kept.split(","):
    c.model.param_dtype = kept
    run = settings.build(config_lib.TrainSettings, c.to_dict())
    shape = compile_training.shape_of(run, "2.8b")
    shape = dataclasses.replace(shape, layers=flags.layers)
    for how in flags.passes.split(","):
      with passes(how):
        found = compile_training.compile_steps(
          run, shape, mesh, flags.rows, tuple(flags.steps.split(","))
        )
      for one in found:
        held = one.memory.temporary / 2**20
        print(f"| {kept} | {one.name} | {how} | {held:.0f} |", flush=True)


def timed(flags: argparse.Namespace) -> None:
  flags.steps, flags.child, flags.set = 1, "", "{}"
  run = dpo_step_jax.config(flags)
  run = dataclasses.replace(
    run,
    precompute_reference=False,
    model=dataclasses.replace(
      run.model, param_dtype=flags.kept, remat=flags.remat
    ),
  )
  items = dataset.prepare(run.data, "dpo", tokenizer.load(run.tokenizer))
  shape, base = dpo_step_jax.load(run)
  shape = dataclasses.replace(
    shape,
    attention=run.model.attention,
    logit_chunk=run.model.logit_chunk,
  )
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  tx = optimizer.make(run.optimizer, 9, "lora")
  state = setup.initial_state(shape, tx)(base, None, jax.random.key(0))
  pairs = items.train.table.take(range(run.batch_size))
  how = packing.Packing(
    layout=run.data.layout,
    row_length=run.row_length,
    shards=1,
    microbatches=1,
    loss_on_prompt=False,
    pad_id=0,
    spans_rows=run.spans_rows,
  )
  batch = sharding.put(batch_lib.pack(pairs, how)[0], mesh, leading=1)
  objective = step_lib.Objective("dpo", run.loss, run.batch_size)
  made = {}
  for how in PASSES:
    with passes(how):
      step = step_lib.make_train_step(shape, objective, tx, 0)
      step = jax.jit(step, compiler_options=step_lib.COMPILER_OPTIONS)
      made[how] = step.lower(state, None, batch).compile()
    print(how, made[how].memory_analysis().temp_size_in_bytes / 2**20, "MiB")
  spent = {how: [] for how in made}
  for _ in range(flags.repeats):
    for how, step in made.items():
      started = time.process_time()
      jax.block_until_ready(step(state, None, batch))
      spent[how].append(time.process_time() - started)
  for how, seconds in spent.items():
    print(
      f"{how}: best {min(seconds):.3f} s,"
      f" median {statistics.median(seconds):.3f} s"
    )
  ratios = [b / a for a, b in zip(spent["apart"], spent["shared"])]
  print(f"shared / apart: median {statistics.median(ratios):.3f}")


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--topology", default="", help="such as v5e:2x4")
  parser.add_argument("--layers", type=int, default=32)
  parser.add_argument("--rows", type=int, default=2, help="of a chip")
  parser.add_argument("--tensor", type=int, default=1, help="split of heads")
  parser.add_argument("--steps", default="train,eval")
  parser.add_argument("--passes", default=",".join(PASSES))
  parser.add_argument("--kept", default="float32", help="the base's dtype")
  parser.add_argument("--remat", default="full")
  parser.add_argument("--model")
  parser.add_argument("--pairs")
  parser.add_argument("--variant", default="pythia-14m")
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--repeats", type=int, default=9)
  flags = parser.parse_args()
  if flags.model and flags.pairs:
    return timed(flags)
  return compiled(flags)


if __name__ == "__main__":
  main()
