"""Win rates against the dataset's chosen answers, from judge calls.

The unit is the prompt: calls about one prompt (both orders, several samples)
are not independent, so they are averaged into one number in [0, 1] before
anything is counted or resampled. A call that gave no verdict is never a tie
or a loss: it leaves the rate, is counted, and bounds the rate from both sides.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from scipy import stats

MODELS = ("base", "sft", "dpo")
"""The order of a table's rows; other names follow in alphabetical order."""

MIN_UNITS = 10
"""Below this many prompts a percentile bootstrap is far too narrow."""

_SCORES = {"model": 1.0, "tie": 0.5, "chosen": 0.0}


class Call(Protocol):
  """What is read of a judge call; `records.Verdict` has it."""

  @property
  def key(self) -> str: ...
  @property
  def prompt_id(self) -> str: ...
  @property
  def model(self) -> str: ...
  @property
  def step(self) -> int | None: ...
  @property
  def temperature(self) -> float: ...
  @property
  def sample_id(self) -> int: ...
  @property
  def order(self) -> str: ...
  @property
  def verdict(self) -> str: ...
  @property
  def judge(self) -> str: ...
  @property
  def template_hash(self) -> str: ...
  @property
  def response_chars(self) -> int: ...
  @property
  def chosen_chars(self) -> int: ...


T = TypeVar("T", bound=Call)


@dataclasses.dataclass(frozen=True)
class WinRate:
  """One row of the table: a model (at a step) sampled at one temperature.

  `prompts` were judged, `n` of them with a verdict in at least one call;
  `win_rate` is the mean over these n and [`low`, `high`] its interval, made
  by the method that `interval` names. `worst` and `best` are the rate over
  all `prompts` if every call without a verdict were lost or won. `wins` to
  `refusals` count calls. Lengths are characters, averaged over prompts. A
  rate of nothing is NaN.
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
  first_slot_rate: float
  order_consistency: float
  response_chars: float
  chosen_chars: float


@dataclasses.dataclass(frozen=True)
class JudgeHealth:
  """How the judge behaved over all calls of a table; a rate of nothing is NaN.

  `comparisons` are pairs of texts, `both_orders` those with a verdict in both
  orders, `order_consistency` the fraction of these with the same verdict.
  """

  judge: str
  template_hash: str
  prompts: int
  comparisons: int
  calls: int
  missing: int
  refusals: int
  first_slot_rate: float
  both_orders: int
  order_consistency: float


def win_rates(
  verdicts: Iterable[Call],
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
      files; those that `current` leaves out do not count.
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
  _check_settings(resamples, confidence)
  verdicts = current(verdicts)
  cells = collections.defaultdict(list)
  for call in verdicts:
    cells[call.model, call.step, call.temperature].append(call)
  return [
    _win_rate(
      cells[cell], seed=seed, resamples=resamples, confidence=confidence
    )
    for cell in sorted(cells, key=_rank)
  ]


def current(verdicts: Iterable[T]) -> list[T]:
  """The calls that count.

  A call without a verdict is asked again, and so is one about a text that has
  changed since (its `key` is another): the last row of a call then replaces
  the earlier ones.

  Raises:
    ValueError: judges or templates are mixed, or an answered call stands
      twice.
  """
  verdicts = list(verdicts)
  rows: dict[tuple, list[T]] = collections.defaultdict(list)
  for call in verdicts:
    row = rows[_call(call)]
    if row and (row[-1].verdict == "missing" or row[-1].key != call.key):
      row.clear()
    row.append(call)
  standing = [call for row in rows.values() for call in row]
  # A judge that answered nothing, and was then replaced, has no part in it.
  answered = [call for call in verdicts if call.verdict != "missing"]
  for field in ("judge", "template_hash"):
    names = sorted({getattr(call, field) for call in answered + standing})
    if len(names) > 1:
      raise ValueError(
        f"rows of several values of {field} in one table: {', '.join(names)};"
        " report each from a directory of its own"
      )
  twice = [name for name, row in rows.items() if len(row) > 1]
  if twice:
    raise ValueError(
      f"{len(twice)} judge calls stand more than once, the first is (model,"
      f" step, temperature, prompt, sample, order) = {twice[0]}; keep one row"
      " of each"
    )
  return standing


def judge_health(verdicts: Iterable[Call]) -> JudgeHealth:
  """The judge's own record over a table; errors as in `win_rates`."""
  verdicts = current(verdicts)
  if not verdicts:
    raise ValueError("no verdicts: there is no judge to describe")
  counts = collections.Counter(call.verdict for call in verdicts)
  agree, both = _agreement(verdicts)
  return JudgeHealth(
    judge=verdicts[0].judge,
    template_hash=verdicts[0].template_hash,
    prompts=len({call.prompt_id for call in verdicts}),
    comparisons=len({_comparison(call) for call in verdicts}),
    calls=len(verdicts),
    missing=counts["missing"],
    refusals=counts["refusal"],
    first_slot_rate=first_slot_rate(verdicts),
    both_orders=both,
    order_consistency=agree / both if both else math.nan,
  )


def first_slot_rate(verdicts: Iterable[Call]) -> float:
  """Fraction of decided calls (no ties) in which the text shown first won.

  Over both orders of every comparison a fair judge gives 1/2 whatever the
  model is worth. NaN when no call was decided.
  """
  first = [
    (call.verdict == "model") == (call.order == "model_first")
    for call in verdicts
    if call.verdict in ("model", "chosen")
  ]
  return sum(first) / len(first) if first else math.nan


def wilson_interval(
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
  z2 = stats.norm.ppf(0.5 + confidence / 2) ** 2
  rate = successes / n
  centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
  half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2)))
  half /= 1 + z2 / n
  # Rounding may not move an end past the rate, nor out of [0, 1].
  low = min(max(float(centre - half), 0.0), rate)
  high = max(min(float(centre + half), 1.0), rate)
  return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def bootstrap_interval(
  units: Sequence[float] | np.ndarray,
  *,
  seed: int,
  resamples: int,
  confidence: float,
) -> tuple[float, float]:
  """Percentile bootstrap interval of the mean of prompts' scores, [n].

  A resample is drawn as counts of the distinct scores, a multinomial, which
  is the same distribution as drawing prompts one by one, and much faster.

  References:
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13.
  """
  values, counts = np.unique(np.asarray(units, float), return_counts=True)
  n = counts.sum()
  draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
  tail = (1 - confidence) / 2
  low, high = np.quantile(draws @ values / n, [tail, 1 - tail])
  return float(low), float(high)


def _win_rate(
  calls: list[Call], *, seed: int, resamples: int, confidence: float
) -> WinRate:
  by_prompt = collections.defaultdict(list)
  for call in calls:
    by_prompt[call.prompt_id].append(call)
  units = np.asarray(
    [score for group in by_prompt.values() for score in _unit(group, None)]
  )
  single = all(len(group) == 1 for group in by_prompt.values())
  interval, low, high = _interval(
    units, single, seed=seed, resamples=resamples, confidence=confidence
  )
  counts = collections.Counter(call.verdict for call in calls)
  agree, both = _agreement(calls)

  def over_prompts(number) -> float:
    return float(np.mean([number(group) for group in by_prompt.values()]))

  return WinRate(
    model=calls[0].model,
    step=calls[0].step,
    temperature=calls[0].temperature,
    prompts=len(by_prompt),
    n=len(units),
    win_rate=float(units.mean()) if len(units) else math.nan,
    low=low,
    high=high,
    interval=interval,
    wins=counts["model"],
    ties=counts["tie"],
    losses=counts["chosen"],
    missing=counts["missing"],
    refusals=counts["refusal"],
    worst=over_prompts(lambda group: _unit(group, 0.0)[0]),
    best=over_prompts(lambda group: _unit(group, 1.0)[0]),
    first_slot_rate=first_slot_rate(calls),
    order_consistency=agree / both if both else math.nan,
    response_chars=over_prompts(
      lambda group: np.mean([call.response_chars for call in group])
    ),
    chosen_chars=over_prompts(
      lambda group: np.mean([call.chosen_chars for call in group])
    ),
  )


def _unit(calls: list[Call], unread: float | None) -> list[float]:
  """A prompt's score as a list of one, or of none without any verdict.

  `unread` is the score of a call without a verdict; None leaves it out.
  """
  scores = [_SCORES.get(call.verdict, unread) for call in calls]
  known = [score for score in scores if score is not None]
  return [math.fsum(known) / len(known)] if known else []


def _interval(
  units: np.ndarray,
  single: bool,
  *,
  seed: int,
  resamples: int,
  confidence: float,
) -> tuple[str, float, float]:
  """Name and ends of the interval that fits the units, [n]."""
  n = len(units)
  binary = bool(np.isin(units, (0.0, 1.0)).all())
  # Equal units resample to a single point, few units to hardly more: the
  # bootstrap would then claim a certainty that the data do not have.
  few = n < MIN_UNITS or bool((units == units[0]).all())
  if few or (single and binary):
    ends = wilson_interval(float(units.sum()), n, confidence=confidence)
    name = "wilson" if single and binary and n else "wilson bound"
    return name, *ends
  return "bootstrap", *bootstrap_interval(
    units, seed=seed, resamples=resamples, confidence=confidence
  )


def _agreement(calls: Iterable[Call]) -> tuple[int, int]:
  """Comparisons whose two orders agree, and those read in both orders."""
  verdicts = collections.defaultdict(list)
  for call in calls:
    if call.verdict in _SCORES:
      verdicts[_comparison(call)].append(call.verdict)
  pairs = [pair for pair in verdicts.values() if len(pair) == 2]
  return sum(one == other for one, other in pairs), len(pairs)


def _call(call: Call) -> tuple:
  return *_comparison(call), call.order


def _comparison(call: Call) -> tuple:
  return (
    call.model,
    call.step,
    call.temperature,
    call.prompt_id,
    call.sample_id,
  )


def _rank(cell: tuple[str, int | None, float]) -> tuple:
  model, step, temperature = cell
  rank = MODELS.index(model) if model in MODELS else len(MODELS)
  return rank, model, -1 if step is None else step, temperature


def _check_settings(resamples: int, confidence: float) -> None:
  if resamples < 100:
    raise ValueError(
      f"resamples={resamples} must be at least 100: fewer do not find the ends"
      " of an interval"
    )
  if not 0 < confidence < 1:
    raise ValueError(f"confidence={confidence} must be in (0, 1)")
