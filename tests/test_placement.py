"""Shapes of a run: few, sufficient, and the best choice of so many."""

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
import sourcing
import tiny
from hypothesis import strategies as st

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import batch_shapes, loader, packing, token_table

SHARED = packing.Packing("shared", 40, 1, 1, False, 1)


def steps_of(count, batch_size, steps, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.permutation(count)[:batch_size] for _ in range(steps)]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)),
    min_size=1,
    max_size=9,
  ),
  st.integers(1, 4),
)
def test_the_shapes_are_the_cheapest(needs, count):
  needs = np.asarray(needs)
  shares = batch_shapes._SHARES_RUNNING_ON
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


def test_places_for_predicted_tokens_count_beside_rows(shared):
  """Real batches: fewer empty places and pairs for some more rows."""
  table = real_lengths(shared)
  how = packing.Packing("shared", 64, 1, 1, False, 1, spans_rows=True)
  steps = steps_of(len(table), 16, 96)
  free = [
    packing.shape_of(packing.plans(table.take(step), how), how, growth=1.0)
    for step in steps
  ]
  needs = np.asarray([(s.rows, s.width, s.seen) for s in free])

  def waste(shapes):
    """Of rows, places and pairs, by the first shape that holds each step."""
    holds = (shapes[None] >= needs[:, None]).all(axis=2)
    assert holds.any(axis=1).all()
    return shapes[holds.argmax(axis=1)].sum(axis=0) / needs.sum(axis=0) - 1

  settled = batch_shapes.choose(table, how, steps, 4).shapes
  found = waste(np.asarray([(s.rows, s.width, s.seen) for s in settled]))
  alone = waste(batch_shapes._shapes(needs, np.array([1.0, 0.0, 0.0]), 4))
  print(found, alone)
  assert found[1] < alone[1] - 0.05
  assert found @ batch_shapes._SHARES_RUNNING_ON < 0.9 * (
    alone @ batch_shapes._SHARES_RUNNING_ON
  )


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize(("shards", "microbatches"), [(1, 1), (4, 2)])
def test_all_steps_fit_in_the_settled_shapes(layout, shards, microbatches):
  table = token_table.from_items(tiny.pairs(60, 5, prompt=(2, 20)))
  how = dataclasses.replace(
    SHARED, layout=layout, shards=shards, microbatches=microbatches
  )
  steps = steps_of(60, 16, 40)
  for count in (1, 3):
    settled = batch_shapes.choose(table, how, steps, count)
    assert 1 <= len(settled.shapes) <= count
    assert dataclasses.replace(settled, shapes=()) == how
    met = set()
    for indices in steps:
      batch, counts = batch_lib.pack(table.take(indices), settled)
      met.add(packing.Shape(batch.tokens.shape[1], batch.sequence_ids.shape[2]))
      assert counts.ids == tuple(table.ids[i] for i in indices)
    assert met == set(settled.shapes)
  # So few rows over 4 shards may always be as many.
  if shards == 1:
    assert len(settled.shapes) > 1


def test_a_batch_beyond_the_settled_shapes_is_still_whole():
  table = token_table.from_items(tiny.pairs(24, 5, prompt=(10, 20)))
  settled = batch_shapes.choose(table, SHARED, [np.arange(4)], 1)
  batch, counts = batch_lib.pack(table, settled)
  assert batch.tokens.shape[1] > settled.shapes[0].rows
  assert counts.tokens == table.lengths.sum()


def test_rows_beyond_come_in_few_sizes():
  counts = sorted({packing._rounded(n, 8, 1.1) for n in range(1, 400)})
  assert all(count % 8 == 0 for count in counts)
  assert len(counts) < 35
  for n in range(1, 400):
    # At most a tenth and one multiple of padding rows.
    assert n <= packing._rounded(n, 8, 1.1) <= 1.1 * n + 8


def test_shapes_that_were_settled_before_are_forgotten():
  table = token_table.from_items(tiny.pairs(24, 5))
  taken = [np.arange(4), np.arange(4, 8)]
  wanted = batch_shapes.choose(table, SHARED, taken, 2)
  # A layout that was settled for greater batches; feed does just that.
  greater = batch_shapes.choose(table, SHARED, [np.arange(24)], 1)
  assert greater.shapes[0].rows > wanted.shapes[-1].rows
  assert batch_shapes.choose(table, greater, taken, 2) == wanted


def test_a_text_s_first_token_needs_no_room():
  # 128 predicted tokens and not 129, which would be two multiples.
  item = token_table.Example("i", (5,), (6,) * 128)
  how = packing.Packing("packed", 129, 1, 1, True, 1)
  batch, counts = batch_lib.pack([item], how)
  assert counts.completion_tokens == 128
  assert batch.sequence_ids.shape == (1, 1, 128)


@pytest.mark.parametrize("count", [7, 13])
def test_padded_rows_are_as_many_as_sequences(count):
  how = dataclasses.replace(SHARED, layout="padded")
  batch, _ = batch_lib.pack(tiny.pairs(count), how)
  assert batch.tokens.shape[1] == 2 * count


def test_rows_beyond_the_settled_shapes_waste_at_most_a_fifth():
  # Each pair fills its row.
  items = tiny.pairs(40, 1, prompt=(20, 21), response=(10, 11))
  for count in range(1, 41):
    batch, _ = batch_lib.pack(items[:count], SHARED)
    assert count <= batch.tokens.shape[1] <= 1.2 * count + 1


def test_real_rows_fill_nine_tenths(shared):
  """Lengths of the real rows; the target of rows of 1024 is 92%."""
  pairs = real_lengths(shared)
  how = dataclasses.replace(SHARED, row_length=1024)
  schedule = loader.Schedule((len(pairs),), (1.0,), 64, 0, 10)
  steps = [schedule.items(step) for step in range(schedule.steps)]
  settled = batch_shapes.choose(pairs, how, steps, 4)
  assert len(settled.shapes) == 4
  tokens = slots = 0
  for indices in steps:
    taken = pairs.take(indices)
    shape = packing.shape_of(packing.plans(taken, settled), settled)
    tokens += int(taken.lengths.sum())
    slots += shape.rows * 1024
  assert tokens / slots >= 0.92


def real_lengths(shared):
  from dpo_jax.data import tokenizer

  rows = sourcing.harmless(shared)
  words = tokenizer.load(shared / "tokenizer" / "pythia")
  columns = [
    [x[:256] for x in words.encode_all([getattr(row, name) for row in rows])]
    for name in ("prompt", "chosen", "rejected")
  ]
  return token_table.from_columns([row.id for row in rows], columns)


def test_micro_batches_of_lines_are_dealt_evenly():
  sizes = (9, 8, 2, 1)
  items = [
    token_table.Example(str(i), (10 + i,), (20 + i,) * (size - 1))
    if size > 1
    else token_table.Example(str(i), (10 + i,), ())
    for i, size in enumerate(sizes)
  ]
  table = token_table.from_items(items)
  how = packing.Packing("packed", 10, 1, 2, True, 1, spans_rows=True)
  # 9, then 8 to the other, 2 to where 8 is, 1 where there is still room.
  assert packing.dealt(table.lengths, how).tolist() == [0, 3, 1, 2]
  one = dataclasses.replace(how, microbatches=1)
  apart = dataclasses.replace(how, spans_rows=False)
  for other in (one, apart):
    assert packing.dealt(table.lengths, other).tolist() == [0, 1, 2, 3]
  batch, counts = batch_lib.pack(table, how)
  assert np.count_nonzero(batch.segment_ids, (1, 2)).tolist() == [10, 10]
  assert counts.ids == ("0", "1", "2", "3")
  # Each token keeps its seat, by which dropout is drawn.
  whole, _ = batch_lib.pack(table, one)

  def seated(x):
    return sorted(
      zip(x.dropout_ids[x.segment_ids > 0], x.tokens[x.segment_ids > 0])
    )

  assert seated(batch) == seated(whole)
  settled = batch_shapes.choose(table, how, [np.arange(4)], 1)
  assert settled.shapes[0].rows == 1
