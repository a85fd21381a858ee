"""What decoding carries from call to call: rows, their tokens, their cache.

A fixed number of rows is decoded together, each in a slot of the cache from
position 0. Or, where many rows have one prompt, prompts lie in a cache of their
own, and rows, which sit at their prompt's places, have slots for their answers
alone. What a row was asked for is data; what all rows have in common is
compiled in.

Letters: B rows, P prompts, G places of a prompt, T prompt tokens, S cache
slots, M new tokens, V vocab, L layers, N heads, H head dim.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import model, partitioning
from dpo_jax.engine import draw, kv_cache


@dataclasses.dataclass(frozen=True)
class Shared:
  """Where prompts lie that rows share.

  Attributes:
    prompts: so many, P, in all shards.
    places: rows of a prompt, G.
    slots: cache slots of a prompt, T.
    shards: parts in which rows and prompts are split; a row sits in its own.
  """

  prompts: int
  places: int
  slots: int
  shards: int = 1


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled in; programs with equal fields are compiled once.

  Attributes:
    config: the model's shape.
    slots: cache slots of a row, S.
    room: new tokens of a row at most, M.
    eos_id: the token that ends a row.
    vocab_size: tokens at or past it do not exist and are never drawn.
    ways: how rows draw.
    cache: what keys and values are kept in.
    layout: how the cache lies, see `kv_cache`. "apart": a layer's weights and
      cache are arrays of their own while tokens are decoded. A CPU copies a
      slice of a stack before it uses it, at every step; elsewhere a stack is
      one loop, which is compiled sooner.
    shared: where prompts lie; None: in the slots of each of their rows.
  """

  config: model.ModelConfig
  slots: int
  room: int
  eos_id: int
  vocab_size: int
  ways: draw.Ways
  cache: kv_cache.Kind
  layout: kv_cache.Layout
  shared: Shared | None = None

  @property
  def apart(self) -> bool:
    return self.layout == "apart"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What each row was asked for; all [B].

  `limit` is the new tokens that it may have, `length` those of its prompt;
  `adapter` is an index of the stack, -1 for none.
  """

  stream: Any
  sample_id: Any
  temperature: Any
  top_k: Any
  top_p: Any
  limit: Any
  length: Any
  adapter: Any


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["members", "place", "length"],
  meta_fields=["span"],
)
@dataclasses.dataclass(frozen=True)
class Seats:
  """Who sits where, and how much of the prompts there is.

  Attributes:
    members: the row in each place of each prompt, or any, counted in its shard,
      int32 [P, G].
    place: the place of each row, counted through its shard's prompts, or any,
      int32 [B].
    length: tokens of each prompt; 0 for none, [P].
    span: slots of a prompt that are attended to; none has more tokens.
  """

  members: Any
  place: Any
  length: Any
  span: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """Prompts that were read: their cache of T slots, and logits [P, V]."""

  cache: Any
  logits: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All rows between two calls.

  Attributes:
    rows: what they were asked for.
    keys: a key for each row, [B].
    tokens: new tokens, int32 [B, M].
    logps: log-prob of each under the model at temperature 1, [B, M].
    count: how many tokens are new, [B].
    done: whether the row takes no more; empty slots are done, [B].
    turn: how much of a human turn its text ends with, see `stops`, [B].
    cache: see `kv_cache`; a tuple of single layers' if they are apart.
    prompts: such a cache of the prompts that rows share; None if they do not.
  """

  rows: Rows
  keys: jax.Array
  tokens: jax.Array
  logps: jax.Array
  count: jax.Array
  done: jax.Array
  turn: jax.Array
  cache: Any
  prompts: Any = None


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(
  program: Program, batch: int, slots: int, prompt_slots: int = 0
) -> State:
  """A state whose rows are all free.

  Args:
    program: static shapes.
    batch: rows.
    slots: cache slots of a row.
    prompt_slots: of a prompt, where rows share prompts.
  """
  zeros = functools.partial(jnp.zeros, (batch,))
  rows = Rows(
    stream=zeros(jnp.uint32),
    sample_id=zeros(jnp.uint32),
    temperature=zeros(jnp.float32),
    top_k=zeros(jnp.int32),
    top_p=jnp.ones((batch,), jnp.float32),
    limit=zeros(jnp.int32),
    length=jnp.ones((batch,), jnp.int32),
    adapter=jnp.full((batch,), -1, jnp.int32),
  )
  state = State(
    rows=rows,
    keys=keys(rows, jnp.uint32(0)),
    tokens=jnp.zeros((batch, program.room), jnp.int32),
    logps=jnp.zeros((batch, program.room), jnp.float32),
    count=zeros(jnp.int32),
    done=jnp.ones((batch,), bool),
    turn=zeros(jnp.int32),
    cache=_new_cache(program, batch, slots),
  )
  if program.shared is not None:
    prompts = _new_cache(program, program.shared.prompts, prompt_slots)
    state = dataclasses.replace(state, prompts=prompts)
  return placed(state)


def resize(state: State, name: str, slots: int) -> State:
  """The state with so many slots in a cache, where layers are apart.

  A layer at a time, each of which is freed before the next one is made.

  Args:
    state: of all rows.
    name: "cache" or "prompts".
    slots: that this cache shall have.
  """
  caches = list(getattr(state, name))
  state = dataclasses.replace(state, **{name: ()})
  for at, cache in enumerate(caches):
    caches[at] = None
    caches[at] = _resize(cache, slots)
  return dataclasses.replace(state, **{name: tuple(caches)})


@functools.partial(jax.jit, static_argnums=1)
def _resize(cache, slots):
  return jax.tree.map_with_path(
    lambda path, leaf: partitioning.constrain(leaf, *cache_axes(path, leaf, 0)),
    kv_cache.resize(cache, slots),
  )


def _new_cache(program, batch, slots):
  cache = stacked_cache(program, batch, slots)
  return kv_cache.split(cache) if program.apart else cache


def stacked_cache(program: Program, batch: int, slots: int) -> kv_cache.Tree:
  """An empty cache of all layers, for so many rows."""
  folded = program.layout == "folded"
  return model.init_cache(program.config, batch, slots, program.cache, folded)


def keys(rows: Rows, seed: jax.Array) -> jax.Array:
  """A key for each row, of (seed, prompt, sample id)."""
  root = jax.random.key(seed)
  fold = jax.random.fold_in
  return jax.vmap(lambda one, two: fold(fold(root, one), two))(
    rows.stream, rows.sample_id
  )


def axes(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
  """Logical axes of a leaf of the state.

  The cache is split over rows and heads; what the host reads is everywhere.
  """
  if path[0].name in ("cache", "prompts"):
    # A layer's own cache has numbers in its path, and no axis of layers.
    return cache_axes(path, leaf, 1 if len(path) == 2 else 0)
  return (None,) * leaf.ndim


def cache_axes(
  path: tuple[Any, ...], leaf: Any, before: int
) -> tuple[str | None, ...]:
  """Logical axes of a leaf of a cache with so many axes before its rows."""
  names = kv_cache.axes(path[-1].key, leaf.ndim - before)
  split = [name if name in ("batch", "heads") else None for name in names]
  return (*(None,) * before, *split)


def placed(state: State) -> State:
  """The state as `axes` lay it on the mesh."""
  return jax.tree.map_with_path(
    lambda path, leaf: partitioning.constrain(leaf, *axes(path, leaf)), state
  )
