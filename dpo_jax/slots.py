"""The host half of sampling: who reads, who enters which slot, who leaves.

Requests wait in a queue, those of one prompt and adapter together, the longest
prompts first so that a lack of memory shows at once. A batch of prompts of one
padded length is read in one call; the rows that ask for them enter free slots,
and what finds none waits beside the prompt's cache. Decoding stops as soon as a
few rows have ended and others wait. None of this changes an answer.

Letters: B rows, P prompts, T prompt tokens.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import (
  console,
  decoding,
  draw,
  kv_cache,
  model,
  partitioning,
  stops,
)

# Refilling costs about a step; it waits until this share of the slots is free.
_FREE = 1 / 8

# Share of a device's free memory that the cache may take: prefill, logits and
# the copy that a refill makes of a part of it need the rest.
CACHE_SHARE = 0.6

# More rows on one shard would gain little and wait long for each other.
MOST_ROWS = 512

# Of blocks' weights: decoding with layers apart copies them for each call.
_APART_BYTES = 2**29

# Rows of a part of a layer's cache are at least so many; parts are at most so
# many, as each is compiled.
_PART_ROWS, _MOST_PARTS = 8, 8

# A TPU pads the last axis of an array to a multiple of this.
_LANES = 128

# Index of a request, its tokens, their log-probs, seconds in a slot.
Ended = list[tuple[int, list[int], list[float], float]]


@dataclasses.dataclass(frozen=True)
class Reading:
  """Prompts that are read in one call.

  Attributes:
    padded: tokens of each, T.
    groups: for each prompt, the requests that ask for it.
    size: prompts of the call, P; those past `groups` are filler.
  """

  padded: int
  groups: tuple[tuple[int, ...], ...]
  size: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """All shapes of one serving, for whoever runs or plans it.

  Attributes:
    readings: what is read, in order.
    program: static shapes.
    size: slots, B.
    why: what their number comes from.
  """

  readings: list[Reading]
  program: decoding.Program
  size: int
  why: str


def layout(
  config: model.ModelConfig,
  tokenizer: Any,
  requests: Sequence[Any],
  engine: Any,
  mesh: Any,
  wanted: Sequence[int],
  free: int | None = None,
) -> Layout:
  """The shapes that serve these requests.

  Args:
    config: the model's, as `sampling.served` gives it.
    tokenizer: its `eos_id` and `vocab_size` matter.
    requests: all that were ever asked for.
    engine: the settings.
    mesh: or None.
    wanted: indices of those that are not answered yet.
    free: bytes for the cache on each device; `free_bytes` by default.

  Raises:
    ValueError: the mesh does not divide the rows, or not one of them fits.
  """
  shards = partitioning.data_shards(mesh) if mesh is not None else 1
  program = _program(config, tokenizer, requests, engine, mesh)
  size = batch_size(config, engine, program.slots, mesh, free)
  # At most as many as are asked for, in whole eights of each shard.
  most = -(-len(requests) // (8 * shards)) * 8 * shards
  why = "batch_size says so"
  if not engine.batch_size:
    free = free_bytes(engine) if free is None else free
    why = f"{free / 2**30:.3g} GiB for the cache hold no more"
    if size == MOST_ROWS * shards:
      why = f"more than {MOST_ROWS} a shard gain little"
    if most <= size:
      size, why = most, f"{len(requests)} are asked for"
  program = dataclasses.replace(program, parts=_parts(program, size))
  return Layout(plan(requests, engine, shards, wanted), program, size, why)


def plan(
  requests: Sequence[Any], engine: Any, shards: int, wanted: Sequence[int]
) -> list[Reading]:
  """What is read, in order; each wanted request stands in one group.

  Sizes depend on all requests, not on which of them are wanted.
  """
  buckets: dict[int, dict[Any, list[int]]] = {}
  for index, request in enumerate(requests):
    multiple = engine.length_multiple
    padded = -(-len(request.prompt) // multiple) * multiple
    groups = buckets.setdefault(padded, {})
    groups.setdefault((request.prompt, request.adapter), []).append(index)
  left = set(wanted)
  readings = []
  for padded, groups in sorted(buckets.items(), reverse=True):
    most = max(engine.prefill_tokens // padded // shards, 1) * shards
    size = min(most, -(-len(groups) // shards) * shards)
    kept = [tuple(i for i in rows if i in left) for rows in groups.values()]
    kept = [rows for rows in kept if rows]
    for at in range(0, len(kept), size):
      readings.append(Reading(padded, tuple(kept[at : at + size]), size))
  return readings


def free_bytes(engine: Any) -> int:
  """Bytes for the cache on each device: of what is free, or as configured."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return int(free * CACHE_SHARE)
  return int(engine.cache_gib * 2**30)


def batch_size(
  config: model.ModelConfig,
  engine: Any,
  cache_slots: int,
  mesh: Any,
  free: int | None = None,
) -> int:
  """Rows decoded at once: as configured, or as many as memory holds.

  Raises:
    ValueError: the mesh does not divide them, or not one of them fits.
  """
  shards = partitioning.data_shards(mesh) if mesh is not None else 1
  tensor = mesh.shape["tensor"] if mesh is not None else 1
  if engine.batch_size:
    if engine.batch_size % shards:
      raise ValueError(
        f"batch_size={engine.batch_size} must be a multiple of the data shards"
        f" of the mesh ({shards})"
      )
    return engine.batch_size
  shape = (config.layers, config.heads // tensor, cache_slots, config.head_dim)
  each = kv_cache.bytes_of(*shape, engine.cache)
  if _platform(mesh) == "tpu" and _cache_layout(config, mesh) == "stacked":
    each += _padded_bytes(shape, engine.cache)
  free = free_bytes(engine) if free is None else free
  fit = free // each
  if not fit:
    raise ValueError(
      f"a row's cache of {cache_slots} slots takes {each / 2**30:.2f} GiB of a"
      f" device, and {free / 2**30:.2f} GiB are to be had: raise"
      " cache_gib, take cache='int8', or split heads over a tensor axis"
    )
  # Whole eights: matrix products round alike in all places of such a batch.
  fit = fit // 8 * 8 if fit >= 8 else fit
  return min(fit, MOST_ROWS) * shards


def _padded_bytes(shape, kind) -> int:
  """Bytes of the padded copy of a row's cache that a TPU decodes with."""
  *rest, head_dim = shape
  if head_dim % _LANES == 0:
    return 0
  return kv_cache.bytes_of(*rest, -(-head_dim // _LANES) * _LANES, kind)


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
    found = layout(config, tokenizer, requests, engine, mesh, wanted)
    self.readings, self.program = found.readings, found.program
    self.size = found.size
    _say(found, engine)
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
      self.state = decoding.empty(self.program, self.size, self.held)
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

  def _read(self, reading: Reading) -> None:
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
    rows = decoding.Rows(
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
      self.program, span, *self.weights, self.state, self.table, steps, quota
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
      self.state = decoding.resize(self.state, slots)
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


@functools.cache
def _say_once(text: str) -> None:
  console.say(text, "slots")


def _say(layout: Layout, engine: Any) -> None:
  """What was chosen; training samples at intervals, and says it once."""
  shape, program = layout.program.config, layout.program
  each = kv_cache.bytes_of(
    shape.layers, shape.heads, program.slots, shape.head_dim, program.cache
  )
  apart = ""
  if program.apart:
    size = _blocks_bytes(shape) / 2**30
    apart = f"; a second copy of the blocks, {size:.3g} GiB, while decoding"
  _say_once(
    f"{layout.size} answers at once ({layout.why}), up to {program.slots}"
    f" tokens each: {layout.size * each / 2**30:.3g} GiB of cache in"
    f" {program.cache}; refilled after {engine.chunk} steps at most{apart}"
  )


def _platform(mesh) -> str:
  # A plan's devices need not be this machine's.
  if mesh is not None:
    return next(iter(mesh.devices.flat)).platform
  return jax.default_backend()


def _cache_layout(config, mesh) -> kv_cache.Layout:
  """Apart on one CPU, if a copy of the blocks is small; folded on TPUs.

  Not apart over several devices of a CPU: collectives that do not depend on
  each other, as those of single layers, start there in any order, and have been
  seen to wait for each other for ever. Not folded where heads are split: the
  products of a query that is spread over all heads would be summed over the
  devices.
  """
  platform = _platform(mesh)
  if platform == "tpu" and config.head_dim % _LANES:
    split = mesh is not None and mesh.shape["tensor"] > 1
    return "stacked" if split else "folded"
  if platform != "cpu" or (mesh is not None and mesh.size > 1):
    return "stacked"
  return "apart" if _blocks_bytes(config) <= _APART_BYTES else "stacked"


def _parts(program, size) -> int:
  """Parts of a layer's cache: one for each core that rows are enough for."""
  if not program.apart:
    return 1
  most = min(os.cpu_count() or 1, size // _PART_ROWS, _MOST_PARTS)
  return next(
    parts for parts in range(max(most, 1), 0, -1) if size % parts == 0
  )


def _blocks_bytes(config) -> int:
  each = config.width * (4 * config.width + 2 * config.mlp_width)
  return config.layers * each * jnp.dtype(config.dtype).itemsize


def _program(config, tokenizer, requests, engine, mesh) -> decoding.Program:
  longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
  padded = max(len(r.prompt) for r in requests)
  padded = -(-padded // engine.length_multiple) * engine.length_multiple
  multiple = engine.span or engine.length_multiple
  slots = math.ceil(max(longest, padded) / multiple) * multiple
  parameters = {(r.temperature, r.top_k, r.top_p) for r in requests}
  return decoding.Program(
    config=config,
    slots=slots,
    room=max(r.max_new_tokens for r in requests),
    eos_id=tokenizer.eos_id,
    vocab_size=tokenizer.vocab_size,
    ways=draw.ways(parameters, tokenizer.vocab_size),
    cache=engine.cache,
    layout=_cache_layout(config, mesh),
  )
