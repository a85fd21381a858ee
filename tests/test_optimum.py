"""Losses in a world of few responses, whose best policy is known exactly.

Pairs have both orders, weighted by the probability that people of known rewards
prefer the first response (Bradley and Terry); labels drawn by it would reach
the optimum only on average.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dpo_jax.training import losses


def trained(settings, rewards, reference):
  """Log-probs [P, Y] of the policy that minimizes the loss over all pairs.

  Args:
    settings: the loss.
    rewards: of each response to each prompt, [P, Y].
    reference: log-probs of the reference, [P, Y].
  """
  count, size = rewards.shape
  order = np.array(list(itertools.permutations(range(size), 2)))
  prompt = np.repeat(np.arange(count), len(order))
  chosen, rejected = np.tile(order, (count, 1)).T
  margin = rewards[prompt, chosen] - rewards[prompt, rejected]
  preferred = 1 / (1 + np.exp(-margin))
  ones = losses.Responses(*np.ones((2, len(prompt))))

  def responses(logps):
    return losses.Responses(logps[prompt, chosen], logps[prompt, rejected])

  def loss(logits):
    policy = jax.nn.log_softmax(logits)
    ratios = responses(policy - reference)
    pair = losses.Pair(responses(policy), responses(reference), ratios, ones)
    (values,) = losses.preference_losses(settings, pair).values()
    return jnp.sum(preferred * values)

  optimizer = optax.lbfgs()
  step = optax.value_and_grad_from_state(loss)

  @jax.jit
  def minimize(logits):
    def update(carry, _):
      logits, state = carry
      value, slopes = step(logits, state=state)
      change, state = optimizer.update(
        slopes, state, logits, value=value, grad=slopes, value_fn=loss
      )
      return (optax.apply_updates(logits, change), state), None

    start = logits, optimizer.init(logits)
    return jax.lax.scan(update, start, length=100)[0][0]

  with jax.enable_x64(True):
    found = minimize(jnp.asarray(reference))
    return np.asarray(jax.nn.log_softmax(found))


def world(responses):
  """Rewards, and a reference that is not uniform, of three prompts."""
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(3, responses))
  logits = rng.normal(size=(3, responses))
  return rewards, logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_dpo_reaches_the_optimum_of_its_reward(beta):
  """pi_ref exp(r / beta) / Z: Rafailov et al., 2023, Eq. 4."""
  rewards, reference = world(4)
  found = trained(tiny.loss(beta=beta), rewards, reference)
  best = reference + rewards / beta
  best -= np.log(np.exp(best).sum(1, keepdims=True))
  divergence = (np.exp(best) * (best - found)).sum(1)
  assert divergence.max() < 1e-3
  # From which the reference is far.
  assert (np.exp(best) * (best - reference)).sum(1).min() > 0.02


@pytest.mark.parametrize("beta", [0.2, 1.0])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_margins_of_two_responses_are_those_of_theory(kind, beta):
  """Of conservative DPO with a tenth of the labels swapped, and of IPO."""
  rewards, reference = world(2)
  smoothing = 0.1 if kind == "sigmoid" else 0.0
  settings = tiny.loss(kind=kind, beta=beta, label_smoothing=smoothing)
  found = trained(settings, rewards, reference) - reference
  preferred = 1 / (1 + np.exp(rewards[:, 1] - rewards[:, 0]))
  if kind == "ipo":
    wanted = (2 * preferred - 1) / (2 * beta)
  else:
    labeled = 0.9 * preferred + 0.1 * (1 - preferred)
    wanted = np.log(labeled / (1 - labeled)) / beta
  np.testing.assert_allclose(found[:, 0] - found[:, 1], wanted, atol=1e-3)
