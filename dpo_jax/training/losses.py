"""Preference losses and reward metrics: pure functions of log-probs.

A log-prob is the sum over a response's tokens of log pi(token | before), in
nats and float32. `margin` is log pi(chosen|x) - log pi(rejected|x); a loss sees
h, the policy's margin minus the reference's.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from dpo_jax.core import settings as settings_lib

# Rounding error, in nats, of a margin of a thousand float32 log-probs; smaller
# margins are ties.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """The preference loss; see configs/common.py."""

  kind: Literal["sigmoid", "ipo_sum", "ipo_mean", "hinge"]
  beta: float
  label_smoothing: float

  def __post_init__(self):
    settings_lib.check(self, "loss.")
    if self.label_smoothing and self.kind != "sigmoid":
      raise ValueError(
        f"loss.label_smoothing={self.label_smoothing} is defined for"
        f" kind='sigmoid' only, not {self.kind!r}; set it to 0"
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairLogps:
  """Log-probs of pairs under one model; all [B], lengths in tokens."""

  chosen: jax.Array
  rejected: jax.Array
  chosen_length: jax.Array
  rejected_length: jax.Array

  @property
  def margin(self) -> jax.Array:
    return self.chosen - self.rejected

  @property
  def mean_margin(self) -> jax.Array:
    """The margin of the per-token means instead of the sums."""
    chosen = self.chosen / jnp.maximum(self.chosen_length, 1)
    return chosen - self.rejected / jnp.maximum(self.rejected_length, 1)


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
  right, swapped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
  return -(1 - label_smoothing) * right - label_smoothing * swapped


def ipo_loss(policy_margin, reference_margin, *, beta):
  """Per-pair IPO loss, [B]: (h - 1 / (2 beta))^2.

  The margins are of sums (the paper and the official code) or of per-token
  means (TRL's normalization); the caller chooses.

  References:
    Azar et al., A General Theoretical Paradigm to Understand Learning from
    Human Preferences, 2023, Eq. 17 (arXiv 2310.12036).
  """
  return jnp.square(policy_margin - reference_margin - 1 / (2 * beta))


def hinge_loss(policy_margin, reference_margin, *, beta):
  """Per-pair hinge loss, [B]: relu(1 - beta h).

  References:
    Zhao et al., SLiC-HF, 2023 (arXiv 2305.10425), on DPO's margin.
  """
  return jax.nn.relu(1 - beta * (policy_margin - reference_margin))


def preference_loss(
  settings: LossSettings, policy: PairLogps, reference: PairLogps
) -> jax.Array:
  """The preference loss of every pair, float32 [B]."""
  beta = settings.beta
  match settings.kind:
    case "sigmoid":
      return dpo_loss(
        policy.margin,
        reference.margin,
        beta=beta,
        label_smoothing=settings.label_smoothing,
      )
    case "ipo_sum":
      return ipo_loss(policy.margin, reference.margin, beta=beta)
    case "ipo_mean":
      return ipo_loss(policy.mean_margin, reference.mean_margin, beta=beta)
    case "hinge":
      return hinge_loss(policy.margin, reference.margin, beta=beta)


def loss_at_start(settings: LossSettings) -> float:
  """The loss while policy and reference are equal; for DPO, ln 2."""
  match settings.kind:
    case "sigmoid":
      return math.log(2)
    case "ipo_sum" | "ipo_mean":
      return 1 / (2 * settings.beta) ** 2
    case "hinge":
      return 1.0


def slope_at_start(settings: LossSettings) -> float:
  """Absolute derivative of the loss with respect to h at the start."""
  match settings.kind:
    case "sigmoid":
      return settings.beta * (0.5 - settings.label_smoothing)
    case "ipo_sum" | "ipo_mean":
      return 1 / settings.beta
    case "hinge":
      return settings.beta


def reward_metrics(
  policy: PairLogps, reference: PairLogps, *, beta: float
) -> dict[str, jax.Array]:
  """Implicit rewards and log-probs of each pair, under TRL's names; all [B].

  The implicit reward is beta * (log pi(y|x) - log pi_ref(y|x)); an accuracy is
  1 where the chosen one's is greater, a half where they are equal but for
  rounding.

  References:
    Rafailov et al., 2023, Eq. 5 without the partition function, which cancels
    in a pair.
  """
  margin = policy.margin - reference.margin
  ahead = jnp.where(jnp.abs(margin) > ROUNDING, jnp.sign(margin), 0)
  chosen = beta * (policy.chosen - reference.chosen)
  rejected = beta * (policy.rejected - reference.rejected)
  return {
    "rewards/chosen": chosen,
    "rewards/rejected": rejected,
    "rewards/margins": chosen - rejected,
    "rewards/accuracies": (1 + ahead) / 2,
    "logps/chosen": policy.chosen,
    "logps/rejected": policy.rejected,
  }
