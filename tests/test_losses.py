"""Preference losses against hand arithmetic and the paper's own gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dpo_jax.training import losses, pair_metrics

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


def settings(**values):
  smoothing = 1e-3 if values.get("kind") == "exo_pair" else 0.0
  return tiny.loss(**({"beta": BETA, "label_smoothing": smoothing} | values))


def loss(pair=PAIR, **values):
  """The loss of every pair of one kind."""
  (found,) = losses.preference_losses(settings(**values), pair).values()
  return found


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def logistic(x):
  return -math.log(sigmoid(x))


# Float32 keeps seven digits of values of this size.
def close(values):
  return pytest.approx(values, rel=1e-6)


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
  swapped = losses.Pair(*(losses.Responses(*x[::-1]) for x in PAIR[:4]))
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
  assert list(loss(kind="unlikelihood", per_token=True)) == [-3, -2]
  # The SFT term is a mean over all chosen tokens as it is.
  assert list(loss(kind="sft", per_token=True)) == [4, 9]


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
    ("bco_pair", lambda a, b: logistic(BETA * a) + logistic(-BETA * b)),
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


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_sorted_losses(kind):
  # "aot": margins of the policy 2, -1 and of the reference 0.5, 1; the first is
  # the greater of the policy's, the second the smaller. "aot_unpaired": log-
  # ratios of chosen 1, -2 and of rejected -0.5, 0.
  differences = (2 - 1, -1 - 0.5) if kind == "aot" else (1 - 0, -2 + 0.5)
  wanted = [logistic(BETA * x) for x in differences]
  assert list(loss(kind=kind)) == close(wanted)
  # A pair that fills up the batch has no rank.
  more = jax.tree.map(lambda x: jnp.append(0.0, x), PAIR)
  assert list(loss(more, kind=kind)[1:]) == close(wanted)
  smooth = loss(kind=kind, label_smoothing=0.1)
  wanted = [
    0.9 * a + 0.1 * logistic(-BETA * x) for a, x in zip(wanted, differences)
  ]
  assert list(smooth) == close(wanted)


def log_odds(mean):
  return mean - math.log(1 - math.exp(mean))


@pytest.mark.parametrize(
  ("kind", "wanted"),
  [
    # Margins of 2 and -1 nats.
    ("cpo", [logistic(BETA * 2), logistic(-BETA)]),
    # Means -4/4 and -9/3 of chosen, -6/2 and -8/4 of rejected.
    ("simpo", [logistic(BETA * 2), logistic(-BETA)]),
    (
      "orpo",
      [
        BETA * logistic(log_odds(-1) - log_odds(-3)),
        BETA * logistic(log_odds(-3) - log_odds(-2)),
      ],
    ),
    ("sft", [4, 9]),
    ("unlikelihood", [-6, -8]),
  ],
)
def test_losses_of_the_policy_alone(kind, wanted):
  alone = PAIR._replace(reference=None, ratios=PAIR.policy)
  assert settings(kind=kind).reference_free
  assert list(loss(alone, kind=kind)) == close(wanted)
  assert losses.at_start(settings(kind=kind)) == {}
  # A reference, which another kind of a sum may need, changes nothing.
  assert list(loss(kind=kind)) == close(wanted)


def test_kto_by_hand():
  # Log-ratios 1 and -2, of responses to other prompts -0.5 and 2.5: z is 1.
  pair = pair_of(((-4, -9), (-6, -5.5)), ((-5, -7), (-5.5, -8)))
  pair = pair._replace(desirable=jnp.array([True, False]))
  found = loss(pair, kind="kto", undesirable_weight=3.0)
  assert list(found) == close([1 - 0.5, 3 * (1 - sigmoid(BETA * 3))])
  # The point is a constant: responses to other prompts are not trained on.
  slopes = jax.grad(
    lambda x: jnp.sum(loss(pair._replace(ratios=x), kind="kto"))
  )
  assert not np.any(slopes(pair.ratios).rejected)
  assert np.all(slopes(pair.ratios).chosen)
  # A negative mean is no divergence.
  found = loss(PAIR._replace(desirable=pair.desirable), kind="kto")
  assert list(found) == close([1 - sigmoid(BETA), 1 - sigmoid(BETA * 2)])
  assert losses.at_start(settings(kind="kto")) == {
    "loss": close((0.5, BETA / 4))
  }
  # Metrics are of the labels; the others' are 0.
  found = pair_metrics.metrics(pair, settings(kind="kto"))
  assert list(found["rewards/chosen"]) == [0.5, 0.0]
  assert list(found["rewards/rejected"]) == [0.0, -1.0]
  assert list(found["logps/rejected"]) == [0.0, -9.0]
  assert list(found["kl"]) == [1.0, 1.0]


def test_simpo_of_other_lengths_and_margins():
  pair = PAIR._replace(lengths=losses.Responses(*jnp.float32([[8, 3], [2, 2]])))
  # Means -0.5 and -3, -3 and -4: margins 2.5 and 1, times 2 less 0.6.
  found = loss(pair, kind="simpo", beta=2.0, gamma=0.6)
  assert list(found) == close([logistic(4.4), logistic(1.4)])


@pytest.mark.parametrize(
  ("values", "score", "slope"),
  [
    ({"divergence": "forward_kl"}, lambda x: 1 - math.exp(-x), 1),
    (
      {"divergence": "js_divergence"},
      lambda x: math.log(2 * math.exp(x) / (1 + math.exp(x))),
      0.5,
    ),
    (
      {"divergence": "alpha_divergence", "divergence_alpha": 0.25},
      lambda x: (math.exp(-0.75 * x) - 1) / -0.75,
      1,
    ),
    (
      {"divergence": "alpha_divergence", "divergence_alpha": 1.0},
      lambda x: x,
      1,
    ),
  ],
)
def test_divergences(values, score, slope):
  wanted = [logistic(BETA * (score(a) - score(b))) for a, b in zip(A, B)]
  assert list(loss(**values)) == close(wanted)
  start = losses.at_start(settings(**values))
  assert start == {"loss": close((math.log(2), slope * BETA / 2))}


def test_weights_of_tokens():
  """LD-DPO: three tokens of four are those that the other response has."""
  found = losses.token_weights(
    settings(ld_alpha=0.25), jnp.arange(4), jnp.array(3)
  )
  assert list(found) == [1, 1, 1, 0.25]


def test_wpo_weighs_pairs_without_a_gradient():
  on_policy = losses.Responses(*jnp.float32([[-0.5, 0.25], [-1.0, 0.5]]))

  def weighed(policy):
    pair = PAIR._replace(on_policy=policy)
    return losses.preference_losses(settings(kind="hinge+sft", wpo=True), pair)

  found = weighed(on_policy)
  wanted = [0.25 * math.exp(-1.5), 2 * math.exp(0.75)]
  assert list(found["hinge"]) == close(wanted)
  assert list(found["sft"]) == [4, 9]
  slopes = jax.grad(lambda x: jnp.sum(weighed(x)["hinge"]))(on_policy)
  assert not np.any(slopes)
  assert losses.at_start(settings(wpo=True)) == {}


def test_a_sum_of_kinds():
  used = settings(kind="0.5*sigmoid + bco_pair+ 2*sft")
  assert used.weights == {"sigmoid": 0.5, "bco_pair": 1.0, "sft": 2.0}
  assert not used.reference_free
  found = losses.preference_losses(used, PAIR)
  for kind, values in found.items():
    assert list(values) == list(loss(kind=kind))
  # The parts that are known before training.
  start = losses.at_start(used)
  assert start.keys() == {"loss/sigmoid", "loss/bco_pair"}
  assert start["loss/bco_pair"] == close((2 * math.log(2), BETA / 2))


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
  "bco_pair": (2 * math.log(2), BETA / 2),
  "aot": (math.log(2), BETA / 2),
  "aot_unpaired": (math.log(2), BETA / 2),
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
  start = losses.at_start(settings(kind=kind))
  assert start == {"loss": close((value, abs(slope)))}
  if kind != "exo_pair":
    start = losses.at_start(settings(kind=kind, per_token=True))
    assert start["loss"][0] == close(value)


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


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
  "values",
  [
    *({"kind": kind} for kind in losses.LOSSES),
    *({"divergence": x} for x in ("forward_kl", "js_divergence")),
    {"divergence": "alpha_divergence"},
  ],
  ids=lambda values: "".join(values.values()),
)
def test_no_margin_gives_nan(values, per_token):
  huge = jnp.float32([[3e4, -3e4, 1e4], [-3e4, 3e4, 1e4]])
  pair = pair_of(huge, np.zeros((2, 3)), [[1, 1, 0]] * 2)
  pair = pair._replace(desirable=jnp.array([True, False, False]))

  def total(ratios):
    used = pair._replace(policy=ratios, ratios=ratios)
    return jnp.sum(loss(used, per_token=per_token, **values))

  value, grads = jax.value_and_grad(total)(pair.ratios)
  assert np.isfinite(value)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("kind", losses.LOSSES)
def test_slopes_are_those_of_the_values(kind):
  """By central differences in float64."""
  with jax.enable_x64(True):
    policy = losses.Responses(*np.float64([[-4, -9, -2.25], [-6, -8, -5]]))
    zeros = losses.Responses(*np.float64([[-5, -7, -3], [-5.5, -8, -4]]))
    lengths = losses.Responses(*np.float64([[4, 3, 2], [2, 4, 2]]))

    @jax.jit
    def value(policy):
      ratios = jax.tree.map(jnp.subtract, policy, zeros)
      desirable = jnp.array([True, False, True])
      pair = losses.Pair(policy, zeros, ratios, lengths, desirable)
      return jnp.sum(loss(pair, kind=kind))

    slopes = jax.grad(value)(policy)
    # The responses to other prompts, of which KTO's point is a constant.
    for side in range(1 if kind == "kto" else 2):
      for i in range(3):
        step = np.zeros((2, 3))
        step[side, i] = 1e-5
        near, far = (
          value(losses.Responses(*(policy + sign * step))) for sign in (1, -1)
        )
        assert float(slopes[side][i]) == pytest.approx(
          float(near - far) / 2e-5, abs=1e-8
        )


@pytest.mark.parametrize(
  "kind",
  ["sigmoid", "robust", "ipo", "hinge", "exo_pair", "discopop", "aot", "cpo"],
)
def test_losses_of_margins_ignore_what_both_responses_share(kind):
  # Of the policy's log-probs; exact in binary.
  moved = pair_of(
    [[x + 0.25 for x in row] for row in PAIR.policy], PAIR.reference
  )
  found = [loss(pair, kind=kind) for pair in (PAIR, moved)]
  np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
  ("values", "best"),
  [
    ({"kind": "ipo"}, (1.0, 0.0)),
    ({"kind": "sppo_hard"}, (1.0, -1.0)),
    # The odds of the labels, 9 to 1.
    ({"kind": "exo_pair", "label_smoothing": 0.1}, (2 * math.log(9), 0.0)),
  ],
)
def test_losses_are_least_where_their_papers_say(values, best):
  def total(ratios):
    return jnp.sum(loss(SAME._replace(ratios=ratios), **values))

  at = losses.Responses(*(jnp.full(2, x) for x in best))
  for slopes in jax.grad(total)(at):
    np.testing.assert_allclose(slopes, 0, atol=1e-6)
  for change in (0.5, -0.5):
    near = at._replace(chosen=at.chosen + change)
    assert total(near) > total(at)


def test_reward_metrics():
  found = pair_metrics.metrics(PAIR, settings())
  assert {key: list(value) for key, value in found.items()} == {
    "rewards/chosen": [0.5, -1.0],
    "rewards/rejected": [-0.25, 0.0],
    "rewards/margins": [0.75, -1.0],
    "rewards/accuracies": [1.0, 0.0],
    "logps/chosen": [-4.0, -9.0],
    "logps/rejected": [-6.0, -8.0],
    "logps/chosen_per_token": [-1.0, -3.0],
    "logps/rejected_per_token": [-3.0, -2.0],
  }
  # Without a reference, of log-probs; SimPO's of their means.
  alone = PAIR._replace(reference=None, ratios=PAIR.policy)
  for kind, wanted in (("cpo", [-2.0, -4.5]), ("simpo+sft", [-0.5, -1.5])):
    found = pair_metrics.metrics(alone, settings(kind=kind))
    assert list(found["rewards/chosen"]) == wanted
  # Before training nothing is told apart: chance, not zero.
  same = pair_metrics.metrics(SAME, settings())
  assert list(same["rewards/accuracies"]) == [0.5, 0.5]
  # Nor is a margin smaller than what rounding makes of equal log-probs.
  near = pair_of(((5e-5, 2e-4), (0, 0)), ((0, 0), (0, 0)))
  found = pair_metrics.metrics(near, settings(beta=10.0))
  assert list(found["rewards/accuracies"]) == [0.5, 1.0]


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"beta": 0.0}, "loss.beta=0.0 must be positive and finite"),
    (
      {"kind": "hinge", "label_smoothing": 0.1},
      "not defined for 'hinge' but for sigmoid, robust, exo_pair",
    ),
    ({"kind": "exo_pair", "label_smoothing": 0.0}, "set it to 1e-3"),
    ({"gamma": 0.5}, "not defined for 'sigmoid' but for simpo.*set it to 0.0"),
    ({"kind": "bco_pair", "divergence": "forward_kl"}, "set it to 'reverse_kl"),
    ({"kind": "simpo+ipo", "ld_alpha": 0.5}, "not defined for 'simpo'"),
    ({"kind": "aot", "wpo": True}, "loss.wpo=True.*set it to False"),
    ({"ld_alpha": 1.5}, r"loss.ld_alpha=1.5 must be in \[0, 1\]"),
    ({"kind": "dpo"}, "'dpo' is no sum such as 'sigmoid.0.2.sft' of sigmoid"),
    ({"kind": "ipo+-1*sft"}, "give 'sft' once, with a positive weight"),
    ({"kind": "ipo+ipo"}, "give 'ipo' once"),
    ({"kind": "kto+sft"}, "'kto' is of labels, the others of pairs"),
    ({"kind": "x*ipo"}, "give 'ipo' once, with a positive weight"),
  ],
)
def test_settings_that_make_no_sense_are_refused(values, words):
  with pytest.raises(ValueError, match=words):
    settings(**values)
