"""Batch shapes of a run: few, sufficient, and the cheapest."""

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
import sourcing
import tiny
from hypothesis import strategies as st

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import (
  batch_shapes,
  loader,
  packing,
  token_table,
  tokenization,
  tokenizer,
)

SHARED = packing.Packing("shared", 40, 1, 1, False, 1)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)),
    min_size=1,
    max_size=6,
  ),
  st.lists(st.integers(1, 4), min_size=6, max_size=6),
  st.integers(1, 3),
)
@hypothesis.example([(1, 1, 1), (4, 4, 4), (6, 6, 6)], [9, 1, 1] * 2, 2)
@hypothesis.example([(1, 1, 1), (3, 3, 3), (6, 6, 6)], [1, 1, 9] * 2, 2)
@hypothesis.example([(1, 1, 1), (2, 2, 2), (5, 5, 5)], [1, 9, 1] * 2, 2)
def test_the_shapes_are_the_cheapest(needs, times, count):
  # Several steps have the same need.
  needs = np.repeat(np.asarray(needs), times[: len(needs)], axis=0)
  shares = batch_shapes._SHARES_SPANNING
  found = batch_shapes._shapes(needs, shares, count)
  assert len(found) <= count
  prices = shares / np.maximum(needs.mean(axis=0), 1)

  def cost(shapes):
    """Each need costs the cheapest shape that holds it."""
    holds = (shapes[None] >= needs[:, None]).all(axis=2)
    return np.where(holds, shapes @ prices, np.inf).min(axis=1).sum()

  ordered = needs[np.argsort(needs @ prices, kind="stable")]
  # By trial of every way to cut them; shapes may hold others' needs too.
  wanted = min(
    sum(
      (group.max(axis=0) @ prices) * len(group)
      for group in np.split(ordered, cuts)
    )
    for size in range(min(count, len(needs)))
    for cuts in itertools.combinations(range(1, len(needs)), size)
  )
  assert cost(found) <= wanted * (1 + 1e-9)
  np.testing.assert_array_equal(found @ prices, np.sort(found @ prices))


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize(("shards", "microbatches"), [(1, 1), (4, 2)])
def test_all_steps_fit_in_the_chosen_shapes(layout, shards, microbatches):
  table = token_table.from_items(tiny.pairs(60, 5, prompt=(2, 20)))
  how = dataclasses.replace(
    SHARED, layout=layout, shards=shards, microbatches=microbatches
  )
  rng = np.random.default_rng(0)
  steps = [rng.permutation(60)[:16] for _ in range(40)]
  for count in (1, 3):
    chosen = batch_shapes.choose(table, how, steps, count)
    assert 1 <= len(chosen.shapes) <= count
    assert dataclasses.replace(chosen, shapes=()) == how
    met = set()
    for indices in steps:
      batch, counts = batch_lib.pack(table.take(indices), chosen)
      met.add(packing.Shape(batch.tokens.shape[1], batch.sequence_ids.shape[2]))
      assert counts.ids == tuple(table.ids[i] for i in indices)
    assert met == set(chosen.shapes)
  # So few rows over 4 shards may always be as many.
  if shards == 1:
    assert len(chosen.shapes) > 1


def test_micro_batches_that_span_rows_are_balanced_first():
  # 10 and 10 tokens; in the order of the items they would be 17 and 3.
  items = [
    token_table.Example(str(i), (9,), (9,) * (size - 1))
    for i, size in enumerate((9, 8, 2, 1))
  ]
  how = packing.Packing("packed", 10, 1, 2, True, 1, spans_rows=True)
  table = token_table.from_items(items)
  chosen = batch_shapes.choose(table, how, [np.arange(4)], 1)
  assert chosen.shapes[0].rows == 1


def test_a_batch_beyond_the_chosen_shapes_is_still_whole():
  table = token_table.from_items(tiny.pairs(24, 5, prompt=(10, 20)))
  chosen = batch_shapes.choose(table, SHARED, [np.arange(4)], 1)
  batch, counts = batch_lib.pack(table, chosen)
  assert batch.tokens.shape[1] > chosen.shapes[0].rows
  assert counts.tokens == table.lengths.sum()


def test_shapes_of_before_are_replaced():
  table = token_table.from_items(tiny.pairs(24, 5))
  steps = [np.arange(4), np.arange(4, 8)]
  wanted = batch_shapes.choose(table, SHARED, steps, 2)
  larger = batch_shapes.choose(table, SHARED, [np.arange(24)], 1)
  assert larger.shapes[0].rows > wanted.shapes[-1].rows
  assert batch_shapes.choose(table, larger, steps, 2) == wanted


def test_a_text_s_first_token_needs_no_room():
  # 128 predicted tokens and not 129, which would be two multiples.
  item = token_table.Example("i", (5,), (6,) * 128)
  how = packing.Packing("packed", 129, 1, 1, True, 1)
  batch, counts = batch_lib.pack([item], how)
  assert counts.completion_tokens == 128
  assert batch.sequence_ids.shape == (1, 1, 128)


def test_real_rows_fill_nine_tenths(shared):
  """Lengths of the real rows; the target of rows of 1024 is 92%."""
  pairs = tokenization.tokenize(
    tokenizer.load(shared / "tokenizer" / "pythia"),
    sourcing.harmless(shared),
    rules="paper",
    max_length=512,
    max_prompt_length=256,
  ).table
  how = dataclasses.replace(SHARED, row_length=1024)
  schedule = loader.Schedule((len(pairs),), (1.0,), 64, 0, 2)
  steps = [schedule.items(step) for step in range(schedule.steps)]
  chosen = batch_shapes.choose(pairs, how, steps, 4)
  assert len(chosen.shapes) == 4
  tokens = slots = 0
  for indices in steps:
    items = pairs.take(indices)
    shape = packing.shape_of(packing.plans(items, chosen), chosen)
    tokens += int(items.lengths.sum())
    slots += shape.rows * 1024
  assert tokens / slots >= 0.92
