"""The eval_*.json files of the dpo-replication system, recounted.

Such a file has a header (`win_counts` and `winrates`) and its own evidence
(`results`, one judged row each, with the judge's text). Nothing in the header
is believed: verdicts are counted, and the judge's text is read again.
"""

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from dpo_jax import winrates
from dpo_jax.io import strict_json
from dpo_jax.judging import verdicts as parser

_RATES = {
  "Model": "model_winrate",
  "Chosen": "chosen_winrate",
  "Tie": "tie_rate",
  "Error": "error_rate",
}
"""Verdict -> the header's field of its rate."""
_MAX_RAW_CHARS = 20_000
_SLOTS = {
  "model_first": {"A": "Model", "B": "Chosen"},
  "chosen_first": {"A": "Chosen", "B": "Model"},
}
_KINDS = {
  dict: "an object",
  list: "a list",
  int: "a whole number",
  float: "a number",
  str: "text",
}
_RUN = re.compile(
  r"(?:eval_)?(?P<stem>.+?)[-_]\d+(?:\.\d+)?_\d{8}_\d{6}", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One judged row.

  Attributes:
    verdict: Model, Chosen, Tie or Error, as the file has it.
    reread: what the judge's text says, by our parser.
    first_won: whether the text shown first won.
    longer: characters of the model's response more than of the chosen one.
    identical: the two texts are the same.
  """

  verdict: str
  reread: str
  first_won: bool
  longer: int
  identical: bool


@dataclasses.dataclass(frozen=True)
class EvalFile:
  """A file's header and its rows.

  Attributes:
    path: of the file.
    model: base, sft or dpo where the run's name says so, else that name.
    temperature: of sampling.
    header: verdict -> count, as the header says.
    header_rates: verdict -> percent, as the header says.
    header_n: the header's number of samples.
    rows: the rows.
  """

  path: pathlib.Path
  model: str
  temperature: float
  header: dict[str, int]
  header_rates: dict[str, float]
  header_n: int
  rows: list[Row]

  @property
  def counts(self) -> dict[str, int]:
    """Verdict -> count, from the rows."""
    found = collections.Counter(row.verdict for row in self.rows)
    return {verdict: found[verdict] for verdict in _RATES}

  @property
  def missed(self) -> list[int]:
    """Rows without a winner whose text does name one."""
    return [
      index
      for index, row in enumerate(self.rows)
      if not _decided(row) and row.reread in ("Model", "Chosen")
    ]

  @property
  def refusals(self) -> list[int]:
    return [i for i, row in enumerate(self.rows) if row.reread == "refusal"]


def paths(directory: pathlib.Path) -> list[pathlib.Path]:
  """The eval_*.json files of a directory; ValueError if there are none."""
  found = sorted(directory.glob("eval_*.json"))
  if not found:
    raise ValueError(f"{directory} holds no files eval_*.json")
  return found


def read_all(files: Sequence[pathlib.Path]) -> list[EvalFile]:
  """The files by model and temperature; two of one cell by their file names."""
  read_files = [read(path) for path in files]
  cells = collections.Counter((f.model, f.temperature) for f in read_files)
  found = [
    dataclasses.replace(file, model=file.path.stem)
    if cells[file.model, file.temperature] > 1
    else file
    for file in read_files
  ]
  ranks = {model: rank for rank, model in enumerate(winrates.MODELS)}
  return sorted(
    found,
    key=lambda f: (ranks.get(f.model, len(ranks)), f.model, f.temperature),
  )


def read(path: str | os.PathLike) -> EvalFile:
  """One file.

  Raises:
    ValueError: naming the file and the field, if it is too large, not strict
      JSON, or a field is missing or of another type or value.
  """
  path = pathlib.Path(path)
  content = strict_json.read(path)
  try:
    return _file(path, content)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def differences(file: EvalFile) -> list[str]:
  """What the header or a verdict says and the rows do not, with both."""
  counts, n = file.counts, len(file.rows)
  found = [
    f"win_counts.{name} is {file.header[name]}, its rows give {counts[name]}"
    for name in counts
    if file.header[name] != counts[name]
  ]
  if file.header_n != n:
    found.append(
      f"metadata.total_samples_evaluated is {file.header_n}, its rows give {n}"
    )
  for name, field in _RATES.items():
    share = 100 * counts[name] / n if n else 0.0
    if not math.isclose(file.header_rates[name], share, abs_tol=0.01):
      found.append(
        f"winrates.{field} is {file.header_rates[name]:g}, its rows give"
        f" {share:g}"
      )
  found += [
    f"results[{index}].verdict is {row.verdict}, its raw text says {row.reread}"
    for index, row in enumerate(file.rows)
    if _decided(row) and row.reread != row.verdict
  ]
  return [f"{file.path}: {line}" for line in found]


def lines(files: Sequence[EvalFile]) -> list[str]:
  """The recount for a terminal: a table, and what was found on the way."""
  temperatures = sorted({file.temperature for file in files})
  cells = {(file.model, file.temperature): _rate(file) for file in files}
  table = [("", *(f"T={t:g}" for t in temperatures))]
  for model in dict.fromkeys(file.model for file in files):
    rates = [cells.get((model, t), "") for t in temperatures]
    table.append((model[:40], *rates))
  widths = [max(map(len, column)) for column in zip(*table)]
  rows = [row for file in files for row in file.rows]
  missed = sum(len(file.missed) for file in files)
  refusals = sum(len(file.refusals) for file in files)
  same = [row for row in rows if row.identical]
  unequal = [row for row in rows if _decided(row) and row.longer]
  longer = sum((r.verdict == "Model") == (r.longer > 0) for r in unequal)
  share = f" ({100 * longer / len(unequal):.1f}%)" if unequal else ""
  return [
    "Wins among all rows, recounted, % [95% Wilson interval]:",
    *(
      "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
      for row in table
    ),
    f"{len(rows)} rows in {len(files)} files; {missed} verdicts that the"
    f" judge's text states were missed, {refusals} are refusals.",
    f"{len(same)} rows compare a text with itself; the text shown first won"
    f" {sum(row.first_won for row in same)} of these.",
    f"The longer text won {longer} of {len(unequal)} decided rows{share}.",
    *(
      f"NOTE {file.path}: {len(file.missed)} verdicts missed, in results"
      f" {file.missed}; {len(file.refusals)} refusals, {file.refusals}"
      for file in files
      if file.missed or file.refusals
    ),
  ]


def _decided(row: Row) -> bool:
  return row.verdict in ("Model", "Chosen")


def _rate(file: EvalFile) -> str:
  """Wins among all rows, as the system counts, with a Wilson interval."""
  wins, n = file.counts["Model"], len(file.rows)
  low, high = winrates.wilson_interval(wins, n, confidence=0.95)
  rate = f"{100 * wins / n:.1f}" if n else "n/a"
  return f"{rate} [{100 * low:.0f},{100 * high:.0f}]"


def _file(path: pathlib.Path, content: Any) -> EvalFile:
  metadata = _field(content, "metadata", dict)
  header = _field(content, "win_counts", dict)
  rates = _field(content, "winrates", dict)
  results = _field(content, "results", list)
  return EvalFile(
    path=path,
    model=_model(_field(metadata, "metadata.run_name", str)),
    temperature=_field(metadata, "metadata.temperature", float),
    header={
      verdict: _field(header, f"win_counts.{verdict}", int)
      for verdict in _RATES
    },
    header_rates={
      verdict: _field(rates, f"winrates.{field}", float)
      for verdict, field in _RATES.items()
    },
    header_n=_field(metadata, "metadata.total_samples_evaluated", int),
    rows=[_row(item, f"results[{i}]") for i, item in enumerate(results)],
  )


def _row(item: Any, where: str) -> Row:
  response = _field(item, f"{where}.model_response", str)
  chosen = _field(item, f"{where}.chosen_response", str)
  order = _one_of(item, f"{where}.presentation_order", _SLOTS)
  verdict = _one_of(item, f"{where}.verdict", _RATES)
  raw = item.get("raw_gpt4_response")
  if raw is not None and not isinstance(raw, str):
    raise ValueError(f"{where}.raw_gpt4_response must be text or null")
  if raw and len(raw) > _MAX_RAW_CHARS:
    raise ValueError(
      f"{where}.raw_gpt4_response has {len(raw)} characters: more than"
      f" {_MAX_RAW_CHARS} are no judge's reply"
    )
  letter = parser.read(raw)
  return Row(
    verdict=verdict,
    reread=_SLOTS[order].get(letter, letter),
    first_won=verdict == _SLOTS[order]["A"],
    longer=len(response) - len(chosen),
    identical=response.strip() == chosen.strip(),
  )


def _model(run_name: str) -> str:
  match = _RUN.fullmatch(run_name)
  stem = match["stem"] if match else run_name
  words = re.split(r"[-_]", stem.lower())
  named = [model for model in winrates.MODELS if model in words]
  return named[0] if len(named) == 1 and "checkpoint" not in stem else stem


def _one_of(value: Any, name: str, allowed: dict[str, Any]) -> str:
  found = _field(value, name, str)
  if found not in allowed:
    raise ValueError(f"{name} is {found!r:.80}, not one of {[*allowed]}")
  return found


def _field(value: Any, name: str, kind: type) -> Any:
  """The field that `name` ends in, of its type, or ValueError."""
  where, _, key = name.rpartition(".")
  if not isinstance(value, dict):
    raise ValueError(f"{where or 'the file'} must be an object")
  if key not in value:
    raise ValueError(f"{name} is missing")
  found = value[key]
  # A bool is an int to Python, and to nobody else.
  kinds = (int, float) if kind is float else kind
  if not isinstance(found, kinds) or isinstance(found, bool):
    raise ValueError(f"{name} is {found!r:.80}, which is not {_KINDS[kind]}")
  # Larger whole numbers than floats there are would raise another error.
  if kind is float and not abs(found) < 1e9:
    raise ValueError(f"{name} is {found!r:.80}: too large")
  return float(found) if kind is float else found
