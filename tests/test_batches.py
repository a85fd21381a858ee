"""Which items a step holds: a function of seed, epoch and step alone."""

import collections
import json
import threading

import jax
import numpy as np
import pytest
import tiny

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import loader, packing, token_table

HOW = packing.Packing("shared", 40, 1, 1, False, 1)
LAYOUTS = ("padded", "packed", "shared")


def schedule(sizes=(13,), weights=None, batch_size=4, seed=3, epochs=2):
  weights = weights or (1.0,) * len(sizes)
  return loader.Schedule(tuple(sizes), weights, batch_size, seed, epochs)


def stream(items, plan=None, how=HOW, start=0, steps=None, **values):
  table = token_table.from_items(items)
  plan = plan or schedule((len(table),))
  return list(
    loader.stream(
      table,
      plan,
      how,
      start_step=start,
      steps=plan.steps if steps is None else steps,
      **values,
    )
  )


def test_a_step_holds_batch_size_pairs_and_an_epoch_each_pair_once():
  items = tiny.pairs(14)
  found = [counts.ids for _, counts in stream(items)]
  # Three batches of four; the two left over wait for the next epoch.
  assert [len(i) for i in found] == [4] * 6
  assert schedule((14,)).left_out == 2
  for epoch in (found[:3], found[3:]):
    seen = [i for batch in epoch for i in batch]
    assert len(set(seen)) == 12
  assert found[:3] != found[3:]
  everything = {i for batch in found for i in batch}
  assert everything <= {item.id for item in items}


def test_the_order_of_one_source_is_the_seed_s_permutation():
  plan = schedule((13,), seed=5)
  wanted = np.random.default_rng((5, 1)).permutation(13)
  np.testing.assert_array_equal(plan.items(4), wanted[4:8])


def test_order_depends_on_the_seed_and_on_nothing_else():
  items = tiny.pairs(13)
  order = [counts.ids for _, counts in stream(items)]
  for layout in LAYOUTS:
    for microbatches in (1, 2):
      how = packing.Packing(layout, 40, 8, microbatches, False, 1)
      found = [counts.ids for _, counts in stream(items, how=how)]
      assert found == order
  other = stream(items, schedule((13,), seed=4))
  assert [counts.ids for _, counts in other] != order


@pytest.mark.parametrize("start", [1, 3, 4, 5, 6])
def test_a_stream_goes_on_where_it_was(start):
  items = tiny.pairs(13)
  whole, rest = stream(items), stream(items, start=start)
  assert len(rest) == 6 - start
  for (a, a_counts), (b, b_counts) in zip(rest, whole[start:], strict=True):
    assert a_counts == b_counts
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_more_epochs_do_not_change_the_first():
  items = tiny.pairs(9)
  short = stream(items, schedule((9,), epochs=1))
  long = stream(items, schedule((9,), epochs=3))
  assert [c.ids for _, c in long][:2] == [c.ids for _, c in short]


def test_a_stream_ends_at_the_last_step():
  assert len(stream(tiny.pairs(13), steps=4)) == 4


# --- several sources


def taken(plan, epoch):
  steps = range(epoch * plan.per_epoch, (epoch + 1) * plan.per_epoch)
  return np.concatenate([plan.items(step) for step in steps])


def test_weights_are_passes_over_a_source():
  plan = schedule((10, 8, 6), (1.0, 0.5, 2.0), batch_size=1, epochs=4)
  assert plan.shares == (10, 4, 12)
  assert plan.per_epoch == 26
  second = collections.Counter()
  for epoch in range(4):
    counts = collections.Counter(taken(plan, epoch).tolist())
    assert all(counts[i] == 1 for i in range(10))
    assert sum(counts[i] for i in range(10, 18)) == 4
    assert max(counts[i] for i in range(10, 18)) == 1
    assert all(counts[i] == 2 for i in range(18, 24))
    second.update({i: counts[i] for i in range(10, 18)})
    # Twice half of a source is each of its items once.
    assert max(second.values()) - min(second.values()) == (epoch + 1) % 2
  # Mixed, and not one source after the other.
  order = taken(plan, 0)
  kinds = np.searchsorted([10, 18], order, side="right")
  assert (np.diff(kinds) != 0).sum() > 8


def test_a_weight_that_divides_nothing_still_visits_all_alike():
  plan = schedule((7,), (0.4,), batch_size=1, epochs=20)
  assert plan.shares == (3,)
  counts = collections.Counter()
  for epoch in range(20):
    counts.update(taken(plan, epoch).tolist())
    assert max(counts.values()) - min(counts[i] for i in range(7)) <= 1


def test_an_epoch_of_fewer_items_than_a_batch_is_refused():
  with pytest.raises(ValueError, match=r"3 items, fewer than batch_size=4"):
    schedule((3,))
  with pytest.raises(ValueError, match=r"1 items, fewer than batch_size=4"):
    schedule((10,), (0.1,))


def test_the_state_is_small_json_and_says_where():
  plan = schedule((10, 8), (1.0, 0.5), batch_size=4, epochs=2)
  state = json.loads(json.dumps(plan.state(4)))
  assert state == {
    "sizes": [10, 8],
    "weights": [1.0, 0.5],
    "batch_size": 4,
    "seed": 3,
    "epochs": 2,
    "step": 4,
    "epoch": 1,
    "step_of_epoch": 1,
  }


# --- batches


def test_a_bad_item_stops_the_stream():
  items = tiny.pairs(7, prompt=(30, 31), response=(9, 10))
  with pytest.raises(ValueError, match="takes 48 tokens"):
    stream(items)


def test_reference_log_probs_go_with_their_tokens():
  table = token_table.from_items(tiny.pairs(13))
  # No two alike, so that each says which token it belongs to.
  reference = -np.arange(1, len(table.tokens) + 1, dtype=np.float32)
  plain = stream(table)
  for number, (batch, _) in enumerate(stream(table, reference=reference)):
    assert plain[number][0].reference is None
    there = batch.sequence_ids >= 0
    assert (batch.reference[~there] == 0).all()
    at = -batch.reference[there].astype(int) - 1
    np.testing.assert_array_equal(table.tokens[at], batch.target[there])
    # Just the response tokens of the step's items, each once.
    items = schedule((13,)).items(number)
    starts, lengths = (
      x[items, 1:].ravel() for x in (table.starts, table.lengths)
    )
    wanted = [i for s, n in zip(starts, lengths) for i in range(s, s + n)]
    assert sorted(at) == sorted(wanted)


def test_evaluation_keeps_order_and_the_last_few():
  items = tiny.pairs(10)
  found = list(loader.in_order(items, HOW, batch_size=4))
  assert [len(counts.ids) for _, counts in found] == [4, 4, 2]
  assert sum((counts.ids for _, counts in found), ()) == tuple(
    item.id for item in items
  )
  assert [len(i) for i in loader.consecutive(10, 4)] == [4, 4, 2]


def test_halves_differ_by_source_seed_and_pass():
  def half(seed, number, epoch):
    plan = schedule((64, 64), (0.5, 0.5), seed=seed, epochs=4)
    found = taken(plan, epoch)
    return frozenset(found[found // 64 == number].tolist())

  def places(seed, number, epoch):
    return frozenset(i % 64 for i in half(seed, number, epoch))

  # The second epoch has the other half; a third one begins a new pass.
  everything = frozenset(range(64))
  assert places(3, 0, 0) | places(3, 0, 1) == everything
  different = {
    places(3, 0, 0),
    places(3, 0, 1),
    places(3, 0, 2),
    places(3, 1, 0),
    places(3, 1, 1),
    places(4, 0, 0),
    places(4, 1, 0),
  }
  assert len(different) == 7


def test_no_epoch_is_shuffled_as_a_source_is():
  # NumPy fills short seeds up with zeros: (5, 1) is (5, 1, 0).
  for epoch in range(3):
    plan = schedule((50,), batch_size=1, seed=5, epochs=3)
    order = loader._epoch(plan, epoch)
    for number in range(3):
      source = loader._taken(5, number, 50, 0, 50)
      assert not np.array_equal(order, source)


def test_batches_are_packed_in_another_thread(monkeypatch):
  pack, threads = batch_lib.pack, set()

  def noted(*arguments):
    threads.add(threading.get_ident())
    return pack(*arguments)

  monkeypatch.setattr(batch_lib, "pack", noted)
  table = token_table.from_items(tiny.pairs(13))
  plan = schedule((13,))
  found = loader.stream(table, plan, HOW, start_step=0, steps=plan.steps)
  assert len(list(found)) == plan.steps
  assert len(threads) == 1
  assert threading.get_ident() not in threads


def test_evaluation_carries_reference_log_probs():
  table = token_table.from_items(tiny.pairs(10))
  kept = -np.arange(1, len(table.tokens) + 1, dtype=np.float32)
  for batch, _ in loader.in_order(table, HOW, batch_size=4, reference=kept):
    there = batch.sequence_ids >= 0
    at = -batch.reference[there].astype(int) - 1
    np.testing.assert_array_equal(table.tokens[at], batch.target[there])
