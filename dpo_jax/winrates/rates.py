"""Win rates against the dataset's chosen responses, plain and by length.

A call without a verdict is never a tie or a loss: it leaves the rate, is
counted, and bounds the rate from both sides.

Judges prefer long responses. A logistic regression of a prompt's score on the
difference in length gives the rate at equal length.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from dpo_jax.winrates import calls, intervals

_STEPS = 60
_LARGE = 15.0  # log-odds; beyond, the scores are separable: no finite maximum


@dataclasses.dataclass(frozen=True)
class WinRate:
  """A row of the table: a model (at a step) at a sampling temperature.

  Attributes:
    prompts: judged prompts, `n` of them with a verdict.
    win_rate: mean score over these n, in [`low`, `high`] by method `interval`.
    wins: calls, as are `ties` to `refusals`.
    worst: the rate over all `prompts` if calls without a verdict were lost,
      `best` if they were won.
    soft_rate: mean over prompts of the judge's own probabilities; NaN unless
      every verdict has one.
    response_chars: characters averaged over prompts, as `chosen_chars`.
  """

  model: str
  step: int | None
  temperature: float
  prompts: int
  n: int
  win_rate: float
  low: float
  high: float
  interval: str
  wins: int
  ties: int
  losses: int
  missing: int
  refusals: int
  worst: float
  best: float
  soft_rate: float
  first_slot_rate: float
  order_consistency: float
  response_chars: float
  chosen_chars: float


def win_rates(
  verdicts: Iterable[calls.Call], settings: intervals.Settings
) -> list[WinRate]:
  """The table, a row for each cell in the order of `calls.by_cell`.

  The rate is the mean over prompts of each prompt's mean score over samples and
  orders: model 1, tie 1/2, chosen 0. A row depends on its own calls only.

  Args:
    verdicts: calls of one judge and template, in the order of their files.
    settings: of the intervals.

  Raises:
    ValueError: judges or templates are mixed, or a call has two verdicts.
  """
  return [
    _win_rate(group, settings) for group in calls.by_cell(verdicts).values()
  ]


def first_slot_rate(verdicts: Iterable[calls.Call]) -> float:
  """Fraction of decided calls (no ties) that the text shown first won.

  Over both orders of every comparison, 1/2 for a fair judge. NaN if no call was
  decided.
  """
  first = [
    (call.verdict == "model") == (call.order == "model_first")
    for call in verdicts
    if call.verdict in ("model", "chosen")
  ]
  return sum(first) / len(first) if first else math.nan


def agreement(verdicts: Iterable[calls.Call]) -> tuple[int, int]:
  """Comparisons with equal verdicts in both orders, and with both verdicts."""
  found = collections.defaultdict(list)
  for call in verdicts:
    if call.verdict in calls.SCORES:
      found[calls.comparison(call)].append(call.verdict)
  pairs = [pair for pair in found.values() if len(pair) == 2]
  return sum(one == other for one, other in pairs), len(pairs)


def _win_rate(group: list[calls.Call], settings: intervals.Settings) -> WinRate:
  prompts = calls.by_prompt(group)
  units = np.asarray(list(calls.units(group).values()))
  single = all(len(rows) == 1 for rows in prompts.values())
  found = intervals.of_rate(units, settings, single=single)
  counts = collections.Counter(call.verdict for call in group)
  agree, both = agreement(group)

  def over_prompts(number) -> float:
    return float(np.mean([number(rows) for rows in prompts.values()]))

  return WinRate(
    model=group[0].model,
    step=group[0].step,
    temperature=group[0].temperature,
    prompts=len(prompts),
    n=len(units),
    win_rate=math.fsum(units) / len(units) if len(units) else math.nan,
    low=found.low,
    high=found.high,
    interval=found.method,
    wins=counts["model"],
    ties=counts["tie"],
    losses=counts["chosen"],
    missing=counts["missing"],
    refusals=counts["refusal"],
    worst=over_prompts(lambda rows: calls.mean_score(rows, 0.0)),
    best=over_prompts(lambda rows: calls.mean_score(rows, 1.0)),
    soft_rate=_soft_rate(prompts.values()),
    first_slot_rate=first_slot_rate(group),
    order_consistency=agree / both if both else math.nan,
    response_chars=over_prompts(
      lambda rows: np.mean([call.response_chars for call in rows])
    ),
    chosen_chars=over_prompts(
      lambda rows: np.mean([call.chosen_chars for call in rows])
    ),
  )


def _soft_rate(groups: Iterable[list[calls.Call]]) -> float:
  means, asked = [], False
  for rows in groups:
    read = [call for call in rows if call.verdict in calls.SCORES]
    # Identical texts are a tie without a call, so without a probability.
    scores = [
      0.5 if call.score is None and call.verdict == "tie" else call.score
      for call in read
    ]
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
      return math.nan
    asked = asked or any(call.score is not None for call in read)
    if known:
      means.append(math.fsum(known) / len(known))
  return math.fsum(means) / len(means) if means and asked else math.nan


@dataclasses.dataclass(frozen=True)
class LengthControlled:
  """The win rate of a cell at equal length, over its `n` prompts.

  Attributes:
    rate: at a length difference of zero, in [`low`, `high`]; NaN where the
      scores do not determine the regression, like `effect`.
    effect: the coefficient of tanh(difference / `scale`), log-odds.
    scale: standard deviation of the differences, characters.
    longer_rate: mean score of the longer text where lengths differ.
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
  verdicts: Iterable[calls.Call], settings: intervals.Settings
) -> list[LengthControlled]:
  """Rows as in `win_rates`, with intervals from a sandwich variance.

  References:
    Dubois et al., Length-controlled AlpacaEval, 2024 (arXiv 2404.04475),
    without the terms for the prompt's difficulty.
  """
  from scipy import special

  quantile = intervals.normal_quantile(settings.confidence)
  found = []
  for cell, group in calls.by_cell(verdicts).items():
    prompts, columns = _scores_and_lengths(group)
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
  """The win rate of a final model on `n` prompts of similar length difference.

  `difference` is their mean, response minus chosen, in characters; [`low`,
  `high`] is an `intervals.effective_wilson`.
  """

  model: str
  temperature: float
  difference: float
  n: int
  win_rate: float
  low: float
  high: float


def by_length(
  verdicts: Iterable[calls.Call],
  settings: intervals.Settings,
  *,
  bins: int = 5,
) -> list[LengthBin]:
  """Win rates of final models by length difference, in bins of equal size.

  At the temperature nearest to the paper's 0.7. At most `bins`, with at least
  10 prompts each.
  """
  cells = {
    cell: group
    for cell, group in calls.by_cell(verdicts).items()
    if cell[1] is None
  }
  nearest = min(
    (t for _, _, t in cells), key=lambda t: (abs(t - 0.7), t), default=None
  )
  found = []
  for (model, _, temperature), group in cells.items():
    if temperature != nearest:
      continue
    _, columns = _scores_and_lengths(group)
    columns = columns[np.argsort(columns[:, 1], kind="stable")]
    for part in np.array_split(columns, min(bins, max(1, len(columns) // 10))):
      if len(part):
        low, high = intervals.effective_wilson(
          part[:, 0], confidence=settings.confidence
        )
        rate, difference = map(float, part.mean(axis=0))
        found.append(
          LengthBin(model, temperature, difference, len(part), rate, low, high)
        )
  return found


def _scores_and_lengths(
  group: list[calls.Call],
) -> tuple[list[str], np.ndarray]:
  """The prompts of a cell, and their scores and length differences, [n, 2]."""
  return calls.shared([calls.units(group), calls.length_units(group)])


def fit_logistic(
  lengths: np.ndarray, scores: np.ndarray
) -> tuple[float, float, float] | None:
  """Logistic regression of scores in [0, 1] on tanh of lengths, both [n].

  Returns:
    Intercept, slope, and the intercept's robust standard error (HC1); None for
    less than 3 prompts, or where the likelihood has no finite maximum.
  """
  from scipy import special

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
    # A full Newton step may overshoot where probabilities are near 0 or 1.
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
