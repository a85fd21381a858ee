"""Preference losses against hand arithmetic and the paper's own gradient."""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.training import losses

KINDS = get_args(losses.Kind)
BETA = 0.5


def pair_of(policy, reference, lengths=((4.0, 3.0), (2.0, 4.0))):
  """A Pair of (chosen, rejected) log-probs and lengths."""
  policy, reference, lengths = (
    losses.Responses(*map(jnp.float32, x)) for x in (policy, reference, lengths)
  )
  ratios = jax.tree.map(jnp.subtract, policy, reference)
  return losses.Pair(policy, reference, ratios, lengths)


# Two pairs. Log-ratios of chosen are 1 and -2, of rejected -0.5 and 0, so that
# h is 1.5 and -2. All are exact in binary.
PAIR = pair_of(((-4, -9), (-6, -8)), ((-5, -7), (-5.5, -8)))
SAME = pair_of(PAIR.policy, PAIR.policy)
A, B, H = (1.0, -2.0), (-0.5, 0.0), (1.5, -2.0)


def settings(kind="sigmoid", beta=BETA, label_smoothing=None, per_token=False):
  if label_smoothing is None:
    label_smoothing = 1e-3 if kind == "exo_pair" else 0.0
  return losses.LossSettings(kind, beta, label_smoothing, per_token)


def loss(pair=PAIR, **values):
  return losses.preference_loss(settings(**values), pair)


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def logistic(x):
  return -math.log(sigmoid(x))


# Float32 keeps seven digits of values of this size.
def close(values):
  return pytest.approx(values, rel=1e-6)


def test_the_table_has_every_kind():
  assert losses.LOSSES.keys() == {*KINDS}


def test_sigmoid():
  # -log sigmoid(0.75) and -log sigmoid(-1).
  assert list(loss()) == close([0.38687101, 1.31326169])


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


def test_robust_is_unbiased_under_swapped_labels():
  # (0.9 L(h) - 0.1 L(-h)) / 0.8; L as in conservative DPO.
  by_hand = [
    (0.9 * 0.38687101 - 0.1 * 1.13687101) / 0.8,
    (0.9 * 1.31326169 - 0.1 * 0.31326169) / 0.8,
  ]
  assert list(loss(kind="robust", label_smoothing=0.1)) == close(by_hand)
  # The mean over labels of which a tenth is swapped is the clean loss.
  swapped = losses.Pair(*(losses.Responses(*x[::-1]) for x in PAIR))
  kept, other = (
    loss(x, kind="robust", label_smoothing=0.1) for x in (PAIR, swapped)
  )
  assert (0.9 * kept + 0.1 * other).tolist() == close(loss().tolist())


def test_ipo():
  # (1.5 - 1)^2 and (-2 - 1)^2.
  assert list(loss(kind="ipo")) == close([0.25, 9.0])


def test_log_ratios_per_token():
  # Of means: 1/4 + 0.5/2 = 0.5 and -2/3.
  wanted = [(0.5 - 1) ** 2, (-2 / 3 - 1) ** 2]
  assert list(loss(kind="ipo", per_token=True)) == close(wanted)
  wanted = [logistic(0.5 * 0.5), logistic(0.5 * -2 / 3)]
  assert list(loss(per_token=True)) == close(wanted)


def test_hinge():
  # relu(1 - 0.75) and relu(1 + 1).
  assert list(loss(kind="hinge")) == close([0.25, 2.0])
  assert list(loss(kind="hinge", beta=2.0)) == close([0.0, 5.0])


def test_exo_is_a_kl_divergence():
  def divergence(h, e):
    p = sigmoid(BETA * h)
    return p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e)

  found = loss(kind="exo_pair", label_smoothing=0.01)
  assert list(found) == close([divergence(h, 0.01) for h in H])


@pytest.mark.parametrize(
  ("kind", "by_hand"),
  [
    (
      "nca_pair",
      lambda a, b: (
        logistic(BETA * a) + (logistic(-BETA * a) + logistic(-BETA * b)) / 2
      ),
    ),
    ("sppo_hard", lambda a, b: (a - 1) ** 2 + (b + 1) ** 2),
    ("apo_zero", lambda a, b: 1 - sigmoid(BETA * a) + sigmoid(BETA * b)),
    ("apo_down", lambda a, b: 1 + sigmoid(BETA * a) - sigmoid(BETA * (a - b))),
    (
      "discopop",
      lambda a, b: (
        logistic(BETA * (a - b)) * (1 - sigmoid(BETA * (a - b) / 0.05))
        + math.exp(-BETA * (a - b)) * sigmoid(BETA * (a - b) / 0.05)
      ),
    ),
  ],
)
def test_losses_of_both_log_ratios(kind, by_hand):
  assert list(loss(kind=kind)) == close([by_hand(a, b) for a, b in zip(A, B)])


# Value, and the slopes in the log-ratios of chosen and rejected, at equality.
AT_START = {
  "sigmoid": (math.log(2), BETA / 2),
  "robust": (math.log(2), BETA / 2),
  # h - 1 / (2 beta) is -1, twice that its slope.
  "ipo": (1.0, 2.0),
  "hinge": (1.0, BETA),
  # p = 1/2: log(p / (1 - e)) and log(p / e) by halves; beta p (1 - p) times
  # the difference of the two.
  "exo_pair": (
    (math.log(0.5 / 0.999) + math.log(0.5 / 0.001)) / 2,
    BETA / 4 * math.log(999),
  ),
  "nca_pair": (2 * math.log(2), BETA / 4),
  "sppo_hard": (2.0, 2.0),
  "apo_zero": (1.0, BETA / 4),
  # In chosen the two slopes cancel.
  "apo_down": (1.0, BETA / 4),
  # Half of each loss, and of each slope, and their difference times m's slope.
  "discopop": (
    (math.log(2) + 1) / 2,
    BETA * (0.5 * 0.5 + 0.5 * 1 - (1 - math.log(2)) / (4 * 0.05)),
  ),
}


@pytest.mark.parametrize("kind", AT_START)
def test_losses_and_slopes_at_the_start(kind):
  value, slope = AT_START[kind]
  assert list(loss(SAME, kind=kind)) == close([value] * 2)
  assert losses.at_start(settings(kind)) == close((value, abs(slope)))
  if kind != "exo_pair":
    assert losses.at_start(settings(kind, per_token=True))[0] == close(value)


def test_a_loss_of_the_policy_alone_has_no_value_at_the_start(monkeypatch):
  def length_normalized(pair, settings):
    return -jax.nn.log_sigmoid(settings.beta * pair.policy.margin)

  monkeypatch.setitem(losses.LOSSES, "sigmoid", length_normalized)
  assert losses.at_start(settings()) is None


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_token", [False, True])
def test_no_margin_gives_nan(kind, per_token):
  huge = [[3e4, -3e4, 1e4], [-3e4, 3e4, 1e4]]
  pair = pair_of(huge, np.zeros((2, 3)), [[1, 1, 0]] * 2)

  def total(ratios):
    used = pair._replace(ratios=ratios)
    return jnp.sum(loss(used, kind=kind, per_token=per_token))

  value, grads = jax.value_and_grad(total)(pair.ratios)
  assert np.isfinite(value)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_reward_metrics():
  found = losses.reward_metrics(PAIR, beta=0.5)
  assert {key: list(value) for key, value in found.items()} == {
    "rewards/chosen": [0.5, -1.0],
    "rewards/rejected": [-0.25, 0.0],
    "rewards/margins": [0.75, -1.0],
    "rewards/accuracies": [1.0, 0.0],
    "logps/chosen": [-4.0, -9.0],
    "logps/rejected": [-6.0, -8.0],
  }
  # Before training nothing is told apart: chance, not zero.
  same = losses.reward_metrics(SAME, beta=0.5)
  assert list(same["rewards/accuracies"]) == [0.5, 0.5]
  # Nor is a margin smaller than what rounding makes of equal log-probs.
  near = pair_of(((5e-5, 2e-4), (0, 0)), ((0, 0), (0, 0)))
  found = losses.reward_metrics(near, beta=10.0)
  assert list(found["rewards/accuracies"]) == [0.5, 1.0]


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"beta": 0.0}, "loss.beta=0.0 must be positive and finite"),
    ({"kind": "hinge", "label_smoothing": 0.1}, "kinds sigmoid, robust, exo"),
    ({"kind": "exo_pair", "label_smoothing": 0.0}, "set it to 1e-3"),
  ],
)
def test_settings_that_make_no_sense_are_refused(values, words):
  with pytest.raises(ValueError, match=words):
    settings(**values)
