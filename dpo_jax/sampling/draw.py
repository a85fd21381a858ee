"""Drawing the next token of each row: greedy, temperature, top_k, top_p.

A vocabulary of 50,000 is too long to sort, or to draw a number for each word,
at every step. Three exact shortcuts are taken. The k likeliest tokens are in
the k blocks with the largest maxima, and of these in the k pieces with the
largest, so that top_k ranks three short lists. A draw from all tokens first
draws a block by its total weight and then a token of it, both by the Gumbel-max
trick: the maximum of a block's perturbed logits is itself the block's
log-weight with Gumbel noise, so the distribution is that of one draw. The
threshold of top_p without top_k is found by bisection over the positive floats.

The noise of a token is keyed by the row's key and the token's id, so that it
depends neither on the batch nor on which other tokens are candidates.

Letters: B rows, V vocab, G blocks, C candidates.

References:
  Maddison, Tarlow and Minka, A* Sampling, 2014 (arXiv 1411.0030), Section 3;
  Holtzman et al., The Curious Case of Neural Text Degeneration, 2020
  (arXiv 1904.09751).
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp

# Tokens of a block: near the root of Pythia's vocabulary.
BLOCK = 128

# Tokens of a piece of a block; the last list ranked is 16 k long.
_PIECE = 16

# Names how noise is keyed: a run cannot continue under another name.
SCHEME = "gumbel by token and block of 128"

# The number of candidates is rounded up to this, so that requests with the
# usual top_k rank lists of one length, whatever the other requests are.
_STEP = 64

# Folded into the key of a draw among blocks; token ids are smaller.
_BLOCKS = 2**31


@dataclasses.dataclass(frozen=True)
class Paths:
  """Which of the ways to draw a program compiles; static.

  They change a step's cost, never a row's token.

  Attributes:
    candidates: how many of the likeliest tokens are ranked; 0 if no row has
      top_k.
    whole: whether some row draws from the whole vocabulary.
    nucleus: whether some of those rows has a top_p.
  """

  candidates: int
  whole: bool
  nucleus: bool


def paths(
  parameters: Iterable[tuple[float, int, float]], vocab_size: int
) -> Paths:
  """The paths that rows of these (temperature, top_k, top_p) need."""
  drawn = {(k if k < vocab_size else 0, p) for t, k, p in parameters if t > 0}
  largest = max((k for k, _ in drawn), default=0)
  return Paths(
    candidates=min(-(-largest // _STEP) * _STEP, vocab_size),
    whole=any(k == 0 for k, _ in drawn),
    nucleus=any(k == 0 and p < 1 for k, p in drawn),
  )


def draw(
  logits: jax.Array,
  keys: jax.Array,
  temperature: jax.Array,
  top_k: jax.Array,
  top_p: jax.Array,
  *,
  vocab_size: int,
  paths: Paths,
) -> tuple[jax.Array, jax.Array]:
  """The next token of each row, int32 [B], and its log-prob, float32 [B].

  top_k keeps the k likeliest tokens, of equals those with the smaller ids;
  then top_p keeps the likeliest that together reach it, and tokens as likely as
  the last of them.

  Args:
    logits: float32, [B, V].
    keys: one typed key a row, [B].
    temperature: float32, 0 is greedy, [B].
    top_k: int32, 0 or `vocab_size` and above is off, [B].
    top_p: float32, 1 is off, [B].
    vocab_size: tokens at or past it do not exist and are never drawn.
    paths: those that some row needs.

  Returns:
    The tokens, and their log-probs under the model itself: in nats, at
    temperature 1, over all V, before top_k and top_p.
  """
  top_k = jnp.where(top_k < vocab_size, top_k, 0)
  blocks = _blocks(logits)
  every = jnp.max(blocks, axis=-1)
  maxima = _existing_maxima(blocks, every, vocab_size)
  best = jnp.max(maxima, axis=-1)
  token = _greedy(blocks, maxima, best, vocab_size)
  cool = jnp.where(temperature > 0, temperature, 1)
  if paths.whole:
    existing = _existing(blocks, _ids(blocks.shape[1]), vocab_size)
    drawn = _from_all(existing, best, keys, cool, top_p, paths)
    token = jnp.where((temperature > 0) & (top_k == 0), drawn, token)
  if paths.candidates:
    few = _likeliest(blocks, maxima, paths.candidates, vocab_size)
    drawn = _from_few(*few, best, keys, cool, top_k, top_p)
    token = jnp.where((temperature > 0) & (top_k > 0), drawn, token)
  return token, log_prob(logits, token, jnp.max(every, axis=-1))


def log_prob(
  logits: jax.Array, token: jax.Array, largest: jax.Array
) -> jax.Array:
  """log p(token), float32 [B], of logits [B, V] with maxima `largest`, [B]."""
  own = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
  total = jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1)
  return own - largest - jnp.log(total)


def _blocks(logits):
  """Logits as [B, G, BLOCK], padded with -inf."""
  more = -logits.shape[-1] % BLOCK
  # Pythia's vocabulary is a multiple: nothing is copied.
  if more:
    ends = ((0, 0), (0, more))
    logits = jnp.pad(logits, ends, constant_values=-jnp.inf)
  return logits.reshape(len(logits), -1, BLOCK)


def _ids(blocks):
  """Token ids of the first G blocks, int32 [1, G, BLOCK]."""
  return jnp.arange(blocks * BLOCK, dtype=jnp.int32).reshape(1, -1, BLOCK)


def _existing(logits, ids, vocab_size):
  """The logits of tokens that exist, -inf for the others."""
  return jnp.where(ids < vocab_size, logits, -jnp.inf)


def _existing_maxima(blocks, maxima, vocab_size):
  """The largest of each block, [B, G], over tokens that exist.

  Only the last blocks have others; masking all would copy all logits.
  """
  whole = vocab_size // BLOCK
  last = _existing(
    blocks[:, whole:], _ids(blocks.shape[1])[:, whole:], vocab_size
  )
  return jnp.concatenate([maxima[:, :whole], jnp.max(last, axis=-1)], axis=1)


def _first(x, value):
  """Index of the first `value` in each row of x, int32 [B].

  Two plain reductions; XLA's argmax is a hundred times slower on CPU.
  """
  places = jnp.arange(x.shape[-1], dtype=jnp.int32)[None]
  found = jnp.where(x == value[:, None], places, x.shape[-1] - 1)
  return jnp.min(found, axis=-1)


def _take_block(blocks, block):
  return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _greedy(blocks, maxima, best, vocab_size):
  start = _first(maxima, best) * BLOCK
  ids = start[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None]
  own = _existing(_take_block(blocks, start // BLOCK), ids, vocab_size)
  return start + _first(own, best)


def _from_few(values, ids, best, keys, cool, top_k, top_p):
  """A draw among the top_k likeliest tokens, after top_p, int32 [B].

  Args:
    values: the largest logits in descending order, [B, C].
    ids: their tokens.
    best: the largest of them, [B].
    keys: see `draw`.
    cool: temperatures, positive.
    top_k: at most C.
    top_p: see `draw`.
  """
  # Not values[:, :1]: XLA then sorts the whole list in place of top_k.
  scores = (values - best[:, None]) / cool[:, None]
  rank = jnp.arange(values.shape[-1])[None]
  ranked = (rank < top_k[:, None]) & (scores > -jnp.inf)
  weights = jnp.where(ranked, jnp.exp(scores), 0)
  # The running sum as a product: XLA's own is fused into what reads it, and
  # then computed again for every candidate.
  earlier = jnp.triu(jnp.ones((ids.shape[1],) * 2, jnp.float32), 1)
  before = jnp.matmul(weights, earlier, precision=jax.lax.Precision.HIGHEST)
  mass = top_p * jnp.sum(weights, axis=-1)
  inside = (before < mass[:, None]) | (top_p >= 1)[:, None]
  lowest = jnp.min(
    jnp.where(ranked & inside, scores, jnp.inf), axis=-1, keepdims=True
  )
  kept = ranked & (scores >= lowest)
  perturbed = jnp.where(kept, scores + _noise(keys, ids), -jnp.inf)
  choice = jnp.argmax(perturbed, axis=-1)
  return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0]


def _likeliest(blocks, maxima, count, vocab_size):
  """The `count` largest logits in descending order and their ids, [B, C].

  A token among the `count` likeliest is in a block whose maximum is among the
  `count` largest maxima, since each larger maximum is a likelier token; and so
  for the pieces of these blocks. Of equal logits the smaller id comes first:
  `top_k` takes the first of equals, and ids stay in order.
  """
  rows = len(blocks)
  _, chosen = jax.lax.top_k(maxima, min(count, maxima.shape[-1]))
  chosen = jnp.sort(chosen, axis=-1)
  few = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1)
  ids = jnp.expand_dims(chosen * BLOCK, -1)
  ids = ids + jnp.arange(BLOCK, dtype=jnp.int32)[None, None]
  few = _existing(few, ids, vocab_size).reshape(rows, -1, _PIECE)
  starts = ids.reshape(rows, -1, _PIECE)[:, :, 0]
  _, chosen = jax.lax.top_k(jnp.max(few, -1), min(count, few.shape[1]))
  chosen = jnp.sort(chosen, axis=-1)
  few = jnp.take_along_axis(few, chosen[:, :, None], axis=1)
  starts = jnp.take_along_axis(starts, chosen, axis=1)
  values, places = jax.lax.top_k(few.reshape(rows, -1), count)
  starts = jnp.take_along_axis(starts, places // _PIECE, axis=1)
  return values, (starts + places % _PIECE).astype(jnp.int32)


def _from_all(blocks, best, keys, cool, top_p, paths):
  """A draw among all tokens, after top_p, int32 [B]."""
  scores = (blocks - best[:, None, None]) / cool[:, None, None]
  weights = jnp.exp(scores)
  if paths.nucleus:
    lowest = _nucleus(weights, top_p)
    kept = weights >= lowest[:, None, None]
    weights = jnp.where(kept, weights, 0)
    scores = jnp.where(kept, scores, -jnp.inf)
  count = blocks.shape[1]
  noise = jax.vmap(
    lambda key: jax.random.gumbel(
      jax.random.fold_in(key, _BLOCKS), (count,), jnp.float32
    )
  )(keys)
  block = jnp.argmax(jnp.log(jnp.sum(weights, axis=-1)) + noise, axis=-1)
  block = block.astype(jnp.int32)
  ids = block[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None]
  perturbed = _take_block(scores, block) + _noise(keys, ids)
  return block * BLOCK + jnp.argmax(perturbed, axis=-1).astype(jnp.int32)


def _nucleus(weights, top_p):
  """The smallest weight that top_p keeps, [B]: those above it sum to less.

  Positive floats are ordered as their bits, so that 30 halvings find the
  threshold exactly; each is one pass over the weights.
  """
  bits = jax.lax.bitcast_convert_type(weights, jnp.int32)
  goal = jnp.where(top_p < 1, top_p, jnp.inf) * jnp.sum(weights, axis=(1, 2))

  def halve(_, bounds):
    low, high = (
      bounds  # The sum above `low` is too large, above `high` it is not.
    )
    middle = low + jnp.maximum((high - low) // 2, 1)
    heavier = bits > middle[:, None, None]
    above = jnp.sum(jnp.where(heavier, weights, 0), axis=(1, 2))
    enough = above < goal
    return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

  # Nothing is heavier than 1, the weight of the likeliest token; -1 is below
  # the bits of every weight, zero included.
  one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
  ends = jnp.full_like(goal, -1, jnp.int32), jnp.full_like(goal, one, jnp.int32)
  _, high = jax.lax.fori_loop(0, 30, halve, ends)
  return jax.lax.bitcast_convert_type(high, jnp.float32)


def _noise(keys, ids):
  """Standard Gumbel noise of tokens, [B, C], keyed by row and id."""

  def one(key, token):
    return jax.random.gumbel(jax.random.fold_in(key, token), (), jnp.float32)

  return jax.vmap(jax.vmap(one, (None, 0)))(keys, ids)
