"""Token log-probs by a chunked log-softmax, at completion positions only.

The hidden states that predict a completion token are gathered, and their logits
are computed for a chunk of tokens at a time: over the whole vocabulary, or by
vocabulary tiles with an online softmax. Logits of all tokens never exist.

The gradient of a token's log-prob is known before the loss, up to one factor:
d log p(t) / d hidden = W_t - E_p[W]. With a frozen unembedding W the forward
pass computes and saves it, [C, D], from the exponentials that it sums: two
matrix products for both passes instead of three. The gradient of a trained W
needs the factors, so its backward pass computes the logits again.

Letters: B rows, T tokens, S shards of the rows, C completion tokens of a shard
or chunk, D width, V vocabulary or a tile of it.

References:
  Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
  (arXiv 1805.02867), Algorithm 3.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dpo_jax.core import sharding

# Below every logit, and times zero it is zero.
_FLOOR = jnp.finfo(jnp.float32).min


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
  """Statistics of the next-token distribution, all [S, C].

  Those that a program does not use cost it nothing.

  Attributes:
    logps: log p(target | everything before it), float32, in nats.
    entropy: of that distribution, float32, in nats; it has no gradient.
    top: its most likely token, int32.
    log_square_sum: log of the sum of its squared probabilities, float32; it has
      no gradient.
  """

  logps: jax.Array
  entropy: jax.Array
  top: jax.Array
  log_square_sum: jax.Array


def token_stats(
  hidden: jax.Array,
  kernel: jax.Array,
  source: jax.Array,
  target: jax.Array,
  *,
  chunk: int,
  vocab_tile: int = 0,
) -> TokenStats:
  """Statistics of every completion token; logits and softmax in float32.

  Args:
    hidden: hidden states after the final norm, [B, T, D].
    kernel: the unembedding, [D, V]; products are in the dtype of `hidden`.
    source: index of the hidden state that predicts each token, in the shard's
      B / S flattened rows, [S, C].
    target: the token predicted, [S, C].
    chunk: tokens of a shard whose logits exist at one time.
    vocab_tile: columns of the logits that exist at one time; 0 is all.
  """
  hidden = hidden.reshape(len(source), -1, hidden.shape[-1])
  rows = jnp.take_along_axis(hidden, source[:, :, None], axis=1)
  tile = vocab_tile or kernel.shape[1]
  return TokenStats(*_stats(rows, kernel, target, chunk, tile))


def sequence_sums(
  logps: jax.Array, sequence_ids: jax.Array, sequences: int
) -> tuple[jax.Array, jax.Array]:
  """Summed log-probs and token counts of sequences, float32 [sequences].

  Args:
    logps: token log-probs, [S, C].
    sequence_ids: the sequence of each token, -1 for padding, [S, C].
    sequences: number of sequences.
  """
  # One extra segment takes the padding.
  index = jnp.where(sequence_ids < 0, sequences, sequence_ids).reshape(-1)
  total = functools.partial(
    jax.ops.segment_sum, segment_ids=index, num_segments=sequences + 1
  )
  sums = total(logps.reshape(-1))[:-1]
  return sums, total(jnp.ones(index.shape, jnp.float32))[:-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _stats(rows, kernel, target, chunk, tile):
  """(logps, entropy, top, log square sum) of gathered rows [S, C, D]."""
  return _forward_stats(rows, kernel, target, chunk, tile)[:4]


def _forward_stats(rows, kernel, target, chunk, tile):
  kernel = _replicated_width(kernel, rows.dtype)

  def stats(rows, target):
    return _chunk(rows, kernel, target, tile)[0]

  return _map_chunks(stats, chunk, rows, target)


def _forward(rows, kernel, target, chunk, tile):
  trained = kernel.perturbed
  rows, kernel, target = rows.value, kernel.value, target.value
  if trained:
    stats = _forward_stats(rows, kernel, target, chunk, tile)
    return stats[:4], (rows, kernel, target, stats[4])
  kernel = _replicated_width(kernel, rows.dtype)

  def stats_and_gradient(rows, target):
    stats, gradient = _chunk(rows, kernel, target, tile)
    return stats[:4], (gradient,)

  return _map_chunks(stats_and_gradient, chunk, rows, target)


def _backward(chunk, tile, saved, cotangents):
  factor = cotangents[0]
  if isinstance(factor, jax.custom_derivatives.SymbolicZero):
    return None, None, None
  if len(saved) == 1:
    (gradient,) = saved
    of_rows = (factor[:, :, None] * gradient).astype(gradient.dtype)
    return of_rows, None, None
  rows, kernel, target, log_total = saved
  shards, count, width = rows.shape
  cast = _replicated_width(kernel, rows.dtype)

  def gradients(of_kernel, arrays):
    of_rows, of_kernel = _chunk_gradients(cast, tile, of_kernel, *arrays)
    return of_kernel, of_rows.astype(rows.dtype)

  chunks = _split(chunk, rows, target, log_total, factor)
  start = jnp.zeros((shards, width, kernel.shape[1]), jnp.float32)
  of_kernel, of_rows = jax.lax.scan(gradients, start, chunks)
  of_kernel = jnp.sum(of_kernel, axis=0).astype(kernel.dtype)
  return _join(of_rows, count), of_kernel, None


_stats.defvjp(_forward, _backward, symbolic_zeros=True)


def _replicated_width(kernel, dtype):
  """The unembedding in `dtype`, split over the vocabulary alone.

  XLA for TPUs would gather its width again for each chunk.
  """
  return sharding.constrain(kernel.astype(dtype), None, "vocab")


def _map_chunks(f, chunk, *arrays):
  """`f` of a chunk at a time of arrays [S, C, ...], results joined."""
  count = arrays[0].shape[1]
  if count <= chunk:
    return f(*arrays)
  results = jax.lax.map(lambda xs: f(*xs), _split(chunk, *arrays))
  return jax.tree.map(lambda x: _join(x, count), results)


def _split(chunk, *arrays):
  """[S, C, ...] as equal chunks [n, S, C / n, ...], padded with zeros."""
  count = arrays[0].shape[1]
  chunks = -(-count // chunk)

  def split(x):
    widths = [(0, 0), (0, -count % chunks)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths)
    return jnp.moveaxis(x.reshape(len(x), chunks, -1, *x.shape[2:]), 1, 0)

  return tuple(split(x) for x in arrays)


def _join(x, count):
  """[n, S, C / n, ...] as [S, C, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(len(x), -1, *x.shape[3:])[:, :count]


def _chunk(rows, kernel, target, tile):
  """Statistics of a chunk, and the gradient of its log-probs by the rows.

  Returns:
    (logps, entropy, top, log square sum, log sum exp of the logits), [S, C];
    d logps / d rows, [S, C, D].
  """
  if tile >= kernel.shape[1]:
    return _full_softmax(rows, kernel, target)
  return _online_softmax(rows, kernel, target, tile)


def _full_softmax(rows, kernel, target):
  logits = _logits(rows, kernel)
  peak = jnp.max(logits, axis=-1)
  shifted = logits - peak[:, :, None]
  weights = jnp.exp(shifted)
  total = jnp.sum(weights, axis=-1)
  picked = jnp.take_along_axis(shifted, target[:, :, None], axis=-1)[..., 0]
  weighted = jnp.sum(weights * shifted, axis=-1)
  squares = jnp.sum(jnp.square(weights), axis=-1)
  top = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  stats = _normalized(peak, total, weighted, squares, picked, top)
  # Unnormalized: the most likely token's weight is exactly one in any dtype, so
  # that a confident prediction keeps its small gradient.
  mean = _columns(weights, kernel)
  return stats, _gradient(total, mean, kernel, target, rows.dtype)


def _online_softmax(rows, kernel, target, tile):
  """`_full_softmax` by tiles, its sums rescaled where the maximum grows."""
  shards, count, _ = rows.shape

  def add_tile(carry, number):
    before, total, weighted, squares, picked, top, mean = carry
    part, start = _tile(kernel, number, tile)
    logits = _logits(rows, part)
    if kernel.shape[1] % tile:
      new = _token_ids(part, start) >= number * tile
      logits = jnp.where(new, logits, _FLOOR)
    peak = jnp.maximum(before, jnp.max(logits, axis=-1))
    shifted = logits - peak[:, :, None]
    weights = jnp.exp(shifted)
    drop = before - peak
    scale = jnp.exp(drop)
    weighted = scale * (weighted + drop * total)
    weighted += jnp.sum(weights * shifted, axis=-1)
    total = scale * total + jnp.sum(weights, axis=-1)
    squares = jnp.square(scale) * squares
    squares += jnp.sum(jnp.square(weights), axis=-1)
    mean = scale[:, :, None] * mean + _columns(weights, part)
    at = jnp.clip(target - start, 0, tile - 1)
    here = jnp.take_along_axis(logits, at[:, :, None], axis=-1)[..., 0]
    picked = jnp.where(target // tile == number, here, picked)
    highest = start + jnp.argmax(logits, axis=-1).astype(jnp.int32)
    top = jnp.where(peak > before, highest, top)
    return (peak, total, weighted, squares, picked, top, mean), None

  zero = jnp.zeros((shards, count), jnp.float32)
  start = (zero + _FLOOR, zero, zero, zero, zero, jnp.zeros_like(target))
  start += (jnp.zeros(rows.shape, jnp.float32),)
  end, _ = jax.lax.scan(add_tile, start, _tile_numbers(kernel, tile))
  peak, total, weighted, squares, picked, top, mean = end
  stats = _normalized(peak, total, weighted, squares, picked - peak, top)
  return stats, _gradient(total, mean, kernel, target, rows.dtype)


def _normalized(peak, total, weighted, squares, picked, top):
  """Statistics from sums of exp(logit - peak).

  `weighted` is the sum of each times logit - peak, `squares` that of squares.
  """
  log_total = jnp.log(total)
  entropy = log_total - weighted / total
  square_sum = jnp.log(squares) - 2 * log_total
  return picked - log_total, entropy, top, square_sum, peak + log_total


def _gradient(total, mean, kernel, target, dtype):
  """W_t - E_p[W], from the weighted sum of the columns of W."""
  expected = mean / total[:, :, None]
  picked = jnp.moveaxis(jnp.take(kernel, target, axis=1), 0, -1)
  return (picked.astype(jnp.float32) - expected).astype(dtype)


def _chunk_gradients(
  kernel, tile, grad_kernel, rows, target, log_total, factor
):
  """Gradients of the loss by a chunk's rows and, added up, by the kernel.

  Args:
    kernel: the unembedding in the dtype of `rows`, [D, V].
    tile: columns of a vocabulary tile.
    grad_kernel: of earlier chunks, float32 [S, D, V].
    rows: hidden states, [S, C, D].
    target: tokens predicted, [S, C].
    log_total: log sum exp of the logits in the forward pass, [S, C].
    factor: d loss / d logps, [S, C].

  Returns:
    Gradient of rows, float32 [S, C, D], and `grad_kernel`, [S, D, V].
  """
  target, log_total, factor = (
    x[:, :, None] for x in (target, log_total, factor)
  )

  def of_logits(part, start):
    p = jnp.exp(_logits(rows, part) - log_total)
    return factor * ((_token_ids(part, start) == target) - p)

  def of_both(gradient, part):
    gradient = gradient.astype(rows.dtype)
    # By shard, so that devices reduce once and not in every chunk.
    return _columns(gradient, part), jnp.einsum(
      "SCD,SCV->SDV", rows, gradient, preferred_element_type=jnp.float32
    )

  if tile >= kernel.shape[1]:
    grad_rows, of_kernel = of_both(of_logits(kernel, 0), kernel)
    return grad_rows, grad_kernel + of_kernel

  def add_tile(carry, number):
    grad_rows, grad_kernel = carry
    part, start = _tile(kernel, number, tile)
    new = _token_ids(part, start) >= number * tile
    of_rows, of_kernel = of_both(
      jnp.where(new, of_logits(part, start), 0), part
    )
    before = jax.lax.dynamic_slice_in_dim(grad_kernel, start, tile, axis=2)
    grad_kernel = jax.lax.dynamic_update_slice_in_dim(
      grad_kernel, before + of_kernel, start, axis=2
    )
    return (grad_rows + of_rows, grad_kernel), None

  start = (jnp.zeros(rows.shape, jnp.float32), grad_kernel)
  return jax.lax.scan(add_tile, start, _tile_numbers(kernel, tile))[0]


def _logits(rows, kernel):
  """Float32 [S, C, V] of rows [S, C, D] and a kernel [D, V]."""
  return jnp.einsum(
    "SCD,DV->SCV", rows, kernel, preferred_element_type=jnp.float32
  )


def _columns(weights, kernel):
  """Weighted sums of the kernel's columns, [S, C, D]."""
  return jnp.einsum(
    "SCV,DV->SCD",
    weights.astype(kernel.dtype),
    kernel,
    preferred_element_type=jnp.float32,
  )


def _tile_numbers(kernel, tile):
  return jnp.arange(-(-kernel.shape[1] // tile))


def _tile(kernel, number, tile):
  """A tile and its first token id; the last overlaps the one before it."""
  start = jnp.minimum(number * tile, kernel.shape[1] - tile)
  return jax.lax.dynamic_slice_in_dim(kernel, start, tile, axis=1), start


def _token_ids(part, start):
  """Token ids of a tile's columns, [1, 1, V]."""
  return start + jnp.arange(part.shape[1]).reshape(1, 1, -1)
