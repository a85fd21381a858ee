"""The answers of a report as the page's browser reads them: plain JSON.

A prompt holds its answers, and an answer the calls that judged it, so that a
text stands there once. Every line of the JSON is one prompt: a difference
between two pages is then about a prompt, not about a file.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from dpo_jax.data import preferences
from dpo_jax.io import records
from dpo_jax.report import load
from dpo_jax.winrates import calls

OUTCOMES = ("won", "lost", "split", "tie", "none")
"""What the calls on an answer say together; see `outcome`."""


@dataclasses.dataclass(frozen=True)
class Call:
  """What one judge call said of an answer; `text` is the judge's own."""

  order: str
  verdict: str
  score: float | None
  text: str
  error: str


@dataclasses.dataclass(frozen=True)
class Answer:
  """One answer of a model.

  Attributes:
    cell: of the model, its step and the temperature.
    sample: number of the sample.
    text: as generated.
    tokens: of the answer.
    finish: why it ended.
    flags: what is odd about it or about its calls, in words.
    calls: about it, that with the answer shown first first.
  """

  cell: calls.Cell
  sample: int
  text: str
  tokens: int
  finish: str
  flags: tuple[str, ...]
  calls: tuple[Call, ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt, its chosen answer, the models' answers, and where it is from."""

  id: str
  text: str
  chosen: str
  answers: tuple[Answer, ...]
  subset: str = ""


def prompts(found: load.Material) -> list[Prompt]:
  """All prompts of a working directory, in the order of its files."""
  judged: dict[tuple, list[records.Verdict]] = {}
  for call in found.verdicts:
    judged.setdefault(call.unit[:5], []).append(call)
  odd = {call.unit for call in found.odd}
  rows: dict[str, list[records.Response]] = {}
  for row in found.responses:
    rows.setdefault(row.prompt_id, []).append(row)
  return [
    Prompt(
      id=prompt_id,
      text=group[0].prompt,
      chosen=group[0].chosen,
      answers=tuple(
        _answer(row, judged.get(row.unit, []), odd)
        for row in sorted(group, key=_place)
      ),
      subset=group[0].subset or "",
    )
    for prompt_id, group in rows.items()
  ]


def _answer(
  row: records.Response, judged: Sequence[records.Verdict], odd: set[tuple]
) -> Answer:
  judged = sorted(judged, key=lambda call: call.order != "model_first")
  flags = flagged(row.response, row.chosen, [call.verdict for call in judged])
  lengths = (len(row.response), len(row.chosen))
  if any((c.response_chars, c.chosen_chars) != lengths for c in judged):
    flags += ("judged with other texts",)
  if any(call.unit in odd for call in judged):
    flags += ("verdict is not what its text says",)
  return Answer(
    cell=(row.model, row.step, row.temperature),
    sample=row.sample_id,
    text=row.response,
    tokens=row.token_count,
    finish=row.finish_reason,
    flags=flags,
    calls=tuple(
      Call(call.order, call.verdict, call.score, call.raw, call.error)
      for call in judged
    ),
  )


def flagged(text: str, chosen: str, verdicts: Sequence[str]) -> tuple[str, ...]:
  """What a reader may want to look at: of the texts and their verdicts."""
  questions = (
    (outcome(verdicts) == "split", "orders disagree"),
    ("missing" in verdicts, "a call without a verdict"),
    ("refusal" in verdicts, "the judge refused"),
    (not verdicts and bool(chosen.strip()), "not judged"),
    (not text.strip(), "empty answer"),
    (not chosen.strip(), "empty chosen answer"),
    (text.strip() == chosen.strip(), "same text as chosen"),
  )
  return tuple(name for holds, name in questions if holds)


def outcome(verdicts: Sequence[str]) -> str:
  """One of OUTCOMES, from the verdicts on one answer.

  It won or lost if every call that was read says so; "split" if one order says
  the one and the other the other; "tie" if a tie is among them; "none" if no
  call was read.
  """
  read = {verdict for verdict in verdicts if verdict in calls.SCORES}
  if not read:
    return "none"
  if "tie" in read:
    return "tie"
  if len(read) == 2:
    return "split"
  return "won" if "model" in read else "lost"


def data(prompts: Sequence[Prompt], names: dict[str, str]) -> str:
  """The JSON of the browser, safe within an HTML script element.

  Args:
    prompts: what can be browsed.
    names: model -> how the report calls it, as plain text.
  """
  cells = sorted(
    {answer.cell for prompt in prompts for answer in prompt.answers},
    key=_cell_place,
  )
  places = {cell: place for place, cell in enumerate(cells)}
  head = {
    "cells": [
      [names.get(model, model), step, temperature]
      for model, step, temperature in cells
    ],
    "outcomes": OUTCOMES,
  }
  rows = [_embeddable(_row(prompt, places)) for prompt in prompts]
  return (
    f'{{"head": {_embeddable(head)},\n"prompts": [\n'
    + ",\n".join(rows)
    + "\n]}"
  )


def _row(prompt: Prompt, places: dict[calls.Cell, int]) -> list[Any]:
  turns = max(1, prompt.text.count(preferences.HUMAN))
  answers = [
    [
      places[answer.cell],
      answer.sample,
      answer.text,
      answer.tokens,
      answer.finish,
      OUTCOMES.index(outcome([call.verdict for call in answer.calls])),
      answer.flags,
      [dataclasses.astuple(call) for call in answer.calls],
    ]
    for answer in prompt.answers
  ]
  return [
    prompt.id,
    turns,
    prompt.text,
    prompt.chosen,
    answers,
    prompt.subset,
  ]


def _embeddable(value: Any) -> str:
  """JSON on one line that no HTML parser can take for a tag or comment."""
  text = json.dumps(value, ensure_ascii=False, allow_nan=False)
  for character in "<>&\u2028\u2029":
    # They stand within strings only, where the escape means the same.
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text


def _place(row: records.Response) -> tuple:
  return *_cell_place((row.model, row.step, row.temperature)), row.sample_id


def _cell_place(cell: calls.Cell) -> tuple:
  """Final models before checkpoints, each as a table has them."""
  model, step, temperature = cell
  known = model in calls.MODELS
  rank = calls.MODELS.index(model) if known else len(calls.MODELS)
  return step is not None, rank, model, step or 0, temperature
