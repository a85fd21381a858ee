"""Stop rule: a response ends where its text begins a new human turn.

A model trained on transcripts continues with the human's part. The stop string
"\\n\\nHuman:" may be spelled by any tokens, so the device matches text: it has
for each row the number of the string's characters that the text ends with, and
a table of the transitions by token (a Knuth-Morris-Pratt automaton). The host
confirms on the decoded text.

References:
  Knuth, Morris and Pratt, Fast Pattern Matching in Strings, 1977.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data import preferences
from dpo_jax.data import tokenizer as tokenizer_lib

# State of a text that holds the whole stop string; absorbing.
TURN = len(preferences.HUMAN)


@functools.lru_cache(maxsize=8)
def table(tokenizer: tokenizer_lib.Tokenizer) -> np.ndarray:
  """Next state by token and state, int8 [V, TURN + 1].

  Cached: Pythia's takes half a second, and training samples at intervals.
  """
  texts = tokenizer.decode_each()
  found = np.zeros((len(texts), TURN + 1), np.int8)
  found[:, TURN] = TURN
  after = {character: _after(character) for character in preferences.HUMAN}
  other = _after("")
  for token, text in enumerate(texts):
    # Any other token resets the state to 0.
    if not after.keys().isdisjoint(text):
      states = list(range(TURN + 1))
      for character in text:
        following = after.get(character, other)
        states = [following[state] for state in states]
      found[token] = states
  return found


def step(table: jax.Array, state: jax.Array, token: jax.Array) -> jax.Array:
  """Next states of rows, int32 [B]."""
  return table[token, state].astype(jnp.int32)


def turn_end(tokenizer: tokenizer_lib.Tokenizer, tokens: list[int]) -> int:
  """Number of tokens up to the end of the first human turn; 0 if none."""
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
  """Next state by state for a character; "" is any outside the string."""
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
