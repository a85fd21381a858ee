"""How the judge behaved: its habits, and its answers where they are known.

Every share here comes with an interval over prompts, since calls about one
prompt share its difficulty. A share of nothing is NaN in [0, 1].
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from dpo_jax.winrates import calls, intervals, rates


@dataclasses.dataclass(frozen=True)
class Share:
  """A share of `n` prompts' means, with an interval over these prompts."""

  n: int
  rate: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class JudgeHealth:
  """How the judge behaved over all ordinary calls of a table.

  `comparisons` are pairs of texts, `both_orders` those with a verdict in both
  orders, `order_consistency` the fraction of these with the same verdict.
  `first_slot_rate` is over decided calls; `first_slot` the same with each
  prompt weighing alike, and an interval. A rate of nothing is NaN.
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
  """What the judge did on questions whose answer is known.

  `aa` compared a text with itself: its rate is 50% for a fair judge, and
  `aa_p` is the two-sided p-value of the sign test over prompts that left it.
  `aa_first_slot` is how often the text shown first won there. `gold` compared
  the prompt's own chosen answer with another prompt's: the rate is that of the
  right one. `retest` asked an ordinary question again: the rate is that of
  equal verdicts. `unread` control calls gave no verdict.
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
  """The judge's own record over a table; errors as in `rates.win_rates`."""
  group = calls.ordinary(verdicts)
  if not group:
    raise ValueError("no verdicts: there is no judge to describe")
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
  for call in (standing := calls.current(verdicts)):
    groups[call.control].append(call)
  aa = calls.units(groups["aa"])
  gold = calls.units(groups["gold"])
  return Controls(
    aa=_share(list(aa.values()), settings),
    aa_p=sign_test(
      sum(score > 0.5 for score in aa.values()),
      sum(score < 0.5 for score in aa.values()),
    ),
    aa_first_slot=_share(_first_slots(groups["aa"]), settings),
    gold=_share(list(gold.values()), settings),
    retest=_share(_retests(groups[""], groups["retest"]), settings),
    unread=sum(
      bool(call.control) and call.verdict not in calls.SCORES
      for call in standing
    ),
  )


def sign_test(above: int, below: int) -> float:
  """Two-sided exact p-value that either side is as likely; 1 when none is.

  References:
    McNemar, Note on the sampling error of the difference between correlated
    proportions or percentages, Psychometrika 12, 1947; its exact form is this
    test of the discordant pairs.
  """
  from scipy import stats

  n = above + below
  return float(stats.binomtest(above, n).pvalue) if n else 1.0


def _first_slots(group: Iterable[calls.Call]) -> list[float]:
  """Each prompt's share of decided calls that the text shown first won."""
  found = collections.defaultdict(list)
  for call in group:
    found[call.prompt_id] += rates.first_slot(call)
  return [sum(won) / len(won) for won in found.values() if won]


def _retests(
  first: Iterable[calls.Call], again: Iterable[calls.Call]
) -> list[float]:
  """Each prompt's share of questions that were answered as the first time."""
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
