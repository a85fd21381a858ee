"""Where an answer ends by itself: the beginning of a new human turn.

A model that was trained on transcripts goes on writing the human's part. What
ends its answer is the text "\\n\\nHuman:", in whatever tokens it is spelt, so
the device follows the text: it keeps, for each row, how many characters of the
turn the text ends with, and a table says how a token changes that. The host
confirms on the text itself.

References:
  Knuth, Morris and Pratt, Fast Pattern Matching in Strings, 1977.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import comparisons
from dpo_jax import tokenizer as tokenizer_lib

# The state of a text that holds the whole turn; it is never left.
TURN = len(comparisons.HUMAN)


@functools.lru_cache(maxsize=8)
def table(tokenizer: tokenizer_lib.Tokenizer) -> np.ndarray:
  """State after each token, int8 [V, TURN + 1], from the states before it."""
  texts = tokenizer.decode_each()
  found = np.zeros((len(texts), TURN + 1), np.int8)
  found[:, TURN] = TURN
  characters = set(comparisons.HUMAN)
  for token, text in enumerate(texts):
    # No other token leaves a text that ends like the turn's beginning.
    if not characters.isdisjoint(text):
      found[token, :TURN] = [_after(state, text) for state in range(TURN)]
  return found


def step(table: jax.Array, state: jax.Array, token: jax.Array) -> jax.Array:
  """States after a token each, int32 [B]."""
  return table[token, state].astype(jnp.int32)


def turn_end(tokenizer: tokenizer_lib.Tokenizer, tokens: list[int]) -> int:
  """How many tokens it took to begin a new human turn; 0 if there is none."""
  if comparisons.HUMAN not in tokenizer.decode(tokens):
    return 0
  low, high = 0, len(tokens)
  while high - low > 1:
    middle = (low + high) // 2
    if comparisons.HUMAN in tokenizer.decode(tokens[:middle]):
      high = middle
    else:
      low = middle
  return high


def _after(state: int, text: str) -> int:
  for character in text:
    state = _next(state, character)
    if state == TURN:
      break
  return state


@functools.cache
def _next(state: int, character: str) -> int:
  seen = comparisons.HUMAN[:state] + character
  return next(
    size
    for size in range(state + 1, -1, -1)
    if seen.endswith(comparisons.HUMAN[:size])
  )
