"""Per-token log-probs, with the unembedding at completion positions only.

Most positions of a row are prompt or padding and need no logits. The hidden
states that predict a completion token are gathered first, and the vocabulary
is then visited for a chunk of them at a time, all words at once or tile by tile
(`vocabulary`), so that an array of all tokens by all words never exists: of
logits, what lives at one time is a chunk's, whatever the number of tokens.

The gradient of a log-prob is known before the loss is: d log p(t) / d hidden is
W_t - E_p[W], and what the loss adds is one factor for each token. So while the
unembedding W is frozen, the forward pass takes the gradient from the very
exponentials it sums, and keeps it, [C, D]: the vocabulary is visited once for
both passes, with two matrix products instead of three, and no gradient of W is
formed. Where W is trained its gradient needs the factors, so the backward pass
visits the vocabulary again.

`plain` is the same without chunks or rules of its own.

Letters: B rows, T tokens, S shards of the rows, C completion tokens of a shard,
D width, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dpo_jax import partitioning, vocabulary


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
  logits = vocabulary.logits(rows, kernel.astype(hidden.dtype))
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _stats(rows, kernel, target, chunk, words):
  """(logps, entropy, top) of gathered rows [S, C, D]."""
  return _visited(rows, kernel, target, chunk, words)[:3]


def _read(kernel, dtype):
  """The unembedding as the chunks read it: once for all, if it is split.

  Left to itself XLA for TPUs gathers it again for each chunk.
  """
  return partitioning.constrain(kernel.astype(dtype), None, "vocab")


def _visited(rows, kernel, target, chunk, words):
  kernel = _read(kernel, rows.dtype)

  def one(rows, target):
    return vocabulary.visit(rows, kernel, target, words)[0]

  return _map(one, chunk, rows, target)


def _forward(rows, kernel, target, chunk, words):
  trained = kernel.perturbed
  rows, kernel, target = rows.value, kernel.value, target.value
  if trained:
    *stats, level = _visited(rows, kernel, target, chunk, words)
    return tuple(stats), (rows, kernel, target, stats[1], level)
  kernel = _read(kernel, rows.dtype)

  def one(rows, target):
    stats, slopes = vocabulary.visit(rows, kernel, target, words)
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
    grad_rows, grad_kernel = vocabulary.gradients(
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
