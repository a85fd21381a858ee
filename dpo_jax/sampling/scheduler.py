"""The host half of sampling: who reads, who enters which slot, who leaves.

Requests wait in a queue, those of one prompt and adapter together, the longest
prompts first so that a lack of memory shows at once. A batch of prompts of one
padded length is read in one call; the rows that ask for them enter free slots,
and what finds none waits beside the prompt's cache. Decoding stops as soon as a
few rows have ended and others wait. Where rows share prompts, one for which
there is no place waits too. None of this changes an answer.

Letters: B rows, P prompts, G places of a prompt.
"""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax.core import sharding as sharding_lib
from dpo_jax.sampling import capacity, decode, stop

# Refilling costs about a step; it waits until this share of the slots is free.
_FREE = 1 / 8

# What a row takes from its request as it is.
_ASKED = ("stream", "sample_id", "temperature", "top_k", "top_p", "adapter")

# Index of a request, its tokens, their log-probs.
Ended = list[tuple[int, list[int], list[float]]]


class Seating:
  """Which prompt lies where, and which rows sit at it.

  A prompt that rows share lies in one place of the cache for as long as one of
  them is being answered. A row that enters takes a place at its prompt, or with
  it a free place for the prompt; if there is neither it waits. Where rows are
  split over devices, row and prompt are of one shard.

  Attributes:
    length: tokens of each prompt that is there; 0 for none, [P].
  """

  def __init__(self, shared: decode.Shared, size: int):
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

  def seats(self, span: int) -> decode.Seats:
    """What a call of `decode.advance` is told."""
    of_shard = self._each * self._members.shape[1]
    return decode.Seats(
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


class Slots:
  """One serving of requests: the queue, the slots, and the compiled programs.

  Attributes:
    program: static shapes.
    size: slots, B.
  """

  def __init__(
    self, config, base, lora, tokenizer, requests, engine, mesh, wanted
  ):
    self.requests, self.engine, self.mesh = requests, engine, mesh
    self.tokenizer, self.weights = tokenizer, (base, lora)
    # What they are decoded with, see `decode.apart`.
    self.decoded = self.weights
    found = capacity.layout(config, tokenizer, requests, engine, mesh, wanted)
    self.readings, self.program = found.readings, found.program
    self.size = found.size
    capacity.say(found, engine)
    self.slot_of: dict[int, int] = {}
    self.waiting: list[tuple[int, int]] = []
    self.prefix: Any = None
    # How many were read, and the tokens of those in `prefix`.
    self.read = self.padded = 0
    # Cache slots that rows, and the prompts that they share, have now.
    self.held = {"cache": self.program.slots, "prompts": 0}
    self.seating = None
    if self.program.shared is not None:
      self.seating = Seating(self.program.shared, self.size)
      self.held["prompts"] = self.program.shared.slots

  def run(self) -> Iterator[Ended]:
    """Yields requests as they end."""
    if not self.readings:
      return
    with self._context():
      self.table = self._put(stop.table(self.tokenizer))
      if self.program.apart:
        # Prompts grow shorter, and each row has its own or looks at a shared.
        name = "cache" if self.seating is None else "prompts"
        self.held[name] = self._span(name, self.readings[0].padded)
        # Once, and not in each call of `advance`: it is a copy.
        self.decoded = decode.apart(*self.weights)
      self.state = decode.empty(
        self.program, self.size, self.held["cache"], self.held["prompts"]
      )
    count = np.zeros(self.size, np.int64)
    while self.slot_of or self.waiting or self.readings:
      with self._context():
        self._refill(count)
        self._advance(count)
        ended, count = self._leave()
      if ended:
        yield ended

  def _context(self):
    if self.mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  def _put(self, tree):
    """Arrays that every process has whole, whole on every device."""
    if self.mesh is None:
      return jax.device_put(tree)
    sharding = sharding_lib.replicated(self.mesh)
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(
        np.shape(x), sharding, lambda index: np.asarray(x)[index]
      ),
      tree,
    )

  def _refill(self, count) -> None:
    """Puts what waits into free slots, reading prompts where none waits."""
    taken = set(self.slot_of.values())
    free = [slot for slot in range(self.size) if slot not in taken]
    while free and (self.waiting or self.readings):
      if not self.waiting:
        self._read(self.readings.pop(0))
      entering, laid = self._seated(free)
      if not entering:
        return
      self.waiting = self.waiting[len(entering) :]
      self._enter(entering, laid)
      for slot, (index, _) in entering:
        self.slot_of[index] = slot
        count[slot] = 1

  def _seated(self, free):
    """Who of those that wait gets which slot, taken from `free`.

    Returns:
      Pairs of a slot and of what waited, and for each prompt that rows share
      which of the prefix is to be laid there, -1 for none.
    """
    if self.seating is None:
      entering = list(zip(free, self.waiting))
      del free[: len(entering)]
      return entering, None
    entering, laid = [], np.full(len(self.seating.length), -1, np.int32)
    for index, prompt in self.waiting:
      length = len(self.requests[index].prompt)
      slot, at, new = self.seating.take(free, (self.read, prompt), length)
      if slot < 0:
        break
      free.remove(slot)
      entering.append((slot, (index, prompt)))
      if new:
        laid[at] = prompt
    return entering, laid

  def _read(self, reading: capacity.Reading) -> None:
    shape = (reading.size, reading.padded)
    prompts = np.full(shape, self.tokenizer.eos_id, np.int32)
    length = np.ones(reading.size, np.int32)
    adapter = np.full(reading.size, -1, np.int32)
    for at, group in enumerate(reading.groups):
      request = self.requests[group[0]]
      length[at] = len(request.prompt)
      prompts[at, : length[at]] = request.prompt
      adapter[at] = request.adapter
      self.waiting += [(index, at) for index in group]
    inputs = (prompts, length, adapter)
    if self.mesh is None:
      inputs = jax.device_put(inputs)
    else:
      inputs = sharding_lib.put(inputs, self.mesh)
    self.read += 1
    self.padded = reading.padded
    self.prefix = decode.read(self.program, *self.weights, *inputs)

  def _enter(self, entering, laid) -> None:
    source = np.full(self.size, -1, np.int32)
    rows = decode.free_rows(self.size)
    for slot, (index, prompt) in entering:
      request = self.requests[index]
      source[slot] = prompt
      rows.limit[slot] = request.max_new_tokens
      rows.length[slot] = len(request.prompt)
      for name in _ASKED:
        getattr(rows, name)[slot] = getattr(request, name)
    source, rows, laid = self._put((source, rows, laid))
    seed = self._put(np.uint32(self.engine.seed))
    name = "cache" if laid is None else "prompts"
    self._hold(name, max(self.held[name], self._span(name, self.padded)))
    self.state = decode.enter(
      self.program,
      self.state,
      self.prefix,
      source,
      rows,
      self.table,
      seed,
      laid,
    )

  def _advance(self, count) -> None:
    """Some steps; fewer if slots are to be had for those who wait."""
    idle = self.size - len(self.slot_of)
    quota = self.size
    if self.waiting or self.readings:
      quota = min(idle + max(int(self.size * _FREE), 1), self.size)
    spans = self._spans(count)
    if self.program.apart:
      for name, span in spans.items():
        self._hold(name, span)
    steps, quota = self._put((np.int32(self.engine.chunk), np.int32(quota)))
    seats = None
    if self.seating is not None:
      seats = self._put(self.seating.seats(spans["prompts"]))
    self.state = decode.advance(
      self.program,
      spans["cache"],
      *self.decoded,
      self.state,
      self.table,
      steps,
      quota,
      seats,
    )

  def _spans(self, count) -> dict[str, int]:
    """Slots that a call attends to, of each cache."""
    # What rows will have at most, and their prompts.
    new, prompts = [], []
    for index, slot in self.slot_of.items():
      request = self.requests[index]
      most = int(count[slot]) + self.engine.chunk
      new.append(min(most, request.max_new_tokens))
      prompts.append(len(request.prompt))
    # Where slots change, not fewer than those who wait will bring.
    coming = self.padded if self.waiting and self.program.apart else 0
    if self.seating is None:
      longest = max(map(sum, zip(prompts, new, strict=True)))
      return {"cache": self._span("cache", max(longest, coming))}
    return {
      "cache": self._span("cache", max(new)),
      "prompts": self._span("prompts", max(*prompts, coming)),
    }

  def _span(self, name: str, tokens: int) -> int:
    """Slots of a cache that are attended to so that so many tokens are."""
    shared = self.program.shared
    most = self.program.slots if name == "cache" else shared.slots
    if not self.engine.span:
      return most
    return min(-(-tokens // self.engine.span) * self.engine.span, most)

  def _hold(self, name: str, slots: int) -> None:
    """Lets a cache have so many slots; only where layers are apart."""
    if slots != self.held[name]:
      self.state = decode.resize(self.state, name, slots)
      self.held[name] = slots

  def _leave(self) -> tuple[Ended, np.ndarray]:
    """Those who have ended, and how many tokens every slot has."""
    state = self.state
    tokens, logps, count, done, turn = jax.device_get(
      (state.tokens, state.logps, state.count, state.done, state.turn)
    )
    ended, again = [], np.zeros(self.size, bool)
    for index, slot in list(self.slot_of.items()):
      if not done[slot]:
        continue
      own = tokens[slot, : count[slot]].tolist()
      full = count[slot] >= self.requests[index].max_new_tokens
      if (
        turn[slot] == stop.TURN
        and not full
        and own[-1] != self.tokenizer.eos_id
        and not stop.turn_end(self.tokenizer, own)
      ):
        again[slot] = True
        continue
      del self.slot_of[index]
      if self.seating is not None:
        self.seating.leave(slot)
      ended.append((index, own, logps[slot, : count[slot]].tolist()))
    if again.any():
      self.state = decode.resume(state, self._put(again))
    return ended, count.astype(np.int64)
