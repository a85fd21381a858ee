"""Which prompt lies where, and which rows sit at it, on the host.

A prompt that rows share lies in one place of the cache for as long as one of
them is being answered. A row that enters takes a place at its prompt, or with
it a free place for the prompt; if there is neither it waits. Where rows are
split over devices, row and prompt are of one shard.

Letters: B rows, P prompts, G places of a prompt.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from dpo_jax.engine import decoding_state


class Seating:
  """Who sits where.

  Attributes:
    length: tokens of each prompt that is there; 0 for none, [P].
  """

  def __init__(self, shared: decoding_state.Shared, size: int):
    self._members = np.full((shared.prompts, shared.places), -1, np.int32)
    self._place = np.full(size, -1, np.int32)
    self._prompts: list[Hashable] = [None] * shared.prompts
    self._rows = size // shared.shards
    self._each = shared.prompts // shared.shards
    self.length = np.zeros(shared.prompts, np.int32)

  def take(
    self, free: Sequence[int], prompt: Hashable, length: int
  ) -> tuple[int, int, bool]:
    """Seats a row.

    Args:
      free: slots that it may have.
      prompt: what tells its prompt from others.
      length: tokens of the prompt.

    Returns:
      The row's slot, or -1 if there is no place for it; where the prompt lies;
      and whether it is to be laid there.
    """
    shards = [slot // self._rows for slot in free]
    empty = self._members < 0
    for at in np.flatnonzero(empty.any(axis=1)):
      if self._prompts[at] == prompt and at // self._each in shards:
        row = free[shards.index(at // self._each)]
        return self._sit(row, at), at, False
    # Where the most rows are free, so that those of the prompt will fit.
    at = max(
      np.flatnonzero(empty.all(axis=1)),
      key=lambda at: shards.count(at // self._each),
      default=-1,
    )
    if at < 0 or at // self._each not in shards:
      return -1, -1, False
    self._prompts[at], self.length[at] = prompt, length
    return self._sit(free[shards.index(at // self._each)], at), at, True

  def leave(self, row: int) -> None:
    """Frees a row's place, and its prompt's after the last of its rows."""
    at, place = divmod(self._place[row], self._members.shape[1])
    self._members[at, place] = self._place[row] = -1
    if (self._members[at] < 0).all():
      self._prompts[at], self.length[at] = None, 0

  def seats(self, span: int) -> decoding_state.Seats:
    """What a call of `decoding.advance` is told."""
    of_shard = self._each * self._members.shape[1]
    return decoding_state.Seats(
      members=np.where(self._members < 0, 0, self._members % self._rows),
      place=np.where(self._place < 0, 0, self._place % of_shard),
      length=self.length.copy(),
      span=span,
    )

  def _sit(self, row, at) -> int:
    place = int(np.argmax(self._members[at] < 0))
    self._members[at, place] = row
    self._place[row] = at * self._members.shape[1] + place
    return row
