"""Per-token log-probs, with the unembedding at completion positions only.

Most positions of a row are prompt or padding and need no logits. The hidden
states that predict a completion token are gathered first, and the vocabulary
is then visited for a chunk of them at a time, all words at once or tile by
tile, so that an array of all tokens by all words never exists: of logits, what
lives at one time is a chunk's, whatever the number of tokens.

By tiles the sums go on from tile to tile as in online softmax: they are of
exponentials below the highest logit so far, and are scaled down when a higher
one comes. A kernel that is visited by tiles is read, and by a CPU's matrix
products packed, once for all tokens of the chunk.

The gradient of a log-prob is known before the loss is: d log p(t) / d hidden is
W_t - E_p[W], and what the loss adds is one factor for each token. So while the
unembedding W is frozen, the forward pass takes the gradient from the very
exponentials it sums, and keeps it, [C, D]: the vocabulary is visited once for
both passes, with two matrix products instead of three, and no gradient of W is
formed. Where W is trained its gradient needs the factors, so the backward pass
visits the vocabulary again.

`plain` is the same without chunks or rules of its own.

Letters: B rows, T tokens, S shards of the rows, C completion tokens of a shard,
or of its chunk, D width, V vocabulary, or a tile of it.

References:
  Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
  (arXiv 1805.02867), Algorithm 3.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.core import sharding

# Below every logit, and times zero it is zero.
_FLOOR = jnp.finfo(jnp.float32).min


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
  """What the distribution over the vocabulary says of each token; all [S, C].

  All come from one visit of the vocabulary, and what nobody reads is not
  computed.

  Attributes:
    logps: log p(target | everything before it), float32, in nats.
    entropy: of the distribution that the target is scored by, float32, in
      nats.
    top: the likeliest token, int32.
  """

  logps: jax.Array
  entropy: jax.Array
  top: jax.Array


def token_stats(
  hidden: jax.Array,
  kernel: jax.Array,
  source: jax.Array,
  target: jax.Array,
  *,
  chunk: int,
  words: int = 0,
) -> TokenStats:
  """Statistics of every completion token; logits and softmax in float32.

  Args:
    hidden: hidden states after the final norm, [B, T, D].
    kernel: the unembedding, [D, V]; products are of the dtype of `hidden`.
    source: where the hidden state that predicts lies among the B / S rows of
      the shard, one after the other, [S, C].
    target: the token that comes next, [S, C].
    chunk: tokens of a shard whose logits live at one time. It decides memory
      and speed, not the numbers.
    words: words whose logits live at one time, likewise; 0 is all.

  Raises:
    ValueError: `chunk` is not positive, or `words` is negative.
  """
  if chunk < 1:
    raise ValueError(f"chunk={chunk} must be at least 1")
  if words < 0:
    raise ValueError(f"words={words} must not be negative")
  words = words or kernel.shape[1]
  rows = _gather(hidden, source)
  return TokenStats(*_stats(rows, kernel, target, chunk, words))


def plain(
  hidden: jax.Array, kernel: jax.Array, source: jax.Array, target: jax.Array
) -> TokenStats:
  """`token_stats` as the formulas have it: the slow twin."""
  rows = _gather(hidden, source)
  logits = _logits(rows, kernel.astype(hidden.dtype))
  logps = jax.nn.log_softmax(logits, axis=-1)
  return TokenStats(
    jnp.take_along_axis(logps, target[:, :, None], axis=-1)[..., 0],
    -jnp.sum(jnp.exp(logps) * logps, axis=-1),
    jnp.argmax(logits, axis=-1).astype(jnp.int32),
  )


def sequence_sums(
  logps: jax.Array, sequence_ids: jax.Array, sequences: int
) -> tuple[jax.Array, jax.Array]:
  """Sums each sequence's token log-probs.

  Args:
    logps: token log-probs, [S, C].
    sequence_ids: which sequence each token belongs to, -1 for padding, [S, C].
    sequences: how many sequences there are.

  Returns:
    Sums and token counts, both float32 [sequences].
  """
  # One extra segment takes the padding.
  index = jnp.where(sequence_ids < 0, sequences, sequence_ids).reshape(-1)
  total = functools.partial(
    jax.ops.segment_sum, segment_ids=index, num_segments=sequences + 1
  )
  sums = total(logps.reshape(-1))[:-1]
  return sums, total(jnp.ones(index.shape, jnp.float32))[:-1]


def _gather(hidden, source):
  """The hidden states that predict, [S, C, D]."""
  hidden = hidden.reshape(len(source), -1, hidden.shape[-1])
  return jnp.take_along_axis(hidden, source[:, :, None], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _stats(rows, kernel, target, chunk, words):
  """(logps, entropy, top) of gathered rows [S, C, D]."""
  return _visited(rows, kernel, target, chunk, words)[:3]


def _read(kernel, dtype):
  """The unembedding as the chunks read it: once for all, if it is split.

  Left to itself XLA for TPUs gathers it again for each chunk.
  """
  return sharding.constrain(kernel.astype(dtype), None, "vocab")


def _visited(rows, kernel, target, chunk, words):
  kernel = _read(kernel, rows.dtype)

  def one(rows, target):
    return _visit(rows, kernel, target, words)[0]

  return _map(one, chunk, rows, target)


def _forward(rows, kernel, target, chunk, words):
  trained = kernel.perturbed
  rows, kernel, target = rows.value, kernel.value, target.value
  if trained:
    *stats, level = _visited(rows, kernel, target, chunk, words)
    return tuple(stats), (rows, kernel, target, stats[1], level)
  kernel = _read(kernel, rows.dtype)

  def one(rows, target):
    stats, slopes = _visit(rows, kernel, target, words)
    return stats[:3], tuple(slopes)

  return _map(one, chunk, rows, target)


def _backward(chunk, words, kept, cotangents):
  factors = [_known(ct) for ct in cotangents[:2]]
  if len(kept) == 2:
    grads = [
      factor[:, :, None] * slope
      for factor, slope in zip(factors, kept)
      if factor is not None
    ]
    return sum(grads).astype(kept[0].dtype) if grads else None, None, None
  return *_of_both(chunk, words, kept, factors), None


_stats.defvjp(_forward, _backward, symbolic_zeros=True)


def _of_both(chunk, words, kept, factors):
  """Gradients of rows and of the unembedding, by another visit."""
  rows, kernel, target, *found = kept
  shards, count, width = rows.shape
  cast = _read(kernel, rows.dtype)
  zero = jnp.zeros((shards, count), jnp.float32)
  factors = [zero if factor is None else factor for factor in factors]

  def one(grad_kernel, piece):
    rows, target, entropy, level, *factors = piece
    grad_rows, grad_kernel = _gradients(
      rows, cast, target, (entropy, level), factors, grad_kernel, words
    )
    return grad_kernel, grad_rows.astype(rows.dtype)

  chunks = _chunks(chunk, rows, target, *found, *factors)
  start = jnp.zeros((shards, width, kernel.shape[1]), jnp.float32)
  grad_kernel, grad_rows = jax.lax.scan(one, start, chunks)
  grad_kernel = jnp.sum(grad_kernel, axis=0).astype(kernel.dtype)
  return _joined(grad_rows, count), grad_kernel


def _known(cotangent):
  """A cotangent, or None where nothing depends on the output."""
  zero = isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
  return None if zero else cotangent


def _map(one, chunk, *arrays):
  """`one` of a chunk at a time of arrays [S, C, ...], results joined."""
  count = arrays[0].shape[1]
  if count <= chunk:
    return one(*arrays)
  found = jax.lax.map(lambda piece: one(*piece), _chunks(chunk, *arrays))
  return jax.tree.map(lambda x: _joined(x, count), found)


def _chunks(chunk, *arrays):
  """[S, C, ...] as [n, S, C / n, ...] with zeros behind: even, none longer."""
  count = arrays[0].shape[1]
  pieces = -(-count // chunk)

  def split(x):
    widths = [(0, 0), (0, -count % pieces)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths)
    return jnp.moveaxis(x.reshape(len(x), pieces, -1, *x.shape[2:]), 1, 0)

  return tuple(split(x) for x in arrays)


def _joined(x, count):
  """[n, S, C / n, ...] as [S, C, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(len(x), -1, *x.shape[3:])[:, :count]


# One visit of the vocabulary by a chunk of tokens.


class _Visit(NamedTuple):
  """What one visit gives, all [S, C]: statistics, and log sum exp of logits."""

  logps: jax.Array
  entropy: jax.Array
  top: jax.Array
  level: jax.Array


class _Slopes(NamedTuple):
  """d logps / d rows and d entropy / d rows, both [S, C, D]."""

  of_logps: jax.Array
  of_entropy: jax.Array


def _logits(rows: jax.Array, kernel: jax.Array) -> jax.Array:
  """Float32 [S, C, V] of rows [S, C, D] and a kernel [D, V]."""
  return jnp.einsum(
    "SCD,DV->SCV", rows, kernel, preferred_element_type=jnp.float32
  )


def _visit(
  rows: jax.Array, kernel: jax.Array, target: jax.Array, words: int
) -> tuple[_Visit, _Slopes]:
  """Statistics and their slopes; what nobody reads is not computed.

  Args:
    rows: hidden states, [S, C, D].
    kernel: the unembedding in the dtype of `rows`, [D, V].
    target: the words whose log-probs are asked for, [S, C].
    words: words of a tile; all at once where there are no more.
  """
  if words >= kernel.shape[1]:
    return _whole(rows, kernel, target)
  return _by_tiles(rows, kernel, target, words)


def _gradients(
  rows: jax.Array,
  kernel: jax.Array,
  target: jax.Array,
  found: tuple[jax.Array, jax.Array],
  factors: tuple[jax.Array, jax.Array],
  grad_kernel: jax.Array,
  words: int,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of rows and, added to `grad_kernel`, of the kernel.

  Args:
    rows: as in `_visit`, as are `kernel`, `target` and `words`.
    found: the visit's entropy and level, [S, C].
    factors: d loss / d logps and d loss / d entropy, [S, C].
    grad_kernel: of other chunks, float32 [S, D, V].

  Returns:
    Gradient of rows, float32 [S, C, D], and `grad_kernel`, [S, D, V].
  """
  entropy, level = (x[:, :, None] for x in found)
  of_logps, of_entropy = (x[:, :, None] for x in factors)

  def slope(part, start):
    below = _logits(rows, part) - level
    p = jnp.exp(below)
    hit = _numbers(part, start) == target[:, :, None]
    slope = of_logps * (hit - p) - of_entropy * p * (below + entropy)
    return slope

  def both(slope, part):
    slope = slope.astype(rows.dtype)
    # By shard, so that devices add up once and not in every chunk.
    return _back(slope, part), jnp.einsum(
      "SCD,SCV->SDV", rows, slope, preferred_element_type=jnp.float32
    )

  if words >= kernel.shape[1]:
    grad_rows, of_kernel = both(slope(kernel, 0), kernel)
    return grad_rows, grad_kernel + of_kernel

  def tile(carry, number):
    grad_rows, grad_kernel = carry
    part, start = _tile(kernel, number, words)
    new = _numbers(part, start) >= number * words
    of_rows, of_kernel = both(jnp.where(new, slope(part, start), 0), part)
    before = jax.lax.dynamic_slice_in_dim(grad_kernel, start, words, axis=2)
    grad_kernel = jax.lax.dynamic_update_slice_in_dim(
      grad_kernel, before + of_kernel, start, axis=2
    )
    return (grad_rows + of_rows, grad_kernel), None

  start = (jnp.zeros(rows.shape, jnp.float32), grad_kernel)
  return jax.lax.scan(tile, start, _tiles(kernel, words))[0]


def _whole(rows, kernel, target):
  z = _logits(rows, kernel)
  peak = jnp.max(z, axis=-1)
  below = z - peak[:, :, None]
  weights = jnp.exp(below)
  total = jnp.sum(weights, axis=-1)
  picked = jnp.take_along_axis(below, target[:, :, None], axis=-1)[..., 0]
  spread = jnp.sum(weights * below, axis=-1)
  top = jnp.argmax(z, axis=-1).astype(jnp.int32)
  found = _found(peak, total, spread, picked, top)
  # The likeliest token's weight is exactly one in any dtype, so that a sure
  # prediction keeps its small gradient.
  means = _back(weights, kernel), _back(weights * below, kernel)
  return found, _slopes(found.entropy, total, means, rows, kernel, target)


def _by_tiles(rows, kernel, target, words):
  shards, count, _ = rows.shape

  def tile(carry, number):
    before, total, spread, picked, top, mean, spread_mean = carry
    part, start = _tile(kernel, number, words)
    z = _logits(rows, part)
    if kernel.shape[1] % words:
      z = jnp.where(_numbers(part, start) >= number * words, z, _FLOOR)
    peak = jnp.maximum(before, jnp.max(z, axis=-1))
    below = z - peak[:, :, None]
    weights = jnp.exp(below)
    # What the earlier sums become below the new peak.
    drop = before - peak
    scale = jnp.exp(drop)
    spread = scale * (spread + drop * total)
    spread += jnp.sum(weights * below, axis=-1)
    total = scale * total + jnp.sum(weights, axis=-1)
    drop, scale = drop[:, :, None], scale[:, :, None]
    spread_mean = scale * (spread_mean + drop * mean)
    spread_mean += _back(weights * below, part)
    mean = scale * mean + _back(weights, part)
    at = jnp.clip(target - start, 0, words - 1)
    here = jnp.take_along_axis(z, at[:, :, None], axis=-1)[..., 0]
    picked = jnp.where(target // words == number, here, picked)
    highest = start + jnp.argmax(z, axis=-1).astype(jnp.int32)
    top = jnp.where(peak > before, highest, top)
    return (peak, total, spread, picked, top, mean, spread_mean), None

  zero = jnp.zeros((shards, count), jnp.float32)
  start = (zero + _FLOOR, zero, zero, zero, jnp.zeros_like(target))
  start += (jnp.zeros(rows.shape, jnp.float32),) * 2
  end, _ = jax.lax.scan(tile, start, _tiles(kernel, words))
  peak, total, spread, picked, top, *means = end
  found = _found(peak, total, spread, picked - peak, top)
  return found, _slopes(found.entropy, total, means, rows, kernel, target)


def _found(peak, total, spread, picked, top):
  """Statistics of sums below the peak; `picked` is below it as well."""
  log_total = jnp.log(total)
  entropy = log_total - spread / total
  return _Visit(picked - log_total, entropy, top, peak + log_total)


def _slopes(entropy, total, means, rows, kernel, target):
  """Slopes of the sums of the kernel's columns, each times a weight."""
  expected, spread_mean = (mean / total[:, :, None] for mean in means)
  wanted = jnp.moveaxis(jnp.take(kernel, target, axis=1), 0, -1)
  of_logps = wanted.astype(jnp.float32) - expected
  rest = (entropy - jnp.log(total))[:, :, None]
  of_entropy = -spread_mean - rest * expected
  return _Slopes(of_logps.astype(rows.dtype), of_entropy.astype(rows.dtype))


def _back(values, kernel):
  """Sum over words of the kernel's columns, each times a value, [S, C, D]."""
  return jnp.einsum(
    "SCV,DV->SCD",
    values.astype(kernel.dtype),
    kernel,
    preferred_element_type=jnp.float32,
  )


def _tiles(kernel, words):
  return jnp.arange(-(-kernel.shape[1] // words))


def _tile(kernel, number, words):
  """A tile's columns and the first word of them; the last tile starts early."""
  start = jnp.minimum(number * words, kernel.shape[1] - words)
  return jax.lax.dynamic_slice_in_dim(kernel, start, words, axis=1), start


def _numbers(part, start):
  """Which words a tile's are, [1, 1, V]."""
  return start + jnp.arange(part.shape[1]).reshape(1, 1, -1)
