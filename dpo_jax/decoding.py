"""The device half of sampling: a prefill, and a decode loop with a cache.

Rows are padded on the left, so that all of them write the same cache slot at
the same step and its index is a scalar. Each row carries its own parameters as
data: rows of any temperature, top_k and top_p share one compiled program, and
the same program serves every adapter and checkpoint of one shape.

Letters: B rows, P prompts, T prompt tokens, S cache slots, M new tokens,
V vocab, C candidates.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import model


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled in; programs with equal fields are compiled once.

  Attributes:
    config: the model's shape.
    padded: prompt tokens of a row, T.
    room: new tokens of a row, M.
    eos_id: the token that ends a row.
    vocab_size: tokens at or past it do not exist and are never drawn.
    candidates: see `draw`.
  """

  config: model.ModelConfig
  padded: int
  room: int
  eos_id: int
  vocab_size: int
  candidates: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What each row was asked for; all [B]."""

  stream: jax.Array
  sample_id: jax.Array
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  limit: jax.Array
  length: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The loop's carry: tokens [B, M], count and done [B], step, keys [B]."""

  tokens: jax.Array
  count: jax.Array
  done: jax.Array
  step: jax.Array
  keys: jax.Array
  cache: Any


@functools.partial(jax.jit, static_argnums=0)
def prefill(
  program: Program,
  base: model.Tree,
  lora: model.Tree | None,
  prompts: jax.Array,
  rows: Rows,
  seed: jax.Array,
) -> State:
  """Reads every prompt once and draws the first token of its rows.

  Args:
    program: static shapes.
    base: base weights.
    lora: adapters, or None.
    prompts: token ids, padded on the left, [P, T].
    rows: parameters of each row; B is a multiple of P, and rows of one prompt
      stand together.
    seed: of all noise, uint32.
  """
  count = prompts.shape[0]
  copies = rows.limit.size // count
  place = jnp.arange(program.padded)[None]
  start = program.padded - rows.length[::copies, None]
  causal = place[:, None] <= place[..., None]
  hidden, cache = model.apply(
    program.config,
    base,
    lora,
    prompts,
    jnp.maximum(place - start, 0),
    causal & (place >= start)[:, None],
    cache=model.init_cache(program.config, count, program.padded),
    index=0,
  )
  logits = model.unembed(base, hidden[:, -1])
  root = jax.random.key(seed)
  keys = jax.vmap(
    lambda one, two: jax.random.fold_in(jax.random.fold_in(root, one), two)
  )(rows.stream, rows.sample_id)
  state = State(
    tokens=jnp.zeros((rows.limit.size, program.room), jnp.int32),
    count=jnp.zeros_like(rows.limit),
    done=rows.limit == 0,
    step=jnp.int32(0),
    keys=keys,
    cache=_spread(program, cache, count, copies),
  )
  return _advance(program, state, jnp.repeat(logits, copies, axis=0), rows)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(
  program: Program,
  base: model.Tree,
  lora: model.Tree | None,
  state: State,
  rows: Rows,
  until: jax.Array,
) -> State:
  """Goes on until all rows are done or have `until` tokens.

  `state` is donated: its cache is written in place.
  """
  place = jnp.arange(program.padded + program.room)[None]
  real = place >= program.padded - rows.length[:, None]

  def unfinished(state):
    return (state.step < until) & ~jnp.all(state.done)

  def step(state):
    # The token drawn last has not been read yet: it is this step's input.
    last = state.step - 1
    index = program.padded + last
    hidden, cache = model.apply(
      program.config,
      base,
      lora,
      jax.lax.dynamic_slice_in_dim(state.tokens, last, 1, axis=1),
      (rows.length + last)[:, None],
      (real & (place <= index))[:, None],
      cache=state.cache,
      index=index,
    )
    state = dataclasses.replace(state, cache=cache)
    return _advance(program, state, model.unembed(base, hidden[:, 0]), rows)

  return jax.lax.while_loop(unfinished, step, state)


def draw(
  logits: jax.Array,
  keys: jax.Array,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
  *,
  vocab_size: int,
  candidates: int,
) -> jax.Array:
  """Next token of each row by the Gumbel-max trick, int32 [B].

  Args:
    logits: float32, [B, V].
    keys: one typed key a row, [B].
    temperature: float32, 0 is greedy, [B].
    top_k: int32, 0 is off, [B].
    top_p: float32, 1 is off, [B].
    vocab_size: tokens at or past it do not exist and are never drawn.
    candidates: how many of the likeliest tokens to rank for top_k and top_p;
      0 where no row uses them, `vocab_size` where a row has top_p alone.
      It changes the cost, never the result.
  """
  size = logits.shape[-1]
  exists = jnp.arange(size)[None] < vocab_size
  logits = jnp.where(exists, logits, -jnp.inf)
  hot = temperature[:, None] > 0
  # Relative to the maximum, so that a low temperature cannot overflow.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  logits = logits / jnp.where(hot, temperature[:, None], 1)
  if candidates:
    cutoff = _cutoff(logits, top_k[:, None], top_p[:, None], candidates)
    logits = jnp.where(logits >= cutoff, logits, -jnp.inf)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32))(
    keys
  )
  return jnp.argmax(logits + jnp.where(hot, noise, 0), axis=-1).astype(
    jnp.int32
  )


def _cutoff(logits, top_k, top_p, candidates):
  """Lowest logit that a row may draw, [B, 1]; ties with it are kept."""
  values, _ = jax.lax.top_k(logits, candidates)
  ranked = (jnp.arange(candidates)[None] < top_k) | (top_k == 0)
  weights = jax.nn.softmax(jnp.where(ranked, values, -jnp.inf), axis=-1)
  before = jnp.cumsum(weights, axis=-1) - weights
  kept = ranked & ((before < top_p) | (top_p >= 1))
  lowest = jnp.min(jnp.where(kept, values, jnp.inf), axis=-1, keepdims=True)
  return jnp.where((top_k == 0) & (top_p >= 1), -jnp.inf, lowest)


def _advance(program, state, logits, rows):
  """Draws a token for each row and writes it down."""
  token = draw(
    logits,
    jax.vmap(jax.random.fold_in)(state.keys, state.count),
    rows.temperature,
    rows.top_k,
    rows.top_p,
    vocab_size=program.vocab_size,
    candidates=program.candidates,
  )
  token = jnp.where(state.done, program.eos_id, token)
  count = state.count + ~state.done
  return dataclasses.replace(
    state,
    tokens=jax.lax.dynamic_update_slice(
      state.tokens, token[:, None], (0, state.step)
    ),
    count=count,
    done=state.done | (token == program.eos_id) | (count >= rows.limit),
    step=state.step + 1,
  )


def _spread(program, cache, count, copies):
  """The cache with each row repeated, and room for new tokens."""
  slots = program.padded + program.room
  target = jax.eval_shape(
    lambda: model.init_cache(program.config, count * copies, slots)
  )

  def one(leaf, target):
    # Rows are the fourth axis from the end; then only slots differ.
    leaf = jnp.repeat(leaf, copies, axis=-4)
    grow = [(0, b - a) for a, b in zip(leaf.shape, target.shape)]
    return jnp.pad(leaf, grow)

  return jax.tree.map(one, cache, target)
