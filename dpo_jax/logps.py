"""Per-token log-probs, with the unembedding at completion positions only.

Most positions of a row are prompt or padding and need no logits. The hidden
states that predict a completion token are gathered first, and the vocabulary
is then visited for a chunk of them at a time, so that an array of all tokens by
all words never exists.

Einsum letters: B rows, T tokens, S shards of the rows, C completion tokens of a
shard, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

# Logits of a shard that are alive at one time: 256 MiB in float32, which is
# 1,334 tokens of Pythia's vocabulary.
LIVE = 2**26


def token_logps(
  hidden: jax.Array, kernel: jax.Array, source: jax.Array, target: jax.Array
) -> jax.Array:
  """log p(target | everything before it), float32 [S, C], in nats.

  Args:
    hidden: hidden states after the final norm, [B, T, D].
    kernel: the unembedding, [D, V].
    source: where the hidden state that predicts lies among the B / S rows of
      the shard, one after the other, [S, C].
    target: the token that comes next, [S, C].
  """
  shards, count = source.shape
  hidden = hidden.reshape(shards, -1, hidden.shape[-1])
  rows = jnp.take_along_axis(hidden, source[:, :, None], axis=1)
  kernel = kernel.astype(hidden.dtype)
  pieces = -(-count // max(LIVE // kernel.shape[1], 1))
  if pieces <= 1:
    return _logps(rows, kernel, target)
  padding = -count % pieces
  rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0)))
  target = jnp.pad(target, ((0, 0), (0, padding)))
  chunks = (_chunked(rows, pieces), _chunked(target, pieces))
  # Recomputing a chunk's logits in the backward pass keeps only its inputs.
  one = jax.checkpoint(functools.partial(_logps, kernel=kernel))
  logps = jax.lax.map(lambda chunk: one(chunk[0], target=chunk[1]), chunks)
  return jnp.moveaxis(logps, 0, 1).reshape(len(target), -1)[:, :count]


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


def _logps(rows, kernel, target):
  logits = jnp.einsum(
    "SCD,DV->SCV", rows, kernel, preferred_element_type=jnp.float32
  )
  picked = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def _chunked(x, pieces):
  """[S, n C, ...] as [n, S, C, ...]."""
  shape = (x.shape[0], pieces, -1, *x.shape[2:])
  return jnp.moveaxis(x.reshape(shape), 1, 0)
