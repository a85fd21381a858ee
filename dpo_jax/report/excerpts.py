"""The sections of a report about the runs and their answers.

Each is a list of Markdown lines made of rows; a section that has nothing to
say is an empty list.
"""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_jax import winrates
from dpo_jax.io import markdown, records
from dpo_jax.report import load, sections
from dpo_jax.sampling import summary

_EXCERPT_CHARS = 600
_OUTCOMES = {"model": "won", "chosen": "lost"}
_REASONS = {
  "eos": "ended itself",
  "turn": "began a human turn",
  "length": "cut at the limit",
}


def accuracy(found: load.Material) -> list[str]:
  """Last held-out accuracy of each run that has one."""
  lines = []
  for run, rows in found.metrics.items():
    key = "eval_rewards/accuracies"
    # A value that is not finite is written as its name, a string.
    held = [row for row in rows if isinstance(row.get(key), int | float)]
    if not held:
      continue
    last = max(held, key=lambda row: row["step"])
    share = f"{sections.percent(last[key])}%"
    n = last.get("eval_items")
    if isinstance(n, int | float) and n > 0:
      low, high = winrates.wilson_interval(
        last[key] * n, n, confidence=found.settings.confidence
      )
      share += (
        f" of {n:g} pairs, {found.level} interval {sections.ends(low, high)}"
      )
    lines.append(
      f"{sections.name(run)}: the implicit reward ranks chosen above rejected"
      f" in {share} (step {last['step']})."
    )
  return lines or ["No run has evaluated it."]


def answers(found: load.Material) -> list[str]:
  """How long the answers are and how they end, for every model and step."""
  cells = collections.defaultdict(list)
  for row in found.responses:
    cells[row.model, row.step, row.temperature].append(row)
  chars = {
    (rate.model, rate.step, rate.temperature): rate for rate in found.rates
  }
  rows = []
  order = [cell for cell in chars if cell in cells]
  for cell in [*order, *(cell for cell in cells if cell not in chars)]:
    answers, rate = cells[cell], chars.get(cell)
    model, step, temperature = cell
    ends = collections.Counter(row.finish_reason for row in answers)
    rows.append(
      (
        sections.name(model),
        sections.step(step),
        str(temperature),
        str(len(answers)),
        f"{np.mean([row.token_count for row in answers]):.1f}",
        f"{rate.response_chars:.0f}" if rate else "not judged",
        f"{rate.chosen_chars:.0f}" if rate else "not judged",
        *(sections.percent(ends[reason] / len(answers)) for reason in _REASONS),
        str(sum(not row.response.strip() for row in answers)),
        str(sum(summary.loops(row.response) for row in answers)),
        _mean_logp(answers),
      )
    )
  return markdown.table(
    (
      *("model", "step", "T", "answers", "mean tokens", "mean characters"),
      "of chosen",
      *(f"{text} %" for text in _REASONS.values()),
      *("empty", "looping", "mean log-prob"),
    ),
    rows,
  )


def _mean_logp(answers: Sequence[records.Response]) -> str:
  """Mean over answers, of those that say it."""
  logps = [row.mean_logp for row in answers if row.mean_logp is not None]
  return f"{np.mean(logps):.3f}" if logps else "n/a"


def examples(found: load.Material) -> list[str]:
  """A few prompts, drawn by seed, with the answers of all final models."""
  finals = {
    (row.temperature, row.prompt_id, row.model): row
    # The lowest sample id is written last and stays.
    for row in sorted(found.responses, key=lambda row: -row.sample_id)
    if row.step is None
  }
  answered = {model for _, _, model in finals}
  judged_models = dict.fromkeys(rate.model for rate in found.rates)
  models = [model for model in judged_models if model in answered]
  shared = collections.defaultdict(set)
  for temperature, prompt_id, _ in finals:
    if all((temperature, prompt_id, model) in finals for model in models):
      shared[temperature].add(prompt_id)
  if not (shared and models and found.settings.examples):
    return []
  # The paper compares at 0.7: the nearest temperature that was sampled.
  temperature = min(shared, key=lambda t: (abs(t - 0.7), t))
  ids = sorted(shared[temperature])
  generator = np.random.default_rng(found.settings.seed)
  count = min(found.settings.examples, len(ids))
  drawn = sorted(generator.choice(len(ids), count, replace=False))
  verdicts = _verdicts(found)
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


def _verdicts(found: load.Material) -> dict[tuple, list[str]]:
  """Verdicts by the unit of the response, the one where it came first first."""
  verdicts = collections.defaultdict(list)
  for call in sorted(
    found.verdicts, key=lambda call: call.order != "model_first"
  ):
    place = "first" if call.order == "model_first" else "second"
    outcome = _OUTCOMES.get(call.verdict, call.verdict)
    verdicts[call.unit[:5]].append(f"{outcome} when shown {place}")
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
      ("", "chosen", *(sections.name(row.model) for row in rows)),
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


def training(found: load.Material, curves: list[str]) -> list[str]:
  """The training curves, and what the runs' manifests count of their data."""
  lines = ["## Training"]
  if curves:
    lines += ["", *curves]
  rows = [
    (sections.name(run), markdown.literal(name), markdown.literal(value))
    for run, manifest in found.manifests.items()
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
