"""How fast pairs are tokenized, read back and packed, and how full rows are.

  python benchmarks/data.py --data=DIR --tokenizer=DIR [--repeats=5]

DIR is HH in its own layout, and a directory with tokenizer.json. Everything is
measured in this one process, on one core if it is started with `taskset -c 0`;
medians over the repeats are printed, with the least and the greatest.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from configs import data as data_config
from dpo_jax.core import settings
from dpo_jax.data import (
  batch_shapes,
  loader,
  packing,
  sources,
  token_cache,
  token_table,
  tokenization,
  tokenizer,
)

BATCH, SHAPES = 64, 4


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", required=True)
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--subset", default="harmless-base")
  parser.add_argument("--repeats", type=int, default=5)
  # A training set of HH has 160,800 pairs: the rows, over and over.
  parser.add_argument("--pairs", type=int, default=160_800)
  arguments = parser.parse_args()
  words = tokenizer.load(arguments.tokenizer)
  rows = load(arguments.data, arguments.subset)
  rule = {"rules": "paper", "max_length": 512, "max_prompt_length": 256}
  table = tokenization.tokenize(words, rows, **rule).table
  print(f"{len(rows)} pairs, {len(os.sched_getaffinity(0))} core(s)\n")
  for name in ("paper", "trl", "dpo-replication"):
    other = rule | {"rules": name}
    if name == "trl":
      other["max_prompt_length"] = 0
    show(
      f"tokenize, {name}",
      repeat(
        arguments.repeats,
        len(rows),
        lambda other=other: tokenization.tokenize(words, rows, **other),
      ),
    )
  with tempfile.TemporaryDirectory() as directory:
    token_cache.tokenize(directory, words, rows, **rule)
    show(
      "read from the cache",
      repeat(
        arguments.repeats,
        len(rows),
        lambda: token_cache.tokenize(directory, words, rows, **rule),
      ),
    )
  many = repeated(table, arguments.pairs)
  print(f"\n{len(many)} pairs in batches of {BATCH}")
  for layout, length in (("padded", 512), ("packed", 1024), ("shared", 1024)):
    for shards in (1, 8):
      layouts(many, layout, length, shards, arguments.repeats)


def load(directory, subset):
  source = data_config.hh(directory)
  source.subsets = (subset,)
  source = settings.build(sources.SourceSettings, source.to_dict())
  filters = settings.build(
    sources.FilterSettings, data_config.filters().to_dict()
  )
  return sources.load(source, "train", filters, 0).rows


def repeated(table: token_table.Table, count: int) -> token_table.Table:
  return table.take(np.arange(count) % len(table))


def layouts(table, layout, length, shards, repeats):
  how = packing.Packing(layout, length, shards, 1, False, 1)
  plan = loader.Schedule((len(table),), (1.0,), BATCH, 0, 1)
  steps = [plan.items(step) for step in range(plan.steps)]
  started = time.perf_counter()
  how = batch_shapes.choose(table, how, steps, SHAPES)
  settled_s = time.perf_counter() - started
  tokens = slots = completions = places = 0
  speeds = []
  for _ in range(repeats):
    # Through grain's thread, as in training, with its waits.
    started, done = time.perf_counter(), 0
    stream = loader.stream(
      table, plan, how, start_step=0, steps=min(500, plan.steps)
    )
    for batch, counts in stream:
      done += len(counts.ids)
      tokens, slots = tokens + counts.tokens, slots + counts.slots
      completions += counts.completion_tokens
      places += batch.sequence_ids.size
    speeds.append(done / (time.perf_counter() - started))
  pairs = repeats * min(500, plan.steps) * BATCH
  print(
    f"{layout:7} {shards} shard(s): {tokens / pairs:.1f} tokens a pair,"
    f" {slots / pairs:.1f} places a pair, fill {tokens / slots:.1%}"
    f" (completions {completions / places:.1%}), {len(how.shapes)} shapes"
    f" settled in {settled_s:.1f} s, {median(speeds)} pairs/s"
  )


def repeat(times, count, call):
  speeds = []
  for _ in range(times):
    started = time.perf_counter()
    call()
    speeds.append(count / (time.perf_counter() - started))
  return speeds


def show(name, speeds):
  print(f"{name:20} {median(speeds)} pairs/s")


def median(values):
  return (
    f"{statistics.median(values):,.0f} [{min(values):,.0f}, {max(values):,.0f}]"
  )


if __name__ == "__main__":
  main()
