"""What the implementations of attention cost, forward and backward.

  python -m benchmarks.attention --topology=v5e:2x4
  python -m benchmarks.attention

With a topology, one chip's program is compiled for a TPU slice that need not be
there: bytes that it holds beside its arguments. Without one, the
implementations that this machine's first device can run are run and timed: the
best of several calls. Rows hold pairs of HH's mean lengths, prompts shared.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.model import attention
from dpo_jax.model.attention import flash
from dpo_jax.plan import compile_training, topology

# HH's means (dpo_jax/plan/mean_batch.py): a prompt and the two responses.
PAIR = (116, 46, 45)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--topology", default="", help="such as v5e:2x4")
  parser.add_argument("--rows", type=int, default=4)
  parser.add_argument("--length", type=int, default=1024)
  parser.add_argument("--heads", type=int, default=32)
  parser.add_argument("--head_dim", type=int, default=80)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--repeats", type=int, default=20)
  arguments = parser.parse_args()
  device = topology.devices(arguments.topology)[0]
  segments = rows_of_pairs(arguments.rows, arguments.length)
  visible = int(segments.mask().sum())
  print(
    f"{device.device_kind}: {arguments.rows} rows of {arguments.length} tokens,"
    f" {arguments.heads} heads of {arguments.head_dim}, {arguments.dtype};"
    f" {visible / arguments.rows / arguments.length**2:.1%} of the scores are"
    f" seen, {visited(segments):.1%} lie in blocks that flash visits"
  )
  for name in ("dense", "flash", "cudnn"):
    try:
      attention.check(
        name,
        device,
        dtype=arguments.dtype,
        head_dim=arguments.head_dim,
        row_length=arguments.length,
      )
    except ValueError as error:
      print(f"{name}: {error}")
      continue
    if arguments.topology:
      print(f"{name}: {compiled(name, arguments, device)}")
    else:
      print(f"{name}: {timed(name, arguments, segments)}")


def rows_of_pairs(rows: int, length: int) -> attention.Segments:
  """Rows full of pairs, with what is left as padding."""
  pieces, parts = np.zeros((2, rows, length), np.int32)
  for number in range(length // sum(PAIR)):
    at = number * sum(PAIR)
    for part, size in enumerate(PAIR):
      pieces[:, at : at + size] = number + 1
      parts[:, at : at + size] = part
      at += size
  return attention.Segments(jnp.asarray(pieces), jnp.asarray(parts))


def visited(segments: attention.Segments) -> float:
  """Which share of T x T lies in blocks of a TPU that see something."""
  rows = flash.plan(
    segments.segment_ids, segments.part_ids, segments.mask(), "mosaic"
  )
  size = flash.SIZES["mosaic"]
  count = rows.codes.shape[-1] // size
  listed = rows.keys[size].reshape(-1, count, count + 1)
  return float(jnp.mean(listed[:, :, 0])) / count


def gradient(name: str):
  """(q, k, v, gradient of the output, segments) -> output and gradients."""

  def step(q, k, v, above, segments):
    out, pull = jax.vjp(attention.bind(name, segments), q, k, v)
    return out, pull(above)

  return jax.jit(step)


def shapes(arguments, sharding=None):
  rows, length = arguments.rows, arguments.length
  heads, dim = arguments.heads, arguments.head_dim

  def one(*sizes, dtype=arguments.dtype):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  query, key = one(rows, length, heads, dim), one(rows, heads, length, dim)
  ids = one(rows, length, dtype=jnp.int32)
  return query, key, key, query, attention.Segments(ids, ids)


def compiled(name: str, arguments, device: jax.Device) -> str:
  """What the compiler says of one chip's program."""
  here = jax.sharding.SingleDeviceSharding(device)
  step = gradient(name)
  found = compile_training.compile_one(
    name, lambda: step.lower(*shapes(arguments, here))
  )
  if found.memory is None:
    return f"does not fit ({found.refusal})"
  return f"{found.memory.temporary / 2**20:,.1f} MiB held beside the arguments"


def timed(name: str, arguments, segments: attention.Segments) -> str:
  """The best time of a call on this machine's first device."""
  rng = np.random.default_rng(0)
  values = [
    jnp.asarray(rng.normal(size=one.shape), one.dtype)
    for one in shapes(arguments)[:4]
  ]
  step = gradient(name)
  jax.block_until_ready(step(*values, segments))
  best = float("inf")
  for _ in range(arguments.repeats):
    started = time.perf_counter()
    jax.block_until_ready(step(*values, segments))
    best = min(best, time.perf_counter() - started)
  return f"{best * 1e3:.3f} ms"


if __name__ == "__main__":
  main()
