"""Preference losses: pure functions of log-probs.

A log-prob is the sum over a response's tokens of log pi(token | before), in
nats and float32. A loss is an entry of the table `LOSSES`: a function of a
`Pair` and the settings, and its traits. a and b are the log-ratios of policy to
reference of the chosen and the rejected response, h = a - b.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.core import settings as settings_lib

# DiscoPOP's temperature, as found by its search.
_DISCOPOP_TAU = 0.05

# Largest exponent of an f-divergence's score, as in TRL.
_LARGEST_EXPONENT = 80.0

Divergence = Literal[
  "reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"
]


@dataclasses.dataclass(frozen=True)
class LossSettings:
  """The preference loss; see configs/common.py."""

  kind: str
  beta: float
  label_smoothing: float
  per_token: bool
  gamma: float
  divergence: Divergence
  divergence_alpha: float
  ld_alpha: float
  wpo: bool
  undesirable_weight: float

  def __post_init__(self):
    settings_lib.check(self, "loss.")
    for field, off in _OFF.items():
      value = getattr(self, field)
      for kind, loss in self.losses:
        if value != off and field not in loss.takes:
          fit = [name for name, loss in LOSSES.items() if field in loss.takes]
          raise ValueError(
            f"loss.{field}={value!r} with loss.kind={self.kind!r}: it is not"
            f" defined for {kind!r} but for {', '.join(fit)}; set it to {off!r}"
          )
    if "exo_pair" in self.weights and not self.label_smoothing:
      raise ValueError(
        "loss.label_smoothing=0 with loss.kind='exo_pair', which takes its"
        " logarithm; set it to 1e-3, as TRL does"
      )

    if self.labeled and len(self.weights) > 1:
      raise ValueError(
        f"loss.kind={self.kind!r}: 'kto' is of labels, the others of pairs"
      )

  @functools.cached_property
  def weights(self) -> dict[str, float]:
    """The weight of each kind of the sum that `kind` names.

    Raises:
      ValueError: it is no sum of different kinds with positive weights.
    """
    found = {}
    for term in self.kind.split("+"):
      weight, _, name = term.rpartition("*")
      name = name.strip()
      if name not in LOSSES:
        raise ValueError(
          f"loss.kind={self.kind!r} is no sum such as 'sigmoid+0.2*sft' of"
          f" {', '.join(LOSSES)}"
        )
      try:
        value = float(weight or 1)
      except ValueError:
        value = math.nan
      if name in found or not 0 < value < math.inf:
        raise ValueError(
          f"loss.kind={self.kind!r}: give {name!r} once, with a positive weight"
        )
      found[name] = value
    return found

  @property
  def losses(self) -> list[tuple[str, "Loss"]]:
    """The kinds of the sum, with their entries in the table."""
    return [(kind, LOSSES[kind]) for kind in self.weights]

  @property
  def reference_free(self) -> bool:
    """Whether no reference is computed."""
    return all(loss.reference_free for _, loss in self.losses)

  @property
  def whole_batch(self) -> bool:
    """Whether the loss of a pair depends on the other pairs of its batch."""
    return any(loss.whole_batch for _, loss in self.losses)

  @property
  def labeled(self) -> bool:
    """Whether items are labeled responses instead of pairs."""
    return any(loss.labeled for _, loss in self.losses)

  def metric(self, kind: str) -> str:
    """Name of the metric that holds the loss of this kind, without weight."""
    return f"loss/{kind}" if len(self.weights) > 1 else "loss"


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
    reference: those under the frozen reference; None if no loss reads it.
    ratios: policy less reference, subtracted token by token: the difference of
      two sums of a thousand nats has no more digits than those sums. Tokens are
      weighted by `token_weights`. Without a reference, the policy's log-probs.
    lengths: tokens of each response; 0 in a pair that fills up a batch.
    desirable: of labeled responses, which are `chosen`, bool; then `rejected`
      are responses to other prompts.
    on_policy: mean over tokens of log pi(token) - log sum over the vocabulary
      of pi^2, for WPO; None without it.
  """

  policy: Responses
  reference: Responses | None
  ratios: Responses
  lengths: Responses
  desirable: jax.Array | None = None
  on_policy: Responses | None = None


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


def bco_pair(pair: Pair, settings: LossSettings) -> jax.Array:
  """BCO of pairs, without its shift of rewards. TRL's "bco_pair".

  -log sigmoid(beta a) - log sigmoid(-beta b).

  References:
    Jung et al., Binary Classifier Optimization for LLM Alignment, 2024
    (arXiv 2404.04656).
  """
  chosen, rejected = (settings.beta * ratio for ratio in pair.ratios)
  return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def aot(pair: Pair, settings: LossSettings) -> jax.Array:
  """AOT: DPO of the batch's sorted margins. TRL's "aot".

  The i-th smallest margin of the policy is compared with the i-th smallest of
  the reference.

  References:
    Melnyk et al., Distributional Preference Alignment of LLMs via Optimal
    Transport, 2024 (arXiv 2406.05882).
  """
  return _sorted_loss(pair.policy.margin, pair.reference.margin, pair, settings)


def aot_unpaired(pair: Pair, settings: LossSettings) -> jax.Array:
  """AOT of sorted log-ratios, chosen against rejected. TRL's "aot_unpaired"."""
  return _sorted_loss(*pair.ratios, pair, settings)


def _sorted_loss(high, low, pair, settings):
  """DPO of the differences by rank, each where `high` has that rank."""
  filled = pair.lengths.chosen > 0
  high, low = (
    jnp.where(filled, x, jnp.finfo(x.dtype).max) for x in (high, low)
  )
  order = jnp.argsort(high)
  by_rank = dpo_loss(
    high[order],
    jnp.sort(low),
    beta=settings.beta,
    label_smoothing=settings.label_smoothing,
  )
  return jnp.zeros_like(high).at[order].set(by_rank)


def cpo(pair: Pair, settings: LossSettings) -> jax.Array:
  """CPO's preference term: DPO with a uniform reference.

  CPO is "cpo+sft". CPOTrainer's "sigmoid" in TRL.

  References:
    Xu et al., Contrastive Preference Optimization, 2024 (arXiv 2401.08417),
    Eq. 3.
  """
  return dpo_loss(
    pair.policy.margin,
    0.0,
    beta=settings.beta,
    label_smoothing=settings.label_smoothing,
  )


def simpo(pair: Pair, settings: LossSettings) -> jax.Array:
  """SimPO: -log sigmoid(beta (mean log pi_w - mean log pi_l) - gamma).

  CPOTrainer's "simpo" in TRL.

  References:
    Meng et al., SimPO, 2024 (arXiv 2405.14734), Eq. 6.
  """
  return dpo_loss(
    per_token(pair.policy, pair.lengths).margin,
    settings.gamma / settings.beta,
    beta=settings.beta,
    label_smoothing=settings.label_smoothing,
  )


def orpo(pair: Pair, settings: LossSettings) -> jax.Array:
  """ORPO's odds-ratio term, -beta log sigmoid(log odds_w - log odds_l).

  odds = p / (1 - p) of the mean log-prob of a response's tokens, log p. ORPO is
  "sft+orpo", beta its lambda. ORPOTrainer in TRL, whose SFT term counts the
  prompt's tokens too.

  References:
    Hong et al., ORPO, 2024 (arXiv 2403.07691), Eq. 7.
  """
  # Below a probability of one, whose odds are infinite.
  means = per_token(pair.policy, pair.lengths)
  logps = (jnp.minimum(x, -1e-7) for x in means)
  chosen, rejected = (x - jnp.log(-jnp.expm1(x)) for x in logps)
  return -settings.beta * jax.nn.log_sigmoid(chosen - rejected)


def kto(pair: Pair, settings: LossSettings) -> jax.Array:
  """KTO: 1 - sigmoid(beta (a - z)) of desirable, of others beta (z - a).

  z, the reference point, is the batch's mean log-ratio of responses to other
  prompts, at least 0, without a gradient; undesirable responses weigh
  undesirable_weight. KTOTrainer's "kto" in TRL.

  References:
    Ethayarajh et al., KTO, 2024 (arXiv 2402.01306), Eq. 8.
  """
  point = reference_point(pair)
  sign = jnp.where(pair.desirable, 1, -1)
  weight = jnp.where(pair.desirable, 1, settings.undesirable_weight)
  ahead = settings.beta * sign * (pair.ratios.chosen - point)
  return weight * jax.nn.sigmoid(-ahead)


def reference_point(pair: Pair) -> jax.Array:
  """KTO's z: an estimate of the divergence of policy and reference, []."""
  filled = pair.lengths.chosen > 0
  total = jnp.sum(jnp.where(filled, pair.ratios.rejected, 0))
  mean = total / jnp.maximum(jnp.sum(filled), 1)
  return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def sft(pair: Pair, settings: LossSettings) -> jax.Array:
  """Negative log-prob of chosen, a mean over chosen tokens. TRL's "sft".

  Alone it is the DPO paper's Preferred-FT; "sigmoid+0.2*sft" is RPO's sum.

  References:
    Pang et al., Iterative Reasoning Preference Optimization, 2024
    (arXiv 2404.19733), Eq. 2.
  """
  del settings
  return -pair.policy.chosen


def unlikelihood(pair: Pair, settings: LossSettings) -> jax.Array:
  """The log-prob of rejected, to be minimized.

  "sft+0.1*unlikelihood" is the baseline of the DPO paper, Section 6, which
  drives both responses' log-probs down without end.
  """
  del settings
  return pair.policy.rejected


@dataclasses.dataclass(frozen=True)
class Loss:
  """An entry of `LOSSES`.

  Attributes:
    pair: the loss of every pair, float32 [B].
    takes: settings that it may be combined with.
    reference_free: whether it reads the policy's log-probs and lengths alone.
    of_means: whether it always reads means over a response's tokens.
    whole_batch: whether it compares pairs with each other.
    labeled: whether its items are labeled responses.
    per_chosen_token: whether it is a mean over the update's chosen tokens, not
      over its pairs.
  """

  pair: Callable[[Pair, LossSettings], jax.Array]
  takes: tuple[str, ...]
  reference_free: bool = False
  of_means: bool = False
  whole_batch: bool = False
  labeled: bool = False
  per_chosen_token: bool = False


# Settings that not every loss takes, and their value that turns them off.
_OFF = {
  "label_smoothing": 0.0,
  "gamma": 0.0,
  "divergence": "reverse_kl",
  "ld_alpha": 1.0,
  "wpo": False,
  "undesirable_weight": 1.0,
}
_TOKENS = ("ld_alpha", "wpo")
_MARGIN = ("divergence", *_TOKENS)
_SMOOTHED = ("label_smoothing", *_MARGIN)

LOSSES = {
  "sigmoid": Loss(sigmoid, _SMOOTHED),
  "robust": Loss(robust, _SMOOTHED),
  "ipo": Loss(ipo, _MARGIN),
  "hinge": Loss(hinge, _MARGIN),
  "exo_pair": Loss(exo_pair, _SMOOTHED),
  "discopop": Loss(discopop, _MARGIN),
  "nca_pair": Loss(nca_pair, _TOKENS),
  "bco_pair": Loss(bco_pair, _TOKENS),
  "sppo_hard": Loss(sppo_hard, _TOKENS),
  "apo_zero": Loss(apo_zero, _TOKENS),
  "apo_down": Loss(apo_down, _TOKENS),
  "aot": Loss(aot, ("label_smoothing",), whole_batch=True),
  "aot_unpaired": Loss(
    aot_unpaired, ("label_smoothing", "ld_alpha"), whole_batch=True
  ),
  "kto": Loss(kto, ("undesirable_weight",), whole_batch=True, labeled=True),
  "cpo": Loss(cpo, ("label_smoothing", "wpo"), reference_free=True),
  "simpo": Loss(
    simpo,
    ("label_smoothing", "gamma", "wpo"),
    reference_free=True,
    of_means=True,
  ),
  "orpo": Loss(orpo, ("wpo",), reference_free=True, of_means=True),
  "unlikelihood": Loss(unlikelihood, ("wpo",), reference_free=True),
  "sft": Loss(sft, (*_OFF,), reference_free=True, per_chosen_token=True),
}


def per_token(values: Responses, lengths: Responses) -> Responses:
  """Means over each response's tokens of values that are their sums."""
  return Responses(*(x / jnp.maximum(n, 1) for x, n in zip(values, lengths)))


def token_weights(
  settings: LossSettings, index: jax.Array, shorter: jax.Array
) -> jax.Array:
  """LD-DPO: ld_alpha past the length of the pair's shorter response, else 1.

  Args:
    settings: the loss.
    index: of a token in its response, from 0.
    shorter: tokens of the shorter response of its pair.

  References:
    Liu et al., Length Desensitization in Direct Preference Optimization, 2024
    (arXiv 2409.06411), Eq. 9.
  """
  return jnp.where(index < shorter, 1.0, settings.ld_alpha)


def scores(settings: LossSettings, ratios: Responses) -> Responses:
  """f'(pi / pi_ref) of both responses; of the reverse KL the log-ratios.

  References:
    Wang et al., Beyond Reverse KL, 2023 (arXiv 2309.16240), Table 1.
  """
  if settings.divergence == "forward_kl":
    power = -1.0
  elif settings.divergence == "alpha_divergence":
    power = settings.divergence_alpha - 1
  elif settings.divergence == "js_divergence":
    return Responses(*(math.log(2) + jax.nn.log_sigmoid(x) for x in ratios))
  else:
    return ratios
  if not power:
    return ratios
  return Responses(
    *(
      jnp.expm1(jnp.minimum(power * x, _LARGEST_EXPONENT)) / power
      for x in ratios
    )
  )


def preference_losses(
  settings: LossSettings, pair: Pair
) -> dict[str, jax.Array]:
  """The loss of every pair by kind, without the kind's weight, float32 [B]."""
  used = pair._replace(ratios=scores(settings, pair.ratios))
  if settings.per_token:
    reference = used.reference
    used = used._replace(
      policy=per_token(used.policy, used.lengths),
      reference=reference and per_token(reference, used.lengths),
      ratios=per_token(used.ratios, used.lengths),
    )
  found = {}
  for kind, loss in settings.losses:
    if loss.per_chosen_token:
      found[kind] = loss.pair(pair, settings)
      continue
    found[kind] = loss.pair(used, settings)
    if pair.on_policy is not None:
      # Zhou et al., WPO, 2024 (arXiv 2406.11827), Eq. 2.
      weight = jnp.exp(pair.on_policy.chosen + pair.on_policy.rejected)
      found[kind] *= jax.lax.stop_gradient(weight)
  return found


def at_start(settings: LossSettings) -> dict[str, tuple[float, float]]:
  """Losses and largest slopes while policy and reference are equal.

  By the name of their metric. The slope is that in a response's log-ratio.
  Losses that depend on the data there are left out.
  """
  logps = Responses(np.float32([-5, -90]), np.float32([-7, -60]))
  zeros = jax.tree.map(np.zeros_like, logps)
  # A token each has the largest slope under per_token.
  ones = jax.tree.map(np.ones_like, logps)
  half = np.array([True, False])
  pair = Pair(logps, logps, zeros, ones, half, logps if settings.wpo else None)

  def total(ratios):
    moved = jax.tree.map(jnp.add, pair.policy, ratios)
    values = preference_losses(
      settings, pair._replace(policy=moved, ratios=ratios)
    )
    return {kind: jnp.sum(x) for kind, x in values.items()}, values

  slopes, values = jax.jit(jax.jacrev(total, has_aux=True))(zeros)
  return {
    settings.metric(kind): (
      float(first),
      float(np.max(np.abs(jax.tree.leaves(slopes[kind])))),
    )
    for kind, (first, second) in values.items()
    if first == second
  }
