"""Which prompt lies where, and which rows sit at it, on the host.

A prompt that rows share lies in one place of the cache for as long as one of
them is being answered. A row that enters takes a place at its prompt, or with
it a free place for the prompt; if there is neither it waits.

Letters: B rows, P prompts, G places of a prompt.
"""

from collections.abc import Hashable

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
    self.length = np.zeros(shared.prompts, np.int32)

  def take(self, row: int, prompt: Hashable, length: int) -> tuple[int, bool]:
    """Seats a row.

    Args:
      row: its slot.
      prompt: what tells its prompt from others.
      length: tokens of the prompt.

    Returns:
      Where the prompt lies, or -1 if there is no place for the row; and whether
      it is to be laid there.
    """
    empty = self._members < 0
    for at in np.flatnonzero(empty.any(axis=1)):
      if self._prompts[at] == prompt:
        return self._sit(row, at), False
    free = np.flatnonzero(empty.all(axis=1))
    if not free.size:
      return -1, False
    at = free[0]
    self._prompts[at], self.length[at] = prompt, length
    return self._sit(row, at), True

  def leave(self, row: int) -> None:
    """Frees a row's place, and its prompt's after the last of its rows."""
    at, place = divmod(self._place[row], self._members.shape[1])
    self._members[at, place] = self._place[row] = -1
    if (self._members[at] < 0).all():
      self._prompts[at], self.length[at] = None, 0

  def seats(self, span: int) -> decoding_state.Seats:
    """What a call of `decoding.advance` is told."""
    return decoding_state.Seats(
      members=np.maximum(self._members, 0),
      place=np.maximum(self._place, 0),
      length=self.length.copy(),
      span=span,
    )

  def _sit(self, row, at) -> int:
    place = int(np.argmax(self._members[at] < 0))
    self._members[at, place] = row
    self._place[row] = at * self._members.shape[1] + place
    return int(at)
