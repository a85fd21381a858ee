"""The human turn: on the device by a table, on the host by the text."""

import random

import numpy as np
import pytest
import scripted

from dpo_jax.data import preferences
from dpo_jax.sampling import sampler, stop


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
  return scripted.small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Fused:
  """A tokenizer whose tokens end and begin inside the turn."""

  eos_id, vocab_size = 0, 6
  pieces = ("", "\n\nHu", "man: yes", "ok", "\n\n\nHuman:", "\n")

  def decode(self, ids):
    return "".join(self.pieces[token] for token in ids)

  def decode_each(self):
    return list(self.pieces)


def followed(tokenizer, tokens):
  state = 0
  for token in tokens:
    state = int(stop.table(tokenizer)[token, state])
  return state


def test_the_tokenizers_own_turn_is_found(tok):
  usual = tok.encode("\n\nHuman:")
  assert usual == tok.encode("\n") * 2 + tok.encode("Human") + tok.encode(":")
  tokens = [*tok.encode("!"), *usual, *tok.encode(" Hi!")]
  assert stop.turn_end(tok, tokens) == 1 + len(usual)
  for fewer in range(len(usual) + 1):
    assert stop.turn_end(tok, tokens[:fewer]) == 0
    assert followed(tok, tokens[:fewer]) < stop.TURN
  assert followed(tok, tokens) == stop.TURN


def test_a_colon_inside_a_longer_token_is_a_turn_too():
  """The token that ends the turn may go on behind it."""
  fused = Fused()
  assert stop.turn_end(fused, [3, 1, 2, 3]) == 3
  assert stop.turn_end(fused, [3, 1, 3, 3]) == 0
  assert followed(fused, [3, 1, 2, 3]) == stop.TURN
  assert followed(fused, [5, 5, 1, 2]) == stop.TURN
  assert followed(fused, [5, 4]) == stop.TURN
  assert followed(fused, [1, 3, 2]) < stop.TURN
  sample = sampler.finish(fused, [3, 1, 2, 3], [-1.0, -2.0, -3.0, -4.0])
  assert sample == sampler.Sample((3, 1, 2), "ok", "turn")
  assert sample.logps == (-1.0, -2.0, -3.0)


def test_the_table_agrees_with_the_text(tok):
  """Random tokens, most of them pieces of the turn."""
  rng = random.Random(0)
  pieces = [
    token
    for token, text in enumerate(tok.decode_each())
    if text and text in preferences.HUMAN * 2
  ]
  assert len(pieces) > 8
  found = 0
  for _ in range(4000):
    tokens = [rng.choice(pieces) for _ in range(rng.randrange(1, 12))]
    if rng.random() < 0.5:
      # A turn spelt at random somewhere in the middle.
      left = preferences.HUMAN
      while left:
        fits = [t for t in pieces if left.startswith(tok.decode([t]))]
        tokens.append(rng.choice(fits))
        left = left.removeprefix(tok.decode([tokens[-1]]))
      tokens += [rng.randrange(2, tok.vocab_size)]
    holds = preferences.HUMAN in tok.decode(tokens)
    assert (followed(tok, tokens) == stop.TURN) == holds
    assert bool(stop.turn_end(tok, tokens)) == holds
    found += holds
  assert found > 1000


def test_pythias_table(shared):
  from dpo_jax.data import tokenizer

  tok = tokenizer.load(shared / "tokenizer" / "pythia")
  table = stop.table(tok)
  assert table.shape == (tok.vocab_size, stop.TURN + 1)
  for text in ("\n\nHuman:", "x\n\n\nHuman: Hi", "\n\nHuman :\n\nHuman:"):
    assert followed(tok, tok.encode(text)) == stop.TURN
  for text in ("\n\nHuman", "\nHuman:", "\n\nHumans:", "Human:\n\nHu"):
    assert followed(tok, tok.encode(text)) < stop.TURN
  assert np.all(table[:, stop.TURN] == stop.TURN)
