"""Win rates against the dataset's chosen answers, one row a table's cell.

A call that gave no verdict is never a tie or a loss: it leaves the rate, is
counted, and bounds the rate from both sides.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from dpo_jax.winrates import calls, intervals


@dataclasses.dataclass(frozen=True)
class WinRate:
  """One row of the table: a model (at a step) sampled at one temperature.

  `prompts` were judged, `n` of them with a verdict in at least one call;
  `win_rate` is the mean over these n and [`low`, `high`] its interval, made
  by the method that `interval` names. `worst` and `best` are the rate over
  all `prompts` if every call without a verdict were lost or won. `wins` to
  `refusals` count calls. `soft_rate` is the mean over prompts of the judge's
  own probabilities, where every verdict came with one. Lengths are
  characters, averaged over prompts. A rate of nothing is NaN.
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
  verdicts: Iterable[calls.Call],
  *,
  seed: int,
  resamples: int = 2000,
  confidence: float = 0.95,
) -> list[WinRate]:
  """One WinRate for each (model, step, temperature) of a table.

  The rate is the mean over prompts of each prompt's mean score: model 1,
  tie 1/2, chosen 0, over sample ids and orders. A row depends only on its own
  calls, beside whatever others they come.

  Args:
    verdicts: judge calls of one judge and one template, in the order of their
      files; those that `calls.current` leaves out, and controls, do not count.
    seed: of the bootstrap, which starts anew with it in every row.
    resamples: bootstrap resamples.
    confidence: of the intervals, in (0, 1).

  Returns:
    Rows by model (base, sft, dpo, others), final models before checkpoints,
    then by step and temperature.

  Raises:
    ValueError: judges or templates are mixed, a call stands twice, or a
      setting is out of range.
  """
  intervals.check(resamples, confidence)
  return [
    _win_rate(group, seed=seed, resamples=resamples, confidence=confidence)
    for group in calls.by_cell(calls.ordinary(verdicts)).values()
  ]


def first_slot_rate(verdicts: Iterable[calls.Call]) -> float:
  """Fraction of decided calls (no ties) in which the text shown first won.

  Over both orders of every comparison a fair judge gives 1/2 whatever the
  model is worth. NaN when no call was decided.
  """
  first = [won for call in verdicts for won in first_slot(call)]
  return sum(first) / len(first) if first else math.nan


def first_slot(call: calls.Call) -> list[bool]:
  """Whether the text shown first won, in a list; an empty one if undecided."""
  if call.verdict not in ("model", "chosen"):
    return []
  return [(call.verdict == "model") == (call.order == "model_first")]


def agreement(verdicts: Iterable[calls.Call]) -> tuple[int, int]:
  """Comparisons whose two orders agree, and those read in both orders."""
  found = collections.defaultdict(list)
  for call in verdicts:
    if call.verdict in calls.SCORES:
      found[calls.comparison(call)].append(call.verdict)
  pairs = [pair for pair in found.values() if len(pair) == 2]
  return sum(one == other for one, other in pairs), len(pairs)


def _win_rate(
  group: list[calls.Call], *, seed: int, resamples: int, confidence: float
) -> WinRate:
  prompts = calls.by_prompt(group)
  units = np.asarray(list(calls.units(group).values()))
  found = intervals.of_rate(
    units,
    single=all(len(rows) == 1 for rows in prompts.values()),
    seed=seed,
    resamples=resamples,
    confidence=confidence,
  )
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
    worst=over_prompts(lambda rows: calls.unit(rows, 0.0)[0]),
    best=over_prompts(lambda rows: calls.unit(rows, 1.0)[0]),
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
    # Identical texts are a tie without a call, and so without probabilities.
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
