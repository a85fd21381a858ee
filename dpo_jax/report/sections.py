"""The sections of a report about win rates and their judge.

Each is a list of Markdown lines; a section that has nothing to say is an empty
list. Nothing is estimated here: numbers come from the material.
"""

import collections
import math

from dpo_jax import winrates
from dpo_jax.io import markdown
from dpo_jax.report import checks, load

PLAIN_NAMES = {"base": "base", "sft": "SFT", "dpo": "DPO", "chosen": "chosen"}
"""How known models are called; see `name`."""
_CAUSE_CHARS = 600

_METHODS = {
  "wilson": "Wilson score, one call a prompt",
  "wilson bound": "Wilson score of the summed scores, which assumes the widest"
  " spread, where all prompts score alike",
  "wilson effective": "Wilson score at the effective number of prompts, with"
  " Student's t, where prompts are few",
  "bca": "bootstrap over prompts, corrected for bias and skew (BCa,"
  " {resamples} resamples, seed {seed})",
}


def flagged(flags: list[checks.Flag]) -> list[str]:
  """What a reader must know before reading any number, as a quotation."""
  notes = [f"> **{flag.name}**: {flag.text}" for flag in flags]
  # A bare ">" parts the paragraphs of one quotation.
  return [line for note in notes for line in (note, ">")][:-1]


def judged(found: load.Material) -> list[str]:
  """Who judged what, and how the intervals were made."""
  health, settings = found.health, found.settings
  methods = {rate.interval for rate in found.rates}
  texts = [
    _METHODS[method].format(resamples=settings.resamples, seed=settings.seed)
    for method in sorted(methods)
  ]
  lines = [
    f"Judge {markdown.literal(health.judge)}, template"
    f" {markdown.literal(health.template_hash or '(none)')}:"
    f" {health.calls} calls on"
    f" {health.comparisons} comparisons of an answer with the dataset's chosen"
    f" one, over {health.prompts} prompts. Data fingerprint"
    f" {found.data_fingerprint}.",
    "",
    "The win rate is the mean over prompts; a prompt's score is the mean of"
    " its calls (answer better 1, tie 1/2, chosen better 0). Brackets hold"
    f" {found.level} intervals: {'; '.join(texts)}.",
  ]
  if _length_rates(found):
    lines += [
      "",
      "Beside it stands the rate at equal length: what a logistic regression"
      " on tanh of the difference in length expects of two texts of one"
      " length. It is a second opinion; nothing else is made of it.",
    ]
  return lines


def final_table(found: load.Material) -> list[str]:
  return _rate_table(
    found,
    [rate for rate in found.rates if rate.step is None],
    ("model", "T"),
    lambda rate: (name(rate.model), str(rate.temperature)),
  )


def step_table(found: load.Material) -> list[str]:
  rates = [rate for rate in found.rates if rate.step is not None]
  if not rates:
    return []
  table = _rate_table(
    found,
    rates,
    ("model", "step", "T"),
    lambda rate: (name(rate.model), step(rate.step), str(rate.temperature)),
  )
  return ["### Over training", "", *table, *_slopes(found)]


def subset_table(found: load.Material) -> list[str]:
  """Win rates of the final models on each part of the dataset."""
  rows = [
    (
      markdown.literal(subset),
      name(rate.model),
      str(rate.temperature),
      str(rate.n),
      _interval(rate),
    )
    for subset, rates in found.by_subset.items()
    for rate in rates
  ]
  if not rows:
    return []
  header = ("subset", "model", "T", "prompts", "win rate %")
  return ["### By subset", "", *markdown.table(header, rows)]


def _slopes(found: load.Material) -> list[str]:
  lines = []
  for slope in found.slopes:
    temperatures = ", ".join(map(str, slope.temperatures))
    gain = f"{_signed(slope.gain)} {ends(slope.low, slope.high, _signed)}"
    left = f"; {slope.left_out} prompts were not judged everywhere"
    verdict = "it cannot be told whether it improves"
    if slope.low > 0 or slope.high < 0:
      verdict = "it improves" if slope.low > 0 else "it gets worse"
    lines += [
      "",
      f"{name(slope.model)} with training: {verdict}. One least-squares slope"
      f" for each of {slope.n} prompts over {slope.steps} steps, T ="
      f" {temperatures}: from step {slope.first} to {slope.last} the rate"
      f" changes by {gain} points (t-test of the slopes,"
      f" {_p_text(slope.p)}{left * bool(slope.left_out)}).",
    ]
  return lines


def _rate_table(found, rates, names, cells) -> list[str]:
  equal = _length_rates(found)
  soft = any(not math.isnan(rate.soft_rate) for rate in found.rates)
  header = (
    *names,
    "prompts",
    "win rate %",
    *(["at equal length %"] if equal else []),
    *(["by probabilities %"] if soft else []),
    "ties",
    "no verdict",
    "first slot won %",
  )
  rows = [
    (
      *cells(rate),
      str(rate.n),
      _interval(rate),
      *([equal.get(_cell(rate), "n/a")] if equal else []),
      *([percent(rate.soft_rate)] if soft else []),
      str(rate.ties),
      str(rate.missing + rate.refusals),
      percent(rate.first_slot_rate),
    )
    for rate in rates
  ]
  return markdown.table(header, rows)


def _length_rates(found: load.Material) -> dict[tuple, str]:
  """Rates at equal length by cell; none if no cell determines one."""
  return {
    _cell(row): f"{percent(row.rate)} {ends(row.low, row.high)}"
    for row in found.lengths
    if not math.isnan(row.rate)
  }


def ordering(found: load.Material) -> list[str]:
  """Whether each stage is above the one before it, in plain sentences."""
  finals = {
    (rate.model, rate.temperature): rate
    for rate in found.rates
    if rate.step is None and rate.n
  }
  temperatures = sorted({t for _, t in finals if t >= 0.7})
  tested = [
    t for t in temperatures if all((m, t) in finals for m in winrates.MODELS)
  ]
  if not tested:
    return [
      "It cannot be told: at no temperature of 0.7 or more were base, SFT and"
      " DPO all judged."
    ]
  failures, failed = [], []
  for t in tested:
    base, sft, dpo = (finals[model, t] for model in winrates.MODELS)
    for lower, upper in ((base, sft), (sft, dpo)):
      if lower.high < upper.low:
        continue
      above = upper.win_rate > lower.win_rate
      failed.append(t)
      failures.append(
        f"- T = {t}: {name(upper.model)} {_interval(upper)} is"
        f" {'' if above else 'not '}above {name(lower.model)}"
        f" {_interval(lower)}{', but the intervals overlap' * above}."
      )
  held = [str(t) for t in tested if t not in failed]
  claim = f"base < SFT < DPO, and the {found.level} intervals do not overlap"
  if not failed:
    return [
      "**Yes**: at every temperature of 0.7 or more at which all three were"
      f" judged ({', '.join(held)}), {claim}."
    ]
  there = f" It holds at T = {', '.join(held)}." if held else ""
  missed = ", ".join(map(str, dict.fromkeys(failed)))
  return [
    f"**No**: at T = {missed} it does not hold that {claim}.{there}",
    "",
    *failures,
  ]


def differences(found: load.Material) -> list[str]:
  """Paired differences of the final models."""
  rows = [
    (
      f"{name(row.upper)} - {name(row.lower)}",
      str(row.temperature),
      str(row.n),
      f"{_signed(row.difference)} {ends(row.low, row.high, _signed)}",
      f"{row.wins} : {row.losses}",
      _p_value(row.p),
      _p_value(row.p_holm),
    )
    for row in found.differences
  ]
  if not rows:
    return []
  header = ("models", "T", "prompts", "difference, points")
  return [
    "### Differences on the same prompts",
    "",
    "A difference is taken prompt by prompt, which is surer than two intervals"
    " side by side. p is the exact McNemar test of the prompts on which one"
    " model scored higher against those on which the other did; Holm's"
    " correction is over the temperatures of a pair.",
    "",
    *markdown.table((*header, "higher : lower", "p", "p, Holm"), rows),
  ]


def judge_health(found: load.Material) -> list[str]:
  """The judge's own record, and what calls without a verdict could change."""
  judge = found.health
  slot = judge.first_slot
  fingerprints = {call.judge_fingerprint for call in found.verdicts} - {""}
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
      percent(judge.first_slot_rate),
    ),
    ("first slot won, % over prompts", _share(slot)),
    ("comparisons read in both orders", str(judge.both_orders)),
    (
      "same verdict in both orders, %",
      percent(judge.order_consistency),
    ),
    ("fingerprints of the judge's server", str(len(fingerprints))),
    ("tokens read and written by the judge", f"{tokens[0]} and {tokens[1]}"),
  ]
  lines = markdown.table(("judge", "value"), rows)
  lines += ["", *_judge_controls(found), *_bounds(found)]
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


def _judge_controls(found: load.Material) -> list[str]:
  control = found.controls
  if not any(share.n for share in (control.aa, control.gold, control.retest)):
    return ["No controls were asked."]
  rows = [
    (
      "a text against itself: won",
      "50",
      _share(control.aa),
      _p_value(control.aa_p),
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


def _bounds(found: load.Material) -> list[str]:
  bounds = [
    (
      name(rate.model),
      step(rate.step),
      str(rate.temperature),
      percent(rate.win_rate),
      f"{percent(rate.worst)} to {percent(rate.best)}",
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


def _share(share) -> str:
  if not share.n:
    return "n/a"
  interval = ends(share.low, share.high)
  return f"{percent(share.rate)} {interval} ({share.n} prompts)"


def name(model: str) -> str:
  """How a model or run is called in a report, as Markdown."""
  return PLAIN_NAMES.get(model) or markdown.literal(model)


def step(step: int | None) -> str:
  return "" if step is None else str(step)


def percent(share: float) -> str:
  return "n/a" if math.isnan(share) else f"{100 * share:.1f}"


def _cell(row) -> tuple:
  return row.model, row.step, row.temperature


def _interval(rate: winrates.WinRate) -> str:
  return f"{percent(rate.win_rate)} {ends(rate.low, rate.high)}"


def ends(low: float, high: float, shown=percent) -> str:
  return f"[{shown(low)}, {shown(high)}]"


def _signed(share: float) -> str:
  text = f"{100 * share:+.1f}"
  # What rounds to zero has no sign.
  return text[1:] if float(text) == 0 else text


def _p_value(value: float) -> str:
  if math.isnan(value):
    return "n/a"
  return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _p_text(value: float) -> str:
  text = _p_value(value)
  return f"p {text}" if text.startswith("<") else f"p = {text}"
