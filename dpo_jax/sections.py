"""The sections of a report, each a list of Markdown lines from the rows.

Everything is computed here from verdicts, responses and metrics; a section
that has nothing to say is an empty list.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax import markdown, records, winrates

_EXCERPT_CHARS = 600
_NAMES = {"base": "base", "sft": "SFT", "dpo": "DPO"}
_OUTCOMES = {"model": "won", "chosen": "lost"}
_REASONS = {
  "eos": "ended itself",
  "turn": "began a human turn",
  "length": "cut at the limit",
}


@dataclasses.dataclass(frozen=True)
class Material:
  """Everything that a report is made of; `verdicts` are the current ones."""

  seed: int
  resamples: int
  confidence: float
  examples: int
  verdicts: list[records.Verdict]
  responses: list[records.Response]
  rates: list[winrates.WinRate]
  metrics: dict[str, list[dict]]
  manifests: dict[str, dict]


def warnings(material: Material) -> list[str]:
  """What a reader must know before reading any number."""
  verdicts, notes = material.verdicts, []
  missing = sum(call.verdict == "missing" for call in verdicts)
  if missing:
    notes.append(
      f"> **INCOMPLETE**: {missing} of {len(verdicts)} judge calls gave no"
      " verdict. They are left out of the rates and counted below, where"
      " bounds show what they could change."
    )
  open_calls, strays = _open_calls(material)
  if open_calls:
    notes.append(
      f"> **INCOMPLETE**: {open_calls} judge calls were never made. Run"
      " judge.py again; only these are asked."
    )
  if strays:
    notes.append(
      f"> **INCONSISTENT**: {strays} judge calls are about answers that"
      " responses/ does not hold."
    )
  returned = sorted({call.judge_returned for call in verdicts} - {""})
  if len(returned) > 1:
    notes.append(
      "> **MIXED**: the judge answered as several models:"
      f" {markdown.literal(', '.join(returned))}."
    )
  # A bare ">" parts the paragraphs of one quotation.
  return [line for note in notes for line in (note, ">")][:-1]


def _open_calls(material: Material) -> tuple[int, int]:
  """Calls not made for the responses at hand, and calls about no response."""
  made = collections.Counter(call.unit[:-1] for call in material.verdicts)
  # Both orders of a pair are asked, or one order of every pair.
  orders = max(made.values())
  # An empty reference says nothing about a model: it is not judged.
  due = {row.unit for row in material.responses if row.chosen.strip()}
  known = {row.unit for row in material.responses}
  unmade = sum(max(0, orders - made[key]) for key in due)
  return unmade, sum(count for key, count in made.items() if key not in known)


def judged(material: Material) -> list[str]:
  """Who judged what, and how the intervals were made."""
  health = winrates.judge_health(material.verdicts)
  level = level_of(material)
  methods = {rate.interval for rate in material.rates}
  texts = {
    "bootstrap": f"percentile bootstrap over prompts"
    f" ({material.resamples} resamples, seed {material.seed})",
    "wilson": "Wilson score, one call a prompt",
    "wilson bound": "Wilson score of the summed scores, which assumes the"
    " widest spread, where prompts are few or all score alike",
  }
  return [
    f"Judge {markdown.literal(health.judge)}, template"
    f" {markdown.literal(health.template_hash or '(none)')}:"
    f" {health.calls} calls on"
    f" {health.comparisons} comparisons of an answer with the dataset's chosen"
    f" one, over {health.prompts} prompts.",
    "",
    "The win rate is the mean over prompts; a prompt's score is the mean of"
    " its calls (answer better 1, tie 1/2, chosen better 0). Brackets hold"
    f" {level} intervals: {'; '.join(texts[m] for m in sorted(methods))}.",
  ]


def final_table(material: Material) -> list[str]:
  return _rate_table(
    [rate for rate in material.rates if rate.step is None],
    ("model", "T"),
    lambda rate: (_name(rate.model), str(rate.temperature)),
  )


def step_table(material: Material) -> list[str]:
  rates = [rate for rate in material.rates if rate.step is not None]
  if not rates:
    return []
  table = _rate_table(
    rates,
    ("model", "step", "T"),
    lambda rate: (_name(rate.model), _step(rate.step), str(rate.temperature)),
  )
  return ["### Over training", "", *table]


def _rate_table(rates, names, cells) -> list[str]:
  header = (*names, "prompts", "win rate %", "ties", "no verdict")
  rows = [
    (
      *cells(rate),
      str(rate.n),
      _interval(rate),
      str(rate.ties),
      str(rate.missing + rate.refusals),
      _percent(rate.first_slot_rate),
    )
    for rate in rates
  ]
  return markdown.table((*header, "first slot won %"), rows)


def ordering(material: Material) -> list[str]:
  """Whether each stage is above the one before it, in plain sentences."""
  level = level_of(material)
  finals = {
    (rate.model, rate.temperature): rate
    for rate in material.rates
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
        f"- T = {t}: {_name(upper.model)} {_interval(upper)} is"
        f" {'' if above else 'not '}above {_name(lower.model)}"
        f" {_interval(lower)}{', but the intervals overlap' * above}."
      )
  held = [str(t) for t in tested if t not in failed]
  claim = f"base < SFT < DPO, and the {level} intervals do not overlap"
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


def health(material: Material) -> list[str]:
  """The judge's own record, and what calls without a verdict could change."""
  judge = winrates.judge_health(material.verdicts)
  rows = [
    ("calls", str(judge.calls)),
    ("missing, no verdict", str(judge.missing)),
    ("refusals", str(judge.refusals)),
    ("first slot won, % of decided calls", _percent(judge.first_slot_rate)),
    ("comparisons read in both orders", str(judge.both_orders)),
    ("same verdict in both orders, %", _percent(judge.order_consistency)),
  ]
  lines = markdown.table(("judge", "value"), rows)
  bounds = [
    (
      _name(rate.model),
      _step(rate.step),
      str(rate.temperature),
      _percent(rate.win_rate),
      f"{_percent(rate.worst)} to {_percent(rate.best)}",
      str(rate.missing),
      str(rate.refusals),
    )
    for rate in material.rates
    if rate.missing or rate.refusals
  ]
  if bounds:
    header = ("model", "step", "T", "win rate %", "bounds %")
    lines += [
      "",
      "Bounds are the win rate if every call without a verdict were lost, and"
      " if it were won.",
      "",
      *markdown.table((*header, "missing", "refusals"), bounds),
    ]
  causes = collections.Counter(
    call.error for call in material.verdicts if call.verdict == "missing"
  )
  if causes:
    rows = [
      (markdown.literal(_excerpt(cause)), str(count))
      for cause, count in causes.most_common(5)
    ]
    lines += ["", *markdown.table(("most frequent causes", "calls"), rows)]
  return lines


def accuracy(material: Material) -> list[str]:
  """Last held-out accuracy of each run that has one."""
  lines = []
  for run, rows in material.metrics.items():
    key = "eval_rewards/accuracies"
    # A value that is not finite is written as its name, a string.
    found = [row for row in rows if isinstance(row.get(key), int | float)]
    if not found:
      continue
    last = max(found, key=lambda row: row["step"])
    share = f"{_percent(last[key])}%"
    if "eval_items" in last:
      n = last["eval_items"]
      low, high = winrates.wilson_interval(
        last[key] * n, n, confidence=material.confidence
      )
      share += (
        f" of {n:g} pairs, {level_of(material)} interval"
        f" [{_percent(low)}, {_percent(high)}]"
      )
    lines.append(
      f"{_name(run)}: the implicit reward ranks chosen above rejected in"
      f" {share} (step {last['step']})."
    )
  return lines or ["No run has evaluated it."]


def answers(material: Material) -> list[str]:
  """How long the answers are and how they end, for every model and step."""
  cells = collections.defaultdict(list)
  for row in material.responses:
    cells[row.model, row.step, row.temperature].append(row)
  chars = {
    (rate.model, rate.step, rate.temperature): rate for rate in material.rates
  }
  rows = []
  order = [cell for cell in chars if cell in cells]
  for cell in [*order, *(cell for cell in cells if cell not in chars)]:
    answers, rate = cells[cell], chars.get(cell)
    model, step, temperature = cell
    ends = collections.Counter(row.finish_reason for row in answers)
    rows.append(
      (
        _name(model),
        _step(step),
        str(temperature),
        str(len(answers)),
        f"{np.mean([row.token_count for row in answers]):.1f}",
        f"{rate.response_chars:.0f}" if rate else "not judged",
        f"{rate.chosen_chars:.0f}" if rate else "not judged",
        *(_percent(ends[reason] / len(answers)) for reason in _REASONS),
        str(sum(not row.response.strip() for row in answers)),
      )
    )
  return markdown.table(
    (
      *("model", "step", "T", "answers", "mean tokens", "mean characters"),
      "of chosen",
      *(f"{text} %" for text in _REASONS.values()),
      "empty",
    ),
    rows,
  )


def examples(material: Material) -> list[str]:
  """A few prompts, drawn by seed, with the answers of all final models."""
  finals = {
    (row.temperature, row.prompt_id, row.model): row
    # The lowest sample id is written last and stays.
    for row in sorted(material.responses, key=lambda row: -row.sample_id)
    if row.step is None
  }
  answered = {model for _, _, model in finals}
  judged_models = dict.fromkeys(rate.model for rate in material.rates)
  models = [model for model in judged_models if model in answered]
  shared = collections.defaultdict(set)
  for temperature, prompt_id, _ in finals:
    if all((temperature, prompt_id, model) in finals for model in models):
      shared[temperature].add(prompt_id)
  if not (shared and models and material.examples):
    return []
  # The paper compares at 0.7: the nearest temperature that was sampled.
  temperature = min(shared, key=lambda t: (abs(t - 0.7), t))
  ids = sorted(shared[temperature])
  generator = np.random.default_rng(material.seed)
  count = min(material.examples, len(ids))
  drawn = sorted(generator.choice(len(ids), count, replace=False))
  verdicts = _verdicts(material)
  lines = [
    "## Examples",
    "",
    f"Drawn by seed, not picked; T = {temperature}. The end of the prompt and"
    f" the beginning of the answers, at most {_EXCERPT_CHARS} characters each.",
  ]
  for index in drawn:
    rows = [finals[temperature, ids[index], model] for model in models]
    lines += ["", *_example(rows, verdicts)]
  return lines


def _verdicts(material: Material) -> dict[tuple, list[str]]:
  """Verdicts by the unit of the response, the one where it came first first."""
  verdicts = collections.defaultdict(list)
  for call in sorted(
    material.verdicts, key=lambda call: call.order != "model_first"
  ):
    place = "first" if call.order == "model_first" else "second"
    outcome = _OUTCOMES.get(call.verdict, call.verdict)
    verdicts[call.unit[:-1]].append(f"{outcome} when shown {place}")
  return verdicts


def _example(
  rows: Sequence[records.Response], verdicts: dict[tuple, list[str]]
) -> list[str]:
  """A prompt, and side by side the chosen and the models' answers."""
  texts = [rows[0].chosen, *(row.response for row in rows)]
  prompt = markdown.literal(_excerpt(rows[0].prompt, end=True))
  return [
    *markdown.table(("prompt",), [(prompt,)]),
    "",
    *markdown.table(
      ("", "chosen", *(_name(row.model) for row in rows)),
      [
        ("answer", *(markdown.literal(_excerpt(text)) for text in texts)),
        ("tokens", "", *(str(row.token_count) for row in rows)),
        ("end", "", *(_REASONS[row.finish_reason] for row in rows)),
        (
          "verdict",
          "",
          *("<br>".join(verdicts[row.unit]) or "none" for row in rows),
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


def training(material: Material, curves: list[str]) -> list[str]:
  """The training curves, and what the runs' manifests count of their data."""
  lines = ["## Training"]
  if curves:
    lines += ["", *curves]
  rows = [
    (_name(run), markdown.literal(name), markdown.literal(value))
    for run, manifest in material.manifests.items()
    if "data" in manifest
    for name, value in _flatten(manifest["data"])
  ]
  if rows:
    lines += ["", *markdown.table(("run", "data", "rows"), rows)]
  return lines if len(lines) > 1 else []


def _flatten(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, str]]:
  """Leaves of a nested JSON value as (path, text)."""
  if not isinstance(value, dict):
    return [(", ".join(path), str(value))]
  return [
    leaf
    for name, child in value.items()
    for leaf in _flatten(child, (*path, name))
  ]


def _name(model: str) -> str:
  return _NAMES.get(model) or markdown.literal(model)


def _interval(rate: winrates.WinRate) -> str:
  ends = f"[{_percent(rate.low)}, {_percent(rate.high)}]"
  return f"{_percent(rate.win_rate)} {ends}"


def _step(step: int | None) -> str:
  return "" if step is None else str(step)


def _percent(share: float) -> str:
  return "n/a" if math.isnan(share) else f"{100 * share:.1f}"


def level_of(material: Material) -> str:
  """The intervals' confidence, as "95%"."""
  return f"{100 * material.confidence:g}%"
