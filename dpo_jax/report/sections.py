"""Sections of a report, as lines of Markdown.

A section without content is an empty list. Nothing is estimated here: numbers
come from the report data.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax import winrates
from dpo_jax.io import markdown, records
from dpo_jax.report import checks, load
from dpo_jax.sampling import summary

_EXCERPT_CHARS = 600
_INTERVALS = {
  "wilson": "Wilson score, one call a prompt",
  "wilson bound": "Wilson score of the summed scores, which assumes the widest"
  " spread, where all prompts score alike",
  "wilson effective": "Wilson score at the effective number of prompts, with"
  " Student's t, where prompts are few",
  "bca": "bootstrap over prompts, corrected for bias and skew (BCa,"
  " {resamples} resamples, seed {seed})",
}
_FINISH = {
  "eos": "ended itself",
  "turn": "began a human turn",
  "length": "cut at the limit",
}


def flags(found: Sequence[checks.Flag]) -> list[str]:
  """The flags as one quotation."""
  notes = [f"> **{flag.name}**: {flag.text}" for flag in found]
  # A bare ">" separates the paragraphs of a quotation.
  return [line for note in notes for line in (note, ">")][:-1]


# --- win rates


def ordering(data: load.ReportData) -> list[str]:
  """Whether each stage beats the one before it, with disjoint intervals."""
  finals = {
    (rate.model, rate.temperature): rate
    for rate in data.rates
    if rate.step is None and rate.n
  }
  tested = [
    t
    for t in sorted({t for _, t in finals if t >= 0.7})
    if all((model, t) in finals for model in winrates.MODELS)
  ]
  if not tested:
    return [
      "Undecided: at no temperature of 0.7 or more were base, SFT and DPO all"
      " judged."
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
        f"- T = {t}: {name(upper.model)} {_rate(upper)} is"
        f" {'' if above else 'not '}above {name(lower.model)}"
        f" {_rate(lower)}{', but the intervals overlap' * above}."
      )
  held = ", ".join(str(t) for t in tested if t not in failed)
  claim = f"base < SFT < DPO, and the {data.level} intervals do not overlap"
  if not failed:
    return [
      "**Yes**: at every temperature of 0.7 or more at which all three were"
      f" judged ({held}), {claim}."
    ]
  missed = ", ".join(map(str, dict.fromkeys(failed)))
  return [
    f"**No**: at T = {missed} it does not hold that {claim}."
    + (f" It holds at T = {held}." if held else ""),
    "",
    *failures,
  ]


def final_models(data: load.ReportData) -> list[str]:
  """Method and win rates of the final models."""
  health, settings = data.health, data.settings
  methods = [
    _INTERVALS[method].format(resamples=settings.resamples, seed=settings.seed)
    for method in sorted({rate.interval for rate in data.rates})
  ]
  lines = [
    f"Judge {markdown.literal(health.judge)}, template"
    f" {markdown.literal(health.template_hash or '(none)')}:"
    f" {health.calls} calls on {health.comparisons} comparisons of a response"
    f" with the dataset's chosen one, over {health.prompts} prompts. Data"
    f" fingerprint {data.data_fingerprint}.",
    "",
    "The win rate is the mean over prompts; a prompt's score is the mean of"
    " its calls (response better 1, tie 1/2, chosen better 0). Brackets are"
    f" {data.level} intervals: {'; '.join(methods)}.",
  ]
  if _length_controlled(data):
    lines += [
      "",
      "The rate at equal length is what a logistic regression on tanh of the"
      " difference in length predicts for two texts of equal length. It is a"
      " second opinion; nothing else is computed from it.",
    ]
  finals = [rate for rate in data.rates if rate.step is None]
  return [*lines, "", *_rate_table(data, finals)]


def over_training(data: load.ReportData) -> list[str]:
  """Win rates of checkpoints, and the slope of each model's."""
  rates = [rate for rate in data.rates if rate.step is not None]
  if not rates:
    return []
  lines = ["### Over training", "", *_rate_table(data, rates)]
  for slope in data.slopes:
    temperatures = ", ".join(map(str, slope.temperatures))
    gain = f"{_signed(slope.gain)} {ends(slope.low, slope.high, _signed)}"
    left = f"; {slope.left_out} prompts were not judged everywhere"
    verdict = "undecided whether it improves"
    if slope.low > 0 or slope.high < 0:
      verdict = "it improves" if slope.low > 0 else "it gets worse"
    p = _p_value(slope.p)
    lines += [
      "",
      f"{name(slope.model)} with training: {verdict}. One least-squares slope"
      f" for each of {slope.n} prompts over {slope.steps} steps, T ="
      f" {temperatures}: from step {slope.first} to {slope.last} the rate"
      f" changes by {gain} points (t-test of the slopes,"
      f" p {p if p.startswith('<') else f'= {p}'}"
      f"{left * bool(slope.left_out)}).",
    ]
  return lines


def by_subset(data: load.ReportData) -> list[str]:
  """Win rates of the final models on each subset of the dataset."""
  rows = [
    (
      markdown.literal(subset),
      name(rate.model),
      str(rate.temperature),
      str(rate.n),
      _rate(rate),
    )
    for subset, rates in data.by_subset.items()
    for rate in rates
  ]
  if not rows:
    return []
  header = ("subset", "model", "T", "prompts", "win rate %")
  return ["### By subset", "", *markdown.table(header, rows)]


def differences(data: load.ReportData) -> list[str]:
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
    for row in data.differences
  ]
  if not rows:
    return []
  header = ("models", "T", "prompts", "difference, points")
  return [
    "### Differences on the same prompts",
    "",
    "Differences are paired by prompt, which has more power than comparing two"
    " intervals. p is the exact McNemar test of the prompts on which one model"
    " scored higher against those on which the other did; Holm's correction is"
    " over the temperatures of a pair.",
    "",
    *markdown.table((*header, "higher : lower", "p", "p, Holm"), rows),
  ]


def _rate_table(data, rates) -> list[str]:
  """A column is there only if some rate has it."""
  equal = _length_controlled(data)
  columns = {"model": [name(rate.model) for rate in rates]}
  if any(rate.step is not None for rate in rates):
    columns["step"] = [_step(rate.step) for rate in rates]
  columns |= {
    "T": [str(rate.temperature) for rate in rates],
    "prompts": [str(rate.n) for rate in rates],
    "win rate %": [_rate(rate) for rate in rates],
  }
  if equal:
    columns["at equal length %"] = [equal.get(_cell(r), "n/a") for r in rates]
  if any(not math.isnan(rate.soft_rate) for rate in data.rates):
    columns["by probabilities %"] = [percent(rate.soft_rate) for rate in rates]
  columns |= {
    "ties": [str(rate.ties) for rate in rates],
    "no verdict": [str(rate.missing + rate.refusals) for rate in rates],
    "first slot won %": [percent(rate.first_slot_rate) for rate in rates],
  }
  return markdown.table([*columns], zip(*columns.values()))


def _length_controlled(data: load.ReportData) -> dict[tuple, str]:
  """Length-controlled rates by model, step and temperature."""
  return {
    _cell(row): f"{percent(row.rate)} {ends(row.low, row.high)}"
    for row in data.lengths
    if not math.isnan(row.rate)
  }


# --- the judge


def judge_health(data: load.ReportData) -> list[str]:
  """Position bias, controls, and bounds over calls without a verdict."""
  judge = data.health
  fingerprints = {call.judge_fingerprint for call in data.verdicts} - {""}
  prompt_tokens = sum(call.prompt_tokens for call in data.verdicts)
  reply_tokens = sum(call.completion_tokens for call in data.verdicts)
  rows = [
    ("calls", str(judge.calls)),
    ("missing, no verdict", str(judge.missing)),
    ("refusals", str(judge.refusals)),
    ("first slot won, % of decided calls", percent(judge.first_slot_rate)),
    ("first slot won, % over prompts", _share(judge.first_slot)),
    ("comparisons judged in both orders", str(judge.both_orders)),
    ("same verdict in both orders, %", percent(judge.order_consistency)),
    ("fingerprints of the judge's server", str(len(fingerprints))),
    ("tokens of questions and replies", f"{prompt_tokens} and {reply_tokens}"),
  ]
  lines = markdown.table(("judge", "value"), rows)
  lines += ["", *_controls(data), *_bounds(data)]
  causes = collections.Counter(
    call.error for call in data.verdicts if call.verdict == "missing"
  )
  if causes:
    rows = [
      (markdown.literal(cause[:_EXCERPT_CHARS] or "(none given)"), str(count))
      for cause, count in causes.most_common(5)
    ]
    lines += ["", *markdown.table(("most frequent causes", "calls"), rows)]
  return lines


def _controls(data: load.ReportData) -> list[str]:
  control = data.controls
  if not any(share.n for share in (control.aa, control.gold, control.retest)):
    return ["No controls were asked."]
  rows = [
    ("a text against itself: won", "50", control.aa, _p_value(control.aa_p)),
    ("a text against itself: first won", "50", control.aa_first_slot, ""),
    ("own chosen response against another's", "100", control.gold, ""),
    ("same verdict when asked again", "100", control.retest, ""),
  ]
  lines = markdown.table(
    ("control", "ideal %", f"found %, {data.level}", "p"),
    [(text, ideal, _share(share), p) for text, ideal, share, p in rows],
  )
  if control.unread:
    lines += ["", f"{control.unread} control calls gave no verdict."]
  return lines


def _bounds(data: load.ReportData) -> list[str]:
  rows = [
    (
      name(rate.model),
      _step(rate.step),
      str(rate.temperature),
      percent(rate.win_rate),
      f"{percent(rate.worst)} to {percent(rate.best)}",
      str(rate.missing),
      str(rate.refusals),
    )
    for rate in data.rates
    if rate.missing or rate.refusals
  ]
  if not rows:
    return []
  header = ("model", "step", "T", "win rate %", "bounds %")
  return [
    "",
    "Bounds are the win rate if every call without a verdict were lost, and"
    " if it were won.",
    "",
    *markdown.table((*header, "missing", "refusals"), rows),
  ]


# --- runs and responses


def reward_accuracy(data: load.ReportData) -> list[str]:
  """Last held-out reward accuracy of each run that has one."""
  lines = []
  for run, rows in data.metrics.items():
    key = "eval_rewards/accuracies"
    # Values that are not finite are recorded as strings.
    held_out = [row for row in rows if isinstance(row.get(key), int | float)]
    if not held_out:
      continue
    last = max(held_out, key=lambda row: row["step"])
    share = f"{percent(last[key])}%"
    n = last.get("eval_items")
    if isinstance(n, int | float) and n > 0:
      low, high = winrates.wilson_interval(
        last[key] * n, n, confidence=data.settings.confidence
      )
      share += f" of {n:g} pairs, {data.level} interval {ends(low, high)}"
    lines.append(
      f"{name(run)}: the implicit reward ranks chosen above rejected in {share}"
      f" (step {last['step']})."
    )
  return lines or ["No run has evaluated it."]


def responses(data: load.ReportData) -> list[str]:
  """Lengths and finish reasons, by model, step and temperature."""
  rates = {_cell(rate): rate for rate in data.rates}
  # In the order of the rates; what was not judged is last.
  cells = {cell: [] for cell in rates}
  for row in data.responses:
    cells.setdefault(_cell(row), []).append(row)
  rows = []
  for (model, step, temperature), group in cells.items():
    if not group:
      continue
    rate = rates.get((model, step, temperature))
    finish = collections.Counter(row.finish_reason for row in group)
    logps = [row.mean_logp for row in group if row.mean_logp is not None]
    rows.append(
      (
        name(model),
        _step(step),
        str(temperature),
        str(len(group)),
        f"{np.mean([row.token_count for row in group]):.1f}",
        f"{rate.response_chars:.0f}" if rate else "not judged",
        f"{rate.chosen_chars:.0f}" if rate else "not judged",
        *(percent(finish[reason] / len(group)) for reason in _FINISH),
        str(sum(not row.response.strip() for row in group)),
        str(sum(summary.loops(row.response) for row in group)),
        f"{np.mean(logps):.3f}" if logps else "n/a",
      )
    )
  return markdown.table(
    (
      *("model", "step", "T", "responses", "mean tokens", "mean characters"),
      "of chosen",
      *(f"{text} %" for text in _FINISH.values()),
      *("empty", "looping", "mean log-prob"),
    ),
    rows,
  )


def examples(data: load.ReportData) -> list[str]:
  """Randomly chosen prompts with the responses of all final models."""
  finals = collections.defaultdict(dict)
  for row in data.responses:
    if row.step is None and row.sample_id == 0:
      finals[row.temperature, row.prompt_id][row.model] = row
  models = dict.fromkeys(rate.model for rate in data.rates if rate.step is None)
  shared = [cell for cell in finals if finals[cell].keys() >= models.keys()]
  if not (shared and models and data.settings.examples):
    return []
  # The paper compares at 0.7: the nearest temperature that was sampled.
  temperature = min((t for t, _ in shared), key=lambda t: (abs(t - 0.7), t))
  ids = sorted(prompt_id for t, prompt_id in shared if t == temperature)
  generator = np.random.default_rng(data.settings.seed)
  count = min(data.settings.examples, len(ids))
  chosen = sorted(generator.choice(len(ids), count, replace=False))
  outcomes = _outcomes(data)
  lines = [
    f"Chosen at random by seed; T = {temperature}. The end of the prompt and"
    f" the start of each response, at most {_EXCERPT_CHARS} characters.",
  ]
  for index in chosen:
    found = finals[temperature, ids[index]]
    rows = [found[model] for model in models]
    lines += ["", *_example(rows, outcomes)]
  return lines


def _outcomes(data: load.ReportData) -> dict[tuple, list[str]]:
  """Verdicts by response, that with the response shown first first."""
  won = {"model": "won", "chosen": "lost"}
  outcomes = collections.defaultdict(list)
  for call in sorted(
    data.verdicts, key=lambda call: call.order != "model_first"
  ):
    place = "first" if call.order == "model_first" else "second"
    outcome = won.get(call.verdict, call.verdict)
    outcomes[call.unit[:5]].append(f"{outcome} when shown {place}")
  return outcomes


def _example(
  rows: Sequence[records.Response], outcomes: dict[tuple, list[str]]
) -> list[str]:
  """A prompt, and the chosen and the models' responses side by side."""
  prompt = markdown.literal(_excerpt(rows[0].prompt, end=True))
  texts = [rows[0].chosen, *(row.response for row in rows)]
  return [
    *markdown.table(("prompt",), [(prompt,)]),
    "",
    *markdown.table(
      ("", "chosen", *(name(row.model) for row in rows)),
      [
        ("response", *(markdown.literal(_excerpt(text)) for text in texts)),
        ("tokens", "", *(str(row.token_count) for row in rows)),
        ("end", "", *(_FINISH[row.finish_reason] for row in rows)),
        (
          "verdict",
          "",
          *("<br>".join(outcomes[row.unit]) or "none" for row in rows),
        ),
      ],
    ),
  ]


def _excerpt(text: str, *, end: bool = False) -> str:
  text = text.strip()
  cut = len(text) - _EXCERPT_CHARS
  if cut <= 0:
    return text or "(empty)"
  if end:
    return f"({cut} characters) … {text[cut:]}"
  return f"{text[:-cut]} … ({cut} characters)"


def training_data(data: load.ReportData) -> list[str]:
  """Row counts of each run's training data, from its manifest."""
  rows = [
    (name(run), markdown.literal(path), markdown.literal(value))
    for run, manifest in data.manifests.items()
    if "data" in manifest
    for path, value in _leaves(manifest["data"])
  ]
  return markdown.table(("run", "data", "rows"), rows) if rows else []


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
  """(path, text) of each leaf of a nested JSON object."""
  if not isinstance(value, dict):
    return [(", ".join(path), str(value))]
  return [
    leaf
    for key, child in value.items()
    for leaf in _leaves(child, (*path, key))
  ]


# --- cells


def name(model: str) -> str:
  """Display name of a model or run, as Markdown."""
  return load.NAMES.get(model) or markdown.literal(model)


def percent(share: float) -> str:
  return "n/a" if math.isnan(share) else f"{100 * share:.1f}"


def ends(low: float, high: float, shown=percent) -> str:
  """An interval in brackets."""
  return f"[{shown(low)}, {shown(high)}]"


def _rate(rate: winrates.WinRate) -> str:
  return f"{percent(rate.win_rate)} {ends(rate.low, rate.high)}"


def _share(share) -> str:
  if not share.n:
    return "n/a"
  interval = ends(share.low, share.high)
  return f"{percent(share.rate)} {interval} ({share.n} prompts)"


def _step(step: int | None) -> str:
  return "" if step is None else str(step)


def _cell(row) -> tuple:
  return row.model, row.step, row.temperature


def _signed(share: float) -> str:
  text = f"{100 * share:+.1f}"
  # What rounds to zero has no sign.
  return text[1:] if float(text) == 0 else text


def _p_value(value: float) -> str:
  if math.isnan(value):
    return "n/a"
  return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
