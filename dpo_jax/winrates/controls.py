"""The judge's record: position bias, consistency, and its controls.

Every share has an interval over prompts, since calls on one prompt share its
difficulty. A share of nothing is NaN in [0, 1].
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from dpo_jax.winrates import calls, intervals, rates


@dataclasses.dataclass(frozen=True)
class Share:
  """Mean of `n` prompts' shares, and its interval."""

  n: int
  rate: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class JudgeHealth:
  """The judge's record over all ordinary calls of a table.

  `comparisons` are pairs of texts, `both_orders` those with a verdict in both
  orders, `order_consistency` the fraction of these with equal verdicts.
  `first_slot_rate` is over decided calls, `first_slot` over prompts.
  """

  judge: str
  template_hash: str
  prompts: int
  comparisons: int
  calls: int
  missing: int
  refusals: int
  first_slot_rate: float
  first_slot: Share
  both_orders: int
  order_consistency: float


@dataclasses.dataclass(frozen=True)
class Controls:
  """The judge's record on questions whose answer is known.

  Attributes:
    aa: score of a text against itself; 50% for a fair judge.
    aa_p: two-sided sign test over the prompts that leave 50%.
    aa_first_slot: how often the first slot won there.
    gold: score of a prompt's own chosen response against another prompt's.
    retest: share of equal verdicts when an ordinary question is asked again.
    unread: control calls without a verdict.
  """

  aa: Share
  aa_p: float
  aa_first_slot: Share
  gold: Share
  retest: Share
  unread: int


def judge_health(
  verdicts: Iterable[calls.Call], settings: intervals.Settings
) -> JudgeHealth:
  """The judge's record over a table; errors as in `rates.win_rates`."""
  group = calls.ordinary(verdicts)
  if not group:
    raise ValueError("no verdicts of a judge")
  counts = collections.Counter(call.verdict for call in group)
  agree, both = rates.agreement(group)
  return JudgeHealth(
    judge=group[0].judge,
    template_hash=group[0].template_hash,
    prompts=len({call.prompt_id for call in group}),
    comparisons=len({calls.comparison(call) for call in group}),
    calls=len(group),
    missing=counts["missing"],
    refusals=counts["refusal"],
    first_slot_rate=rates.first_slot_rate(group),
    first_slot=_share(_first_slots(group), settings),
    both_orders=both,
    order_consistency=agree / both if both else math.nan,
  )


def controls(
  verdicts: Iterable[calls.Call], settings: intervals.Settings
) -> Controls:
  """The control calls of a table, all shares NaN where there are none."""
  groups = collections.defaultdict(list)
  for call in (current := calls.current(verdicts)):
    groups[call.control].append(call)
  aa = list(calls.units(groups["aa"]).values())
  gold = list(calls.units(groups["gold"]).values())
  return Controls(
    aa=_share(aa, settings),
    aa_p=sign_test(sum(x > 0.5 for x in aa), sum(x < 0.5 for x in aa)),
    aa_first_slot=_share(_first_slots(groups["aa"]), settings),
    gold=_share(gold, settings),
    retest=_share(_retests(groups[""], groups["retest"]), settings),
    unread=sum(
      bool(call.control) and call.verdict not in calls.SCORES
      for call in current
    ),
  )


def sign_test(above: int, below: int) -> float:
  """Two-sided exact p-value of equally likely sides; 1 without any count.

  References:
    McNemar, Note on the sampling error of the difference between correlated
    proportions or percentages, Psychometrika 12, 1947, whose exact form this is
    for discordant pairs.
  """
  from scipy import stats

  n = above + below
  return float(stats.binomtest(above, n).pvalue) if n else 1.0


def _first_slots(group: Iterable[calls.Call]) -> list[float]:
  """Each prompt's rate of the first slot, where it has decided calls."""
  found = map(rates.first_slot_rate, calls.by_prompt(group).values())
  return [rate for rate in found if not math.isnan(rate)]


def _retests(
  first: Iterable[calls.Call], again: Iterable[calls.Call]
) -> list[float]:
  """Each prompt's share of repeated questions with the same verdict."""
  verdicts = {
    (*calls.comparison(call), call.order): call.verdict
    for call in first
    if call.verdict in calls.SCORES
  }
  found = collections.defaultdict(list)
  for call in again:
    known = verdicts.get((*calls.comparison(call), call.order))
    if known and call.verdict in calls.SCORES:
      found[call.prompt_id].append(known == call.verdict)
  return [sum(same) / len(same) for same in found.values()]


def _share(units: Sequence[float], settings: intervals.Settings) -> Share:
  found = intervals.of_rate(units, settings)
  rate = float(np.mean(units)) if len(units) else math.nan
  return Share(len(units), rate, found.low, found.high)
