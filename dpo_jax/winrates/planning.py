"""How many prompts a question needs, and what a number of prompts can tell.

Everything is per prompt. A prompt judged in both orders scores 0, 1/2 or 1;
the share of halves (split verdicts) lowers the variance p (1 - p) of a single
call by a quarter of itself.
"""

import dataclasses
import math

from scipy import special


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is assumed of a comparison that is still to be made.

  Attributes:
    confidence: of the intervals and of two-sided tests, in (0, 1).
    power: the chance to find an effect that is there, in (0, 1).
    rate: the win rate that is expected.
    split: share of prompts whose two orders disagree; 0 for one order.
    discordant: share of prompts on which two models score differently.
    tests: comparisons among which Holm's correction is shared.
  """

  confidence: float
  power: float
  rate: float
  split: float
  discordant: float
  tests: int

  def __post_init__(self):
    for name in ("confidence", "power", "rate"):
      if not 0 < getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be in (0, 1)")
    most = 2 * min(self.rate, 1 - self.rate)
    if not 0 <= self.split < most:
      raise ValueError(
        f"split={self.split} must be in [0, {most:g}): more split verdicts"
        f" cannot give a rate of {self.rate}"
      )
    if not 0 < self.discordant <= 1:
      raise ValueError(f"discordant={self.discordant} must be in (0, 1]")
    if self.tests < 1:
      raise ValueError(f"tests={self.tests} must be at least 1")


def half_width(plan: Plan, n: int) -> float:
  """Half the interval's width for a win rate over n prompts, about."""
  _check_prompts(n)
  return _two_sided(plan, 1) * _deviation(plan.rate, plan.split) / math.sqrt(n)


def prompts_for_width(plan: Plan, half: float) -> int:
  """Prompts for an interval of plus or minus `half`."""
  _check_effect(half)
  spread = _two_sided(plan, 1) * _deviation(plan.rate, plan.split)
  return _whole((spread / half) ** 2)


def prompts_against_half(plan: Plan, effect: float) -> int:
  """Prompts to tell a rate of 1/2 + effect from 1/2.

  References:
    The usual two-variance formula, as in Fleiss, Levin and Paik, Statistical
    Methods for Rates and Proportions, 2003, ch. 2.
  """
  _check_effect(effect)
  if effect >= (1 - plan.split) / 2:
    raise ValueError(
      f"effect={effect} must be below {(1 - plan.split) / 2:g}: a rate of"
      f" {0.5 + effect:g} leaves no room for split={plan.split}"
    )
  null = _two_sided(plan, 1) * _deviation(0.5, plan.split)
  other = _one_sided(plan) * _deviation(0.5 + effect, plan.split)
  return _whole(((null + other) / effect) ** 2)


def prompts_for_difference(plan: Plan, effect: float) -> int:
  """Prompts to tell two models apart whose rates differ by `effect`.

  For McNemar's exact test, where one model wins on (discordant + effect) / 2 of
  the prompts and the other on (discordant - effect) / 2, at the first and
  hardest of Holm's `tests` steps. What a normal curve needs is raised by about
  2 / effect for the test's whole numbers: without it the power was 1 to 3
  points less than was planned.

  References:
    Connor, Sample size for testing differences in proportions for the
    paired-sample design, Biometrics 43, 1987;
    Fleiss, Tytun and Ury, A simple approximation for calculating sample sizes
    for comparing independent proportions, Biometrics 36, 1980: the correction.
  """
  _check_effect(effect)
  if effect > plan.discordant:
    raise ValueError(
      f"effect={effect} must be at most discordant={plan.discordant}: models"
      " that score alike elsewhere cannot differ by more"
    )
  null = _two_sided(plan, plan.tests) * math.sqrt(plan.discordant)
  other = _one_sided(plan) * math.sqrt(plan.discordant - effect**2)
  smooth = ((null + other) / effect) ** 2
  return _whole(smooth / 4 * (1 + math.sqrt(1 + 4 / (smooth * effect))) ** 2)


def detectable_against_half(plan: Plan, n: int) -> float:
  """Smallest effect that n prompts find against 1/2; NaN if none can."""
  _check_prompts(n)
  return _smallest(prompts_against_half, plan, n, (1 - plan.split) / 2)


def detectable_difference(plan: Plan, n: int) -> float:
  """Smallest difference of two models that n prompts find; NaN if none."""
  _check_prompts(n)
  return _smallest(prompts_for_difference, plan, n, plan.discordant)


def _smallest(needed, plan: Plan, n: int, most: float) -> float:
  """The effect at which `needed` falls to n, by bisection below `most`."""
  low, high = 0.0, most * (1 - 1e-9)
  if needed(plan, high) > n:
    return math.nan
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if needed(plan, middle) > n else (low, middle)
  return high


def _deviation(rate: float, split: float) -> float:
  """Standard deviation of a prompt's score."""
  return math.sqrt(rate * (1 - rate) - split / 4)


def _two_sided(plan: Plan, tests: int) -> float:
  return float(-special.ndtri((1 - plan.confidence) / (2 * tests)))


def _one_sided(plan: Plan) -> float:
  return float(special.ndtri(plan.power))


def _whole(prompts: float) -> int:
  """Rounded up, where a rounding error is no prompt; at most 10^18."""
  return math.ceil(min(prompts, 1e18) * (1 - 1e-12))


def _check_effect(effect: float) -> None:
  if not 0 < effect < 1:
    raise ValueError(f"effect={effect} must be in (0, 1), 0.05 for 5 points")


def _check_prompts(n: int) -> None:
  if n < 2:
    raise ValueError(f"prompts={n} must be at least 2")
