"""Win rates at equal length, as a second opinion beside the plain ones.

Judges like long answers. A logistic regression of a prompt's score on the
difference in length gives the rate that would be seen if both texts were of
one length, as far as length alone made the difference.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from scipy import special

from dpo_jax.winrates import calls, intervals

_STEPS = 60
_LARGE = 15.0  # log-odds; beyond them scores are separated, not fitted


@dataclasses.dataclass(frozen=True)
class LengthControlled:
  """The rate of a cell at equal length, over its `n` prompts.

  `rate` and its interval are those at a length difference of zero, `effect`
  the log-odds that tanh(difference / `scale`) adds, `scale` the standard
  deviation of the differences in characters. NaN where the scores do not
  determine them. `longer_rate` is the mean score of the longer text over the
  prompts whose lengths differ.
  """

  model: str
  step: int | None
  temperature: float
  n: int
  rate: float
  low: float
  high: float
  effect: float
  scale: float
  longer_rate: float


def length_controlled(
  verdicts: Iterable[calls.Call], *, confidence: float = 0.95
) -> list[LengthControlled]:
  """One row for each (model, step, temperature), as `rates.win_rates`.

  The interval is the regression's with a sandwich variance over prompts, on
  the log-odds scale.

  References:
    Dubois et al., Length-controlled AlpacaEval, 2024 (arXiv 2404.04475): the
    same tanh, without its terms for the prompt's difficulty.
  """
  if not 0 < confidence < 1:
    raise ValueError(f"confidence={confidence} must be in (0, 1)")
  quantile = float(special.ndtri(0.5 + confidence / 2))
  found = []
  for cell, group in calls.by_cell(calls.ordinary(verdicts)).items():
    tables = [calls.units(group), calls.length_units(group)]
    prompts, columns = calls.shared(tables)
    scores, lengths = columns[:, 0], columns[:, 1]
    scale = float(lengths.std()) if prompts else math.nan
    fit = fit_logistic(lengths / scale, scores) if scale > 0 else None
    rate = low = high = effect = math.nan
    if fit:
      centre, effect, error = fit
      ends = [centre, centre - quantile * error, centre + quantile * error]
      rate, low, high = map(float, special.expit(ends))
    longer = np.where(lengths > 0, scores, 1 - scores)[lengths != 0]
    found.append(
      LengthControlled(
        *cell,
        n=len(prompts),
        rate=rate,
        low=low,
        high=high,
        effect=effect,
        scale=scale,
        longer_rate=float(longer.mean()) if len(longer) else math.nan,
      )
    )
  return found


@dataclasses.dataclass(frozen=True)
class LengthBin:
  """The rate of a final model on its answers of about one length.

  `difference` is the mean of their `n` prompts, answer less chosen, in
  characters; [`low`, `high`] an `intervals.effective_wilson`.
  """

  model: str
  temperature: float
  difference: float
  n: int
  win_rate: float
  low: float
  high: float


def by_length(
  verdicts: Iterable[calls.Call], *, confidence: float, bins: int = 5
) -> list[LengthBin]:
  """Rates of final models by length, at the temperature nearest to 0.7.

  A model's prompts, sorted by the difference in length, are cut into `bins` of
  one size, or into fewer where each would have less than 10.

  Raises:
    ValueError: confidence is not in (0, 1).
  """
  if not 0 < confidence < 1:
    raise ValueError(f"confidence={confidence} must be in (0, 1)")
  cells = {
    cell: group
    for cell, group in calls.by_cell(calls.ordinary(verdicts)).items()
    if cell[1] is None
  }
  # The paper compares at 0.7.
  nearest = min({t for _, _, t in cells}, key=_from_paper, default=None)
  found = []
  for (model, _, temperature), group in cells.items():
    if temperature != nearest:
      continue
    _, columns = calls.shared([calls.units(group), calls.length_units(group)])
    columns = columns[np.argsort(columns[:, 1], kind="stable")]
    for part in np.array_split(columns, min(bins, max(1, len(columns) // 10))):
      if len(part):
        low, high = intervals.effective_wilson(
          part[:, 0], confidence=confidence
        )
        rate, difference = map(float, part.mean(axis=0))
        found.append(
          LengthBin(model, temperature, difference, len(part), rate, low, high)
        )
  return found


def _from_paper(temperature: float) -> tuple[float, float]:
  return abs(temperature - 0.7), temperature


def fit_logistic(
  lengths: np.ndarray, scores: np.ndarray
) -> tuple[float, float, float] | None:
  """Logistic regression of scores in [0, 1] on tanh of lengths, both [n].

  Returns:
    Intercept, slope, and the intercept's standard error, robust to the
    scores' spread (HC1: n / (n - 2)); None where the maximum is not finite or
    prompts are too few.
  """
  n = len(scores)
  if n < 3:
    return None
  design = np.stack([np.ones(n), np.tanh(lengths)], axis=1)
  weights = np.zeros(2)
  for _ in range(_STEPS):
    chance = special.expit(design @ weights)
    slope = chance * (1 - chance)
    hessian = design.T @ (design * slope[:, None])
    if np.linalg.cond(hessian) > 1e12:
      return None
    step = np.linalg.solve(hessian, design.T @ (scores - chance))
    # A Newton step of any size may overshoot where chances are near 0 or 1.
    step *= min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
    weights = weights + step
    if float(np.abs(weights).max()) > _LARGE:
      return None
    if float(np.abs(step).max()) < 1e-12:
      break
  else:
    return None
  chance = special.expit(design @ weights)
  bread = np.linalg.inv(design.T @ (design * (chance * (1 - chance))[:, None]))
  scored = design * (scores - chance)[:, None]
  variance = bread @ (scored.T @ scored) @ bread * n / (n - 2)
  return float(weights[0]), float(weights[1]), math.sqrt(variance[0, 0])
