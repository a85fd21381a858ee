"""What stands for the items of a batch where none are read: the means of HH.

A plan knows a run's config and not its data. How many rows hold a batch, and
how wide it is, follows from what HH's pairs are in the mean.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dpo_jax.core import sharding
from dpo_jax.data import batch
from dpo_jax.training import config as config_lib

# Completion tokens are dealt to shards unevenly, and a run's shapes hold its
# widest batch.
_SLACK = 1.25
# What blocks of T compute beside the scores that are seen, in T for each token:
# half of the own block, and parts of the first. A run's shapes, which hold its
# widest batch, have more. Measured on HH's harmless-base: at 64, 128 and 256
# tokens 1.8, 2.6 and 4.2 times what is seen; of eight shards, padding included,
# 2.0, 3.0 and 5.1 times.
_BESIDE, _WIDEST = 1.67, 1.15


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Mean tokens of an item, and the places in rows that it takes.

  `deviation` is the standard deviation of what an item takes.
  """

  tokens: float
  places: float
  completion: float
  visible: float
  deviation: float


# Measured on the 1,551 good pairs of HH's harmless-base at hand, profile
# "paper", 512 tokens, prompt 256, and the fill of rows of 1,024 tokens on one
# shard (benchmarks/data.md). By layout; SFT's items are chosen responses.
PAIRS = {
  "shared": Lengths(207.2, 221.1, 91.2, 27_126, 127.0),
  "packed": Lengths(323.3, 344.8, 91.2, 38_137, 211.4),
  "padded": Lengths(323.3, 1024.0, 91.2, 38_137, 0.0),
}
EXAMPLES = {
  "packed": Lengths(156.8, 166.3, 40.8, 18_031, 106.4),
  "padded": Lengths(156.8, 512.0, 40.8, 18_031, 0.0),
}


def lengths(config: config_lib.TrainSettings) -> Lengths:
  """The means that stand for the run's items."""
  table = PAIRS if config.objective == "dpo" else EXAMPLES
  found = table[config.data.layout]
  if config.data.layout == "padded":
    rows = 2 if config.objective == "dpo" else 1
    found = dataclasses.replace(found, places=rows * config.row_length)
  return found


def rows_of(config: config_lib.TrainSettings, items: int, shards: int) -> int:
  """Rows on one device that hold so many items."""
  needed = items * lengths(config).places / config.row_length
  return max(math.ceil(needed / shards), 1)


def items_of(config: config_lib.TrainSettings, rows: int, shards: int) -> int:
  """Items that fill so many rows on one device."""
  places = rows * shards * config.row_length
  return max(int(places / lengths(config).places), 1)


def widest_rows(
  config: config_lib.TrainSettings, items: int, shards: int
) -> int:
  """About how many rows on one device hold any so many items of a run.

  A sum of items is rarely more than three deviations above its mean.
  """
  mean = lengths(config)
  needed = items * mean.places + 3 * mean.deviation * math.sqrt(items)
  return max(math.ceil(needed / config.row_length / shards), 1)


def batch_of(
  config: config_lib.TrainSettings,
  mesh: jax.sharding.Mesh,
  rows: int,
  microbatches: int,
) -> batch.Batch:
  """The shapes of a batch with `rows` rows on each device."""
  shards = sharding.data_shards(mesh)
  mean = lengths(config)
  share = mean.completion / mean.places
  width = rows * config.row_length * min(share * _SLACK, 1.0)
  width = -(-math.ceil(width) // 128) * 128
  lying = sharding.batch_sharding(mesh, leading=1)

  def one(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((microbatches, *sizes), dtype, sharding=lying)

  token = one(rows * shards, config.row_length)
  completion = one(shards, width)
  kept = None
  if config.precompute_reference:
    kept = one(shards, width, dtype=jnp.float32)
  seen = None
  if config.spans_rows:
    size = config.row_length
    scores = _WIDEST * (mean.visible + _BESIDE * mean.tokens * size)
    pairs = rows * size / mean.places * scores / size**2
    seen = one(shards, math.ceil(pairs), 2)
  return batch.Batch(*(token,) * 5, *(completion,) * 3, kept, seen)
