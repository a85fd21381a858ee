"""Recount of the eval_*.json files of the dpo-replication system.

Such a file has a header (`win_counts`, `winrates`) and its evidence, `results`:
one judged row each, with the judge's reply. The header is recomputed from the
rows, and the replies are parsed again.
"""

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Literal

from dpo_jax import winrates
from dpo_jax.core import settings
from dpo_jax.io import strict_json
from dpo_jax.judging import verdicts as parser

_RATES = {
  "Model": "model_winrate",
  "Chosen": "chosen_winrate",
  "Tie": "tie_rate",
  "Error": "error_rate",
}
"""Verdict -> field of its rate in the header."""


@dataclasses.dataclass(frozen=True)
class Row:
  """One judged row, with the file's field names."""

  presentation_order: Literal["model_first", "chosen_first"]
  verdict: Literal["Model", "Chosen", "Tie", "Error"]
  raw_gpt4_response: str | None = None

  @property
  def reply_verdict(self) -> str:
    """Verdict of the judge's reply, by our parser."""
    model_first = self.presentation_order == "model_first"
    slots = ("Model", "Chosen") if model_first else ("Chosen", "Model")
    letter = parser.read(self.raw_gpt4_response)
    return dict(zip("AB", slots)).get(letter, letter)

  @property
  def decided(self) -> bool:
    return self.verdict in ("Model", "Chosen")


@dataclasses.dataclass(frozen=True)
class Metadata:
  """Metadata of a file, with its field names."""

  run_name: str
  temperature: float
  total_samples_evaluated: int


@dataclasses.dataclass(frozen=True)
class EvalFile:
  """A file's header and rows.

  Attributes:
    model: base, sft or dpo if the run's name says so, else that name.
    win_counts: verdict -> count, in the header.
    rates: field of `_RATES` -> percent, in the header.
  """

  path: pathlib.Path
  model: str
  metadata: Metadata
  win_counts: dict[str, int]
  rates: dict[str, float]
  rows: list[Row]

  @property
  def cell(self) -> tuple[str, float]:
    return self.model, self.metadata.temperature

  @property
  def counts(self) -> dict[str, int]:
    """Verdict -> count, from the rows."""
    found = collections.Counter(row.verdict for row in self.rows)
    return {verdict: found[verdict] for verdict in _RATES}


def read_all(paths: Sequence[pathlib.Path]) -> list[EvalFile]:
  """The files by model and temperature.

  Two files of one model and temperature are named by their files instead.
  """
  files = [read(path) for path in paths]
  cells = collections.Counter(file.cell for file in files)
  files = [
    dataclasses.replace(file, model=file.path.stem)
    if cells[file.cell] > 1
    else file
    for file in files
  ]
  ranks = {model: rank for rank, model in enumerate(winrates.MODELS)}
  return sorted(
    files, key=lambda file: (ranks.get(file.model, len(ranks)), *file.cell)
  )


def read(path: str | os.PathLike) -> EvalFile:
  """One file.

  Raises:
    ValueError: naming the file and the field, if it is not strict JSON, or a
      field is missing or of another type or value.
  """
  path = pathlib.Path(path)
  content = strict_json.read_object(path)
  try:
    metadata = _build(Metadata, content.get("metadata"), "metadata")
    results = content.get("results")
    if not isinstance(results, list):
      raise ValueError(f"results must be a list, not {results!r:.80}")
    return EvalFile(
      path=path,
      model=_model(metadata.run_name),
      metadata=metadata,
      win_counts=vars(_build(_Counts, content.get("win_counts"), "win_counts")),
      rates=vars(_build(_Rates, content.get("winrates"), "winrates")),
      rows=[
        _build(Row, row, f"results[{index}]")
        for index, row in enumerate(results)
      ],
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


_Counts = dataclasses.make_dataclass("_Counts", [(n, int) for n in _RATES])
_Rates = dataclasses.make_dataclass(
  "_Rates", [(name, float) for name in _RATES.values()]
)


def _build(cls, value: Any, name: str):
  """A `cls` from an object that may have further fields."""
  if isinstance(value, dict):
    value = {
      field.name: value.get(field.name, field.default)
      for field in dataclasses.fields(cls)
      if field.name in value or field.default is not dataclasses.MISSING
    }
  return settings.build(cls, value, name)


def _model(run_name: str) -> str:
  words = re.split(r"[-_]", run_name.lower())
  named = [model for model in winrates.MODELS if model in words]
  return named[0] if len(named) == 1 and "checkpoint" not in words else run_name


def differences(file: EvalFile) -> list[str]:
  """Differences of header and verdicts from the rows and replies."""
  counts, n = file.counts, len(file.rows)
  total = file.metadata.total_samples_evaluated
  found = [
    f"win_counts.{name} is {file.win_counts[name]}, its rows give {count}"
    for name, count in counts.items()
    if file.win_counts[name] != count
  ]
  if total != n:
    found.append(
      f"metadata.total_samples_evaluated is {total}, its rows give {n}"
    )
  for name, field in _RATES.items():
    rate, share = file.rates[field], 100 * counts[name] / n if n else 0.0
    if not math.isclose(rate, share, abs_tol=0.01):
      found.append(f"winrates.{field} is {rate:g}, its rows give {share:g}")
  found += [
    f"results[{index}].verdict is {row.verdict}, its reply says"
    f" {row.reply_verdict}"
    for index, row in enumerate(file.rows)
    if row.decided and row.reply_verdict != row.verdict
  ]
  return [f"{file.path}: {line}" for line in found]


def lines(files: Sequence[EvalFile]) -> list[str]:
  """The recount for a terminal: a table of win rates."""
  temperatures = sorted({file.metadata.temperature for file in files})
  cells = {file.cell: _rate(file) for file in files}
  table = [("", *(f"T={t:g}" for t in temperatures))]
  for model in dict.fromkeys(file.model for file in files):
    rates = [cells.get((model, t), "") for t in temperatures]
    table.append((model[:40], *rates))
  widths = [max(map(len, column)) for column in zip(*table)]
  rows = [row for file in files for row in file.rows]
  missed = sum(
    not row.decided and row.reply_verdict in ("Model", "Chosen") for row in rows
  )
  return [
    "Wins among all rows, recounted, % [95% Wilson interval]:",
    *(
      "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
      for row in table
    ),
    f"{len(rows)} rows in {len(files)} files; {missed} verdicts that the"
    " judge's reply states were missed.",
  ]


def _rate(file: EvalFile) -> str:
  """Wins among all rows, as that system counts, with a Wilson interval."""
  wins, n = file.counts["Model"], len(file.rows)
  low, high = winrates.wilson_interval(wins, n, confidence=0.95)
  rate = f"{100 * wins / n:.1f}" if n else "n/a"
  return f"{rate} [{100 * low:.0f},{100 * high:.0f}]"
