"""Paired differences: between models, and along a training run.

An easy prompt is easy for both models, so the difference is taken prompt by
prompt: its interval is narrower than two separate intervals suggest.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dpo_jax.winrates import calls, controls, intervals


@dataclasses.dataclass(frozen=True)
class Difference:
  """Two final models at one temperature, on the `n` prompts of both.

  Attributes:
    difference: mean score of `upper` minus `lower`, in [`low`, `high`] by
      method `interval`.
    wins: prompts on which `upper` scored higher, `losses` lower.
    p: exact two-sided McNemar test of these.
    p_holm: the same with Holm's correction over this pair's temperatures.
  """

  lower: str
  upper: str
  temperature: float
  n: int
  difference: float
  low: float
  high: float
  interval: str
  wins: int
  losses: int
  p: float
  p_holm: float


@dataclasses.dataclass(frozen=True)
class BetaSlope:
  """One test of whether a model's checkpoints improve.

  Each of the `n` prompts judged at every step and temperature has a
  least-squares slope of its score, averaged over temperatures, on the step.

  Attributes:
    gain: mean slope times the span from `first` to `last`, a difference of win
      rates, in [`low`, `high`] by method `interval`.
    p: two-sided one-sample t-test of the slopes.
    left_out: prompts that were not judged everywhere.
  """

  model: str
  temperatures: tuple[float, ...]
  steps: int
  first: int
  last: int
  n: int
  left_out: int
  gain: float
  low: float
  high: float
  interval: str
  p: float


def differences(
  verdicts: Iterable[calls.Call], settings: intervals.Settings
) -> list[Difference]:
  """Every pair of final models at every common temperature with common prompts.

  `lower` is the earlier one in the table. Errors as in `rates.win_rates`.
  """
  tables: dict[str, dict[float, dict[str, float]]] = {}
  for cell, group in calls.by_cell(verdicts).items():
    model, step, temperature = cell
    if step is None:
      tables.setdefault(model, {})[temperature] = calls.units(group)
  found = []
  for lower, upper in itertools.combinations(tables, 2):
    rows = []
    for temperature in sorted(tables[lower].keys() & tables[upper].keys()):
      pair = [tables[upper][temperature], tables[lower][temperature]]
      prompts, scores = calls.shared(pair)
      if prompts:
        gaps = scores[:, 0] - scores[:, 1]
        rows.append(_difference(lower, upper, temperature, gaps, settings))
    adjusted = holm([row.p for row in rows])
    found += [
      dataclasses.replace(row, p_holm=p) for row, p in zip(rows, adjusted)
    ]
  return found


def holm(ps: Sequence[float]) -> list[float]:
  """P-values with Holm's step-down correction, in the order given.

  References:
    Holm, A simple sequentially rejective multiple test procedure,
    Scandinavian Journal of Statistics 6, 1979.
  """
  adjusted, worst = [0.0] * len(ps), 0.0
  order = sorted(range(len(ps)), key=lambda index: ps[index])
  for rank, index in enumerate(order):
    worst = max(worst, min(1.0, (len(ps) - rank) * ps[index]))
    adjusted[index] = worst
  return adjusted


def beta_slopes(
  verdicts: Iterable[calls.Call], settings: intervals.Settings
) -> list[BetaSlope]:
  """A BetaSlope for each model with checkpoints at two steps or more."""
  tables: dict[str, dict[tuple[int, float], dict[str, float]]] = (
    collections.defaultdict(dict)
  )
  for cell, group in calls.by_cell(verdicts).items():
    model, step, temperature = cell
    if step is not None:
      tables[model][step, temperature] = calls.units(group)
  slopes = [_slope(model, table, settings) for model, table in tables.items()]
  return [slope for slope in slopes if slope]


def _difference(lower, upper, temperature, gaps, settings) -> Difference:
  interval = intervals.of_mean(gaps, settings, bound=1.0)
  wins, losses = int((gaps > 0).sum()), int((gaps < 0).sum())
  p = controls.sign_test(wins, losses)
  return Difference(
    lower=lower,
    upper=upper,
    temperature=temperature,
    n=len(gaps),
    difference=float(gaps.mean()),
    low=interval.low,
    high=interval.high,
    interval=interval.method,
    wins=wins,
    losses=losses,
    p=p,
    p_holm=p,
  )


def _slope(model, table, settings) -> BetaSlope | None:
  """The test of one model's checkpoints; None without common prompts."""
  # A temperature at some steps only would bias the slope.
  by_temperature = collections.defaultdict(set)
  for step, temperature in table:
    by_temperature[temperature].add(step)
  steps = sorted(set().union(*by_temperature.values()))
  temperatures = tuple(
    sorted(t for t, have in by_temperature.items() if len(have) == len(steps))
  )
  if len(steps) < 2 or not temperatures:
    return None
  cells = [table[step, t] for step in steps for t in temperatures]
  prompts, scores = calls.shared(cells)
  if not prompts:
    return None
  scores = scores.reshape(len(prompts), len(steps), -1).mean(axis=2)
  centred = np.asarray(steps, float) - np.mean(steps)
  weights = centred / (centred**2).sum() * (steps[-1] - steps[0])
  gains = scores @ weights
  # The largest gain of scores in [0, 1], since the weights sum to zero.
  bound = float(weights[weights > 0].sum())
  interval = intervals.of_mean(gains, settings, bound=bound)
  judged = set().union(*cells)
  return BetaSlope(
    model=model,
    temperatures=temperatures,
    steps=len(steps),
    first=steps[0],
    last=steps[-1],
    n=len(prompts),
    left_out=len(judged) - len(prompts),
    gain=float(gains.mean()),
    low=interval.low,
    high=interval.high,
    interval=interval.method,
    p=_t_test(gains),
  )


def _t_test(values: np.ndarray) -> float:
  """Two-sided p-value of mean 0; NaN where nothing varies."""
  from scipy import stats

  if len(values) < 2 or float(np.ptp(values)) < 1e-12:
    return math.nan
  found: Any = stats.ttest_1samp(values, 0)
  return float(found.pvalue)
