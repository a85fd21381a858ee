"""What a reader must know before reading any number, and `strict` fails on.

Each gate is one question about the rows or the controls; it gives the flags
that stand at the top of a report.
"""

import collections
import dataclasses
from collections.abc import Callable

from dpo_jax.io import markdown
from dpo_jax.report import load


@dataclasses.dataclass(frozen=True)
class Flag:
  """`name` is INCOMPLETE, INCONSISTENT, MIXED or CONTROL, `text` Markdown."""

  name: str
  text: str


def flags(found: load.Material) -> list[Flag]:
  """All flags, those about the rows before those about the judge."""
  return [flag for gate in _GATES for flag in gate(found)]


def _missing(found: load.Material) -> list[Flag]:
  missing = found.health.missing
  if not missing:
    return []
  return [
    Flag(
      "INCOMPLETE",
      f"{missing} of {found.health.calls} judge calls gave no verdict. They"
      " are left out of the rates and counted below, where bounds show what"
      " they could change.",
    )
  ]


def _unmade(found: load.Material) -> list[Flag]:
  """Calls not made for the responses at hand, and calls about no response."""
  made = collections.Counter(call.unit[:5] for call in found.verdicts)
  # Both orders of a pair are asked, or one order of every pair.
  orders = max(made.values())
  # An empty reference says nothing about a model: it is not judged.
  due = {row.unit for row in found.responses if row.chosen.strip()}
  known = {row.unit: row for row in found.responses}
  unmade = sum(max(0, orders - made[unit]) for unit in due)
  strays = sum(count for unit, count in made.items() if unit not in known)
  changed = sum(
    call.unit[:5] in known
    and (call.response_chars, call.chosen_chars)
    != (len(known[call.unit[:5]].response), len(known[call.unit[:5]].chosen))
    for call in found.verdicts
  )
  return [
    Flag(name, text)
    for count, name, text in (
      (
        unmade,
        "INCOMPLETE",
        f"{unmade} judge calls were never made. Run judge.py again; only these"
        " are asked.",
      ),
      (
        strays,
        "INCONSISTENT",
        f"{strays} judge calls are about answers that responses/ does not"
        " hold.",
      ),
      (
        changed,
        "INCONSISTENT",
        f"{changed} judge calls are about texts of another length than those"
        " in responses/. Run judge.py again.",
      ),
    )
    if count
  ]


def _judge_run(found: load.Material) -> list[Flag]:
  """What the judge itself wrote about its last run."""
  run, result = found.judge_run, []
  if run.get("complete") is False:
    counts = [
      markdown.literal(str(run.get(name, "?")))
      for name in ("not_dispatched", "missing")
    ]
    result.append(
      Flag(
        "INCOMPLETE",
        f"the last run of judge.py left {counts[0]} questions unasked and"
        f" {counts[1]} without a verdict. The same command goes on.",
      )
    )
  for name, here in (
    ("judge", found.health.judge),
    ("template_hash", found.health.template_hash),
    ("data_fingerprint", found.data_fingerprint),
  ):
    there = run.get(name, here)
    if there != here:
      result.append(
        Flag(
          "INCONSISTENT",
          f"{markdown.literal(name)} is {markdown.literal(_short(there))} in"
          " the judge's record of its last run and"
          f" {markdown.literal(_short(here))} in the rows. Run judge.py again.",
        )
      )
  return result


def _odd(found: load.Material) -> list[Flag]:
  if not found.odd:
    return []
  first = found.odd[0]
  return [
    Flag(
      "INCONSISTENT",
      f"{len(found.odd)} verdicts are not what the judge's own text says; the"
      f" first is about prompt {markdown.literal(_short(first.prompt_id))}.",
    )
  ]


def _mixed(found: load.Material) -> list[Flag]:
  result = []
  # A server's fingerprint changes with every deployment: the report counts
  # them, and only another model is another judge.
  names = sorted({call.judge_returned for call in found.verdicts} - {""})
  if len(names) > 1:
    text = markdown.literal(", ".join(map(_short, names[:5])))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    result.append(
      Flag("MIXED", f"the judge answered as several models: {text}{more}.")
    )
  for final, what in ((True, "final models"), (False, "checkpoints")):
    prompts = collections.defaultdict(set)
    for row in found.responses:
      if (row.step is None) == final and row.chosen.strip():
        prompts[row.model, row.step, row.temperature].add(row.prompt_id)
    sets = {frozenset(ids) for ids in prompts.values()}
    if len(sets) > 1:
      shared = len(frozenset.intersection(*sets))
      result.append(
        Flag(
          "MIXED",
          f"the {what} answered {len(sets)} different sets of prompts, which"
          f" share {shared} of {len(frozenset.union(*sets))}. Compare them on"
          " the same prompts only, as the differences below do.",
        )
      )
  return result


def _controls(found: load.Material) -> list[Flag]:
  limits, control = found.settings, found.controls
  result = []
  if control.aa.n and control.aa_p <= limits.aa_alpha:
    result.append(
      Flag(
        "CONTROL",
        f"a text against itself won {_share(control.aa)}: a fair judge gives"
        f" 50, and leaves it as far with p = {control.aa_p:.2g}.",
      )
    )
  slot, limit = found.health.first_slot, limits.first_slot_limit
  beyond = not 1 - limit <= slot.rate <= limit
  if slot.n and beyond and not slot.low <= 0.5 <= slot.high:
    result.append(
      Flag(
        "CONTROL",
        f"the text shown first won {_share(slot)}, beyond the limit of"
        f" {100 * (1 - limit):g} to {100 * limit:g}.",
      )
    )
  if control.gold.n and control.gold.rate < limits.gold_floor:
    result.append(
      Flag(
        "CONTROL",
        "the prompt's own answer won against another prompt's in only"
        f" {_share(control.gold)}; the floor is {100 * limits.gold_floor:g}.",
      )
    )
  return result


def _share(share) -> str:
  ends = f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"
  return f"{100 * share.rate:.1f}% {ends} ({share.n} prompts)"


def _short(value) -> str:
  text = str(value)
  return text if len(text) <= 40 else f"{text[:40]}…"


_GATES: tuple[Callable[[load.Material], list[Flag]], ...] = (
  _missing,
  _unmade,
  _judge_run,
  _odd,
  _mixed,
  _controls,
)
