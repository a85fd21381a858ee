"""In which shapes requests are served: rows at once, cache, prompts of a call.

All of it is decided before anything compiles, from the requests, the settings
and the memory of a device, and for devices that are only described as well: the
planner compiles the same shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.core import console, sharding
from dpo_jax.model import gpt_neox, kv_cache
from dpo_jax.sampling import decode, draw

# Share of a device's free memory that the cache may take: prefill, logits and
# the copy that a refill makes of a part of it need the rest.
CACHE_SHARE = 0.6

# More rows on one shard would gain little and wait long for each other.
MOST_ROWS = 512

# Places for prompts that rows share, for each that would do if all rows of a
# prompt ended together: it lies there until the last has.
_PROMPTS = 3 / 2

# Of blocks' weights: decoding with layers apart holds a copy of them, and one
# of the unembedding.
_APART_BYTES = 2**29

# A TPU pads the last axis of an array to a multiple of this.
_LANES = 128


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
  program: decode.Program
  size: int
  why: str


def layout(
  config: gpt_neox.ModelConfig,
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
  shards = shards_of(engine.batch_size, mesh)
  slots, prompt_slots = _slots(requests, engine)
  places, prompts = _places(requests)
  row = slots
  if places:
    # A row's own and its part of its prompt's.
    slots = _rounded(engine, max(r.max_new_tokens for r in requests))
    row = slots + math.ceil(prompt_slots * _PROMPTS / places)
  size, why = _rows(config, engine, row, mesh, free, len(requests))
  shared = None
  if places:
    rows = size // shards
    places = min(places, rows)
    prompts = min(prompts, math.ceil(rows * _PROMPTS / places)) * shards
    shared = decode.Shared(prompts, places, prompt_slots, shards)
  parameters = {(r.temperature, r.top_k, r.top_p) for r in requests}
  program = decode.Program(
    config=config,
    slots=slots,
    room=max(r.max_new_tokens for r in requests),
    eos_id=tokenizer.eos_id,
    vocab_size=tokenizer.vocab_size,
    ways=draw.ways(parameters, tokenizer.vocab_size),
    cache=engine.cache,
    layout=_cache_layout(config, mesh),
    shared=shared,
  )
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


def shards_of(batch_size: int, mesh: Any) -> int:
  """Parts in which a mesh splits rows, 1 without a mesh.

  Raises:
    ValueError: they do not divide `batch_size`; 0 is not set.
  """
  shards = sharding.data_shards(mesh) if mesh is not None else 1
  if batch_size % shards:
    raise ValueError(
      f"batch_size={batch_size} must be a multiple of the data shards of the"
      f" mesh ({shards})"
    )
  return shards


def batch_size(
  config: gpt_neox.ModelConfig,
  engine: Any,
  cache_slots: int,
  mesh: Any,
  free: int | None = None,
) -> int:
  """Rows decoded at once: as configured, or as many as memory holds.

  Raises:
    ValueError: the mesh does not divide them, or not one of them fits.
  """
  shards = shards_of(engine.batch_size, mesh)
  tensor = mesh.shape["tensor"] if mesh is not None else 1
  if engine.batch_size:
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


def _rows(config, engine, row, mesh, free, asked) -> tuple[int, str]:
  """Rows decoded at once of those that are asked for, and why so many."""
  size = batch_size(config, engine, row, mesh, free)
  if engine.batch_size:
    return size, "batch_size says so"
  shards = shards_of(0, mesh)
  # At most as many as are asked for, in whole eights of each shard.
  most = -(-asked // (8 * shards)) * 8 * shards
  if most <= size:
    return most, f"{asked} are asked for"
  if size == MOST_ROWS * shards:
    return size, f"more than {MOST_ROWS} a shard gain little"
  free = free_bytes(engine) if free is None else free
  return size, f"{free / 2**30:.3g} GiB for the cache hold no more"


def _padded_bytes(shape, kind) -> int:
  """Bytes of the padded copy of a row's cache that a TPU decodes with."""
  *rest, head_dim = shape
  if head_dim % _LANES == 0:
    return 0
  return kv_cache.bytes_of(*rest, -(-head_dim // _LANES) * _LANES, kind)


@functools.cache
def _say_once(text: str) -> None:
  console.say(text, "slots")


def say(layout: Layout, engine: Any) -> None:
  """What was chosen; training samples at intervals, and says it once."""
  program, size = layout.program, layout.size
  shape, together = program.config, program.shared
  slots, what = size * program.slots, f"up to {program.slots} tokens each"
  if together is not None:
    slots += together.prompts * together.slots
    what += (
      f" after {together.prompts} prompts of up to {together.slots}, each for"
      f" {together.places} of them"
    )
  gib = (
    slots
    / 2**30
    * kv_cache.bytes_of(
      shape.layers, shape.heads, 1, shape.head_dim, program.cache
    )
  )
  _say_once(
    f"{size} answers at once ({layout.why}), {what}: {gib:.3g} GiB of cache in"
    f" {program.cache}; refilled after {engine.chunk} steps at most"
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


def _blocks_bytes(config) -> int:
  each = config.width * (4 * config.width + 2 * config.mlp_width)
  return config.layers * each * jnp.dtype(config.dtype).itemsize


def _places(requests) -> tuple[int, int]:
  """How many rows share a prompt, 0 if each has its own, and all prompts.

  Rounded down: of a few prompts that are there twice, places would stay empty.
  """
  prompts = len({(r.prompt, r.adapter) for r in requests})
  places = len(requests) // prompts
  return places if places > 1 else 0, prompts


def _slots(requests, engine) -> tuple[int, int]:
  """Slots of the longest request and of the longest prompt."""
  longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
  padded = max(len(r.prompt) for r in requests)
  padded = -(-padded // engine.length_multiple) * engine.length_multiple
  return _rounded(engine, max(longest, padded)), _rounded(engine, padded)


def _rounded(engine, tokens) -> int:
  multiple = engine.span or engine.length_multiple
  return -(-tokens // multiple) * multiple
