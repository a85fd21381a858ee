"""Allocation of shared-prompt entries, as rows come and go."""

import random

import numpy as np
import pytest

from dpo_jax.sampling import decode, scheduler


def test_rows_of_a_prompt_share_an_entry_and_the_last_frees_it():
  table = scheduler.PrefixTable(decode.SharedPrompts(2, 2, 16), 5)
  assert table.assign([4, 0], "a", 7) == (4, 0, True)
  assert table.assign([0, 2], "b", 9) == (0, 1, True)
  assert table.assign([2], "a", 7) == (2, 0, False)
  found = table.arrays()
  assert found.prefix_to_rows.tolist() == [[4, 2], [0, 0]]
  assert found.row_to_prefix[[4, 2, 0]].tolist() == [0, 1, 2]
  assert found.length.tolist() == [7, 9]
  # No room at "a", and no entry for another prompt.
  for prompt in "ac":
    assert table.assign([1, 3], prompt, 7) is None
  table.release(4)
  assert table.assign([1, 3], "a", 7) == (1, 0, False)
  assert table.arrays().prefix_to_rows.tolist()[0] == [1, 2]
  table.release(0)
  assert table.arrays().length.tolist() == [7, 0]
  # A prompt whose entry is full gets a second one.
  assert table.assign([0], "a", 7) == (0, 1, True)


def test_row_and_prompt_are_of_one_shard():
  """Rows 0 to 3 and prompts 0 and 1 of one, the others of another."""
  table = scheduler.PrefixTable(decode.SharedPrompts(4, 3, 16, shards=2), 8)
  # Where more rows are free, though not the first of them.
  assert table.assign([3, 4, 5, 6], "a", 7) == (4, 2, True)
  assert table.assign([3, 5, 6], "a", 7) == (5, 2, False)
  # In its shard none is free: it gets an entry in the other one too.
  assert table.assign([3], "a", 7) == (3, 0, True)
  found = table.arrays()
  assert found.prefix_to_rows[[2, 0]].tolist() == [[0, 1, 0], [3, 0, 0]]
  assert found.row_to_prefix[[4, 5, 3]].tolist() == [0, 1, 0]
  # Prompts of the first shard are taken, and its rows alone are free.
  assert table.assign([2], "b", 5) == (2, 1, True)
  assert table.assign([0, 1], "c", 5) is None


@pytest.mark.parametrize("shards", [1, 2])
def test_no_two_rows_ever_have_one_place(shards):
  """Rows come and go in any order; the arrays list those that are there."""
  dice = random.Random(0)
  shared = decode.SharedPrompts(prompts=6, rows=3, slots=8, shards=shards)
  table, there, turned_away = scheduler.PrefixTable(shared, 14), {}, 0
  rows, prompts = 14 // shards, 6 // shards
  for _ in range(2000):
    if there and dice.random() < 0.45:
      row = dice.choice(list(there))
      table.release(row)
      del there[row]
    elif free := sorted(set(range(14)) - set(there)):
      some = dice.sample(free, dice.randint(1, len(free)))
      prompt = dice.randrange(1, 9)
      found = table.assign(some, prompt, prompt)
      taken = {one for _, one in there.values()}
      if found is None:
        turned_away += 1
        open_shards = {slot // rows for slot in some}
        for one in set(range(6)) - taken:
          assert one // prompts not in open_shards
        continue
      row, at, new = found
      assert row in some
      assert row // rows == at // prompts
      assert new == (at not in taken)
      there[row] = prompt, at
    found = table.arrays()
    for shard in range(shards):
      own = [row for row in there if row // rows == shard]
      assert len({found.row_to_prefix[row] for row in own}) == len(own)
    for row, (prompt, at) in there.items():
      within, place = divmod(found.row_to_prefix[row], 3)
      assert within == at % prompts
      assert found.prefix_to_rows[at, place] == row % rows
      assert found.length[at] == prompt
    gone = np.ones(6, bool)
    gone[[at for _, at in there.values()]] = False
    assert not found.length[gone].any()
  assert turned_away > 20
