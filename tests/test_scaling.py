"""Recipes and the table of benchmarks/scaling.py."""

import pytest

from benchmarks import scaling
from dpo_jax.plan import mean_batch


@pytest.mark.parametrize(
  ("shards", "microbatches", "rows"),
  # 64 pairs take 13.8 rows.
  [(1, 8, 2), (4, 2, 2), (8, 1, 2), (16, 1, 1)],
)
def test_a_chip_has_at_most_two_rows(shards, microbatches, rows):
  run = scaling.run_of("14m", "lora", shards)
  assert run.microbatches == microbatches
  assert mean_batch.rows_of(run, 64 // microbatches, shards) == rows


@pytest.mark.parametrize("kind", scaling.KINDS)
def test_all_sizes_are_planned_alike(kind):
  """The smallest too, whose own recipe is for a CPU."""
  small, large = (scaling.run_of(size, kind, 8) for size in ("14m", "2.8b"))
  assert small.model == large.model
  assert (small.model.dtype, small.model.attention) == ("bfloat16", "dense")
  assert not small.precompute_reference
  assert not large.precompute_reference


def test_the_table_names_the_first_slice_that_fits():
  row = {
    "size": "1b",
    "kind": "full",
    "slice": "v5e:1x1",
    "devices": 1,
    "hbm_bytes": 8 * 2**30,
    "refusal": "too much",
  }
  done = row | {
    "slice": "v5e:2x2",
    "devices": 4,
    "refusal": "",
    "total_bytes": 7.5 * 2**30,
  }
  over = done | {"slice": "v5e:2x1", "total_bytes": 9 * 2**30}
  assert [scaling.fits(x) for x in (row, over, done)] == [False, False, True]
  *_, line = scaling.table([row, over, done]).splitlines()
  assert line == "| 1b | all | v5e:2x2 | 7.50 |"
