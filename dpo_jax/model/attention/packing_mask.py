"""The mask of packed rows: which token sees which.

A row holds several segments: a sequence each, or a prompt with two responses
that see the prompt and not each other. Two numbers per token say so, instead of
a mask of T x T.

Letters: B rows, T tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

PROMPT = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
  """Segment and part of each token, which decide what sees what; int32 [B, T].

  Attributes:
    segment_ids: from 1; 0 is padding.
    part_ids: PROMPT, or the number of a response in its segment.
    block_pairs: for rows that segments cross, the pairs of rows that see each
      other, see `blockwise`; None where segments are whole in their rows.
  """

  segment_ids: jax.Array
  part_ids: jax.Array
  block_pairs: jax.Array | None = None

  def mask(self) -> jax.Array:
    """bool [B, T, T]: same segment, causal, key in the prompt or own part."""
    size = self.segment_ids.shape[-1]
    causal = jnp.tril(jnp.ones((1, size, size), bool))
    same_segment = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
    key_part, query_part = self.part_ids[:, None, :], self.part_ids[:, :, None]
    visible = (key_part == PROMPT) | (key_part == query_part)
    return causal & same_segment & visible & (self.segment_ids > 0)[:, None, :]
