"""Items of each step: a function of seed, epoch and step; and their batches."""

import collections
import json
import threading

import jax
import numpy as np
import pytest
import tiny

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import loader, packing, token_table

SHARED = packing.Packing("shared", 40, 1, 1, False, 1)


def schedule(sizes=(13,), weights=None, batch_size=4, seed=3, epochs=2):
  weights = weights or (1.0,) * len(sizes)
  return loader.Schedule(tuple(sizes), weights, batch_size, seed, epochs)


def table_of(count, **lengths):
  return token_table.from_items(tiny.pairs(count, **lengths))


def stream(table, order=None, how=SHARED, start=0, steps=None, **values):
  order = order or schedule((len(table),))
  steps = order.steps if steps is None else steps
  return list(
    loader.stream(table, order, how, start_step=start, steps=steps, **values)
  )


def ids(batches):
  return [counts.ids for _, counts in batches]


def epoch_of(order, epoch):
  steps = range(epoch * order.per_epoch, (epoch + 1) * order.per_epoch)
  return np.concatenate([order.items(step) for step in steps])


# --- order


def test_a_step_holds_batch_size_items_and_an_epoch_each_item_once():
  table = table_of(14)
  found = ids(stream(table))
  # Three batches of four; the two left over wait for the next epoch.
  assert [len(step) for step in found] == [4] * 6
  assert schedule((14,)).left_out == 2
  for epoch in (found[:3], found[3:]):
    assert len({i for step in epoch for i in step}) == 12
  assert found[:3] != found[3:]
  assert {i for step in found for i in step} <= set(table.ids)


def test_the_order_of_one_source_is_the_seed_s_permutation():
  wanted = np.random.default_rng((5, 1)).permutation(13)
  np.testing.assert_array_equal(schedule(seed=5).items(4), wanted[4:8])
  assert (schedule(seed=6).items(4) != wanted[4:8]).any()


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_layout_changes_the_order(layout, microbatches):
  table = table_of(13)
  how = packing.Packing(layout, 40, 8, microbatches, False, 1)
  assert ids(stream(table, how=how)) == ids(stream(table))


@pytest.mark.parametrize("start", [1, 3, 4, 6])
def test_a_stream_resumes_at_any_step(start):
  table = table_of(13)
  whole, rest = stream(table), stream(table, start=start)
  assert len(rest) == 6 - start
  for (a, a_counts), (b, b_counts) in zip(rest, whole[start:], strict=True):
    assert a_counts == b_counts
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_more_epochs_change_nothing_and_a_stream_ends_at_its_last_step():
  long, short = schedule((9,), epochs=3), schedule((9,), epochs=1)
  np.testing.assert_array_equal(epoch_of(long, 0), epoch_of(short, 0))
  assert len(stream(table_of(13), steps=4)) == 4


def test_weights_are_passes_over_a_source():
  order = schedule((10, 8, 6), (1.0, 0.5, 2.0), batch_size=1, epochs=4)
  assert order.shares == (10, 4, 12)
  assert order.per_epoch == 26
  second = collections.Counter()
  for epoch in range(4):
    counts = collections.Counter(epoch_of(order, epoch).tolist())
    assert all(counts[i] == 1 for i in range(10))
    assert sum(counts[i] for i in range(10, 18)) == 4
    assert max(counts[i] for i in range(10, 18)) == 1
    assert all(counts[i] == 2 for i in range(18, 24))
    second.update({i: counts[i] for i in range(10, 18)})
    # Twice half of a source is each of its items once.
    assert max(second.values()) - min(second.values()) == (epoch + 1) % 2
  # Mixed, and not one source after the other.
  kinds = np.searchsorted([10, 18], epoch_of(order, 0), side="right")
  assert (np.diff(kinds) != 0).sum() > 8


def test_a_weight_that_divides_nothing_still_visits_all_alike():
  order = schedule((7,), (0.4,), batch_size=1, epochs=20)
  assert order.shares == (3,)
  counts = collections.Counter()
  for epoch in range(20):
    counts.update(epoch_of(order, epoch).tolist())
    assert max(counts.values()) - min(counts[i] for i in range(7)) <= 1


def test_halves_differ_by_source_seed_and_pass():
  def half(seed, number, epoch):
    order = schedule((64, 64), (0.5, 0.5), seed=seed, epochs=4)
    items = epoch_of(order, epoch)
    return frozenset((items[items // 64 == number] % 64).tolist())

  # The second epoch has the other half; a third one begins a new pass.
  assert half(3, 0, 0) | half(3, 0, 1) == frozenset(range(64))
  cases = [(3, 0, 0), (3, 0, 1), (3, 0, 2), (3, 1, 0), (3, 1, 1)]
  cases += [(4, 0, 0), (4, 1, 0)]
  assert len({half(*case) for case in cases}) == 7


def test_no_epoch_is_shuffled_as_a_source_is():
  # NumPy pads short seeds with zeros: (5, 1) is (5, 1, 0).
  for epoch in range(3):
    order = schedule((50,), batch_size=1, seed=5, epochs=3)
    for number in range(3):
      source = loader._source_items(5, number, 50, 0, 50)
      assert not np.array_equal(epoch_of(order, epoch), source)


def test_an_epoch_of_fewer_items_than_a_batch_is_refused():
  with pytest.raises(ValueError, match=r"3 items, fewer than batch_size=4"):
    schedule((3,))
  with pytest.raises(ValueError, match=r"1 items, fewer than batch_size=4"):
    schedule((10,), (0.1,))


def test_the_state_is_small_json_with_the_position():
  order = schedule((10, 8), (1.0, 0.5), batch_size=4, epochs=2)
  assert order.state(4) == {
    "sizes": [10, 8],
    "weights": [1.0, 0.5],
    "batch_size": 4,
    "seed": 3,
    "epochs": 2,
    "origin": [0, 0, 0],
    "step": 4,
    "epoch": 1,
    "item": 4,
  }


@pytest.mark.parametrize("sizes", [(4, 8), (8, 4), (4, 3, 6), (4, 4)])
def test_no_item_of_an_epoch_is_taken_twice_whatever_the_batch_sizes(sizes):
  def made(size):
    return schedule((24, 24), (1.0, 0.5), batch_size=size, epochs=3)

  order, taken = made(sizes[0]), []
  for number, size in enumerate(sizes):
    # As a checkpoint's JSON, saved twice under the same batch size.
    for _ in range(2):
      state = json.loads(json.dumps(order.state(2 * number)))
      order = made(size).resumed(state)
    last = order.steps if size is sizes[-1] and number else 2 * number + 2
    taken += [
      (order.state(step)["epoch"], order.items(step))
      for step in range(2 * number, last)
    ]
  whole = made(1)
  for epoch in range(3):
    items = np.concatenate([items for at, items in taken if at == epoch])
    # In the epoch's own order, but for the last incomplete batch.
    assert 36 - sizes[-1] < len(items) <= 36
    assert list(items) == list(epoch_of(whole, epoch)[: len(items)])
  assert [epoch for epoch, _ in taken] == sorted(epoch for epoch, _ in taken)


# --- batches


def test_an_item_that_fits_no_row_stops_the_stream():
  with pytest.raises(ValueError, match="takes 48 tokens"):
    stream(table_of(7, prompt=(30, 31), response=(9, 10)))


def test_reference_log_probs_go_with_their_tokens():
  table = table_of(13)
  # No two alike, so that each names its token.
  reference = -np.arange(1, len(table.tokens) + 1, dtype=np.float32)
  assert stream(table)[0][0].reference is None
  streamed = stream(table, reference=reference)
  in_order = loader.in_order(table, SHARED, batch_size=4, reference=reference)
  items = [schedule().items(step) for step in range(6)]
  items += loader.consecutive(13, 4)
  batches = [*streamed, *in_order]
  for (batch, _), own in zip(batches, items, strict=True):
    there = batch.sequence_ids >= 0
    assert (batch.reference[~there] == 0).all()
    at = -batch.reference[there].astype(int) - 1
    np.testing.assert_array_equal(table.tokens[at], batch.target[there])
    # The response tokens of the step's items, each once.
    starts, lengths = (
      x[own, 1:].ravel() for x in (table.starts, table.lengths)
    )
    wanted = [i for s, n in zip(starts, lengths) for i in range(s, s + n)]
    assert sorted(at) == sorted(wanted)


def test_evaluation_keeps_order_and_the_last_few():
  table = table_of(10)
  found = ids(loader.in_order(table, SHARED, batch_size=4))
  assert [len(step) for step in found] == [4, 4, 2]
  assert sum(found, ()) == table.ids


def test_batches_are_packed_in_another_thread(monkeypatch):
  pack, threads = batch_lib.pack, set()

  def noted(*arguments):
    threads.add(threading.get_ident())
    return pack(*arguments)

  monkeypatch.setattr(batch_lib, "pack", noted)
  assert len(stream(table_of(13))) == 6
  assert len(threads) == 1
  assert threading.get_ident() not in threads
