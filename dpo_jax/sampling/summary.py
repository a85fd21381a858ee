"""Table of responses: lengths, and counts of suspicious ones.

A response loops if less than half of its word trigrams are distinct.
"""

import dataclasses
import statistics
from collections.abc import Iterable

from dpo_jax.io import records

# Shorter texts do not count as loops.
_FEWEST_TRIGRAMS = 8
_DISTINCT = 0.5

_HEADER = (
  "model",
  "T",
  "responses",
  "tokens: mean",
  "median",
  "most",
  "empty",
  "looping",
  "cut",
  "human turn",
  "mean log-prob",
)


def distinct_trigrams(text: str) -> float:
  """Share of distinct word trigrams; 1 for a short text."""
  words = text.split()
  trigrams = list(zip(words, words[1:], words[2:]))
  if len(trigrams) < _FEWEST_TRIGRAMS:
    return 1.0
  return len(set(trigrams)) / len(trigrams)


def loops(text: str) -> bool:
  """Whether a response repeats itself."""
  return distinct_trigrams(text) < _DISTINCT


@dataclasses.dataclass(frozen=True)
class Line:
  """The responses of one model and step at one temperature.

  Attributes:
    model: its name; `step` is None for a final model.
    responses: their number.
    mean_tokens: of a response; `median_tokens` and `most_tokens` likewise.
    empty: responses without a word; `looping`, those that loop; `cut`, those
      ended by max_new_tokens; `human_turn`, those ended by a human turn.
    mean_logp: mean of the responses' mean log-probs, where a row has one.
  """

  model: str
  step: int | None
  temperature: float
  responses: int
  mean_tokens: float
  median_tokens: float
  most_tokens: int
  empty: int
  looping: int
  cut: int
  human_turn: int
  mean_logp: float | None


def summary(rows: Iterable[records.Response]) -> list[Line]:
  """A line for each model, step and temperature, in order."""
  groups: dict[tuple, list[records.Response]] = {}
  for row in rows:
    groups.setdefault((row.model, row.step, row.temperature), []).append(row)
  return [_line(*group, rows) for group, rows in groups.items()]


def lines(table: Iterable[Line]) -> list[str]:
  """The table as aligned text, with a header."""
  cells = [_HEADER, *map(_cells, table)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return [
    "  ".join(
      cell.rjust(width) if at else cell.ljust(width)
      for at, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in cells
  ]


def _line(model, step, temperature, rows) -> Line:
  lengths = [row.token_count for row in rows]
  logps = [row.mean_logp for row in rows if row.mean_logp is not None]
  return Line(
    model=model,
    step=step,
    temperature=temperature,
    responses=len(rows),
    mean_tokens=statistics.fmean(lengths),
    median_tokens=statistics.median(lengths),
    most_tokens=max(lengths),
    empty=sum(not row.response.strip() for row in rows),
    looping=sum(loops(row.response) for row in rows),
    cut=sum(row.finish_reason == "length" for row in rows),
    human_turn=sum(row.finish_reason == "turn" for row in rows),
    mean_logp=statistics.fmean(logps) if logps else None,
  )


def _cells(line: Line) -> tuple[str, ...]:
  return (
    line.model if line.step is None else f"{line.model}, step {line.step}",
    f"{line.temperature:g}",
    str(line.responses),
    f"{line.mean_tokens:.1f}",
    f"{line.median_tokens:g}",
    str(line.most_tokens),
    str(line.empty),
    str(line.looping),
    str(line.cut),
    str(line.human_turn),
    "-" if line.mean_logp is None else f"{line.mean_logp:.3f}",
  )
