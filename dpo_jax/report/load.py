"""Everything that a report is made of, read from a working directory.

Rows are read and checked against each other here; nothing is computed that is
not a number of the report, and nothing else is a source of one.
"""

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from dpo_jax import winrates
from dpo_jax.core import settings as settings_lib
from dpo_jax.io import metrics, records, strict_json
from dpo_jax.judging import questions
from dpo_jax.judging import verdicts as parser
from dpo_jax.winrates import controls, intervals, paired
from dpo_jax.winrates import rates as rates_lib

_MAX_ROWS_BYTES = 4 * 2**30
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERDICTS = re.compile(r"verdicts(-[A-Za-z0-9_-]{1,60})?")
_REWARDS = re.compile(r"reward (\S+) against (\S+)")


@dataclasses.dataclass(frozen=True)
class ReportSettings:
  """What a report shows, and when it is flagged.

  Fields:
    title: heading of the report.
    runs: run directories beneath the working directory, in training order.
    verdicts: directory of the verdicts beneath the working directory,
      "verdicts" or "verdicts-NAME"; the report is then "report" or
      "report-NAME".
    seed: of the bootstrap and of the choice of examples.
    resamples: bootstrap resamples.
    confidence: of every interval, in (0, 1).
    examples: prompts shown with the answers of all final models.
    aa_alpha: the A/A control is flagged if a fair judge would leave 50% as
      far with this probability or less, in (0, 1).
    first_slot_limit: the first-slot rate is flagged above it and below 1 less
      it, if its interval excludes 50%; in [0.5, 1].
    gold_floor: the gold control is flagged below this share of right answers,
      in [0, 1].
    strict: a flagged report is a failure; it is written all the same.
  """

  title: str
  runs: tuple[str, ...]
  verdicts: str
  seed: int
  resamples: int
  confidence: float
  examples: int
  aa_alpha: float
  first_slot_limit: float
  gold_floor: float
  strict: bool

  def __post_init__(self):
    if not _VERDICTS.fullmatch(self.verdicts):
      raise ValueError(
        f"verdicts={self.verdicts!r:.80} must be 'verdicts' or"
        " 'verdicts-NAME', with letters, digits, _ and - in NAME"
      )
    for name in self.runs:
      if not _NAME.fullmatch(name):
        raise ValueError(
          f"{name!r:.80} must be the name of a directory in the working"
          " directory: letters, digits, '.', '_' and '-', at most 100"
        )
    if len(set(self.runs)) < len(self.runs):
      raise ValueError(f"runs={self.runs} names a run twice")
    settings_lib.check(self)
    intervals.Settings(self.seed, self.resamples, self.confidence)

  @property
  def directory(self) -> str:
    """Of the report, beneath the working directory."""
    return "report" + self.verdicts.removeprefix("verdicts")


@dataclasses.dataclass(frozen=True)
class Material:
  """The rows, and every number that is estimated from them.

  `verdicts` are the current ordinary calls, `judge_run` what the judge left
  about its last run (empty if nothing), `data_fingerprint` a hash of all
  prompts and chosen answers (two reports of one are about the same questions),
  `by_subset` the rates of final models on the prompts of each part of the
  dataset (none where there are not several), `odd` the calls whose verdict is
  not what their own text says.
  """

  settings: ReportSettings
  verdicts: list[records.Verdict]
  responses: list[records.Response]
  metrics: dict[str, list[dict]]
  manifests: dict[str, dict]
  judge_run: dict[str, Any]
  data_fingerprint: str
  rates: list[winrates.WinRate]
  by_subset: dict[str, list[winrates.WinRate]]
  health: winrates.JudgeHealth
  controls: controls.Controls
  differences: list[paired.Difference]
  slopes: list[paired.BetaSlope]
  lengths: list[rates_lib.LengthControlled]
  by_length: list[rates_lib.LengthBin]
  odd: list[records.Verdict]

  @property
  def level(self) -> str:
    """The intervals' confidence, as "95%"."""
    return f"{100 * self.settings.confidence:g}%"


def read(settings: ReportSettings, workdir: str | os.PathLike) -> Material:
  """The material of a working directory.

  Raises:
    ValueError: there are no verdicts, responses or metrics to report, a row
      is malformed, stands twice, or rows of several judges, templates or
      texts of one prompt are mixed.
  """
  workdir = pathlib.Path(workdir)
  files = verdict_files(settings, workdir)
  every = winrates.current(row for rows in files.values() for row in rows)
  ordinary = [row for row in every if not row.control]
  if not ordinary:
    raise ValueError(
      f"{workdir / settings.verdicts} has no verdict rows to report: run"
      " judge.py"
    )
  responses = _responses(workdir / "responses")
  _check_texts(workdir / "responses", responses)
  sizes = intervals.Settings(
    settings.seed, settings.resamples, settings.confidence
  )
  return Material(
    settings=settings,
    verdicts=ordinary,
    responses=responses,
    metrics={run: _metrics(workdir / run) for run in settings.runs},
    manifests={
      run: _object(workdir / run / "manifest.json") for run in settings.runs
    },
    judge_run=_object(workdir / settings.verdicts / "judge.json"),
    data_fingerprint=questions.fingerprint(
      # An empty reference says nothing about a model: it is not judged.
      row
      for row in responses
      if row.chosen.strip()
    ),
    rates=winrates.win_rates(ordinary, sizes),
    by_subset={
      name: winrates.win_rates(calls, sizes)
      for name, calls in _by_subset(ordinary, responses).items()
    },
    health=winrates.judge_health(ordinary, sizes),
    controls=controls.controls(every, sizes),
    differences=paired.differences(ordinary, sizes),
    slopes=paired.beta_slopes(ordinary, sizes),
    lengths=rates_lib.length_controlled(ordinary, sizes),
    by_length=rates_lib.by_length(ordinary, sizes),
    odd=odd(every),
  )


def _by_subset(
  verdicts: Iterable[records.Verdict], responses: Iterable[records.Response]
) -> dict[str, list[records.Verdict]]:
  """Calls on final models by their prompt's subset; {} if it is one alone."""
  names = {row.prompt_id: row.subset for row in responses if row.subset}
  found: dict[str, list[records.Verdict]] = {}
  for call in verdicts:
    if call.step is None and call.prompt_id in names:
      found.setdefault(names[call.prompt_id], []).append(call)
  return dict(sorted(found.items())) if len(found) > 1 else {}


def verdict_files(
  settings: ReportSettings, workdir: pathlib.Path
) -> dict[pathlib.Path, list[records.Verdict]]:
  """The verdict rows of every file, controls among them."""
  directory = workdir / settings.verdicts
  return {path: _rows(path, records.Verdict) for path in _files(directory)}


def odd(verdicts: Iterable[records.Verdict]) -> list[records.Verdict]:
  """The calls whose verdict is not what the judge's own text says.

  A missing verdict with a cause may have any text, and a refusal may be said
  beside the text: there only a text that names a winner speaks against it.
  """
  return [row for row in verdicts if row.raw.strip() and _is_odd(row)]


def _is_odd(row: records.Verdict) -> bool:
  said = reread(row.raw, row.order)
  if row.verdict in ("missing", "refusal"):
    return not row.error and row.verdict not in said and "missing" not in said
  return row.verdict not in said


def reread(raw: str, order: str) -> set[str]:
  """The verdicts that a judge's text may be taken for."""
  rewards = _REWARDS.fullmatch(raw.strip())
  if rewards:
    first, second = map(float, rewards.groups())
    # Rewards are rounded: equal ones may differ in what is not shown.
    letters = (
      {"A", "B", "tie"} if first == second else set("AB"[first < second])
    )
  else:
    letters = {
      read(raw, ties=ties)
      for read in (parser.read, parser.read_json)
      for ties in (False, True)
    }
    # Text is no JSON, and a tie is none where it may not be called.
    letters = letters - {"missing"} or letters
  slots = {"A": "model", "B": "chosen"}
  if order == "chosen_first":
    slots = {"A": "chosen", "B": "model"}
  return {slots.get(letter, letter) for letter in letters}


def _responses(directory: pathlib.Path) -> list[records.Response]:
  rows = [
    row for path in _files(directory) for row in _rows(path, records.Response)
  ]
  if not rows:
    raise ValueError(
      f"{directory} has no response rows to report: run sample.py"
    )
  counts = collections.Counter(row.unit for row in rows)
  twice = [unit for unit, count in counts.items() if count > 1]
  if twice:
    raise ValueError(
      f"{directory}: {len(twice)} responses stand more than once,"
      f" the first is (prompt, model, step, temperature, sample) = {twice[0]}"
    )
  return rows


def _check_texts(
  directory: pathlib.Path, responses: list[records.Response]
) -> None:
  """One prompt id is one prompt and one chosen answer, in every file."""
  texts = {}
  for row in responses:
    pair = (row.prompt, row.chosen)
    if texts.setdefault(row.prompt_id, pair) != pair:
      raise ValueError(
        f"{directory}: prompt {row.prompt_id!r:.80} stands there with several"
        " texts, so that prompt sets are mixed; report each from a directory"
        " of its own"
      )


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  return sorted(directory.glob("*.jsonl"))


def _rows(path: pathlib.Path, cls) -> list:
  if path.stat().st_size > _MAX_ROWS_BYTES:
    raise ValueError(f"{path} is larger than {_MAX_ROWS_BYTES >> 30} GiB")
  return records.read(path, cls)


def _metrics(run: pathlib.Path) -> list[dict]:
  path = run / metrics.FILE
  if not path.is_file():
    raise ValueError(f"{path} is missing: train {run.name} or leave it out")
  return metrics.read(path)


def _object(path: pathlib.Path) -> dict:
  """A JSON object; {} without the file."""
  return strict_json.read_object(path) if path.is_file() else {}
