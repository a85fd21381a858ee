"""Host-side scheduler: prefill order, slot assignment, eviction.

Requests wait in a queue of prefill batches, those of one prompt and adapter
together, the longest prompts first so that a lack of memory shows at once. Rows
of a prefilled batch take free slots; those without one wait beside the batch's
cache. Where rows share prompts, a row also waits for an entry for its prompt.
Decoding is interrupted as soon as a few rows have ended and others wait. None
of this changes a response.

Letters: B rows, P prompts, G rows of a prompt.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.sampling import capacity, decode, stop

# Refilling costs about a step: it waits until this share of the slots is free.
_FREE = 1 / 8

# Fields of a row that are its request's.
_PARAMETERS = (
  "stream",
  "sample_id",
  "temperature",
  "top_k",
  "top_p",
  "adapter",
)


@dataclasses.dataclass(frozen=True)
class Insertion:
  """Arguments of `decode.insert`, in NumPy."""

  source: np.ndarray
  rows: decode.Rows
  prompt_source: np.ndarray | None


class PrefixTable:
  """Allocation of shared-prompt entries to prompts, and of rows to entries.

  An entry holds a prompt until the last of its rows has ended. A new row joins
  an entry of its prompt with room, or takes a free entry for its prompt; else
  it waits. Row and entry are of the same shard.

  Attributes:
    length: tokens of each entry's prompt; 0 for a free entry, [P].
  """

  def __init__(self, shared: decode.SharedPrompts, size: int):
    self._rows = np.full((shared.prompts, shared.rows), -1, np.int32)
    self._place = np.full(size, -1, np.int32)
    self._prompts: list[Hashable] = [None] * shared.prompts
    self._shard_rows = size // shared.shards
    self._shard_prompts = shared.prompts // shared.shards
    self.length = np.zeros(shared.prompts, np.int32)

  def assign(
    self, free: Sequence[int], prompt: Hashable, length: int
  ) -> tuple[int, int, bool] | None:
    """A slot and an entry for a row; None if it must wait.

    Args:
      free: free slots.
      prompt: identity of the row's prompt.
      length: tokens of the prompt.

    Returns:
      The slot, the entry, and whether the prompt must be copied to the entry.
    """
    shards = [slot // self._shard_rows for slot in free]
    empty = self._rows < 0
    for entry in np.flatnonzero(empty.any(axis=1)).tolist():
      shard = entry // self._shard_prompts
      if self._prompts[entry] == prompt and shard in shards:
        slot = free[shards.index(shard)]
        return self._join(slot, entry), entry, False
    # In the shard with the most free slots, so that the prompt's rows will fit.
    entry = max(
      np.flatnonzero(empty.all(axis=1)).tolist(),
      key=lambda entry: shards.count(entry // self._shard_prompts),
      default=-1,
    )
    shard = entry // self._shard_prompts
    if entry < 0 or shard not in shards:
      return None
    self._prompts[entry], self.length[entry] = prompt, length
    return self._join(free[shards.index(shard)], entry), entry, True

  def release(self, slot: int) -> None:
    """Frees a row's place, and with the last of its rows the entry."""
    entry, place = divmod(self._place[slot], self._rows.shape[1])
    self._rows[entry, place] = self._place[slot] = -1
    if (self._rows[entry] < 0).all():
      self._prompts[entry], self.length[entry] = None, 0

  def arrays(self) -> decode.PrefixTable:
    """The table for `decode.advance`."""
    shard_places = self._shard_prompts * self._rows.shape[1]
    rows, place = self._rows, self._place
    return decode.PrefixTable(
      prefix_to_rows=np.where(rows < 0, 0, rows % self._shard_rows),
      row_to_prefix=np.where(place < 0, 0, place % shard_places),
      length=self.length.copy(),
    )

  def _join(self, slot, entry) -> int:
    place = int(np.argmax(self._rows[entry] < 0))
    self._rows[entry, place] = slot
    self._place[slot] = entry * self._rows.shape[1] + place
    return slot


class Scheduler:
  """Queue, slots and cache sizes of one `sampler.generate`.

  Attributes:
    prefixes: None if rows do not share prompts.
    slots: cache slots that rows, and shared prompts, must have next.
  """

  def __init__(
    self, shapes: capacity.Shapes, requests: Sequence[Any], engine: Any
  ):
    program = shapes.program
    self._requests, self._engine = requests, engine
    self._size, self._most = shapes.size, program.slots
    self._queue = list(shapes.prefills)
    # Request and prompt of the last prefill, for those without a slot.
    self._waiting: list[tuple[int, int]] = []
    self._prefills = self._padded = 0
    self._slot_of: dict[int, int] = {}
    self._count = np.zeros(shapes.size, np.int64)
    self.prefixes, self._most_prompt = None, 0
    if program.shared is not None:
      self.prefixes = PrefixTable(program.shared, shapes.size)
      self._most_prompt = program.shared.slots
    self.slots = (self._most, self._most_prompt)
    if self._queue:
      # Later prompts are shorter.
      self._hold(self._queue[0].padded)

  @property
  def unfinished(self) -> bool:
    return bool(self._slot_of or self._waiting or self._queue)

  def next_prefill(self) -> capacity.PrefillBatch | None:
    """The next batch to prefill; None while rows wait or no slot is free."""
    if self._waiting or not self._queue or not self._free():
      return None
    batch = self._queue.pop(0)
    self._waiting = [
      (index, prompt)
      for prompt, group in enumerate(batch.groups)
      for index in group
    ]
    self._prefills += 1
    self._padded = batch.padded
    return batch

  def insert(self) -> Insertion | None:
    """Waiting rows for free slots; None if there is no room for one."""
    free = self._free()
    source = np.full(self._size, -1, np.int32)
    rows = decode.free_rows(self._size)
    prompt_source = None
    if self.prefixes is not None:
      prompt_source = np.full(len(self.prefixes.length), -1, np.int32)
    inserted = 0
    for index, prompt in self._waiting[: len(free)]:
      request = self._requests[index]
      length = len(request.prompt)
      slot = free[0]
      if self.prefixes is not None:
        found = self.prefixes.assign(free, (self._prefills, prompt), length)
        if found is None:
          break
        slot, entry, new = found
        if new:
          prompt_source[entry] = prompt
      free.remove(slot)
      self._slot_of[index] = slot
      self._count[slot] = 1
      source[slot] = prompt
      rows.limit[slot] = request.max_new_tokens
      rows.length[slot] = length
      for name in _PARAMETERS:
        getattr(rows, name)[slot] = getattr(request, name)
      inserted += 1
    if not inserted:
      return None
    self._waiting = self._waiting[inserted:]
    held = self.slots[0 if self.prefixes is None else 1]
    self._hold(max(held, self._padded))
    return Insertion(source, rows, prompt_source)

  def quota(self) -> int:
    """Done slots at which decoding stops; sets `slots` for these steps."""
    new, prompts = [], []
    for index, slot in self._slot_of.items():
      request = self._requests[index]
      most = int(self._count[slot]) + self._engine.chunk
      new.append(min(most, request.max_new_tokens))
      prompts.append(len(request.prompt))
    # Not fewer than waiting rows will need.
    coming = self._padded if self._waiting else 0
    if self.prefixes is None:
      longest = max(map(sum, zip(prompts, new, strict=True)))
      self._hold(max(longest, coming))
    else:
      self._hold(max(*prompts, coming))
      self.slots = (self._span(max(new), self._most), self.slots[1])
    if not self._waiting and not self._queue:
      return self._size
    idle = self._size - len(self._slot_of)
    return min(idle + max(int(self._size * _FREE), 1), self._size)

  def collect(
    self, tokenizer: tokenizer_lib.Tokenizer, state: decode.State
  ) -> tuple[list[tuple[int, list[int], list[float]]], np.ndarray]:
    """Ended rows of a fetched state, which lose their slots.

    Returns:
      (request, its tokens, their log-probs) of each, and which slots to resume,
      bool [B]: the device saw a human turn that the decoded text does not hold.
    """
    self._count = state.count.astype(np.int64)
    ended, again = [], np.zeros(self._size, bool)
    for index, slot in list(self._slot_of.items()):
      if not state.done[slot]:
        continue
      count = state.count[slot]
      tokens = state.tokens[slot, :count].tolist()
      if (
        state.turn[slot] == stop.TURN
        and count < self._requests[index].max_new_tokens
        and tokens[-1] != tokenizer.eos_id
        and not stop.turn_end(tokenizer, tokens)
      ):
        again[slot] = True
        continue
      del self._slot_of[index]
      if self.prefixes is not None:
        self.prefixes.release(slot)
      ended.append((index, tokens, state.logps[slot, :count].tolist()))
    return ended, again

  def _free(self) -> list[int]:
    taken = set(self._slot_of.values())
    return [slot for slot in range(self._size) if slot not in taken]

  def _hold(self, tokens: int) -> None:
    """Sizes the cache that prompts are copied to for this many tokens."""
    if self.prefixes is None:
      self.slots = (self._span(tokens, self._most), 0)
    else:
      self.slots = (self.slots[0], self._span(tokens, self._most_prompt))

  def _span(self, tokens: int, most: int) -> int:
    """Cache slots for this many tokens: a multiple of `span`, at most all."""
    span = self._engine.span
    return min(-(-tokens // span) * span, most) if span else most
