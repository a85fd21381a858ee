"""A table of answers: how long they are, and how many look wrong.

An answer loops if it says the same words again and again: of the triples of
consecutive words of an answer of some length, less than half are distinct.
"""

import statistics
from collections.abc import Iterable

from dpo_jax import records

# Fewer triples than these do not make a loop.
_LEAST = 8
_DISTINCT = 0.5

_HEADER = (
  "model",
  "T",
  "answers",
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
  """Share of distinct triples of words among all of them; 1 of a short text."""
  words = text.split()
  triples = list(zip(words, words[1:], words[2:]))
  if len(triples) < _LEAST:
    return 1.0
  return len(set(triples)) / len(triples)


def loops(text: str) -> bool:
  """Whether an answer says the same words again and again."""
  return distinct_trigrams(text) < _DISTINCT


def lines(rows: Iterable[records.Response]) -> list[str]:
  """The table, one line for each model, step and temperature, in order."""
  groups: dict[tuple, list[records.Response]] = {}
  for row in rows:
    groups.setdefault((row.model, row.step, row.temperature), []).append(row)
  cells = [_HEADER, *(_cells(*group) for group in groups.items())]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return [
    "  ".join(
      cell.rjust(width) if at else cell.ljust(width)
      for at, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in cells
  ]


def _cells(group, rows) -> tuple[str, ...]:
  name, step, temperature = group
  lengths = [row.token_count for row in rows]
  logps = [row.mean_logp for row in rows if row.mean_logp is not None]
  return (
    name if step is None else f"{name}, step {step}",
    f"{temperature:g}",
    str(len(rows)),
    f"{statistics.fmean(lengths):.1f}",
    f"{statistics.median(lengths):g}",
    str(max(lengths)),
    str(sum(not row.response.strip() for row in rows)),
    str(sum(loops(row.response) for row in rows)),
    str(sum(row.finish_reason == "length" for row in rows)),
    str(sum(row.finish_reason == "turn" for row in rows)),
    f"{statistics.fmean(logps):.3f}" if logps else "-",
  )
