"""Judge calls: which count, and each prompt's score.

The unit of every statistic is the prompt. Calls on one prompt (both orders,
several samples) are not independent, so they are averaged into one score in
[0, 1] before anything is counted or resampled.
"""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

MODELS = ("base", "sft", "dpo")
"""Order of a table's rows; other models follow alphabetically."""

SCORES = {"model": 1.0, "tie": 0.5, "chosen": 0.0}
"""Score of the model by verdict; other verdicts have none."""

Cell = tuple[str, int | None, float]
"""A model, its training step or None for the final one, and a temperature."""


class Call(Protocol):
  """The fields that are read of a `records.Verdict`."""

  @property
  def key(self) -> str: ...
  @property
  def prompt_id(self) -> str: ...
  @property
  def model(self) -> str: ...
  @property
  def step(self) -> int | None: ...
  @property
  def temperature(self) -> float: ...
  @property
  def sample_id(self) -> int: ...
  @property
  def order(self) -> str: ...
  @property
  def control(self) -> str: ...
  @property
  def verdict(self) -> str: ...
  @property
  def score(self) -> float | None: ...
  @property
  def judge(self) -> str: ...
  @property
  def template_hash(self) -> str: ...
  @property
  def response_chars(self) -> int: ...
  @property
  def chosen_chars(self) -> int: ...


T = TypeVar("T", bound=Call)


def current(verdicts: Iterable[T]) -> list[T]:
  """The calls that count, controls included.

  A later row replaces a missing verdict, and a verdict on a text that was
  edited since (its `key` is another).

  Raises:
    ValueError: judges or templates are mixed, or a call has two verdicts.
  """
  verdicts = list(verdicts)
  rows: dict[tuple, list[T]] = collections.defaultdict(list)
  for call in verdicts:
    row = rows[(*comparison(call), call.order, call.control)]
    if row and (row[-1].verdict == "missing" or row[-1].key != call.key):
      row.clear()
    row.append(call)
  counted = [call for row in rows.values() for call in row]
  # A judge whose every verdict was missing, and was replaced, is no other one.
  judged = [call for call in verdicts if call.verdict != "missing"]
  for field in ("judge", "template_hash"):
    names = sorted({getattr(call, field) for call in judged + counted})
    if len(names) > 1:
      raise ValueError(
        f"rows of several values of {field} in one table: {', '.join(names)};"
        " report each from a directory of its own"
      )
  twice = [name for name, row in rows.items() if len(row) > 1]
  if twice:
    raise ValueError(
      f"{len(twice)} judge calls occur more than once, the first is (model,"
      " step, temperature, prompt, sample, order, control) ="
      f" {twice[0]}; keep one row of each"
    )
  return counted


def ordinary(verdicts: Iterable[T]) -> list[T]:
  """The current calls on models' responses: no controls."""
  return [call for call in current(verdicts) if not call.control]


def by_cell(verdicts: Iterable[T]) -> dict[Cell, list[T]]:
  """Ordinary calls by (model, step, temperature), in the order of a table.

  Models as in `MODELS`, the final model before its checkpoints, then by step
  and temperature.
  """
  cells = collections.defaultdict(list)
  for call in ordinary(verdicts):
    cells[call.model, call.step, call.temperature].append(call)

  def rank(cell: Cell) -> tuple:
    model, step, temperature = cell
    place = MODELS.index(model) if model in MODELS else len(MODELS)
    return place, model, -1 if step is None else step, temperature

  return {cell: cells[cell] for cell in sorted(cells, key=rank)}


def by_prompt(calls: Iterable[T]) -> dict[str, list[T]]:
  groups = collections.defaultdict(list)
  for call in calls:
    groups[call.prompt_id].append(call)
  return groups


def mean_score(calls: Iterable[Call], unread: float | None = None) -> float:
  """Mean score of one prompt's calls; NaN without any.

  `unread` is the score of a call without a verdict; None leaves it out.
  """
  scores = [SCORES.get(call.verdict, unread) for call in calls]
  known = [score for score in scores if score is not None]
  return math.fsum(known) / len(known) if known else math.nan


def units(calls: Iterable[Call]) -> dict[str, float]:
  """Each prompt's mean score; prompts without any verdict are left out."""
  scores = {name: mean_score(group) for name, group in by_prompt(calls).items()}
  return {name: x for name, x in scores.items() if not math.isnan(x)}


def length_units(calls: Iterable[Call]) -> dict[str, float]:
  """Each prompt's mean difference in characters, response minus chosen."""
  return {
    prompt: float(
      np.mean([call.response_chars - call.chosen_chars for call in group])
    )
    for prompt, group in by_prompt(calls).items()
  }


def shared(tables: Sequence[dict[str, float]]) -> tuple[list[str], np.ndarray]:
  """The prompts in all tables, sorted, and their scores [n, tables]."""
  prompts = sorted(set.intersection(*map(set, tables))) if tables else []
  rows = [[table[prompt] for table in tables] for prompt in prompts]
  return prompts, np.asarray(rows, float).reshape(len(prompts), len(tables))


def comparison(call: Call) -> tuple:
  """What identifies the two texts of a call."""
  return (
    call.model,
    call.step,
    call.temperature,
    call.prompt_id,
    call.sample_id,
  )
