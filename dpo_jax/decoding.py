"""The device half of sampling: prompts read, rows entered, tokens decoded.

A fixed number of rows is decoded together, each in a slot of the cache from
position 0, so that a row's arithmetic is the same wherever its neighbours are.
Rows that end leave their slot to others between two calls. A prompt is read
once and its keys and values are copied to every row that asks for it. Each row
carries its own parameters and adapter as data: one compiled program serves
them all.

Letters: B rows, P prompts, T prompt tokens, S cache slots, M new tokens,
V vocab, L layers, N heads, H head dim.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import draw, kv_cache, model, partitioning, stops


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
    parts: of a layer's cache, where layers are apart; they divide the rows.
  """

  config: model.ModelConfig
  slots: int
  room: int
  eos_id: int
  vocab_size: int
  ways: draw.Ways
  cache: kv_cache.Kind
  layout: kv_cache.Layout
  parts: int = 1

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
    cache: see `kv_cache`; a tuple of single layers', each in parts, if they
      are apart.
  """

  rows: Rows
  keys: jax.Array
  tokens: jax.Array
  logps: jax.Array
  count: jax.Array
  done: jax.Array
  turn: jax.Array
  cache: Any


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty(program: Program, batch: int, slots: int) -> State:
  """A state whose rows are all free, with so many cache slots each."""
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
    keys=_keys(rows, jnp.uint32(0)),
    tokens=jnp.zeros((batch, program.room), jnp.int32),
    logps=jnp.zeros((batch, program.room), jnp.float32),
    count=zeros(jnp.int32),
    done=jnp.ones((batch,), bool),
    turn=zeros(jnp.int32),
    cache=_new_cache(program, batch, slots),
  )
  return _placed(state)


@functools.partial(jax.jit, static_argnums=0)
def read(
  program: Program,
  base: model.Tree,
  lora: model.Tree | None,
  prompts: jax.Array,
  length: jax.Array,
  adapter: jax.Array,
) -> Prefix:
  """Reads prompts, each once, for all the rows that will ask for it.

  Args:
    program: static shapes.
    base: base weights.
    lora: adapters: None, one, or a stack.
    prompts: token ids, padded on the right, [P, T].
    length: of each prompt, at least 1, [P].
    adapter: of each prompt, [P].
  """
  count, size = prompts.shape
  place = jnp.arange(size)[None]
  causal = jnp.broadcast_to(
    place[:, None] <= place[..., None], (count, size, size)
  )
  hidden, cache = model.apply(
    program.config,
    base,
    lora,
    prompts,
    jnp.broadcast_to(place, (count, size)),
    causal,
    cache=_stacked_cache(program, count, size),
    index=0,
    adapter=_stacked(lora, adapter),
  )
  last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
  if program.apart:
    cache = kv_cache.split(cache)
  return Prefix(cache, model.unembed(base, last[:, 0]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def enter(
  program: Program,
  state: State,
  prefix: Prefix,
  source: jax.Array,
  rows: Rows,
  table: jax.Array,
  seed: jax.Array,
) -> State:
  """Puts rows into slots and draws their first tokens.

  Args:
    program: static shapes.
    state: is donated; its cache has at least as many slots as the prefix.
    prefix: the prompts that were read.
    source: which prompt enters a slot, -1 where the slot stays as it is, [B].
    rows: parameters, read where a row enters.
    table: see `stops.table`.
    seed: of all noise, uint32.
  """
  enters = source >= 0
  prompt = jnp.maximum(source, 0)

  def merge(new, old):
    return jnp.where(enters, new, old)

  def copy(whole, new):
    # A layer at a time: of all at once there would be a second cache.
    def layer(at, whole):
      start = (at, *(0,) * (new.ndim - 1))
      size = (1, len(enters), *new.shape[2:])
      old = jax.lax.dynamic_slice(whole, start, size)
      own = jnp.expand_dims(enters, (0, *range(2, new.ndim)))
      read = jax.lax.dynamic_index_in_dim(new, at)
      kept = jnp.where(own, jnp.take(read, prompt, axis=1), old)
      return jax.lax.dynamic_update_slice(whole, kept, start)

    return jax.lax.fori_loop(0, len(new), layer, whole)

  if program.apart:
    cache = tuple(
      _copy_parts(whole, new, enters, prompt)
      for whole, new in zip(state.cache, prefix.cache, strict=True)
    )
  else:
    cache = jax.tree.map(copy, state.cache, prefix.cache)
  rows = jax.tree.map(merge, rows, state.rows)
  state = State(
    rows=rows,
    keys=_keys(rows, seed),
    tokens=state.tokens,
    logps=state.logps,
    count=merge(0, state.count),
    done=merge(rows.limit == 0, state.done),
    turn=merge(0, state.turn),
    cache=cache,
  )
  logits = jnp.take(prefix.logits, prompt, axis=0)
  return _placed(_take(program, state, logits, table, enters))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def advance(
  program: Program,
  span: int,
  base: model.Tree,
  lora: model.Tree | None,
  state: State,
  table: jax.Array,
  steps: jax.Array,
  quota: jax.Array,
) -> State:
  """Decodes until `steps` tokens were added or `quota` slots are done.

  Args:
    program: static shapes.
    span: slots that are attended to; no row may pass them in this call. Where
      layers are apart, best all that the cache has.
    base: base weights.
    lora: adapters: None, one, or a stack.
    state: is donated: its cache is written in place.
    table: see `stops.table`.
    steps: int32.
    quota: int32.
  """
  place = jnp.arange(span)[None]
  chosen = functools.partial(_stacked, lora)
  if program.apart:
    base, lora = model.apart(base), model.apart(lora)

  def unfinished(carry):
    step, state = carry
    return (step < steps) & (jnp.sum(state.done) < quota)

  def step(carry):
    step, state = carry
    # The token drawn last has not been read yet: it is this step's input.
    last = jnp.maximum(state.count - 1, 0)
    index = jnp.minimum(state.rows.length + last, span - 1)
    hidden, cache = model.apply(
      program.config,
      base,
      lora,
      jnp.take_along_axis(state.tokens, last[:, None], axis=1),
      index[:, None],
      (place <= index[:, None])[:, None],
      cache=state.cache,
      index=index,
      adapter=chosen(state.rows.adapter),
    )
    logits = model.unembed(base, hidden[:, 0])
    state = dataclasses.replace(state, cache=cache)
    state = _take(program, state, logits, table, ~state.done)
    return step + 1, state

  _, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))
  return _placed(state)


@functools.partial(jax.jit, donate_argnums=0)
def resume(state: State, again: jax.Array) -> State:
  """Lets rows go on that seemed to have begun a turn, bool [B]."""
  full = state.count >= state.rows.limit
  return dataclasses.replace(
    state,
    done=jnp.where(again, full, state.done),
    turn=jnp.where(again, 0, state.turn),
  )


def resize(state: State, slots: int) -> State:
  """The state with so many cache slots, where layers are apart.

  A layer at a time, each of which is freed before the next one is made.
  """
  caches = list(state.cache)
  state = dataclasses.replace(state, cache=())
  for at, cache in enumerate(caches):
    caches[at] = None
    caches[at] = _resize(cache, slots)
  return dataclasses.replace(state, cache=tuple(caches))


@functools.partial(jax.jit, static_argnums=1)
def _resize(cache, slots):
  return jax.tree.map_with_path(
    lambda path, leaf: partitioning.constrain(leaf, *cache_axes(path, leaf, 0)),
    kv_cache.resize(cache, slots),
  )


def _new_cache(program, batch, slots):
  cache = _stacked_cache(program, batch, slots)
  if not program.apart:
    return cache
  layers = kv_cache.split(cache)
  return tuple(kv_cache.divide(layer, program.parts) for layer in layers)


def _copy_parts(parts, prompts, enters, prompt):
  """The parts of a layer's cache with the prompts of rows that enter."""
  each = len(enters) // len(parts)

  def copy(whole, new, enters, prompt):
    start = (0,) * new.ndim
    old = jax.lax.slice(whole, start, (each, *new.shape[1:]))
    own = jnp.expand_dims(enters, (*range(1, new.ndim),))
    kept = jnp.where(own, jnp.take(new, prompt, axis=0), old)
    return jax.lax.dynamic_update_slice(whole, kept, start)

  found = []
  for at, part in enumerate(parts):
    own = slice(at * each, (at + 1) * each)
    one = functools.partial(copy, enters=enters[own], prompt=prompt[own])
    found.append(jax.tree.map(one, part, prompts))
  return tuple(found)


def _stacked_cache(program, batch, slots):
  folded = program.layout == "folded"
  return model.init_cache(program.config, batch, slots, program.cache, folded)


def _take(program, state, logits, table, active):
  """Draws a token for each active row and writes it down."""
  rows = state.rows
  token, logp = draw.draw(
    logits,
    jax.vmap(jax.random.fold_in)(state.keys, state.count),
    rows.temperature,
    rows.top_k,
    rows.top_p,
    vocab_size=program.vocab_size,
    how=program.ways,
  )
  active &= ~state.done
  here = jnp.arange(program.room)[None] == state.count[:, None]
  here &= active[:, None]
  count = state.count + active
  turn = jnp.where(active, stops.step(table, state.turn, token), state.turn)
  ended = (
    (token == program.eos_id) | (count >= rows.limit) | (turn == stops.TURN)
  )
  return dataclasses.replace(
    state,
    tokens=jnp.where(here, token[:, None], state.tokens),
    logps=jnp.where(here, logp[:, None], state.logps),
    count=count,
    done=state.done | (active & ended),
    turn=turn,
  )


def _stacked(lora, adapter):
  """The rows' adapters if there is a stack of them to choose from."""
  if lora is None or jax.tree.leaves(lora)[0].ndim == 3:
    return None
  return adapter


def _keys(rows, seed):
  root = jax.random.key(seed)
  fold = jax.random.fold_in
  return jax.vmap(lambda one, two: fold(fold(root, one), two))(
    rows.stream, rows.sample_id
  )


def axes(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
  """Logical axes of a leaf of the state.

  The cache is split over rows and heads; what the host reads is everywhere.
  """
  if path[0].name == "cache":
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


def _placed(state):
  return jax.tree.map_with_path(
    lambda path, leaf: partitioning.constrain(leaf, *axes(path, leaf)), state
  )
