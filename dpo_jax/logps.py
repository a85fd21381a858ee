"""Per-token log-probs, with the unembedding at completion positions only.

Most positions of a row are prompt or padding and need no logits. The hidden
states that predict a completion token are gathered first, and the vocabulary
is then visited for `CHUNK` of them at a time, so that an array of all tokens by
all words never exists.

Einsum letters: B rows, T tokens, C completion tokens of a row, D width,
V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

# Completion tokens of each row whose logits are alive at one time.
CHUNK = 128


def token_logps(
  hidden: jax.Array, kernel: jax.Array, source: jax.Array, target: jax.Array
) -> jax.Array:
  """log p(target | everything before it), float32 [B, C], in nats.

  Args:
    hidden: hidden states after the final norm, [B, T, D].
    kernel: the unembedding, [D, V].
    source: position in the row whose hidden state predicts, [B, C].
    target: the token that comes next, [B, C].
  """
  rows = jnp.take_along_axis(hidden, source[:, :, None], axis=1)
  kernel = kernel.astype(hidden.dtype)
  count = source.shape[1]
  if count <= CHUNK:
    return _logps(rows, kernel, target)
  padding = -count % CHUNK
  rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0)))
  target = jnp.pad(target, ((0, 0), (0, padding)))
  chunks = (_chunked(rows), _chunked(target))
  # Recomputing a chunk's logits in the backward pass keeps only its inputs.
  one = jax.checkpoint(functools.partial(_logps, kernel=kernel))
  logps = jax.lax.map(lambda chunk: one(chunk[0], target=chunk[1]), chunks)
  return jnp.moveaxis(logps, 0, 1).reshape(len(target), -1)[:, :count]


def sequence_sums(
  logps: jax.Array, owner: jax.Array, sequences: int
) -> tuple[jax.Array, jax.Array]:
  """Sums each sequence's token log-probs.

  Args:
    logps: token log-probs, [B, C].
    owner: which sequence each token belongs to, -1 for padding, [B, C].
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


def _logps(rows, kernel, target):
  logits = jnp.einsum(
    "BCD,DV->BCV", rows, kernel, preferred_element_type=jnp.float32
  )
  picked = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def _chunked(x):
  """[B, n CHUNK, ...] as [n, B, CHUNK, ...]."""
  shape = (x.shape[0], -1, CHUNK, *x.shape[2:])
  return jnp.moveaxis(x.reshape(shape), 1, 0)
