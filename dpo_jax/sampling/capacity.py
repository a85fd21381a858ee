"""Static shapes of sampling: rows decoded together, cache, prefill batches.

Chosen from the requests, the settings and a device's memory before anything
compiles, for described devices too: the planner compiles the same shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax

from dpo_jax.core import console, sharding
from dpo_jax.model import gpt_neox, kv_cache
from dpo_jax.sampling import decode, draw

# Share of a device's free memory for the cache; prefill, logits and temporary
# arrays need the rest.
CACHE_SHARE = 0.6

# More rows a shard gain little and wait long for each other.
MOST_ROWS = 512

# Entries of the shared-prompt cache, for each that would do if all rows of a
# prompt ended together: an entry is in use until its last row has ended.
_PROMPT_ENTRIES = 3 / 2


@dataclasses.dataclass(frozen=True)
class PrefillBatch:
  """Prompts prefilled in one call.

  Attributes:
    padded: tokens of each with padding, T.
    groups: indices of the requests of each prompt.
    size: prompts of the call, P; those past `groups` are filler.
  """

  padded: int
  groups: tuple[tuple[int, ...], ...]
  size: int


@dataclasses.dataclass(frozen=True)
class Shapes:
  """All shapes of one `sampler.generate`.

  Attributes:
    prefills: prefill batches, in order.
    program: static shapes of the compiled programs.
    size: slots, B.
    why: reason for that number, for the log.
  """

  prefills: list[PrefillBatch]
  program: decode.Program
  size: int
  why: str


def shapes(
  config: gpt_neox.ModelConfig,
  tokenizer: Any,
  requests: Sequence[Any],
  engine: Any,
  mesh: Any,
  wanted: Sequence[int],
  free: int | None = None,
) -> Shapes:
  """The shapes that serve these requests.

  Args:
    config: the model's, as `sampler.served` gives it.
    tokenizer: its `eos_id` and `vocab_size` matter.
    requests: all of them, with those that have responses already.
    engine: the settings.
    mesh: or None.
    wanted: indices of the requests without a response.
    free: bytes for the cache on each device; by default measured.

  Raises:
    ValueError: the mesh does not divide the rows, or not one of them fits.
  """
  shards = shards_of(engine.batch_size, mesh)
  multiple = engine.length_multiple
  longest_prompt = _rounded(max(len(r.prompt) for r in requests), multiple)
  longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
  new_tokens = max(r.max_new_tokens for r in requests)
  span = engine.span or multiple
  prompts = len({(r.prompt, r.adapter) for r in requests})
  # Rounded down: with few repeated prompts, entries would stay unused.
  rows_per_prompt = len(requests) // prompts
  prompt_slots = _rounded(longest_prompt, span)
  if rows_per_prompt > 1:
    slots = _rounded(new_tokens, span)
    # Of one row, with its part of the prompt's entries.
    row = slots + math.ceil(prompt_slots * _PROMPT_ENTRIES / rows_per_prompt)
  else:
    row = slots = _rounded(max(longest, longest_prompt), span)
  size, why = _rows(config, engine, row, mesh, free, len(requests))
  shared = None
  if rows_per_prompt > 1:
    rows = size // shards
    each = min(rows_per_prompt, rows)
    entries = min(prompts, math.ceil(rows * _PROMPT_ENTRIES / each))
    shared = decode.SharedPrompts(entries * shards, each, prompt_slots, shards)
  parameters = {(r.temperature, r.top_k, r.top_p) for r in requests}
  program = decode.Program(
    config=config,
    slots=slots,
    max_new_tokens=new_tokens,
    eos_id=tokenizer.eos_id,
    vocab_size=tokenizer.vocab_size,
    paths=draw.paths(parameters, tokenizer.vocab_size),
    cache=engine.cache,
    unstacked=platform(mesh) == "cpu",
    shared=shared,
  )
  prefills = prefill_batches(requests, engine, shards, wanted)
  return Shapes(prefills, program, size, why)


def prefill_batches(
  requests: Sequence[Any], engine: Any, shards: int, wanted: Sequence[int]
) -> list[PrefillBatch]:
  """Prefill batches, longest prompts first; each wanted request in one group.

  Sizes depend on all requests, not on which of them are wanted.
  """
  buckets: dict[int, dict[Any, list[int]]] = {}
  for index, request in enumerate(requests):
    padded = _rounded(len(request.prompt), engine.length_multiple)
    groups = buckets.setdefault(padded, {})
    groups.setdefault((request.prompt, request.adapter), []).append(index)
  left = set(wanted)
  batches = []
  for padded, groups in sorted(buckets.items(), reverse=True):
    most = max(engine.prefill_tokens // padded // shards, 1) * shards
    size = min(most, _rounded(len(groups), shards))
    kept = [tuple(i for i in rows if i in left) for rows in groups.values()]
    kept = [rows for rows in kept if rows]
    for at in range(0, len(kept), size):
      batches.append(PrefillBatch(padded, tuple(kept[at : at + size]), size))
  return batches


def shards_of(batch_size: int, mesh: Any) -> int:
  """Parts into which a mesh splits rows; 1 without a mesh.

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


def _rows(config, engine, slots, mesh, free, wanted) -> tuple[int, str]:
  """Rows decoded together with this many cache slots each, and why.

  Raises:
    ValueError: not one row fits.
  """
  if engine.batch_size:
    return engine.batch_size, "as batch_size says"
  shards = shards_of(0, mesh)
  free = _free_bytes(engine) if free is None else free
  heads = config.heads // (mesh.shape["tensor"] if mesh is not None else 1)
  each = kv_cache.bytes_of(
    config.layers, heads, slots, config.head_dim, engine.cache
  )
  fit = free // each
  if not fit:
    raise ValueError(
      f"a row's cache of {slots} slots takes {each / 2**30:.2f} GiB of a device"
      f" with {free / 2**30:.2f} GiB for it: raise cache_gib, set cache='int8'"
      " or split heads over a tensor axis"
    )
  # Multiples of eight: matrix products then round alike for every row.
  fit = fit // 8 * 8 if fit >= 8 else fit
  most = _rounded(-(-wanted // shards), 8)
  size = min(most, fit, MOST_ROWS) * shards
  if most <= min(fit, MOST_ROWS):
    return size, f"{wanted} are wanted"
  if fit >= MOST_ROWS:
    return size, f"more than {MOST_ROWS} a shard gain little"
  return size, f"the most that fit {free / 2**30:.3g} GiB of cache"


def _free_bytes(engine: Any) -> int:
  """Bytes for the cache on each device: of its free memory, or as set."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return int(free * CACHE_SHARE)
  return int(engine.cache_gib * 2**30)


def platform(mesh: Any) -> str:
  """Of the mesh's devices, which need not be this machine's; or the default."""
  if mesh is None:
    return jax.default_backend()
  return mesh.devices.flat[0].platform


@functools.cache
def _say_once(text: str) -> None:
  console.say(text, "slots")


def say(shapes: Shapes, engine: Any) -> None:
  """Logs the shapes; once, though training samples at intervals."""
  program, size = shapes.program, shapes.size
  config, shared = program.config, program.shared
  slots, what = size * program.slots, f"up to {program.slots} tokens each"
  if shared is not None:
    slots += shared.prompts * shared.slots
    what += (
      f" after {shared.prompts} prompts of up to {shared.slots}, each shared by"
      f" {shared.rows} of them"
    )
  slot = kv_cache.bytes_of(
    config.layers, config.heads, 1, config.head_dim, program.cache
  )
  _say_once(
    f"{size} responses at once ({shapes.why}), {what}:"
    f" {slots * slot / 2**30:.3g} GiB of cache in {program.cache}; refilled"
    f" after {engine.chunk} steps at most"
  )


def _rounded(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple
