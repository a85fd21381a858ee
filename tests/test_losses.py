"""Preference losses against hand arithmetic and the paper's own gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.training import losses

# Two pairs. Policy margins are 2 and -1, the reference's 0.5 and 1, so that h,
# what the losses see, is 1.5 and -2. All are exact in binary.
POLICY = losses.PairLogps(
  jnp.array([-4.0, -9.0]),
  jnp.array([-6.0, -8.0]),
  jnp.array([4.0, 3.0]),
  jnp.array([2.0, 4.0]),
)
REFERENCE = losses.PairLogps(
  jnp.array([-5.0, -7.0]),
  jnp.array([-5.5, -8.0]),
  jnp.array([4.0, 3.0]),
  jnp.array([2.0, 4.0]),
)
H = (1.5, -2.0)


def settings(kind="sigmoid", beta=0.5, label_smoothing=0.0):
  return losses.LossSettings(kind, beta, label_smoothing)


def loss(policy=POLICY, reference=REFERENCE, **values):
  return losses.preference_loss(settings(**values), policy, reference)


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


# Float32 keeps seven digits of values of this size.
def close(values):
  return pytest.approx(values, rel=1e-6)


def test_sigmoid():
  # -log sigmoid(0.75) and -log sigmoid(-1).
  assert list(loss()) == close([0.38687101, 1.31326169])
  assert list(loss()) == close([-math.log(sigmoid(0.5 * h)) for h in H])


def test_conservative_dpo():
  # 0.9 L(h) + 0.1 L(-h); L(-0.75) = 1.13687101, L(1) = 0.31326169.
  found = loss(label_smoothing=0.1)
  assert list(found) == close([0.46187101, 1.21326169])
  # Its minimum is where the odds are (1 - eps) : eps.
  best = math.log(0.9 / 0.1) / 0.5
  at = jnp.array([best])
  slope = jax.grad(
    lambda h: losses.dpo_loss(h, jnp.zeros(1), beta=0.5, label_smoothing=0.1)[0]
  )
  assert float(slope(at)[0]) == pytest.approx(0, abs=1e-6)
  assert float(slope(at - 1)[0]) < 0 < float(slope(at + 1)[0])


def test_ipo_of_sums():
  # (1.5 - 1)^2 and (-2 - 1)^2.
  assert list(loss(kind="ipo_sum")) == close([0.25, 9.0])


def test_ipo_of_means():
  # h of means: (-4/4 + 6/2) - (-5/4 + 5.5/2) = 0.5;
  # (-9/3 + 8/4) - (-7/3 + 8/4) = -2/3.
  wanted = [(0.5 - 1) ** 2, (-2 / 3 - 1) ** 2]
  assert list(loss(kind="ipo_mean")) == close(wanted)


def test_hinge():
  # relu(1 - 0.75) and relu(1 + 1).
  assert list(loss(kind="hinge")) == close([0.25, 2.0])
  assert list(loss(kind="hinge", beta=2.0)) == close([0.0, 5.0])


@pytest.mark.parametrize(
  ("kind", "wanted"),
  [("sigmoid", math.log(2)), ("ipo_sum", 1.0), ("ipo_mean", 1.0), ("hinge", 1)],
)
def test_losses_at_the_start(kind, wanted):
  assert losses.loss_at_start(settings(kind)) == wanted
  found = loss(reference=POLICY, kind=kind)
  assert list(found) == close([wanted] * 2)
  smooth = settings(label_smoothing=0.3)
  assert losses.loss_at_start(smooth) == math.log(2)
  same = losses.preference_loss(smooth, POLICY, POLICY)
  assert list(same) == close([math.log(2)] * 2)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo_sum", "ipo_mean", "hinge"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_slope_at_the_start(kind, beta):
  """By a difference quotient, one nat on a token of its own."""
  used = settings(kind, beta=beta)
  zero = losses.PairLogps(*np.float32([[0.0], [0.0], [1.0], [1.0]]))
  moved = losses.PairLogps(*np.float32([[1e-3], [0.0], [1.0], [1.0]]))
  before, after = (
    float(losses.preference_loss(used, pair, zero)[0]) for pair in (zero, moved)
  )
  found = abs(after - before) / 1e-3
  assert losses.slope_at_start(used) == pytest.approx(found, rel=2e-2)


def test_gradient_is_the_papers():
  """Eq. 7's gradient: -beta sigmoid(r_l - r_w) (grad log pi_w - grad log pi_l).

  Here the log-probs themselves are the parameters, whose own gradients are 1.
  """
  beta = 0.3
  rng = np.random.default_rng(0)
  chosen, rejected, ref_chosen, ref_rejected = rng.normal(-20, 4, (4, 16))

  def total(chosen, rejected):
    return jnp.sum(
      losses.dpo_loss(
        chosen - rejected, jnp.asarray(ref_chosen - ref_rejected), beta=beta
      )
    )

  found = jax.grad(total, argnums=(0, 1))(
    jnp.asarray(chosen), jnp.asarray(rejected)
  )
  reward_chosen = beta * (chosen - ref_chosen)
  reward_rejected = beta * (rejected - ref_rejected)
  weight = 1 / (1 + np.exp(reward_chosen - reward_rejected))
  # Margins of about 10 nats in float32.
  np.testing.assert_allclose(found[0], -beta * weight, rtol=1e-5)
  np.testing.assert_allclose(found[1], beta * weight, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo_sum", "ipo_mean", "hinge"])
def test_no_margin_gives_nan(kind):
  huge = jnp.array([3e4, -3e4])
  policy = losses.PairLogps(huge, -huge, jnp.ones(2), jnp.zeros(2))
  reference = losses.PairLogps(*[jnp.zeros(2)] * 4)

  def total(policy):
    return jnp.sum(losses.preference_loss(settings(kind), policy, reference))

  value, grads = jax.value_and_grad(total)(policy)
  assert np.isfinite(value)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_reward_metrics():
  found = losses.reward_metrics(POLICY, REFERENCE, beta=0.5)
  assert {key: list(value) for key, value in found.items()} == {
    "rewards/chosen": [0.5, -1.0],
    "rewards/rejected": [-0.25, 0.0],
    "rewards/margins": [0.75, -1.0],
    "rewards/accuracies": [1.0, 0.0],
    "logps/chosen": [-4.0, -9.0],
    "logps/rejected": [-6.0, -8.0],
  }
  # Before training nothing is told apart: chance, not zero.
  same = losses.reward_metrics(POLICY, POLICY, beta=0.5)
  assert list(same["rewards/accuracies"]) == [0.5, 0.5]
  # Nor is a margin smaller than what rounding makes of equal log-probs.
  ratios = losses.PairLogps(
    jnp.array([5e-5, 2e-4]), jnp.zeros(2), jnp.ones(2), jnp.ones(2)
  )
  zero = jax.tree.map(jnp.zeros_like, ratios)
  near = losses.reward_metrics(ratios, zero, beta=10.0)
  assert list(near["rewards/accuracies"]) == [0.5, 1.0]


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"beta": 0.0}, "loss.beta=0.0 must be positive and finite"),
    ({"kind": "hinge", "label_smoothing": 0.1}, "sigmoid"),
  ],
)
def test_settings_that_make_no_sense_are_refused(values, words):
  with pytest.raises(ValueError, match=words):
    settings(**values)
