"""Checks of report data, whose flags are shown above the first number."""

import collections
import dataclasses

from dpo_jax.io import markdown
from dpo_jax.report import load


@dataclasses.dataclass(frozen=True)
class Flag:
  """`name` is INCOMPLETE, INCONSISTENT, MIXED or CONTROL, `text` Markdown."""

  name: str
  text: str


def flags(data: load.ReportData) -> list[Flag]:
  """All flags: of the rows, then of the judge's controls."""
  checks = (_rows, _judge_run, _mixed, _controls)
  return [flag for check in checks for flag in check(data)]


def _rows(data: load.ReportData) -> list[Flag]:
  """Missing verdicts, and calls that do not match responses or replies."""
  missing = data.health.missing
  calls = collections.Counter(call.unit[:5] for call in data.verdicts)
  # Either both orders of every pair are judged, or one.
  orders = max(calls.values())
  # Responses to prompts with an empty reference are not judged.
  due = {row.unit for row in data.responses if row.chosen.strip()}
  known = {
    row.unit: (len(row.response), len(row.chosen)) for row in data.responses
  }
  unasked = sum(max(0, orders - calls[unit]) for unit in due)
  strays = sum(count for unit, count in calls.items() if unit not in known)
  changed = sum(
    (call.response_chars, call.chosen_chars)
    != known.get(call.unit[:5], (call.response_chars, call.chosen_chars))
    for call in data.verdicts
  )
  against = len(data.contradicted)
  first = _short(data.contradicted[0].prompt_id) if against else ""
  found = (
    (
      missing,
      "INCOMPLETE",
      f"{missing} of {data.health.calls} judge calls gave no verdict. They are"
      " excluded from the rates and counted below, with bounds on what they"
      " could change.",
    ),
    (
      unasked,
      "INCOMPLETE",
      f"{unasked} judge calls were never made. Run judge.py again; it asks only"
      " these.",
    ),
    (
      strays,
      "INCONSISTENT",
      f"{strays} judge calls are about responses that responses/ does not"
      " hold.",
    ),
    (
      changed,
      "INCONSISTENT",
      f"{changed} judge calls are about texts of another length than those in"
      " responses/. Run judge.py again.",
    ),
    (
      against,
      "INCONSISTENT",
      f"{against} verdicts are not what the judge's reply says; the first is"
      f" about prompt {first}.",
    ),
  )
  return [Flag(name, text) for count, name, text in found if count]


def _judge_run(data: load.ReportData) -> list[Flag]:
  """The judge's summary of its last run against the rows."""
  run, result = data.judge_run, []
  if run.get("complete") is False:
    unasked, missing = (
      markdown.literal(str(run.get(name, "?")))
      for name in ("not_dispatched", "missing")
    )
    result.append(
      Flag(
        "INCOMPLETE",
        f"the last run of judge.py left {unasked} questions unasked and"
        f" {missing} without a verdict. The same command continues it.",
      )
    )
  for name, here in (
    ("judge", data.health.judge),
    ("template_hash", data.health.template_hash),
    ("data_fingerprint", data.data_fingerprint),
  ):
    there = run.get(name, here)
    if there != here:
      result.append(
        Flag(
          "INCONSISTENT",
          f"{markdown.literal(name)} is {_short(there)} in the judge's record"
          f" of its last run and {_short(here)} in the rows. Run judge.py"
          " again.",
        )
      )
  return result


def _mixed(data: load.ReportData) -> list[Flag]:
  """Several judge models, or several prompt sets."""
  result = []
  # A server's fingerprint changes with every deployment and is only counted.
  names = sorted({call.judge_returned for call in data.verdicts} - {""})
  if len(names) > 1:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    text = ", ".join(map(_short, names[:5]))
    result.append(
      Flag("MIXED", f"the judge replied as several models: {text}{more}.")
    )
  for final, what in ((True, "final models"), (False, "checkpoints")):
    prompts = collections.defaultdict(set)
    for row in data.responses:
      if (row.step is None) == final and row.chosen.strip():
        prompts[row.model, row.step, row.temperature].add(row.prompt_id)
    sets = {frozenset(ids) for ids in prompts.values()}
    if len(sets) > 1:
      result.append(
        Flag(
          "MIXED",
          f"the {what} responded to {len(sets)} different sets of prompts,"
          f" which share {len(frozenset.intersection(*sets))} of"
          f" {len(frozenset.union(*sets))}. Compare them on the same prompts"
          " only, as the differences below do.",
        )
      )
  return result


def _controls(data: load.ReportData) -> list[Flag]:
  """Failed judge controls."""
  settings, controls = data.settings, data.controls
  slot, limit = data.health.first_slot, settings.first_slot_limit
  texts = []
  if controls.aa.n and controls.aa_p <= settings.aa_alpha:
    texts.append(
      f"a text against itself won {_share(controls.aa)}; under a fair judge,"
      f" who gives 50, p = {controls.aa_p:.2g}."
    )
  beyond = not 1 - limit <= slot.rate <= limit
  if slot.n and beyond and not slot.low <= 0.5 <= slot.high:
    texts.append(
      f"the text shown first won {_share(slot)}, beyond the limit of"
      f" {100 * (1 - limit):g} to {100 * limit:g}."
    )
  if controls.gold.n and controls.gold.rate < settings.gold_floor:
    texts.append(
      "the prompt's own chosen response won against another prompt's in only"
      f" {_share(controls.gold)}; the floor is {100 * settings.gold_floor:g}."
    )
  return [Flag("CONTROL", text) for text in texts]


def _share(share) -> str:
  ends = f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"
  return f"{100 * share.rate:.1f}% {ends} ({share.n} prompts)"


def _short(value) -> str:
  text = str(value)
  return markdown.literal(text if len(text) <= 40 else f"{text[:40]}…")
