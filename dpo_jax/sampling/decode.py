"""Compiled programs of sampling: prefill, insertion into slots, decoding.

A fixed number of rows is decoded together, each in a slot of the KV cache from
position 0, so that its arithmetic does not depend on its slot or neighbors. A
finished row's slot is given to another between two calls. Each prompt is
prefilled once; its keys and values are copied to every row that samples from it
or, where many rows have the same prompt, to one entry of a prompt cache that
all of them attend to (`SharedPrompts`), so that rows have slots for their
responses only. Sampling parameters and adapters are data of each row: one
compiled program serves them all.

Letters: B rows, P prompts, G rows of a prompt, T prompt tokens, S cache slots,
M new tokens, V vocab.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.core import precision, sharding
from dpo_jax.model import gpt_neox, kv_cache
from dpo_jax.model.attention import decode
from dpo_jax.sampling import draw, stop


@dataclasses.dataclass(frozen=True)
class SharedPrompts:
  """Shape of the cache of prompts that rows share.

  Attributes:
    prompts: prompts in the cache over all shards, P.
    rows: most rows of one prompt, G.
    slots: cache slots of a prompt.
    shards: equal parts of rows and prompts; a row's prompt is of its own part.
  """

  prompts: int
  rows: int
  slots: int
  shards: int = 1


@dataclasses.dataclass(frozen=True)
class Program:
  """Static shapes; programs with equal fields are compiled once.

  Attributes:
    config: the model's shape.
    slots: most cache slots of a row, S.
    max_new_tokens: of any row, M.
    eos_id: the token that ends a row.
    vocab_size: ids at or past it are padding of the unembedding, never drawn.
    paths: how rows draw.
    cache: dtype of keys and values.
    unstacked: the layout of the cache, see `kv_cache`. An unstacked one has the
      slots that its rows need; a folded one always has all, of which as many
      are read.
    shared: the cache of shared prompts; None if prompts are in the rows' slots.
  """

  config: gpt_neox.ModelConfig
  slots: int
  max_new_tokens: int
  eos_id: int
  vocab_size: int
  paths: draw.Paths
  cache: kv_cache.Kind
  unstacked: bool
  shared: SharedPrompts | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Sampling parameters of each row; all [B].

  `limit` is max_new_tokens, `length` the prompt's tokens, `adapter` an index of
  the adapter stack, -1 for none.
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
class PrefixTable:
  """Which rows share which cached prompt; indices count within a shard.

  Attributes:
    prefix_to_rows: rows of each prompt, int32 [P, G]; any where it has fewer.
    row_to_prefix: each row's place in the flattened `prefix_to_rows`, int32
      [B]; any for a free slot.
    length: tokens of each prompt; 0 for a free entry, int32 [P].
  """

  prefix_to_rows: Any
  row_to_prefix: Any
  length: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """A prefilled batch: its cache of T slots, and last logits [P, V]."""

  cache: kv_cache.Cache
  logits: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All rows between two calls.

  Attributes:
    rows: sampling parameters.
    keys: random key of each row, [B].
    tokens: new tokens, int32 [B, M].
    logps: log-prob of each under the model at temperature 1, [B, M].
    count: number of new tokens, [B].
    done: finished rows and free slots, [B].
    turn: characters of a human turn that the text ends with, see `stop`, [B].
    cache: see `kv_cache`.
    prompts: the cache of shared prompts; None if rows do not share them.
  """

  rows: Rows
  keys: jax.Array
  tokens: jax.Array
  logps: jax.Array
  count: jax.Array
  done: jax.Array
  turn: jax.Array
  cache: kv_cache.Cache
  prompts: kv_cache.Cache | None = None


def free_rows(count: int) -> Rows:
  """Parameters of free slots, in NumPy."""
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
  """The state of free slots.

  Args:
    program: static shapes.
    batch: rows.
    slots: cache slots of a row, where the cache is unstacked.
    prompt_slots: of a shared prompt, where it is.
  """
  if not program.unstacked:
    slots = program.slots
    prompt_slots = program.shared.slots if program.shared is not None else 0
  zeros = functools.partial(jnp.zeros, (batch,))
  rows = jax.tree.map(jnp.asarray, free_rows(batch))
  cache = functools.partial(
    gpt_neox.init_cache,
    program.config,
    kind=program.cache,
    unstacked=program.unstacked,
  )
  prompts = None
  if program.shared is not None:
    prompts = cache(program.shared.prompts, prompt_slots)
  return _constrained(
    State(
      rows=rows,
      keys=_keys(rows, jnp.uint32(0)),
      tokens=jnp.zeros((batch, program.max_new_tokens), jnp.int32),
      logps=jnp.zeros((batch, program.max_new_tokens), jnp.float32),
      count=zeros(jnp.int32),
      done=jnp.ones((batch,), bool),
      turn=zeros(jnp.int32),
      cache=cache(batch, slots),
      prompts=prompts,
    )
  )


def resize(state: State, slots: int, prompt_slots: int) -> State:
  """The state with this many slots in its caches, where they are unstacked.

  One layer at a time, so that at most one exists twice.
  """
  for name, size in (("cache", slots), ("prompts", prompt_slots)):
    cache = getattr(state, name)
    if isinstance(cache, tuple) and cache[0]["v"].shape[2] != size:
      layers = list(cache)
      state = dataclasses.replace(state, **{name: ()})
      for at, layer in enumerate(layers):
        layers[at] = None
        layers[at] = _resized(layer, size)
      state = dataclasses.replace(state, **{name: tuple(layers)})
  return state


@functools.partial(jax.jit, static_argnums=1)
def _resized(layer, slots):
  return {
    name: sharding.constrain(leaf, *kv_cache.axes(name, True))
    for name, leaf in kv_cache.resize(layer, slots).items()
  }


def axes(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
  """Logical axes of a leaf of `State` or `Prefix`.

  Caches are split over rows and heads; what the host reads is replicated.
  """
  if path[0].name in ("cache", "prompts"):
    # The path of an unstacked layer's array has the layer's number too.
    return kv_cache.axes(path[-1].key, unstacked=len(path) == 3)
  if path[0].name == "logits":
    return ("batch", "vocab")
  return (None,) * leaf.ndim


def _constrained(tree):
  return jax.tree.map_with_path(
    lambda path, leaf: sharding.constrain(leaf, *axes(path, leaf)), tree
  )


@jax.jit
def unstack(
  base: gpt_neox.Tree, lora: gpt_neox.Tree | None
) -> tuple[gpt_neox.Tree, gpt_neox.Tree | None]:
  """A copy of the weights in the form that a CPU decodes fastest with."""
  return gpt_neox.unstack(base), gpt_neox.unstack(lora)


@functools.partial(jax.jit, static_argnums=0)
def prefill(
  program: Program,
  base: gpt_neox.Tree,
  lora: gpt_neox.Tree | None,
  prompts: jax.Array,
  length: jax.Array,
  adapter: jax.Array,
) -> Prefix:
  """KV cache and last logits of a batch of prompts.

  Args:
    program: static shapes.
    base: base weights.
    lora: None, one adapter, or a stack.
    prompts: token ids, padded on the right, [P, T].
    length: tokens of each prompt, at least 1, [P].
    adapter: adapter of each prompt, [P].
  """
  count, size = prompts.shape
  position = jnp.arange(size)[None]
  causal = jnp.broadcast_to(
    position[:, None] <= position[..., None], (count, size, size)
  )
  with precision.matmul_precision(program.config.dtype):
    hidden, cache = gpt_neox.apply(
      program.config,
      base,
      lora,
      prompts,
      jnp.broadcast_to(position, (count, size)),
      causal,
      prefill=program.cache,
      unstacked=program.unstacked,
      adapter=_of_stack(lora, adapter),
    )
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    logits = gpt_neox.unembed(base, last[:, 0])
  return _constrained(Prefix(cache, logits))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(
  program: Program,
  state: State,
  prefix: Prefix,
  source: jax.Array,
  rows: Rows,
  table: jax.Array,
  seed: jax.Array,
  prompt_source: jax.Array | None = None,
) -> State:
  """Puts rows into slots and draws their first tokens.

  Args:
    program: static shapes.
    state: donated; its cache has at least as many slots as the prefix.
    prefix: the prefilled prompts.
    source: prompt of the prefix for each slot, -1 to leave the slot, [B].
    rows: parameters; read where `source` is not -1.
    table: see `stop.table`.
    seed: of all noise, uint32.
    prompt_source: prompt of the prefix for each shared prompt, -1 to leave it,
      [P]; None if rows do not share prompts.
  """
  enters = source >= 0

  def merge(new, old):
    return jnp.where(enters, new, old)

  cache, prompts = state.cache, state.prompts
  if prompt_source is None:
    cache = _copied(cache, prefix.cache, source)
  else:
    prompts = _copied(prompts, prefix.cache, prompt_source)
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
    prompts=prompts,
  )
  logits = jnp.take(prefix.logits, jnp.maximum(source, 0), axis=0)
  return _constrained(_take(program, state, logits, table, enters))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def advance(
  program: Program,
  slots: tuple[int, int],
  base: gpt_neox.Tree,
  lora: gpt_neox.Tree | None,
  state: State,
  table: jax.Array,
  steps: jax.Array,
  quota: jax.Array,
  prefixes: PrefixTable | None = None,
) -> State:
  """Decodes until `steps` tokens were added or `quota` slots are done.

  Args:
    program: static shapes.
    slots: cache slots to read, of rows and of shared prompts; no row may
      outgrow them in this call.
    base: base weights, or those of `unstack`.
    lora: None, one adapter, or a stack; in the form of `base`.
    state: donated.
    table: see `stop.table`.
    steps: int32.
    quota: int32.
    prefixes: which rows share which prompt; None if they do not.
  """
  slot = jnp.arange(slots[0])[None]

  def unfinished(carry):
    step, state = carry
    return (step < steps) & (jnp.sum(state.done) < quota)

  def step(carry):
    step, state = carry
    # The last drawn token is not in the cache yet: it is this step's input.
    last = jnp.maximum(state.count - 1, 0)
    position = state.rows.length + last
    index = position if prefixes is None else last
    index = jnp.minimum(index, slot.shape[1] - 1)
    visible = (slot <= index[:, None])[:, None]
    if prefixes is not None:
      visible = _sharing(slots[1], prefixes, visible)
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
        adapter=_of_stack(lora, state.rows.adapter),
      )
      logits = gpt_neox.unembed(base, hidden[:, 0])
    state = dataclasses.replace(state, cache=cache)
    state = _take(program, state, logits, table, ~state.done)
    return step + 1, state

  _, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))
  return _constrained(state)


@functools.partial(jax.jit, donate_argnums=0)
def resume(state: State, again: jax.Array) -> State:
  """Continues rows [B] whose text does not hold the human turn after all."""
  full = state.count >= state.rows.limit
  return dataclasses.replace(
    state,
    done=jnp.where(again, full, state.done),
    turn=jnp.where(again, 0, state.turn),
  )


def _keys(rows: Rows, seed: jax.Array) -> jax.Array:
  """Random key of each row, from (seed, prompt, sample id)."""
  root = jax.random.key(seed)
  fold = jax.random.fold_in
  return jax.vmap(lambda one, two: fold(fold(root, one), two))(
    rows.stream, rows.sample_id
  )


def _copied(cache, prefix, source):
  """The cache, with prompt `source` [B] of the prefix where it is not -1."""
  enters, prompt = source >= 0, jnp.maximum(source, 0)

  def copy(old, new):
    start = (0,) * new.ndim
    kept = jax.lax.slice(old, start, (len(enters), *new.shape[1:]))
    own = jnp.expand_dims(enters, (*range(1, new.ndim),))
    new = jnp.where(own, jnp.take(new, prompt, axis=0), kept)
    return jax.lax.dynamic_update_slice(old, new, start)

  def copy_stack(old, new):
    # One layer at a time, and of it the prefix alone: all at once would be a
    # second cache.
    def copy_layer(at, old):
      start, size = (at, *(0,) * (new.ndim - 1)), (1, *new.shape[1:])
      (read,) = jax.lax.dynamic_slice(new, start, size)
      (kept,) = jax.lax.dynamic_slice(
        old, start, (1, len(enters), *new.shape[2:])
      )
      copied = copy(kept, read)[None]
      return jax.lax.dynamic_update_slice(old, copied, start)

    return jax.lax.fori_loop(0, len(new), copy_layer, old)

  if not isinstance(cache, tuple):
    return jax.tree.map(copy_stack, cache, prefix)
  return jax.tree.map(copy, cache, prefix)


def _sharing(slots, prefixes, mask):
  slot = jnp.arange(slots)[None]
  return decode.Sharing(
    mask=mask,
    prompt_mask=(slot < prefixes.length[:, None])[:, None],
    prefix_to_rows=prefixes.prefix_to_rows,
    row_to_prefix=prefixes.row_to_prefix,
  )


def _take(program, state, logits, table, active):
  """The state with one more token drawn for each active row."""
  rows = state.rows
  token, logp = draw.draw(
    logits,
    jax.vmap(jax.random.fold_in)(state.keys, state.count),
    rows.temperature,
    rows.top_k,
    rows.top_p,
    vocab_size=program.vocab_size,
    paths=program.paths,
  )
  active &= ~state.done
  here = jnp.arange(program.max_new_tokens)[None] == state.count[:, None]
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


def _of_stack(lora, adapter):
  """The rows' adapters if `lora` is a stack, else None."""
  if lora is None:
    return None
  # A layer axis, unless layers are unstacked, and the kernel's own two.
  single = 2 if isinstance(lora["blocks"], tuple) else 3
  return adapter if jax.tree.leaves(lora)[0].ndim > single else None
