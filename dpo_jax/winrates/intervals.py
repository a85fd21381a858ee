"""Intervals of a proportion and of a mean over prompts.

Which interval is used depends on what the prompts' scores allow, and each
result names it:

  wilson            one call a prompt, won or lost
  wilson bound      prompts that all score alike: the widest spread is assumed
  wilson effective  few prompts: as many won-or-lost ones as would be as sure
  bca               the bootstrap over prompts, corrected for bias and skew

The plain bootstrap of a small table is too narrow: at 20 prompts, a rate of
10% and some split verdicts its nominal 95% covers the truth in 90%. Tests hold
the choice made here to 93-97% over sizes, rates and shares of split verdicts,
or a little above where the possible means lie on a coarse grid.
"""

import dataclasses
import math
import types
from collections.abc import Sequence

import numpy as np

MIN_PROMPTS = 100
"""Below this many prompts the bootstrap is not used."""

MIN_SPREAD = 20
"""Nor with fewer prompts than this beside the commonest score."""

MIN_RESAMPLES = 100


@dataclasses.dataclass(frozen=True)
class Settings:
  """How intervals are made.

  Attributes:
    seed: of the bootstrap, which starts anew with it for every interval.
    resamples: of the bootstrap.
    confidence: in (0, 1).

  Raises:
    ValueError: a setting is out of range.
  """

  seed: int = 0
  resamples: int = 2000
  confidence: float = 0.95

  def __post_init__(self):
    if self.resamples < MIN_RESAMPLES:
      raise ValueError(
        f"resamples={self.resamples} must be at least {MIN_RESAMPLES}: fewer do"
        " not find the ends of an interval"
      )
    if not 0 < self.confidence < 1:
      raise ValueError(f"confidence={self.confidence} must be in (0, 1)")


@dataclasses.dataclass(frozen=True)
class Interval:
  """Ends of an interval, and the method that made it."""

  method: str
  low: float
  high: float


def normal_quantile(confidence: float) -> float:
  """Half the width of a two-sided interval, in standard errors."""
  from scipy import special

  return float(special.ndtri(0.5 + confidence / 2))


def wilson(
  successes: float, n: float, *, confidence: float
) -> tuple[float, float]:
  """Wilson score interval of a proportion; (0, 1) when n is 0.

  Counts need not be whole: `successes` may be the sum of n scores in [0, 1].
  A score in [0, 1] of mean p varies by p (1 - p) at most, which is what the
  formula assumes, so the interval is then too wide rather than too narrow.

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

  The effective n is the number of won-or-lost prompts whose rate would vary as
  much as this mean does, p (1 - p) / (s^2 / n); Student's quantile with n - 1
  degrees of freedom stands for the normal one, as s is estimated. Where s is
  0, or n is 1, n itself is taken.

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

  It is undefined, NaN with a warning, where all scores are equal.

  References:
    Efron, Better bootstrap confidence intervals, JASA 82, 1987.
  """
  from scipy import stats

  units = np.asarray(units, float)
  drawn, mean = resampled_means(units, settings), np.mean(units)
  # Means of a few distinct scores repeat, and those that equal the mean of all
  # count half: rounding errors may not decide which these are.
  drawn[np.isclose(drawn, mean, rtol=0, atol=1e-9)] = mean
  found = stats.bootstrap(
    (units,),
    np.mean,
    n_resamples=0,
    bootstrap_result=types.SimpleNamespace(bootstrap_distribution=drawn),
    confidence_level=settings.confidence,
    method="BCa",
    # Of the jackknife, whose n resamples of n - 1 would fill the memory.
    batch=256,
  ).confidence_interval
  return Interval("bca", float(found.low), float(found.high))


def resampled_means(
  units: Sequence[float] | np.ndarray, settings: Settings
) -> np.ndarray:
  """Means of bootstrap resamples of scores [n], [resamples].

  A resample is drawn as counts of the distinct scores, a multinomial, which
  is the same distribution as drawing prompts one by one, and much faster.
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
  """The interval that fits prompts' scores in [0, 1], [n].

  `single`: every prompt had one call, so that scores of 0 and 1 are binomial.
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
  # Rounding may leave an end by a hair.
  shares = np.clip((np.asarray(units, float) / bound + 1) / 2, 0.0, 1.0)
  found = of_rate(shares, settings)
  low, high = ((2 * end - 1) * bound for end in (found.low, found.high))
  return Interval(found.method, low, high)


def detectable_difference(n: int) -> float | None:
  """Difference of two models' win rates that n prompts detect, power 80%.

  A difference is detected where its interval, `of_mean` at 95% with 2,000
  resamples, excludes zero. Assumed: both models answer all n prompts, each is
  won or lost, and the scores are independent, so that about half of the
  prompts are discordant. This is the worst case of scores that are not
  negatively correlated: ties, split verdicts and prompts that are hard for
  both models lower the variance and raise the power.

  At 30 prompts or more the power is 80 to 84% on average over seeds of the
  bootstrap, whose standard deviation is 2 points; below that it is higher.
  None if no difference is detected.
  """
  from scipy import special

  if n < 2:
    return None
  quantile = float(special.stdtrit(n - 1, 0.975))
  if n >= MIN_PROMPTS:
    # The resamples' own error, sqrt(0.025 * 0.975 / 2000) / phi(1.96).
    quantile += 0.06
  # A score in [0, 1] varies by 1/4 at most, the difference of two by 1/2.
  error = math.sqrt(0.5 / n)
  # Means are multiples of 1 / n, and an end at zero does not exclude it.
  found = (quantile + float(special.ndtri(0.8))) * error + 0.5 / n
  return found if found < 1 else None


def _score_interval(
  rate: float, n: float, quantile: float
) -> tuple[float, float]:
  square = quantile**2
  centre = (rate + square / (2 * n)) / (1 + square / n)
  half = math.sqrt(square * (rate * (1 - rate) / n + square / (4 * n**2)))
  half /= 1 + square / n
  # Rounding may not move an end past the rate, nor out of [0, 1].
  low = min(max(centre - half, 0.0), rate)
  high = max(min(centre + half, 1.0), rate)
  return (0.0 if rate == 0 else low), (1.0 if rate == 1 else high)
