"""Answers of the product's own sampler on one accelerator, for gpu.py."""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence

import jax

from benchmarks import gpu_case, gpu_step
from dpo_jax.model import gpt_neox, kv_cache
from dpo_jax.sampling import sampler


def measure(flags: argparse.Namespace) -> dict:
  """Tokens a second of one wave of rows that all enter together."""
  how, mesh = gpu_case.answering(flags), gpu_case.alone()
  shape = gpu_case.shape_of(flags, gpu_case.config(flags, "dense"))
  shape = dataclasses.replace(shape, dtype=how.dtype, lora=None)
  make = jax.jit(lambda key: gpt_neox.init(shape, key, how.dtype))
  base = make(jax.random.key(0))
  prompts = gpu_case.prompts(flags)
  with tempfile.TemporaryDirectory() as directory:
    words = gpu_case.small_tokenizer(pathlib.Path(directory))
  requests = [
    sampler.Request(
      prompt=prompt,
      stream=i,
      sample_id=0,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      max_new_tokens=flags.new_tokens,
    )
    for i, prompt in enumerate(prompts)
  ]

  def wave():
    tokens = 0
    for ended in sampler.generate(
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
  sizes = [len(prompt) for prompt in prompts]
  seconds = statistics.median(times)
  cache = how.engine().cache
  return {
    "rows": flags.rows,
    "tokens": tokens,
    "tokens_per_second": tokens / seconds,
    "seconds": times,
    "median_seconds": seconds,
    "floor_bytes": floor_bytes(shape, base, sizes, flags.new_tokens, cache),
    "peak_bytes": gpu_step.peak_memory(),
  }


def floor_bytes(
  shape: gpt_neox.ModelConfig,
  base,
  sizes: Sequence[int],
  new_tokens: int,
  cache: kv_cache.Kind,
) -> int:
  """Bytes that `new_tokens` steps must read, if no row ends early.

  Each step all weights but the embedding, of which a row reads one line, and
  every row's keys and values so far.
  """
  read = sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves({k: v for k, v in base.items() if k != "embed"})
  )
  slot = kv_cache.bytes_of(shape.layers, shape.heads, 1, shape.head_dim, cache)
  slots = sum(int(size) + step for size in sizes for step in range(new_tokens))
  return new_tokens * read + slots * slot
