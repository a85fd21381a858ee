"""Device half of sampling: prefill, rows that enter, decoded tokens.

A fixed number of rows is decoded together, each in a slot of the KV cache from
position 0, so that its arithmetic is the same wherever its neighbours are. Rows
that end leave their slot to others between two calls. A prompt is read once;
its keys and values are copied to every row that asks for it, or, where many
rows have one prompt, to one place of a cache of prompts where all of them look
(`Shared`): rows then have slots for their answers alone. Each row carries its
own parameters and adapter as data: one compiled program serves them all.

Letters: B rows, P prompts, G places of a prompt, T prompt tokens, S cache
slots, M new tokens, V vocab, L layers, N heads, H head dim.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.core import precision, sharding
from dpo_jax.model import gpt_neox, kv_cache
from dpo_jax.model.attention import shared_prefix
from dpo_jax.sampling import draw, stop


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

  config: gpt_neox.ModelConfig
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
    turn: how much of a human turn its text ends with, see `stop`, [B].
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


def free_rows(count: int) -> Rows:
  """Rows that were asked for nothing, in NumPy."""
  return Rows(
    stream=np.zeros(count, np.uint32),
    sample_id=np.zeros(count, np.uint32),
    temperature=np.zeros(count, np.float32),
    top_k=np.zeros(count, np.int32),
    top_p=np.ones(count, np.float32),
    limit=np.zeros(count, np.int32),
    length=np.ones(count, np.int32),
    adapter=np.full(count, -1, np.int32),
  )


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
  rows = jax.tree.map(jnp.asarray, free_rows(batch))
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
  if program.shared is not None:
    prompts = _new_cache(program, program.shared.prompts, prompt_slots)
    state = dataclasses.replace(state, prompts=prompts)
  return _placed(state)


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
    lambda path, leaf: sharding.constrain(leaf, *cache_axes(path, leaf, 0)),
    kv_cache.resize(cache, slots),
  )


def _new_cache(program, batch, slots):
  cache = _stacked_cache(program, batch, slots)
  return kv_cache.unstack(cache) if program.apart else cache


def _stacked_cache(program: Program, batch: int, slots: int) -> kv_cache.Tree:
  """An empty cache of all layers, for so many rows."""
  folded = program.layout == "folded"
  return gpt_neox.init_cache(
    program.config, batch, slots, program.cache, folded
  )


def _keys(rows: Rows, seed: jax.Array) -> jax.Array:
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


def _placed(state: State) -> State:
  """The state as `axes` lay it on the mesh."""
  return jax.tree.map_with_path(
    lambda path, leaf: sharding.constrain(leaf, *axes(path, leaf)), state
  )


@jax.jit
def apart(
  base: gpt_neox.Tree, lora: gpt_neox.Tree | None
) -> tuple[gpt_neox.Tree, gpt_neox.Tree | None]:
  """The weights that `advance` takes where layers are apart."""
  return gpt_neox.unstack(base), gpt_neox.unstack(lora)


@functools.partial(jax.jit, static_argnums=0)
def read(
  program: Program,
  base: gpt_neox.Tree,
  lora: gpt_neox.Tree | None,
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
  with precision.matmul_precision(program.config.dtype):
    hidden, cache = gpt_neox.apply(
      program.config,
      base,
      lora,
      prompts,
      jnp.broadcast_to(place, (count, size)),
      causal,
      cache=_stacked_cache(program, count, size),
      index=0,
      adapter=_stacked(lora, adapter, ndim=3),
    )
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    logits = gpt_neox.unembed(base, last[:, 0])
  if program.apart:
    cache = kv_cache.unstack(cache)
  return Prefix(cache, logits)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def enter(
  program: Program,
  state: State,
  prefix: Prefix,
  source: jax.Array,
  rows: Rows,
  table: jax.Array,
  seed: jax.Array,
  laid: jax.Array | None = None,
) -> State:
  """Puts rows into slots and draws their first tokens.

  Args:
    program: static shapes.
    state: is donated; its cache has at least as many slots as the prefix.
    prefix: the prompts that were read.
    source: which prompt enters a slot, -1 where the slot stays as it is, [B].
    rows: parameters, read where a row enters.
    table: see `stop.table`.
    seed: of all noise, uint32.
    laid: where rows share prompts, which of the prefix takes the place of each,
      -1 where the prompt stays as it is, [P].
  """
  enters = source >= 0
  prompt = jnp.maximum(source, 0)

  def merge(new, old):
    return jnp.where(enters, new, old)

  name, taken = ("cache", source) if laid is None else ("prompts", laid)
  copied = _copied(program, getattr(state, name), prefix.cache, taken)
  rows = jax.tree.map(merge, rows, state.rows)
  state = State(
    rows=rows,
    keys=_keys(rows, seed),
    tokens=state.tokens,
    logps=state.logps,
    count=merge(0, state.count),
    done=merge(rows.limit == 0, state.done),
    turn=merge(0, state.turn),
    cache=state.cache,
    prompts=state.prompts,
  )
  state = dataclasses.replace(state, **{name: copied})
  logits = jnp.take(prefix.logits, prompt, axis=0)
  return _placed(_take(program, state, logits, table, enters))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def advance(
  program: Program,
  span: int,
  base: gpt_neox.Tree,
  lora: gpt_neox.Tree | None,
  state: State,
  table: jax.Array,
  steps: jax.Array,
  quota: jax.Array,
  seats: Seats | None = None,
) -> State:
  """Decodes until `steps` tokens were added or `quota` slots are done.

  Args:
    program: static shapes.
    span: slots of a row that are attended to; no row may pass them in this
      call. Where layers are apart, best all that the cache has.
    base: base weights; where layers are apart, as `apart` gives them.
    lora: adapters, like them: None, one, or a stack.
    state: is donated: its cache is written in place.
    table: see `stop.table`.
    steps: int32.
    quota: int32.
    seats: where rows share prompts, who sits where.
  """
  slot = jnp.arange(span)[None]
  ndim = 2 if program.apart else 3

  def unfinished(carry):
    step, state = carry
    return (step < steps) & (jnp.sum(state.done) < quota)

  def step(carry):
    step, state = carry
    # The token drawn last has not been read yet: it is this step's input.
    last = jnp.maximum(state.count - 1, 0)
    position = state.rows.length + last
    index = jnp.minimum(position if seats is None else last, span - 1)
    visible = (slot <= index[:, None])[:, None]
    if seats is not None:
      visible = _sharing(program.shared, seats, visible)
    with precision.matmul_precision(program.config.dtype):
      hidden, cache = gpt_neox.apply(
        program.config,
        base,
        lora,
        jnp.take_along_axis(state.tokens, last[:, None], axis=1),
        position[:, None],
        visible,
        cache=state.cache,
        prompts=state.prompts,
        index=index,
        adapter=_stacked(lora, state.rows.adapter, ndim),
      )
      logits = gpt_neox.unembed(base, hidden[:, 0])
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


def _copied(program, cache, new, source):
  """The cache, where those that `source` [B] names take a prompt of `new`."""
  enters, prompt = source >= 0, jnp.maximum(source, 0)

  def chosen(old, read):
    own = jnp.expand_dims(enters, (*range(1, read.ndim),))
    return jnp.where(own, jnp.take(read, prompt, axis=0), old)

  def copy(whole, new):
    # A layer at a time: of all at once there would be a second cache.
    def layer(at, whole):
      start = (at, *(0,) * (new.ndim - 1))
      size = (1, len(enters), *new.shape[2:])
      (old,) = jax.lax.dynamic_slice(whole, start, size)
      read = jax.lax.dynamic_index_in_dim(new, at, keepdims=False)
      both = chosen(old, read)[None]
      return jax.lax.dynamic_update_slice(whole, both, start)

    return jax.lax.fori_loop(0, len(new), layer, whole)

  def copy_layer(whole, new):
    start = (0,) * new.ndim
    old = jax.lax.slice(whole, start, (len(enters), *new.shape[1:]))
    return jax.lax.dynamic_update_slice(whole, chosen(old, new), start)

  return jax.tree.map(copy_layer if program.apart else copy, cache, new)


def _sharing(together, seats, mask):
  slot = jnp.arange(seats.span)[None]
  return shared_prefix.Sharing(
    mask=mask,
    prompt_mask=(slot < seats.length[:, None])[:, None],
    members=sharding.constrain(seats.members, "batch", None),
    place=sharding.constrain(seats.place, "batch"),
    shards=together.shards,
  )


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
  turn = jnp.where(active, stop.step(table, state.turn, token), state.turn)
  ended = (
    (token == program.eos_id) | (count >= rows.limit) | (turn == stop.TURN)
  )
  return dataclasses.replace(
    state,
    tokens=jnp.where(here, token[:, None], state.tokens),
    logps=jnp.where(here, logp[:, None], state.logps),
    count=count,
    done=state.done | (active & ended),
    turn=turn,
  )


def _stacked(lora, adapter, ndim):
  """The rows' adapters if `lora`, of so many axes if one, is a stack."""
  if lora is None or jax.tree.leaves(lora)[0].ndim == ndim:
    return None
  return adapter
