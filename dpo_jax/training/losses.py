"""Preference losses and reward metrics: pure functions of log-probs.

A log-prob is the sum over a response's tokens of log pi(token | before), in
nats and float32. A loss is a function of a `Pair` and its settings, in the
table `LOSSES`. h is the policy's margin log pi(chosen|x) - log pi(rejected|x)
less the reference's.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.core import settings as settings_lib

# Rounding error, in nats, of a margin of a thousand float32 log-probs; smaller
# margins are ties.
ROUNDING = 1e-4

# DiscoPOP's temperature, as found by its search.
_DISCOPOP_TAU = 0.05

Kind = Literal[
  "sigmoid",
  "robust",
  "ipo",
  "hinge",
  "exo_pair",
  "nca_pair",
  "sppo_hard",
  "apo_zero",
  "apo_down",
  "discopop",
]
# Kinds that read label_smoothing.
_SMOOTHED = ("sigmoid", "robust", "exo_pair")


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """The preference loss; see configs/common.py."""

  kind: Kind
  beta: float
  label_smoothing: float
  per_token: bool

  def __post_init__(self):
    settings_lib.check(self, "loss.")
    if self.label_smoothing and self.kind not in _SMOOTHED:
      raise ValueError(
        f"loss.label_smoothing={self.label_smoothing} is defined for kinds"
        f" {', '.join(_SMOOTHED)}, not {self.kind!r}; set it to 0"
      )
    if self.kind == "exo_pair" and not self.label_smoothing:
      raise ValueError(
        "loss.label_smoothing=0 with loss.kind='exo_pair', which takes its"
        " logarithm; set it to 1e-3, as TRL does"
      )


class Responses(NamedTuple):
  """A value of both responses of every pair, each [B]."""

  chosen: jax.Array
  rejected: jax.Array

  @property
  def margin(self) -> jax.Array:
    return self.chosen - self.rejected


class Pair(NamedTuple):
  """What a loss sees of pairs; float32, log-probs summed over tokens.

  Attributes:
    policy: log-probs under the policy.
    reference: those under the frozen reference.
    ratios: policy less reference, subtracted token by token: the difference of
      two sums of a thousand nats has no more digits than those sums.
    lengths: tokens of each response.
  """

  policy: Responses
  reference: Responses
  ratios: Responses
  lengths: Responses


def dpo_loss(policy_margin, reference_margin, *, beta, label_smoothing=0.0):
  """Per-pair DPO loss, [B]; with label smoothing, conservative DPO.

  Args:
    policy_margin: log pi(chosen|x) - log pi(rejected|x) in nats, [B].
    reference_margin: the same under the frozen reference, [B].
    beta: strength of the KL penalty, > 0.
    label_smoothing: assumed rate of swapped labels, in [0, 0.5).

  References:
    Rafailov et al., Direct Preference Optimization, 2023, Eq. 7
    (arXiv 2305.18290); Mitchell, A note on DPO with noisy preferences, 2023.
  """
  logit = beta * (policy_margin - reference_margin)
  kept, swapped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
  return -(1 - label_smoothing) * kept - label_smoothing * swapped


def sigmoid(pair: Pair, settings: LossSettings) -> jax.Array:
  """DPO: -log sigmoid(beta h); see `dpo_loss`. TRL's "sigmoid"."""
  return dpo_loss(
    pair.ratios.margin,
    0.0,
    beta=settings.beta,
    label_smoothing=settings.label_smoothing,
  )


def robust(pair: Pair, settings: LossSettings) -> jax.Array:
  """Robust DPO: unbiased where a share e of labels is swapped.

  (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e). TRL's
  "robust".

  References:
    Chowdhury et al., Provably Robust DPO, 2024 (arXiv 2403.00409), Eq. 12.
  """
  e, logit = settings.label_smoothing, settings.beta * pair.ratios.margin
  kept, swapped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
  return (e * swapped - (1 - e) * kept) / (1 - 2 * e)


def ipo(pair: Pair, settings: LossSettings) -> jax.Array:
  """IPO: (h - 1 / (2 beta))^2; TRL's "ipo" is that with per_token.

  References:
    Azar et al., A General Theoretical Paradigm to Understand Learning from
    Human Preferences, 2023, Eq. 17 (arXiv 2310.12036).
  """
  return jnp.square(pair.ratios.margin - 1 / (2 * settings.beta))


def hinge(pair: Pair, settings: LossSettings) -> jax.Array:
  """SLiC's hinge on DPO's margin: relu(1 - beta h). TRL's "hinge".

  References:
    Zhao et al., SLiC-HF, 2023 (arXiv 2305.10425).
  """
  return jax.nn.relu(1 - settings.beta * pair.ratios.margin)


def exo_pair(pair: Pair, settings: LossSettings) -> jax.Array:
  """EXO of pairs: KL(p || q), p = sigmoid(beta h), q = 1 - label_smoothing.

  TRL's "exo_pair".

  References:
    Ji et al., Towards Efficient Exact Optimization of Language Model Alignment,
    2024 (arXiv 2402.00856), Eq. 16.
  """
  e, logit = settings.label_smoothing, settings.beta * pair.ratios.margin
  kept = jax.nn.log_sigmoid(logit) - math.log(1 - e)
  swapped = jax.nn.log_sigmoid(-logit) - math.log(e)
  return jax.nn.sigmoid(logit) * kept + jax.nn.sigmoid(-logit) * swapped


def nca_pair(pair: Pair, settings: LossSettings) -> jax.Array:
  """NCA of pairs, which raises chosen's own likelihood too. TRL's "nca_pair".

  With rewards r: -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l))/2.

  References:
    Chen et al., Noise Contrastive Alignment, 2024 (arXiv 2402.05369).
  """
  chosen, rejected = (settings.beta * ratio for ratio in pair.ratios)
  both = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
  return -jax.nn.log_sigmoid(chosen) - 0.5 * both


def sppo_hard(pair: Pair, settings: LossSettings) -> jax.Array:
  """SPPO of hard labels: (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2.

  a and b are the log-ratios of chosen and rejected. TRL's "sppo_hard".

  References:
    Wu et al., Self-Play Preference Optimization, 2024 (arXiv 2405.00675).
  """
  target = 1 / (2 * settings.beta)
  chosen, rejected = pair.ratios
  return jnp.square(chosen - target) + jnp.square(rejected + target)


def apo_zero(pair: Pair, settings: LossSettings) -> jax.Array:
  """APO-zero: raises chosen, lowers rejected. TRL's "apo_zero".

  1 - sigmoid(beta a) + sigmoid(beta b) of log-ratios a (chosen), b (rejected).

  References:
    D'Oosterlinck et al., Anchored Preference Optimization, 2024
    (arXiv 2408.06266).
  """
  chosen, rejected = (settings.beta * ratio for ratio in pair.ratios)
  return 1 - jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected)


def apo_down(pair: Pair, settings: LossSettings) -> jax.Array:
  """APO-down: lowers both, rejected more. TRL's "apo_down".

  sigmoid(beta a) + 1 - sigmoid(beta (a - b)), a and b as in `apo_zero`; for a
  policy that is better than the chosen responses.
  """
  chosen = jax.nn.sigmoid(settings.beta * pair.ratios.chosen)
  return chosen + 1 - jax.nn.sigmoid(settings.beta * pair.ratios.margin)


def discopop(pair: Pair, settings: LossSettings) -> jax.Array:
  """DiscoPOP: (1 - m) * logistic + m * exponential loss. TRL's "discopop".

  Of x = beta h: -log sigmoid(x) and exp(-x), m = sigmoid(x / 0.05).

  References:
    Lu et al., Discovering Preference Optimization Algorithms with and for
    Large Language Models, 2024 (arXiv 2406.08414).
  """
  logit = settings.beta * pair.ratios.margin
  share = jax.nn.sigmoid(logit / _DISCOPOP_TAU)
  # Where its share is nothing the exponential is kept from overflowing.
  exponential = jnp.exp(-jnp.maximum(logit, -20 * _DISCOPOP_TAU))
  return -jax.nn.log_sigmoid(logit) * (1 - share) + exponential * share


LOSSES: dict[str, Callable[[Pair, LossSettings], jax.Array]] = {
  loss.__name__: loss
  for loss in (
    sigmoid,
    robust,
    ipo,
    hinge,
    exo_pair,
    nca_pair,
    sppo_hard,
    apo_zero,
    apo_down,
    discopop,
  )
}


def preference_loss(settings: LossSettings, pair: Pair) -> jax.Array:
  """The preference loss of every pair, float32 [B].

  With per_token log-ratios are their means over a response's tokens.
  """
  if settings.per_token:
    ratios = jax.tree.map(
      lambda ratio, length: ratio / jnp.maximum(length, 1),
      pair.ratios,
      pair.lengths,
    )
    pair = pair._replace(ratios=ratios)
  return LOSSES[settings.kind](pair, settings)


def at_start(settings: LossSettings) -> tuple[float, float] | None:
  """Loss and largest slope while policy and reference are equal.

  The slope is that in a response's log-ratio. None if the loss depends on the
  data there.
  """
  logps = Responses(np.float32([-5, -90]), np.float32([-7, -60]))
  zeros = jax.tree.map(np.zeros_like, logps)
  # A token each has the largest slope under per_token.
  pair = Pair(logps, logps, zeros, jax.tree.map(np.ones_like, logps))

  def total(ratios):
    values = preference_loss(settings, pair._replace(ratios=ratios))
    return jnp.sum(values), values

  slopes, values = jax.jit(jax.grad(total, has_aux=True))(zeros)
  if values[0] != values[1]:
    return None
  return float(values[0]), float(np.max(np.abs(jax.tree.leaves(slopes))))


def reward_metrics(pair: Pair, *, beta: float) -> dict[str, jax.Array]:
  """Implicit rewards and log-probs of each pair, under TRL's names; all [B].

  The implicit reward is beta * (log pi(y|x) - log pi_ref(y|x)); an accuracy is
  1 where the chosen one's is greater, a half where they are equal but for
  rounding.

  References:
    Rafailov et al., 2023, Eq. 5 without the partition function, which cancels
    in a pair.
  """
  margin = pair.ratios.margin
  ahead = jnp.where(jnp.abs(margin) > ROUNDING, jnp.sign(margin), 0)
  chosen, rejected = (beta * ratio for ratio in pair.ratios)
  return {
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "rewards/accuracies": (1 + ahead) / 2,
    "logps/chosen": pair.policy.chosen,
    "logps/rejected": pair.policy.rejected,
  }
