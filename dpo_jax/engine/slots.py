"""The host half of sampling: who reads, who enters which slot, who leaves.

Requests wait in a queue, those of one prompt and adapter together, the longest
prompts first so that a lack of memory shows at once. A batch of prompts of one
padded length is read in one call; the rows that ask for them enter free slots,
and what finds none waits beside the prompt's cache. Decoding stops as soon as a
few rows have ended and others wait. None of this changes an answer.

Letters: B rows, P prompts, T prompt tokens.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dpo_jax import partitioning
from dpo_jax.engine import capacity, decoding, decoding_state, stops

# Refilling costs about a step; it waits until this share of the slots is free.
_FREE = 1 / 8

# Index of a request, its tokens, their log-probs, seconds in a slot.
Ended = list[tuple[int, list[int], list[float], float]]


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
    # What they are decoded with, see `decoding.apart`.
    self.decoded = self.weights
    found = capacity.layout(config, tokenizer, requests, engine, mesh, wanted)
    self.readings, self.program = found.readings, found.program
    self.size = found.size
    capacity.say(found, engine)
    self.slot_of: dict[int, int] = {}
    self.entered: dict[int, float] = {}
    self.waiting: list[tuple[int, int]] = []
    self.prefix: Any = None
    # Tokens of the prompts in `prefix`, and cache slots that rows have now.
    self.padded = self.held = 0

  def run(self) -> Iterator[Ended]:
    """Yields requests as they end."""
    if not self.readings:
      return
    with self._context():
      self.table = self._put(stops.table(self.tokenizer))
      self.held = self.program.slots
      if self.program.apart:
        self.held = self._span(self.readings[0].padded)
        # Once, and not in each call of `advance`: it is a copy.
        self.decoded = decoding.apart(*self.weights)
      self.state = decoding_state.empty(self.program, self.size, self.held)
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
    sharding = partitioning.replicated(self.mesh)
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
      entering = list(zip(free, self.waiting))
      free, self.waiting = free[len(entering) :], self.waiting[len(entering) :]
      self._enter(entering)
      for slot, (index, _) in entering:
        self.slot_of[index] = slot
        self.entered[index] = time.perf_counter()
        count[slot] = 1

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
      inputs = partitioning.place(inputs, self.mesh)
    self.padded = reading.padded
    self.prefix = decoding.read(self.program, *self.weights, *inputs)

  def _enter(self, entering) -> None:
    size = self.size
    source = np.full(size, -1, np.int32)
    rows = decoding_state.Rows(
      stream=np.zeros(size, np.uint32),
      sample_id=np.zeros(size, np.uint32),
      temperature=np.zeros(size, np.float32),
      top_k=np.zeros(size, np.int32),
      top_p=np.ones(size, np.float32),
      limit=np.zeros(size, np.int32),
      length=np.ones(size, np.int32),
      adapter=np.full(size, -1, np.int32),
    )
    for slot, (index, prompt) in entering:
      request = self.requests[index]
      source[slot] = prompt
      rows.limit[slot] = request.max_new_tokens
      rows.length[slot] = len(request.prompt)
      for name in (
        "stream",
        "sample_id",
        "temperature",
        "top_k",
        "top_p",
        "adapter",
      ):
        getattr(rows, name)[slot] = getattr(request, name)
    source, rows = self._put((source, rows))
    seed = self._put(np.uint32(self.engine.seed))
    self._hold(max(self.held, self._span(self.padded)))
    self.state = decoding.enter(
      self.program, self.state, self.prefix, source, rows, self.table, seed
    )

  def _advance(self, count) -> None:
    """Some steps; fewer if slots are to be had for those who wait."""
    idle = self.size - len(self.slot_of)
    quota = self.size
    if self.waiting or self.readings:
      quota = min(idle + max(int(self.size * _FREE), 1), self.size)
    furthest = max(
      len(self.requests[index].prompt)
      + min(
        int(count[slot]) + self.engine.chunk,
        self.requests[index].max_new_tokens,
      )
      for index, slot in self.slot_of.items()
    )
    span = self._span(furthest)
    if self.program.apart:
      if self.waiting:
        # Not fewer than those who wait will bring.
        span = max(span, self._span(self.padded))
      self._hold(span)
    steps, quota = self._put((np.int32(self.engine.chunk), np.int32(quota)))
    self.state = decoding.advance(
      self.program, span, *self.decoded, self.state, self.table, steps, quota
    )

  def _span(self, tokens: int) -> int:
    """Slots that are attended to so that so many tokens are."""
    if not self.engine.span:
      return self.program.slots
    span = -(-tokens // self.engine.span) * self.engine.span
    return min(span, self.program.slots)

  def _hold(self, slots: int) -> None:
    """Lets the cache have so many slots; only where layers are apart."""
    if slots != self.held:
      self.state = decoding_state.resize(self.state, slots)
      self.held = slots

  def _leave(self) -> tuple[Ended, np.ndarray]:
    """Those who have ended, and how many tokens every slot has."""
    state = self.state
    tokens, logps, count, done, turn = jax.device_get(
      (state.tokens, state.logps, state.count, state.done, state.turn)
    )
    ended, again = [], np.zeros(self.size, bool)
    now = time.perf_counter()
    for index, slot in list(self.slot_of.items()):
      if not done[slot]:
        continue
      own = tokens[slot, : count[slot]].tolist()
      full = count[slot] >= self.requests[index].max_new_tokens
      if (
        turn[slot] == stops.TURN
        and not full
        and own[-1] != self.tokenizer.eos_id
        and not stops.turn_end(self.tokenizer, own)
      ):
        again[slot] = True
        continue
      del self.slot_of[index]
      ended.append(
        (
          index,
          own,
          logps[slot, : count[slot]].tolist(),
          now - self.entered.pop(index),
        )
      )
    if again.any():
      self.state = decoding.resume(state, self._put(again))
    return ended, count.astype(np.int64)
