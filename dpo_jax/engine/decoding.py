"""The device half of sampling: prompts read, rows entered, tokens decoded.

Each row lies in a slot of the cache from position 0 (see `decoding_state`), so
that its arithmetic is the same wherever its neighbours are. Rows that end leave
their slot to others between two calls. A prompt is read once; its keys and
values are copied to every row that asks for it, or to one place where all of
them look (`decoding_state.Shared`). Each row carries its own parameters and
adapter as data: one compiled program serves them all.

Letters: B rows, P prompts, G places of a prompt, T prompt tokens, S cache
slots, M new tokens, V vocab, L layers, N heads, H head dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dpo_jax import model, partitioning, precision
from dpo_jax.attention import shared
from dpo_jax.engine import decoding_state, draw, kv_cache, stops


@jax.jit
def apart(
  base: model.Tree, lora: model.Tree | None
) -> tuple[model.Tree, model.Tree | None]:
  """The weights that `advance` takes where layers are apart."""
  return model.apart(base), model.apart(lora)


@functools.partial(jax.jit, static_argnums=0)
def read(
  program: decoding_state.Program,
  base: model.Tree,
  lora: model.Tree | None,
  prompts: jax.Array,
  length: jax.Array,
  adapter: jax.Array,
) -> decoding_state.Prefix:
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
  with precision.products(program.config.dtype):
    hidden, cache = model.apply(
      program.config,
      base,
      lora,
      prompts,
      jnp.broadcast_to(place, (count, size)),
      causal,
      cache=decoding_state.stacked_cache(program, count, size),
      index=0,
      adapter=_stacked(lora, adapter, axes=3),
    )
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    logits = model.unembed(base, last[:, 0])
  if program.apart:
    cache = kv_cache.split(cache)
  return decoding_state.Prefix(cache, logits)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def enter(
  program: decoding_state.Program,
  state: decoding_state.State,
  prefix: decoding_state.Prefix,
  source: jax.Array,
  rows: decoding_state.Rows,
  table: jax.Array,
  seed: jax.Array,
  laid: jax.Array | None = None,
) -> decoding_state.State:
  """Puts rows into slots and draws their first tokens.

  Args:
    program: static shapes.
    state: is donated; its cache has at least as many slots as the prefix.
    prefix: the prompts that were read.
    source: which prompt enters a slot, -1 where the slot stays as it is, [B].
    rows: parameters, read where a row enters.
    table: see `stops.table`.
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
  state = decoding_state.State(
    rows=rows,
    keys=decoding_state.keys(rows, seed),
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
  return decoding_state.placed(_take(program, state, logits, table, enters))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def advance(
  program: decoding_state.Program,
  span: int,
  base: model.Tree,
  lora: model.Tree | None,
  state: decoding_state.State,
  table: jax.Array,
  steps: jax.Array,
  quota: jax.Array,
  seats: decoding_state.Seats | None = None,
) -> decoding_state.State:
  """Decodes until `steps` tokens were added or `quota` slots are done.

  Args:
    program: static shapes.
    span: slots of a row that are attended to; no row may pass them in this
      call. Where layers are apart, best all that the cache has.
    base: base weights; where layers are apart, as `apart` gives them.
    lora: adapters, like them: None, one, or a stack.
    state: is donated: its cache is written in place.
    table: see `stops.table`.
    steps: int32.
    quota: int32.
    seats: where rows share prompts, who sits where.
  """
  slot = jnp.arange(span)[None]
  axes = 2 if program.apart else 3

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
    with precision.products(program.config.dtype):
      hidden, cache = model.apply(
        program.config,
        base,
        lora,
        jnp.take_along_axis(state.tokens, last[:, None], axis=1),
        position[:, None],
        visible,
        cache=state.cache,
        prompts=state.prompts,
        index=index,
        adapter=_stacked(lora, state.rows.adapter, axes),
      )
      logits = model.unembed(base, hidden[:, 0])
    state = dataclasses.replace(state, cache=cache)
    state = _take(program, state, logits, table, ~state.done)
    return step + 1, state

  _, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))
  return decoding_state.placed(state)


@functools.partial(jax.jit, donate_argnums=0)
def resume(
  state: decoding_state.State, again: jax.Array
) -> decoding_state.State:
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
  return shared.Sharing(
    mask=mask,
    prompt_mask=(slot < seats.length[:, None])[:, None],
    members=partitioning.constrain(seats.members, "batch", None),
    place=partitioning.constrain(seats.place, "batch"),
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


def _stacked(lora, adapter, axes):
  """The rows' adapters if `lora`, of so many axes if one, is a stack."""
  if lora is None or jax.tree.leaves(lora)[0].ndim == axes:
    return None
  return adapter
