"""Batch shapes of a run without its data, from HH's mean lengths.

Items are pairs of DPO or examples of SFT.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dpo_jax.core import sharding
from dpo_jax.data import batch
from dpo_jax.training import config as config_lib

# Completion tokens are spread unevenly over shards, and a run's shapes hold its
# widest batch.
_SLACK = 1.25
# Masked scores that blocks of T tokens compute, in T per token (half of the own
# block, and parts of the first), and the factor of a run's widest batch. On HH,
# at T of 64, 128 and 256, all scores are 1.8, 2.6 and 4.2 times the visible
# ones; on eight shards, padding included, 2.0, 3.0 and 5.1 times.
_MASKED, _WIDEST = 1.67, 1.15


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Means of an item.

  Attributes:
    tokens: of all its segments, a shared prompt once.
    places: token positions of rows that it takes, padding included.
    completion: tokens that are predicted.
    visible: pairs of a query and a key that it sees.
    deviation: standard deviation of `places`.
  """

  tokens: float
  places: float
  completion: float
  visible: float
  deviation: float


# By layout, measured on 1,551 pairs of HH's harmless-base, rules "paper", 512
# tokens, prompt 256, in rows of 1,024 tokens on one shard (benchmarks/data.md).
# SFT's items are the chosen responses.
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
  """Mean lengths of the run's items."""
  table = PAIRS if config.objective == "dpo" else EXAMPLES
  found = table[config.data.layout]
  if config.data.layout == "padded":
    rows = 2 if config.objective == "dpo" else 1
    found = dataclasses.replace(found, places=rows * config.row_length)
  return found


def rows_of(config: config_lib.TrainSettings, items: int, shards: int) -> int:
  """Rows on one device that hold `items` items in the mean."""
  needed = items * lengths(config).places / config.row_length
  return max(math.ceil(needed / shards), 1)


def items_of(config: config_lib.TrainSettings, rows: int, shards: int) -> int:
  """Items that fill `rows` rows on each device in the mean."""
  places = rows * shards * config.row_length
  return max(int(places / lengths(config).places), 1)


def widest_rows(
  config: config_lib.TrainSettings, items: int, shards: int
) -> int:
  """Rows on one device that hold any batch of `items` items of a run.

  Three standard deviations above the mean.
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
  split = sharding.batch_sharding(mesh, leading=1)

  def one(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((microbatches, *sizes), dtype, sharding=split)

  token = one(rows * shards, config.row_length)
  completion = one(shards, width)
  reference = None
  if config.precompute_reference:
    reference = one(shards, width, dtype=jnp.float32)
  block_pairs = None
  if config.spans_rows:
    size = config.row_length
    scores = _WIDEST * (mean.visible + _MASKED * mean.tokens * size)
    pairs = rows * size / mean.places * scores / size**2
    block_pairs = one(shards, math.ceil(pairs), 2)
  return batch.Batch(*(token,) * 5, *(completion,) * 3, reference, block_pairs)
