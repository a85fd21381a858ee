"""Updates of the product's own step on one accelerator, for benchmarks/gpu.py.

Useful flops are those of unpadded tokens, recomputation not counted
(dpo_jax/model/flops.py).
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks import gpu_case
from dpo_jax.core import sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import batch_shapes, loader, packing, token_table
from dpo_jax.model import attention, flops, gpt_neox
from dpo_jax.training import config, optimizer, reference, setup, step

# Updates left out of the times.
WARM = 2


def measure(flags: argparse.Namespace) -> dict:
  """What the updates did, and how fast.

  Raises:
    ValueError: the device, or the model, cannot run this attention.
  """
  run = gpu_case.config(flags, flags.attention)
  shape, mesh = gpu_case.shape_of(flags, run), gpu_case.alone()
  attention.check(
    shape.attention,
    mesh.devices.flat[0],
    dtype=shape.dtype,
    head_dim=shape.head_dim,
    row_length=run.row_length,
  )
  table = gpu_case.pairs(flags.steps * run.batch_size, shape.vocab_size)
  base, _ = gpu_case.weights(run, shape)
  ready = packed(flags, run, shape, table, base)
  tx = optimizer.make(run.optimizer, flags.steps, step.trainable(shape))
  start = jax.jit(setup.initial_state(shape, tx), donate_argnums=0)
  state = start(base, None, jax.random.key(1))
  update, _ = setup.jit_steps(
    shape, run.step_objective(), run.eval_batch_size, tx, run.seed, state, mesh
  )
  seconds, losses = [], []
  with jax.set_mesh(mesh):
    # Each shape is compiled before the clock starts.
    shapes = {str(jax.tree.map(jnp.shape, batch)): batch for batch, _ in ready}
    compiled = setup.compile_ahead(update, (state, None), shapes.values())
    if flags.profile:
      jax.profiler.start_trace(str(flags.profile / flags.attention))
    for number, (batch, _) in enumerate(ready):
      started = time.perf_counter()
      state, values = compiled(state, None, batch)
      losses.append(float(values["loss"]))
      seconds.append(time.perf_counter() - started)
      if number == 2 and flags.profile:
        jax.profiler.stop_trace()
  if abs(losses[0] - math.log(2)) > 1e-2:
    raise ValueError(f"the loss of step 0 is {losses[0]}, not ln 2")
  counts = [counts for _, counts in ready]
  return {
    **rates(shape, run.batch_size, counts[WARM:], seconds[WARM:]),
    "step_seconds": seconds,
    "losses": losses,
    "shapes": sorted({str(batch.tokens.shape) for batch, _ in ready}),
    "peak_bytes": peak_memory(),
  }


def packed(
  flags: argparse.Namespace,
  run: config.TrainSettings,
  shape: gpt_neox.ModelConfig,
  table: token_table.Table,
  base,
) -> list[tuple[batch_lib.Batch, batch_lib.Counts]]:
  """The updates' batches on the device, the reference's log-probs kept."""
  mesh = gpu_case.alone()
  order = gpu_case.schedule(flags, table)
  how = packing.Packing(
    layout=run.data.layout,
    row_length=run.row_length,
    shards=1,
    microbatches=run.microbatches,
    loss_on_prompt=False,
    pad_id=1,
    spans_rows=run.spans_rows,
  )
  group = run.batch_size // run.microbatches
  how = batch_shapes.choose(
    table, how, map(order.items, range(flags.steps)), run.data.shapes
  )
  logps = reference.token_logps(shape, base, None, table, how, group, mesh)
  kept = reference.spread(table, logps)
  stream = loader.stream(
    table, order, how, start_step=0, steps=flags.steps, reference=kept
  )
  return [
    (sharding.put(batch, mesh, leading=1), counts) for batch, counts in stream
  ]


def rates(
  shape: gpt_neox.ModelConfig,
  batch_size: int,
  counts: Sequence[batch_lib.Counts],
  seconds: Sequence[float],
) -> dict:
  """Of updates that held `counts` and took `seconds`, each a sequence."""
  took = sum(seconds)
  work = flops.Work(
    sum(c.tokens for c in counts),
    sum(c.completion_tokens for c in counts),
    sum(c.visible for c in counts),
  )
  pairs = batch_size * len(counts)
  return {
    "pairs_per_second": pairs / took,
    "tokens_per_second": work.tokens / took,
    "tokens_a_pair": work.tokens / pairs,
    "row_fill": work.tokens / sum(c.slots for c in counts),
    "useful_flops_per_second": (
      flops.step(shape, work, reference=False) / took
    ),
    "median_step_seconds": statistics.median(seconds),
  }


def peak_memory() -> int | None:
  """Bytes in use at most so far; None where the device does not tell."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use")
