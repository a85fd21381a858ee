"""Per-token log-probs, with the unembedding at completion positions only.

Most positions of a row are prompt or padding and need no logits. The hidden
states that predict a completion token are gathered first, and the vocabulary
is then visited for a chunk of them at a time, so that an array of all tokens by
all words never exists: of logits, what lives at one time is a chunk's, whatever
the number of tokens.

The gradient of a log-prob is known before the loss is: d log p(t) / d hidden is
W_t - E_p[W], and what the loss adds is one factor for each token. So while the
unembedding W is frozen, the forward pass takes the gradient from the very
exponentials it sums, and keeps it, [C, D]: the vocabulary is visited once for
both passes, with two matrix products instead of three, and no gradient of W is
formed. Where W is trained its gradient needs the factors, so the backward pass
visits the vocabulary again.

`plain` is the same without chunks or rules of its own.

Einsum letters: B rows, T tokens, S shards of the rows, C completion tokens of a
shard, D width, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


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

  Raises:
    ValueError: `chunk` is not positive.
  """
  if chunk < 1:
    raise ValueError(f"chunk={chunk} must be at least 1")
  return TokenStats(*_stats(_gather(hidden, source), kernel, target, chunk))


def plain(
  hidden: jax.Array, kernel: jax.Array, source: jax.Array, target: jax.Array
) -> TokenStats:
  """`token_stats` as the formulas have it: the slow twin."""
  logits = _logits(_gather(hidden, source), kernel.astype(hidden.dtype))
  logps = jax.nn.log_softmax(logits, axis=-1)
  return TokenStats(
    jnp.take_along_axis(logps, target[:, :, None], axis=-1)[..., 0],
    -jnp.sum(jnp.exp(logps) * logps, axis=-1),
    jnp.argmax(logits, axis=-1).astype(jnp.int32),
  )


def sequence_sums(
  logps: jax.Array, owner: jax.Array, sequences: int
) -> tuple[jax.Array, jax.Array]:
  """Sums each sequence's token log-probs.

  Args:
    logps: token log-probs, [S, C].
    owner: which sequence each token belongs to, -1 for padding, [S, C].
    sequences: how many sequences there are.

  Returns:
    Sums and token counts, both float32 [sequences].
  """
  # One extra segment takes the padding.
  index = jnp.where(owner < 0, sequences, owner).reshape(-1)
  total = functools.partial(
    jax.ops.segment_sum, segment_ids=index, num_segments=sequences + 1
  )
  sums = total(logps.reshape(-1))[:-1]
  return sums, total(jnp.ones(index.shape, jnp.float32))[:-1]


def _gather(hidden, source):
  """The hidden states that predict, [S, C, D]."""
  hidden = hidden.reshape(len(source), -1, hidden.shape[-1])
  return jnp.take_along_axis(hidden, source[:, :, None], axis=1)


def _logits(rows, kernel):
  return jnp.einsum(
    "SCD,DV->SCV", rows, kernel, preferred_element_type=jnp.float32
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _stats(rows, kernel, target, chunk):
  """(logps, entropy, top) of gathered rows [S, C, D]."""
  kernel = kernel.astype(rows.dtype)

  def one(rows, target):
    return _visit(rows, kernel, target)[0]

  return _map(one, chunk, rows, target)


def _forward(rows, kernel, target, chunk):
  trained = kernel.perturbed
  rows, kernel, target = rows.value, kernel.value, target.value
  if trained:
    stats = _stats(rows, kernel, target, chunk)
    return stats, (rows, kernel, target, stats[1])
  kernel = kernel.astype(rows.dtype)

  def one(rows, target):
    stats, exponentials = _visit(rows, kernel, target)
    return stats, _slopes(stats, exponentials, kernel, target, rows.dtype)

  return _map(one, chunk, rows, target)


def _backward(chunk, kept, cotangents):
  of_logps, of_entropy = (_known(ct) for ct in cotangents[:2])
  if len(kept) == 2:
    factors = (of_logps, of_entropy)
    grads = [
      factor[:, :, None] * slope
      for factor, slope in zip(factors, kept)
      if factor is not None
    ]
    return sum(grads).astype(kept[0].dtype) if grads else None, None, None
  rows, kernel, target, entropy = kept
  grad_rows, grad_kernel = _of_both(
    rows, kernel, target, entropy, of_logps, of_entropy, chunk
  )
  return grad_rows, grad_kernel, None


_stats.defvjp(_forward, _backward, symbolic_zeros=True)


def _visit(rows, kernel, target):
  """A chunk's statistics, and the exponentials that they were made from."""
  logits = _logits(rows, kernel)
  peak = jnp.max(logits, axis=-1)
  below = logits - peak[:, :, None]
  weights = jnp.exp(below)
  total = jnp.sum(weights, axis=-1)
  picked = jnp.take_along_axis(below, target[:, :, None], axis=-1)[..., 0]
  logps = picked - jnp.log(total)
  entropy = jnp.log(total) - jnp.sum(weights * below, axis=-1) / total
  top = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return (logps, entropy, top), (below, weights, total)


def _slopes(stats, exponentials, kernel, target, dtype):
  """d logps / d rows and d entropy / d rows of a chunk, both [S, C, D]."""
  below, weights, total = exponentials

  def mean(values):
    """E_p of the columns of the unembedding, each times a value."""
    values = values.astype(kernel.dtype)
    weighed = jnp.einsum(
      "SCV,DV->SCD", values, kernel, preferred_element_type=jnp.float32
    )
    return weighed / total[:, :, None]

  # The likeliest token's weight is exactly one in any dtype, so that a sure
  # prediction keeps its small gradient.
  expected = mean(weights)
  wanted = jnp.moveaxis(jnp.take(kernel, target, axis=1), 0, -1)
  of_logps = wanted.astype(jnp.float32) - expected
  rest = (stats[1] - jnp.log(total))[:, :, None]
  of_entropy = -mean(weights * below) - rest * expected
  return of_logps.astype(dtype), of_entropy.astype(dtype)


def _of_both(rows, kernel, target, entropy, of_logps, of_entropy, chunk):
  """Gradients of rows and of the unembedding, by another visit."""
  shards, count, width = rows.shape
  cast = kernel.astype(rows.dtype)
  zero = jnp.zeros((shards, count), jnp.float32)
  of_logps = zero if of_logps is None else of_logps
  of_entropy = zero if of_entropy is None else of_entropy

  def one(grad_kernel, chunk):
    rows, target, entropy, of_logps, of_entropy = chunk
    logps = jax.nn.log_softmax(_logits(rows, cast), axis=-1)
    words = jnp.arange(logps.shape[-1], dtype=target.dtype).reshape(1, 1, -1)
    hit = words == target[:, :, None]
    p = jnp.exp(logps)
    slope = of_logps[:, :, None] * (hit - p)
    slope -= of_entropy[:, :, None] * p * (logps + entropy[:, :, None])
    slope = slope.astype(rows.dtype)
    grad_rows = jnp.einsum("SCV,DV->SCD", slope, cast)
    # By shard, so that devices add up once and not in every chunk.
    grad_kernel += jnp.einsum(
      "SCD,SCV->SDV", rows, slope, preferred_element_type=jnp.float32
    )
    return grad_kernel, grad_rows

  chunks = _chunks(chunk, rows, target, entropy, of_logps, of_entropy)
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
