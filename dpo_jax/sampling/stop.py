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

from dpo_jax.data import preferences
from dpo_jax.data import tokenizer as tokenizer_lib

# The state of a text that holds the whole turn; it is never left.
TURN = len(preferences.HUMAN)


@functools.lru_cache(maxsize=8)
def table(tokenizer: tokenizer_lib.Tokenizer) -> np.ndarray:
  """State after each token, int8 [V, TURN + 1], from the states before it.

  Pythia's takes half a second; training asks for it at every interval.
  """
  texts = tokenizer.decode_each()
  found = np.zeros((len(texts), TURN + 1), np.int8)
  found[:, TURN] = TURN
  after = {character: _after(character) for character in preferences.HUMAN}
  other = _after("")
  for token, text in enumerate(texts):
    # No other token leaves a text that ends like the turn's beginning.
    if not after.keys().isdisjoint(text):
      states = list(range(TURN + 1))
      for character in text:
        following = after.get(character, other)
        states = [following[state] for state in states]
      found[token] = states
  return found


def step(table: jax.Array, state: jax.Array, token: jax.Array) -> jax.Array:
  """States after a token each, int32 [B]."""
  return table[token, state].astype(jnp.int32)


def turn_end(tokenizer: tokenizer_lib.Tokenizer, tokens: list[int]) -> int:
  """How many tokens it took to begin a new human turn; 0 if there is none."""
  if preferences.HUMAN not in tokenizer.decode(tokens):
    return 0
  low, high = 0, len(tokens)
  while high - low > 1:
    middle = (low + high) // 2
    if preferences.HUMAN in tokenizer.decode(tokens[:middle]):
      high = middle
    else:
      low = middle
  return high


def _after(character: str) -> list[int]:
  """The state after a character from each state; "" is any other one."""
  turn = preferences.HUMAN
  if not character:
    return [0] * TURN + [TURN]
  return [
    max(
      size
      for size in range(state + 2)
      if (turn[:state] + character).endswith(turn[:size])
    )
    for state in range(TURN)
  ] + [TURN]
