"""The eval_*.json files of the re-implemented system, recounted.

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
from typing import Any

from dpo_jax import winrates
from dpo_jax.judging import verdicts as parser
from dpo_jax.storage import strict_json
from dpo_jax.winrates import intervals

PATTERN = "eval_*.json"
VERDICTS = ("Model", "Chosen", "Tie", "Error")
_RATES = ("model_winrate", "chosen_winrate", "tie_rate", "error_rate")
_MAX_RAW_CHARS = 20_000
_SLOTS = {
  "model_first": {"A": "Model", "B": "Chosen"},
  "chosen_first": {"A": "Chosen", "B": "Model"},
}
_TEXTS = (
  "prompt",
  "model_response",
  "chosen_response",
  "presentation_order",
  "verdict",
)
_RUN = re.compile(
  r"(?:eval_)?(?P<stem>.+?)[-_]\d+(?:\.\d+)?_\d{8}_\d{6}", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Row:
  """One judged row; `reread` is what its raw text says, by our parser.

  `order` is "model_first" or "chosen_first", `raw` the judge's own text.
  """

  prompt: str
  response: str
  chosen: str
  order: str
  raw: str
  verdict: str
  reread: str
  first_won: bool | None
  response_chars: int
  chosen_chars: int
  identical: bool


@dataclasses.dataclass(frozen=True)
class EvalFile:
  """A file's header against its rows.

  Attributes:
    path: of the file.
    model: base, sft or dpo where the run's name says so, else that name.
    temperature: of sampling.
    header: verdict -> count, as the header says.
    header_rates: verdict -> percent, as the header says.
    header_n: the header's number of samples.
    counts: verdict -> count, recounted from the rows.
    rows: the rows.
  """

  path: pathlib.Path
  model: str
  temperature: float
  header: dict[str, int]
  header_rates: dict[str, float]
  header_n: int
  counts: dict[str, int]
  rows: list[Row]

  @property
  def n(self) -> int:
    return len(self.rows)

  @property
  def missed(self) -> list[int]:
    """Rows without a winner whose text does name one."""
    return [
      index
      for index, row in enumerate(self.rows)
      if row.verdict in ("Tie", "Error") and row.reread in ("Model", "Chosen")
    ]

  @property
  def refusals(self) -> list[int]:
    return [
      index for index, row in enumerate(self.rows) if row.reread == "refusal"
    ]

  @property
  def contradicted(self) -> list[int]:
    """Rows with a winner whose text names the other, or none."""
    return [
      index
      for index, row in enumerate(self.rows)
      if row.verdict in ("Model", "Chosen") and row.reread != row.verdict
    ]

  @property
  def differences(self) -> list[str]:
    """Every number of the header that the rows do not give, with both."""
    found = [
      f"win_counts.{name} is {self.header[name]}, its rows give"
      f" {self.counts[name]}"
      for name in VERDICTS
      if self.header[name] != self.counts[name]
    ]
    if self.header_n != self.n:
      found.append(
        f"metadata.total_samples_evaluated is {self.header_n}, its rows give"
        f" {self.n}"
      )
    for name, field in zip(VERDICTS, _RATES):
      share = 100 * self.counts[name] / self.n if self.n else 0.0
      if not math.isclose(self.header_rates[name], share, abs_tol=0.01):
        found.append(
          f"winrates.{field} is {self.header_rates[name]:g}, its rows give"
          f" {share:g}"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Recount:
  """A file's recounted rate, as figures and tables want it.

  The rate is wins among all rows, as the system counts it, with a Wilson
  interval; `read_rate` is that among the rows whose text names a winner.
  """

  model: str
  step: int | None
  temperature: float
  n: int
  win_rate: float
  low: float
  high: float
  read_n: int
  read_rate: float
  published: float


def read_all(
  paths: list[pathlib.Path], *, confidence: float = 0.95
) -> tuple[list[EvalFile], list[Recount]]:
  """The files, and their rates in the order of a table's rows."""
  files = [read(path) for path in paths]
  names = collections.Counter((file.model, file.temperature) for file in files)
  files = [
    dataclasses.replace(file, model=file.path.stem)
    if names[file.model, file.temperature] > 1
    else file
    for file in files
  ]
  models = winrates.MODELS

  def place(file: EvalFile):
    known = file.model in models
    return (
      models.index(file.model) if known else len(models),
      file.model,
      file.temperature,
    )

  files.sort(key=place)
  return files, [_recount(file, confidence) for file in files]


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


def _file(path: pathlib.Path, content: Any) -> EvalFile:
  metadata = _field(content, "metadata", dict)
  header = _field(content, "win_counts", dict)
  rates = _field(content, "winrates", dict)
  results = _field(content, "results", list)
  rows = [_row(item, f"results[{i}]") for i, item in enumerate(results)]
  counts = collections.Counter(row.verdict for row in rows)
  name = _field(metadata, "run_name", str, "metadata.")
  return EvalFile(
    path=path,
    model=_model(name),
    temperature=_number(metadata, "temperature", "metadata."),
    header={
      verdict: _field(header, verdict, int, "win_counts.")
      for verdict in VERDICTS
    },
    header_rates={
      verdict: _number(rates, field, "winrates.")
      for verdict, field in zip(VERDICTS, _RATES)
    },
    header_n=_field(metadata, "total_samples_evaluated", int, "metadata."),
    counts={verdict: counts[verdict] for verdict in VERDICTS},
    rows=rows,
  )


def _row(item: Any, where: str) -> Row:
  texts = {name: _field(item, name, str, f"{where}.") for name in _TEXTS}
  raw = item.get("raw_gpt4_response")
  if raw is not None and not isinstance(raw, str):
    raise ValueError(f"{where}.raw_gpt4_response must be text or null")
  if len(raw or "") > _MAX_RAW_CHARS:
    raise ValueError(
      f"{where}.raw_gpt4_response has {len(raw)} characters: more than"
      f" {_MAX_RAW_CHARS} are no judge's reply"
    )
  order, verdict = texts["presentation_order"], texts["verdict"]
  if order not in _SLOTS:
    raise ValueError(
      f"{where}.presentation_order is {order!r:.80}, not one of {[*_SLOTS]}"
    )
  if verdict not in VERDICTS:
    raise ValueError(
      f"{where}.verdict is {verdict!r:.80}, not one of {[*VERDICTS]}"
    )
  letter = parser.read(raw)
  decided = verdict in ("Model", "Chosen")
  return Row(
    prompt=texts["prompt"],
    response=texts["model_response"],
    chosen=texts["chosen_response"],
    order=order,
    raw=raw or "",
    verdict=verdict,
    reread=_SLOTS[order].get(letter, letter),
    first_won=verdict == _SLOTS[order]["A"] if decided else None,
    response_chars=len(texts["model_response"]),
    chosen_chars=len(texts["chosen_response"]),
    identical=texts["model_response"].strip()
    == texts["chosen_response"].strip(),
  )


def _recount(file: EvalFile, confidence: float) -> Recount:
  wins, n = file.counts["Model"], file.n
  low, high = intervals.wilson(wins, n, confidence=confidence)
  reread = collections.Counter(row.reread for row in file.rows)
  read_n = reread["Model"] + reread["Chosen"]
  return Recount(
    model=file.model,
    step=None,
    temperature=file.temperature,
    n=n,
    win_rate=wins / n if n else math.nan,
    low=low,
    high=high,
    read_n=read_n,
    read_rate=reread["Model"] / read_n if read_n else math.nan,
    published=file.header_rates["Model"] / 100,
  )


def _model(run_name: str) -> str:
  match = _RUN.fullmatch(run_name)
  stem = match["stem"] if match else run_name
  words = re.split(r"[-_]", stem.lower())
  named = [model for model in winrates.MODELS if model in words]
  return named[0] if len(named) == 1 and "checkpoint" not in stem else stem


def _field(value: Any, name: str, kind: type, where: str = "") -> Any:
  if not isinstance(value, dict):
    raise ValueError(f"{where.rstrip('.') or 'the file'} must be an object")
  if name not in value:
    raise ValueError(f"{where}{name} is missing")
  found = value[name]
  # A bool is an int to Python, and to nobody else.
  if not isinstance(found, kind) or isinstance(found, bool):
    raise ValueError(
      f"{where}{name} is {found!r:.80}, which is not {_KINDS[kind]}"
    )
  return found


_KINDS = {dict: "an object", list: "a list", int: "a whole number", str: "text"}


def _number(value: Any, name: str, where: str) -> float:
  found = value.get(name)
  if name not in value:
    raise ValueError(f"{where}{name} is missing")
  if not isinstance(found, int | float) or isinstance(found, bool):
    raise ValueError(f"{where}{name} is {found!r:.80}, which is not a number")
  # Larger whole numbers than floats there are would raise another error.
  if not abs(found) < 1e9:
    raise ValueError(f"{where}{name} is {found!r:.80}: too large")
  return float(found)
