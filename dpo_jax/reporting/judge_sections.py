"""The section of a report about the judge: its habits and its controls."""

import collections

from dpo_jax.interface import markdown
from dpo_jax.reporting import material, sections

_CAUSE_CHARS = 600


def health(found: material.Material) -> list[str]:
  """The judge's own record, and what calls without a verdict could change."""
  judge = found.health
  slot = judge.first_slot
  tokens = [
    sum(getattr(call, field) for call in found.verdicts)
    for field in ("prompt_tokens", "completion_tokens")
  ]
  rows = [
    ("calls", str(judge.calls)),
    ("missing, no verdict", str(judge.missing)),
    ("refusals", str(judge.refusals)),
    (
      "first slot won, % of decided calls",
      sections.percent(judge.first_slot_rate),
    ),
    ("first slot won, % over prompts", _share(slot)),
    ("comparisons read in both orders", str(judge.both_orders)),
    (
      "same verdict in both orders, %",
      sections.percent(judge.order_consistency),
    ),
    ("fingerprints of the judge's server", str(_fingerprints(found))),
    ("tokens read and written by the judge", f"{tokens[0]} and {tokens[1]}"),
  ]
  lines = markdown.table(("judge", "value"), rows)
  lines += ["", *_controls(found), *_bounds(found)]
  causes = collections.Counter(
    call.error for call in found.verdicts if call.verdict == "missing"
  )
  if causes:
    rows = [
      (markdown.literal(cause[:_CAUSE_CHARS] or "(none given)"), str(count))
      for cause, count in causes.most_common(5)
    ]
    lines += ["", *markdown.table(("most frequent causes", "calls"), rows)]
  return lines


def _controls(found: material.Material) -> list[str]:
  control = found.controls
  if not any(share.n for share in (control.aa, control.gold, control.retest)):
    return ["No controls were asked."]
  rows = [
    (
      "a text against itself: won",
      "50",
      _share(control.aa),
      sections.p_value(control.aa_p),
    ),
    ("a text against itself: first won", "50", _share(control.aa_first_slot)),
    ("own answer against another prompt's", "100", _share(control.gold)),
    ("same verdict when asked again", "100", _share(control.retest)),
  ]
  table = [(*row, "")[:4] for row in rows]
  header = ("control", "ideal %", f"found %, {found.level}", "p")
  lines = markdown.table(header, table)
  if control.unread:
    lines += ["", f"{control.unread} control calls gave no verdict."]
  return lines


def _bounds(found: material.Material) -> list[str]:
  bounds = [
    (
      sections.name(rate.model),
      sections.step(rate.step),
      str(rate.temperature),
      sections.percent(rate.win_rate),
      f"{sections.percent(rate.worst)} to {sections.percent(rate.best)}",
      str(rate.missing),
      str(rate.refusals),
    )
    for rate in found.rates
    if rate.missing or rate.refusals
  ]
  if not bounds:
    return []
  header = ("model", "step", "T", "win rate %", "bounds %")
  return [
    "",
    "Bounds are the win rate if every call without a verdict were lost, and"
    " if it were won.",
    "",
    *markdown.table((*header, "missing", "refusals"), bounds),
  ]


def _fingerprints(found: material.Material) -> int:
  return len({call.judge_fingerprint for call in found.verdicts} - {""})


def _share(share) -> str:
  if not share.n:
    return "n/a"
  ends = sections.ends(share.low, share.high)
  return f"{sections.percent(share.rate)} {ends} ({share.n} prompts)"
