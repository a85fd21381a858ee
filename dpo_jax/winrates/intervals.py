"""Confidence intervals of a proportion and of a mean over prompts.

The scores determine the method, and each result names it:

  wilson            one call per prompt, won or lost
  wilson bound      all prompts score alike: the widest spread is assumed
  wilson effective  few prompts: Wilson at the effective sample size
  bca               bias-corrected and accelerated bootstrap over prompts

The plain bootstrap is too narrow for few prompts: at 20, a rate of 10% and some
split verdicts its nominal 95% covers the truth in 90%. Tests hold the choice
made here to 93-97% over sizes, rates and shares of split verdicts, or a little
above where the possible means are on a coarse grid.
"""

import dataclasses
import math
import types
from collections.abc import Sequence

import numpy as np

MIN_PROMPTS = 100
"""Fewest prompts of the bootstrap."""

MIN_SPREAD = 20
"""Fewest prompts of the bootstrap that differ from the commonest score."""

MIN_RESAMPLES = 100


@dataclasses.dataclass(frozen=True)
class Settings:
  """Seed and resamples of each bootstrap, and the confidence in (0, 1)."""

  seed: int = 0
  resamples: int = 2000
  confidence: float = 0.95

  def __post_init__(self):
    if self.resamples < MIN_RESAMPLES:
      raise ValueError(
        f"resamples={self.resamples} must be at least {MIN_RESAMPLES}"
      )
    if not 0 < self.confidence < 1:
      raise ValueError(f"confidence={self.confidence} must be in (0, 1)")


@dataclasses.dataclass(frozen=True)
class Interval:
  """Ends of an interval, and its method."""

  method: str
  low: float
  high: float


def normal_quantile(confidence: float) -> float:
  """Half width of a two-sided normal interval, in standard errors."""
  from scipy import special

  return float(special.ndtri(0.5 + confidence / 2))


def wilson(
  successes: float, n: float, *, confidence: float
) -> tuple[float, float]:
  """Wilson score interval of a proportion; (0, 1) when n is 0.

  `successes` may be the sum of n scores in [0, 1]. Their variance is at most
  p (1 - p), which the formula assumes, so the interval errs by being too wide.

  References:
    Wilson, Probable inference, the law of succession, and statistical
    inference, JASA 22, 1927.
  """
  if not 0 <= successes <= n:
    raise ValueError(f"successes={successes} must be in [0, n={n}]")
  if n == 0:
    return 0.0, 1.0
  return _score_interval(successes / n, n, normal_quantile(confidence))


def effective_wilson(
  units: Sequence[float] | np.ndarray, *, confidence: float
) -> tuple[float, float]:
  """Wilson interval of the mean of scores in [0, 1], [n], at an effective n.

  The effective n is the number of won-or-lost prompts whose rate has the same
  variance, p (1 - p) / (s^2 / n), with Student's quantile, as s is estimated.
  Where s is 0, or n is 1, it is n.

  References:
    Dean and Pagano, Evaluating confidence interval methods for binomial
    proportions in clustered surveys, JSSAM 3, 2015.
  """
  from scipy import special

  units = np.asarray(units, float)
  n = len(units)
  if n == 0:
    return 0.0, 1.0
  mean = math.fsum(units) / n
  variance = float(units.var(ddof=1)) if n > 1 else 0.0
  if not variance > 1e-12:
    return wilson(mean * n, n, confidence=confidence)
  quantile = float(special.stdtrit(n - 1, 0.5 + confidence / 2))
  return _score_interval(mean, mean * (1 - mean) / variance * n, quantile)


def bca(units: Sequence[float] | np.ndarray, settings: Settings) -> Interval:
  """Bias-corrected and accelerated bootstrap interval of a mean, [n].

  NaN with a warning where all scores are equal.

  References:
    Efron, Better bootstrap confidence intervals, JASA 82, 1987.
  """
  from scipy import stats

  units = np.asarray(units, float)
  drawn, mean = resampled_means(units, settings), np.mean(units)
  # Resampled means that equal the mean count half; without this, rounding
  # errors would decide which do.
  drawn[np.isclose(drawn, mean, rtol=0, atol=1e-9)] = mean
  found = stats.bootstrap(
    (units,),
    np.mean,
    n_resamples=0,
    bootstrap_result=types.SimpleNamespace(bootstrap_distribution=drawn),
    confidence_level=settings.confidence,
    method="BCa",
    # Of the jackknife, for memory.
    batch=256,
  ).confidence_interval
  return Interval("bca", float(found.low), float(found.high))


def resampled_means(
  units: Sequence[float] | np.ndarray, settings: Settings
) -> np.ndarray:
  """Means of bootstrap resamples of scores [n], [resamples].

  Draws counts of the distinct scores, a multinomial: the distribution of
  prompts drawn one by one, but faster.
  """
  values, counts = np.unique(np.asarray(units, float), return_counts=True)
  n = counts.sum()
  generator = np.random.default_rng(settings.seed)
  draws = generator.multinomial(n, counts / n, size=settings.resamples)
  return draws @ values / n


def of_rate(
  units: Sequence[float] | np.ndarray,
  settings: Settings,
  *,
  single: bool = False,
) -> Interval:
  """The interval of the mean of prompts' scores in [0, 1], [n].

  `single`: one call per prompt, so that scores of 0 and 1 are binomial.
  """
  units = np.asarray(units, float)
  n = len(units)
  binary = bool(np.isin(units, (0.0, 1.0)).all())
  counts = np.unique(units, return_counts=True)[1]
  if n == 0 or (single and binary) or len(counts) == 1:
    ends = wilson(math.fsum(units), n, confidence=settings.confidence)
    plain = single and binary and n
    return Interval("wilson" if plain else "wilson bound", *ends)
  if n < MIN_PROMPTS or n - counts.max() < MIN_SPREAD:
    ends = effective_wilson(units, confidence=settings.confidence)
    return Interval("wilson effective", *ends)
  return bca(units, settings)


def of_mean(
  units: Sequence[float] | np.ndarray, settings: Settings, *, bound: float
) -> Interval:
  """The interval of a mean of scores in [-bound, bound], [n], as `of_rate`."""
  # Rounding may exceed the range.
  shares = np.clip((np.asarray(units, float) / bound + 1) / 2, 0.0, 1.0)
  found = of_rate(shares, settings)
  low, high = ((2 * end - 1) * bound for end in (found.low, found.high))
  return Interval(found.method, low, high)


def detectable_difference(n: int) -> float | None:
  """Difference of two models' win rates that n prompts detect with power 80%.

  Detected: its interval, `of_mean` at 95% with 2,000 resamples, excludes zero.
  Assumed: each prompt is won or lost, and the models' scores are independent,
  the worst case of scores that are not negatively correlated. Ties, split
  verdicts and prompts that are hard for both raise the power.

  The power is 80 to 84% at 30 prompts or more, higher below. None if no
  difference is detected.
  """
  from scipy import special

  if n < 2:
    return None
  quantile = float(special.stdtrit(n - 1, 0.975))
  if n >= MIN_PROMPTS:
    # Standard error of the resamples, sqrt(0.025 * 0.975 / 2000) / phi(1.96).
    quantile += 0.06
  # A score in [0, 1] has a variance of 1/4 at most, a difference of two 1/2.
  error = math.sqrt(0.5 / n)
  # Means are multiples of 1 / n, and an end at zero does not exclude zero.
  found = (quantile + float(special.ndtri(0.8))) * error + 0.5 / n
  return found if found < 1 else None


def _score_interval(
  rate: float, n: float, quantile: float
) -> tuple[float, float]:
  square = quantile**2
  centre = (rate + square / (2 * n)) / (1 + square / n)
  half = math.sqrt(square * (rate * (1 - rate) / n + square / (4 * n**2)))
  half /= 1 + square / n
  # Against rounding: the interval contains the rate and is within [0, 1].
  low = min(max(centre - half, 0.0), rate)
  high = max(min(centre + half, 1.0), rate)
  return (0.0 if rate == 0 else low), (1.0 if rate == 1 else high)
