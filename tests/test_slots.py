"""Who sits at which prompt, as rows come and go."""

import random

import numpy as np
import pytest

from dpo_jax.sampling import decode, scheduler


def test_rows_of_a_prompt_sit_together_and_the_last_frees_it():
  seats = scheduler.Seating(decode.Shared(2, 2, 16), 5)
  assert seats.take([4, 0], "a", 7) == (4, 0, True)
  assert seats.take([0, 2], "b", 9) == (0, 1, True)
  assert seats.take([2], "a", 7) == (2, 0, False)
  told = seats.seats(16)
  assert told.members.tolist() == [[4, 2], [0, 0]]
  assert told.place[[4, 2, 0]].tolist() == [0, 1, 2]
  assert told.length.tolist() == [7, 9]
  # No place at "a", and none for another prompt.
  for prompt in "ac":
    assert seats.take([1, 3], prompt, 7) == (-1, -1, False)
  seats.leave(4)
  assert seats.take([1, 3], "a", 7) == (1, 0, False)
  assert seats.seats(16).members.tolist()[0] == [1, 2]
  seats.leave(0)
  assert seats.seats(16).length.tolist() == [7, 0]
  # A prompt whose places are taken lies a second time.
  assert seats.take([0], "a", 7) == (0, 1, True)


def test_row_and_prompt_are_of_one_shard():
  """Rows 0 to 3 and prompts 0 and 1 of one, the others of another."""
  seats = scheduler.Seating(decode.Shared(4, 3, 16, shards=2), 8)
  # Where more rows are free, though not the first of them.
  assert seats.take([3, 4, 5, 6], "a", 7) == (4, 2, True)
  assert seats.take([3, 5, 6], "a", 7) == (5, 2, False)
  # Of its shard none is free: it lies in the other one too.
  assert seats.take([3], "a", 7) == (3, 0, True)
  told = seats.seats(16)
  assert told.members[[2, 0]].tolist() == [[0, 1, 0], [3, 0, 0]]
  assert told.place[[4, 5, 3]].tolist() == [0, 1, 0]
  # Prompts of the first shard are taken, and its rows alone are free.
  assert seats.take([2], "b", 5) == (2, 1, True)
  assert seats.take([0, 1], "c", 5) == (-1, -1, False)


@pytest.mark.parametrize("shards", [1, 2])
def test_no_two_rows_ever_have_one_place(shards):
  """Any order of coming and going; what is told is who is there."""
  dice = random.Random(0)
  shared = decode.Shared(prompts=6, places=3, slots=8, shards=shards)
  seats, there, turned_away = scheduler.Seating(shared, 14), {}, 0
  rows, prompts = 14 // shards, 6 // shards
  for _ in range(2000):
    if there and dice.random() < 0.45:
      row = dice.choice(list(there))
      seats.leave(row)
      del there[row]
    elif free := sorted(set(range(14)) - set(there)):
      some = dice.sample(free, dice.randint(1, len(free)))
      prompt = dice.randrange(1, 9)
      row, at, new = seats.take(some, prompt, prompt)
      lying = {one for _, one in there.values()}
      if row < 0:
        turned_away += 1
        open_shards = {slot // rows for slot in some}
        for one in set(range(6)) - lying:
          assert one // prompts not in open_shards
        continue
      assert row in some
      assert row // rows == at // prompts
      assert new == (at not in lying)
      there[row] = prompt, at
    told = seats.seats(8)
    for shard in range(shards):
      own = [row for row in there if row // rows == shard]
      assert len({told.place[row] for row in own}) == len(own)
    for row, (prompt, at) in there.items():
      within, place = divmod(told.place[row], 3)
      assert within == at % prompts
      assert told.members[at, place] == row % rows
      assert told.length[at] == prompt
    gone = np.ones(6, bool)
    gone[[at for _, at in there.values()]] = False
    assert not told.length[gone].any()
  assert turned_away > 20
