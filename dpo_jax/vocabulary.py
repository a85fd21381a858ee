"""One visit of the vocabulary by a chunk of tokens: of `logps` alone.

A visit is of all words at once, or of a tile of words after another. By tiles
the sums go on from tile to tile as in online softmax: they are of exponentials
below the highest logit so far, and are scaled down when a higher one comes. A
kernel that is visited by tiles is read, and by a CPU's matrix products packed,
once for all tokens of the chunk, and what exists is tokens by words of a tile.

Einsum letters: S shards of the rows, C tokens of a shard's chunk, D width, V
words, all of them or a tile's.

References:
  Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
  (arXiv 1805.02867), Algorithm 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Below every logit, and times zero it is zero.
FLOOR = jnp.finfo(jnp.float32).min


class Visit(NamedTuple):
  """What one visit gives, all [S, C]: statistics, and log sum exp of logits."""

  logps: jax.Array
  entropy: jax.Array
  top: jax.Array
  level: jax.Array


class Slopes(NamedTuple):
  """d logps / d rows and d entropy / d rows, both [S, C, D]."""

  of_logps: jax.Array
  of_entropy: jax.Array


def logits(rows: jax.Array, kernel: jax.Array) -> jax.Array:
  """Float32 [S, C, V] of rows [S, C, D] and a kernel [D, V]."""
  return jnp.einsum(
    "SCD,DV->SCV", rows, kernel, preferred_element_type=jnp.float32
  )


def visit(
  rows: jax.Array, kernel: jax.Array, target: jax.Array, words: int
) -> tuple[Visit, Slopes]:
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


def gradients(
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
    rows: as in `visit`, as are `kernel`, `target` and `words`.
    found: the visit's entropy and level, [S, C].
    factors: d loss / d logps and d loss / d entropy, [S, C].
    grad_kernel: of other chunks, float32 [S, D, V].

  Returns:
    Gradient of rows, float32 [S, C, D], and `grad_kernel`, [S, D, V].
  """
  entropy, level = (x[:, :, None] for x in found)
  of_logps, of_entropy = (x[:, :, None] for x in factors)

  def slope(part, start):
    below = logits(rows, part) - level
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
  z = logits(rows, kernel)
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
    z = logits(rows, part)
    if kernel.shape[1] % words:
      z = jnp.where(_numbers(part, start) >= number * words, z, FLOOR)
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
  start = (zero + FLOOR, zero, zero, zero, jnp.zeros_like(target))
  start += (jnp.zeros(rows.shape, jnp.float32),) * 2
  end, _ = jax.lax.scan(tile, start, _tiles(kernel, words))
  peak, total, spread, picked, top, *means = end
  found = _found(peak, total, spread, picked - peak, top)
  return found, _slopes(found.entropy, total, means, rows, kernel, target)


def _found(peak, total, spread, picked, top):
  """Statistics of sums below the peak; `picked` is below it as well."""
  log_total = jnp.log(total)
  entropy = log_total - spread / total
  return Visit(picked - log_total, entropy, top, peak + log_total)


def _slopes(entropy, total, means, rows, kernel, target):
  """Slopes of the sums of the kernel's columns, each times a weight."""
  expected, spread_mean = (mean / total[:, :, None] for mean in means)
  wanted = jnp.moveaxis(jnp.take(kernel, target, axis=1), 0, -1)
  of_logps = wanted.astype(jnp.float32) - expected
  rest = (entropy - jnp.log(total))[:, :, None]
  of_entropy = -spread_mean - rest * expected
  return Slopes(of_logps.astype(rows.dtype), of_entropy.astype(rows.dtype))


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
