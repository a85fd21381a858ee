"""Judge calls: which of them count, and what a prompt scores in them.

The unit of every statistic is the prompt. Calls about one prompt (both orders,
several samples) are not independent, so they are averaged into one number in
[0, 1] before anything is counted or resampled.
"""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

MODELS = ("base", "sft", "dpo")
"""The order of a table's rows; other names follow in alphabetical order."""

SCORES = {"model": 1.0, "tie": 0.5, "chosen": 0.0}
"""What a verdict gives the model; any other verdict says nothing."""

Cell = tuple[str, int | None, float]
"""A model, its training step or None, and a sampling temperature."""


class Call(Protocol):
  """What is read of a judge call; `records.Verdict` has it."""

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
  """The calls that count, controls among them.

  A call without a verdict is asked again, and so is one about a text that has
  changed since (its `key` is another): the last row of a call then replaces
  the earlier ones.

  Raises:
    ValueError: judges or templates are mixed, or an answered call stands
      twice.
  """
  verdicts = list(verdicts)
  rows: dict[tuple, list[T]] = collections.defaultdict(list)
  for call in verdicts:
    row = rows[(*comparison(call), call.order, call.control)]
    if row and (row[-1].verdict == "missing" or row[-1].key != call.key):
      row.clear()
    row.append(call)
  standing = [call for row in rows.values() for call in row]
  # A judge that answered nothing, and was then replaced, has no part in it.
  answered = [call for call in verdicts if call.verdict != "missing"]
  for field in ("judge", "template_hash"):
    names = sorted({getattr(call, field) for call in answered + standing})
    if len(names) > 1:
      raise ValueError(
        f"rows of several values of {field} in one table: {', '.join(names)};"
        " report each from a directory of its own"
      )
  twice = [name for name, row in rows.items() if len(row) > 1]
  if twice:
    raise ValueError(
      f"{len(twice)} judge calls stand more than once, the first is (model,"
      " step, temperature, prompt, sample, order, control) ="
      f" {twice[0]}; keep one row of each"
    )
  return standing


def ordinary(verdicts: Iterable[T]) -> list[T]:
  """The current calls that compare a model's answer: no controls."""
  return [call for call in current(verdicts) if not call.control]


def by_cell(verdicts: Iterable[T]) -> dict[Cell, list[T]]:
  """Calls by (model, step, temperature), in the order of a table's rows.

  Models come as base, sft, dpo, others; the final model before checkpoints,
  then by step and temperature.
  """
  cells = collections.defaultdict(list)
  for call in verdicts:
    cells[call.model, call.step, call.temperature].append(call)
  return {cell: cells[cell] for cell in sorted(cells, key=_rank)}


def by_prompt(calls: Iterable[T]) -> dict[str, list[T]]:
  groups = collections.defaultdict(list)
  for call in calls:
    groups[call.prompt_id].append(call)
  return groups


def units(calls: Iterable[Call]) -> dict[str, float]:
  """Each prompt's mean score; prompts without any verdict are left out."""
  scores = {
    prompt: unit(group, None) for prompt, group in by_prompt(calls).items()
  }
  return {prompt: found[0] for prompt, found in scores.items() if found}


def unit(calls: Sequence[Call], unread: float | None) -> list[float]:
  """A prompt's score as a list of one, or of none without any verdict.

  `unread` is the score of a call without a verdict; None leaves it out.
  """
  scores = [SCORES.get(call.verdict, unread) for call in calls]
  known = [score for score in scores if score is not None]
  return [math.fsum(known) / len(known)] if known else []


def length_units(calls: Iterable[Call]) -> dict[str, float]:
  """Each prompt's mean difference in characters, answer less chosen."""
  return {
    prompt: float(
      np.mean([call.response_chars - call.chosen_chars for call in group])
    )
    for prompt, group in by_prompt(calls).items()
  }


def shared(tables: Sequence[dict[str, float]]) -> tuple[list[str], np.ndarray]:
  """The prompts that all tables have, sorted, and their scores [n, tables]."""
  prompts = sorted(set.intersection(*map(set, tables))) if tables else []
  rows = [[table[prompt] for table in tables] for prompt in prompts]
  return prompts, np.asarray(rows, float).reshape(len(prompts), len(tables))


def comparison(call: Call) -> tuple:
  return (
    call.model,
    call.step,
    call.temperature,
    call.prompt_id,
    call.sample_id,
  )


def _rank(cell: Cell) -> tuple:
  model, step, temperature = cell
  rank = MODELS.index(model) if model in MODELS else len(MODELS)
  return rank, model, -1 if step is None else step, temperature
