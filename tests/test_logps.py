"""Token log-probs against torch's log-softmax over all positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dpo_jax import logps


def case(shards, length, completions, width=8, vocab=23, seed=0):
  """Three rows a shard, so that a source says which row it means."""
  rng = np.random.default_rng(seed)
  return (
    rng.normal(0, 1, (3 * shards, length, width)).astype(np.float32),
    rng.normal(0, 1, (width, vocab)).astype(np.float32),
    rng.integers(0, 3 * length, (shards, completions)),
    rng.integers(0, vocab, (shards, completions)),
  )


def torch_logps(hidden, kernel, source, target):
  """All positions' log-softmax, then the gather: what we must not build."""
  logps = torch.log_softmax(hidden @ kernel, dim=-1)
  row, at = np.divmod(source, hidden.shape[1])
  row = row + 3 * np.arange(len(source))[:, None]
  return logps[*(torch.as_tensor(x) for x in (row, at, target))]


def random_weights(shape):
  return np.random.default_rng(9).normal(size=shape).astype(np.float32)


# Fewer than a chunk, just one, one more, several with an incomplete last one.
@pytest.mark.parametrize("completions", [5, 128, 129, 300])
def test_values_and_gradients_equal_torch(completions, monkeypatch):
  monkeypatch.setattr(logps, "LIVE", 128 * 23)
  hidden, kernel, source, target = case(2, 40, completions)
  weights = random_weights(source.shape)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def ours(hidden, kernel):
    values = logps.token_logps(hidden, kernel, source, target)
    return jnp.sum(values * weights), values

  (_, values), grads = ours(hidden, kernel)
  theirs = [torch.tensor(x, requires_grad=True) for x in (hidden, kernel)]
  wanted = torch_logps(*theirs, source, target)
  (wanted * torch.tensor(weights)).sum().backward()
  assert values.dtype == jnp.float32
  # Sums of 23 exponentials, gradients of up to 600 terms, in float32.
  np.testing.assert_allclose(values, wanted.detach(), rtol=1e-5, atol=1e-5)
  for grad, leaf in zip(grads, theirs, strict=True):
    np.testing.assert_allclose(grad, leaf.grad, rtol=1e-4, atol=1e-4)


def test_chunks_change_nothing(monkeypatch):
  hidden, kernel, source, target = case(3, 30, 21)
  weights = random_weights(source.shape)

  def run(chunk):
    monkeypatch.setattr(logps, "LIVE", chunk * 23)

    def total(hidden, kernel):
      values = logps.token_logps(hidden, kernel, source, target)
      return jnp.sum(values * weights), values

    both = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(both)(hidden, kernel)

  (_, plain), plain_grads = run(64)
  # 21 tokens: six chunks of four with three too many; three whole chunks.
  for chunk in (4, 7):
    (_, values), grads = run(chunk)
    np.testing.assert_allclose(values, plain, rtol=1e-6, atol=1e-6)
    for a, b in zip(grads, plain_grads, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_no_chunk_keeps_its_logits_for_the_gradient(monkeypatch):
  """What the backward pass reads holds no [.., .., V] of all tokens."""
  monkeypatch.setattr(logps, "LIVE", 4 * 97)
  hidden, kernel = jnp.ones((1, 30, 8)), jnp.ones((8, 97))
  source = target = jnp.zeros((1, 20), int)

  def total(hidden):
    return jnp.sum(logps.token_logps(hidden, kernel, source, target))

  _, back = jax.vjp(total, hidden)
  kept = [leaf.shape for leaf in jax.tree.leaves(back)]
  assert kept
  # Five chunks of four tokens by 97 words.
  assert all(np.prod(shape) < 5 * 4 * 97 or shape == (8, 97) for shape in kept)


def test_bfloat16_hidden_states_give_a_float32_softmax():
  hidden, kernel, source, target = case(2, 16, 9, vocab=4096)
  half = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
  found = logps.token_logps(half[0], half[1], source, target)
  exact = [torch.tensor(np.asarray(x.astype(jnp.float32))) for x in half]
  wanted = torch_logps(*exact, source, target)
  assert found.dtype == jnp.float32
  # Products of bfloat16 numbers are exact in float32; only sums are rounded. A
  # softmax in bfloat16 would be off by 1e-2.
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
  hidden = jnp.full((1, 1, 1), 100.0)
  kernel = jnp.array([[100.0, -100.0]])
  index = jnp.zeros((1, 2), int)
  found = logps.token_logps(hidden, kernel, index, jnp.array([[0, 1]]))
  # Logits 1e4 and -1e4.
  assert found.tolist() == [[0.0, -20000.0]]


def test_sums_by_owner():
  # Two rows; sequence 1 is spread over both, 2 owns nothing.
  values = jnp.array([[-1.0, -2.0, -4.0, -8.0], [-16.0, -32.0, -64.0, -128.0]])
  owner = jnp.array([[0, 0, 1, -1], [3, -1, 1, 3]])
  sums, lengths = logps.sequence_sums(values, owner, 4)
  assert sums.tolist() == [-3.0, -68.0, 0.0, -144.0]
  assert lengths.tolist() == [2.0, 2.0, 0.0, 2.0]
