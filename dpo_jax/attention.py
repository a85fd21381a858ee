"""Who sees whom in a packed row, and the attention that obeys it.

A row holds several pieces; a piece is a sequence, or a prompt with two
responses that both see the prompt and not each other. `Segments` says so with
two numbers a token instead of a mask of T x T, so that an implementation may
leave out what is masked whole. Sampling has a cache and no pieces: it passes
the mask itself, as booleans, and such a mask is always attended densely.

Implementations, by the name in `model.attention`:
  dense: scores of all T x T in float32. Runs everywhere.

Letters: B rows, T queries, S keys, N heads, H head dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

PROMPT = 0

IMPLEMENTATIONS = ("dense",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
  """What decides which tokens of a row see each other; both int32 [B, T].

  Attributes:
    pieces: piece of each token, from 1; 0 is padding.
    parts: part of each token in its piece: PROMPT, or a response's number.
  """

  pieces: jax.Array
  parts: jax.Array

  def mask(self) -> jax.Array:
    """bool [B, T, T]: same piece, causal, key in the prompt or the own part."""
    size = self.pieces.shape[-1]
    causal = jnp.tril(jnp.ones((1, size, size), bool))
    same_piece = self.pieces[:, :, None] == self.pieces[:, None, :]
    key_part, query_part = self.parts[:, None, :], self.parts[:, :, None]
    visible = (key_part == PROMPT) | (key_part == query_part)
    return causal & same_piece & visible & (self.pieces > 0)[:, None, :]


def attend(
  name: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  visible: jax.Array | Segments,
) -> jax.Array:
  """Softmax attention, [B, T, N, H] in the dtype of `v`.

  A token that sees nothing (padding) gets something finite.

  Args:
    name: one of `IMPLEMENTATIONS`; it computes what `visible` gives as
      segments, and a mask of booleans is attended densely.
    q: queries, [B, T, N, H].
    k: keys, [B, N, S, H], the order in which decoding reads them for each new
      token.
    v: values, [B, N, S, H].
    visible: segments, for which S is T; or a mask, bool [B, T, S].
  """
  del name  # There is only one.
  mask = visible.mask() if isinstance(visible, Segments) else visible
  return dense(q, k, v, mask)


def dense(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
  """`attend` by a mask, bool [B, T, S]; scores and softmax in float32."""
  scores = jnp.einsum(
    "BTNH,BNSH->BNTS", q, k, preferred_element_type=jnp.float32
  )
  scores = scores / math.sqrt(q.shape[-1])
  # A finite floor: a row that sees nothing (padding) stays free of NaN.
  scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("BNTS,BNSH->BTNH", weights, v)
