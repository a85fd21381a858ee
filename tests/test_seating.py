"""Who sits at which prompt, as rows come and go."""

import random

import numpy as np

from dpo_jax.engine import decoding_state, seating


def test_rows_of_a_prompt_sit_together_and_the_last_frees_it():
  seats = seating.Seating(decoding_state.Shared(2, 2, 16), 5)
  assert seats.take(4, "a", 7) == (0, True)
  assert seats.take(0, "b", 9) == (1, True)
  assert seats.take(2, "a", 7) == (0, False)
  told = seats.seats(16)
  assert told.members.tolist() == [[4, 2], [0, 0]]
  assert told.place[[4, 2, 0]].tolist() == [0, 1, 2]
  assert told.length.tolist() == [7, 9]
  # No place at "a", and none for another prompt.
  assert seats.take(1, "a", 7) == seats.take(1, "c", 3) == (-1, False)
  seats.leave(4)
  assert seats.take(1, "a", 7) == (0, False)
  assert seats.seats(16).members.tolist()[0] == [1, 2]
  seats.leave(0)
  assert seats.seats(16).length.tolist() == [7, 0]
  # A prompt whose places are taken lies a second time.
  assert seats.take(0, "a", 7) == (1, True)


def test_no_two_rows_ever_have_one_place():
  """Any order of coming and going; what is told is who is there."""
  dice = random.Random(0)
  shared = decoding_state.Shared(prompts=5, places=3, slots=8)
  seats, there, turned_away = seating.Seating(shared, 12), {}, 0
  for _ in range(2000):
    if there and dice.random() < 0.45:
      row = dice.choice(list(there))
      seats.leave(row)
      del there[row]
    elif free := sorted(set(range(12)) - set(there)):
      row, prompt = dice.choice(free), dice.randrange(1, 8)
      at, new = seats.take(row, prompt, prompt)
      lying = {there[one][1] for one in there}
      if at < 0:
        turned_away += 1
        assert len(lying) == 5
        continue
      assert new == (at not in lying)
      there[row] = prompt, at
    told = seats.seats(8)
    assert len({told.place[row] for row in there}) == len(there)
    for row, (prompt, at) in there.items():
      assert divmod(told.place[row], 3)[0] == at
      assert told.members.reshape(-1)[told.place[row]] == row
      assert told.length[at] == prompt
    gone = np.ones(5, bool)
    gone[[at for _, at in there.values()]] = False
    assert not told.length[gone].any()
  assert turned_away > 20
