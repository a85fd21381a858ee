"""Report data: rows of a working directory, and every estimate from them."""

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from dpo_jax import winrates
from dpo_jax.core import settings as settings_lib
from dpo_jax.io import metrics, records, rundir, strict_json
from dpo_jax.judging import questions
from dpo_jax.judging import verdicts as parser
from dpo_jax.winrates import controls, intervals, paired
from dpo_jax.winrates import rates as rates_lib

NAMES = {"sft": "SFT", "dpo": "DPO"}
"""Display names of models and runs; others are shown as they are."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERDICTS = re.compile(r"verdicts(-[A-Za-z0-9_-]{1,60})?")
_NUMBER = r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
_REWARDS = re.compile(f"reward {_NUMBER} against {_NUMBER}")


@dataclasses.dataclass(frozen=True)
class ReportSettings:
  """Content of a report, and thresholds of its checks.

  Fields:
    title: heading of the report.
    runs: run directories in the working directory, in training order.
    verdicts: directory of the verdicts in the working directory, "verdicts" or
      "verdicts-NAME"; the report's is then "report" or "report-NAME".
    seed: of the bootstrap and of the choice of examples.
    resamples: bootstrap resamples.
    confidence: level of every interval, in (0, 1).
    examples: number of prompts shown with the responses of all final models.
    aa_alpha: significance level of the A/A control, in (0, 1).
    first_slot_limit: the first-slot rate is flagged above it and below 1 less
      it, if its interval excludes 50%; in [0.5, 1].
    gold_floor: the gold control is flagged below this share of correct
      verdicts, in [0, 1].
    strict: whether a flagged report is a failure; it is written all the same.
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
    """Name of the report's directory in the working directory."""
    return "report" + self.verdicts.removeprefix("verdicts")


@dataclasses.dataclass(frozen=True)
class ReportData:
  """Rows of a working directory and the estimates from them.

  Attributes:
    verdicts: the latest judge call of each comparison, without controls.
    judge_run: judge.json, the judge's summary of its last run; {} without one.
    data_fingerprint: hash of all prompts and chosen responses; reports of
      equal fingerprints are about the same questions.
    by_subset: win rates of final models by subset of the dataset; {} unless
      there are several.
    contradicted: judge calls, controls included, whose verdict is not what the
      judge's reply says.
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
  contradicted: list[records.Verdict]

  @property
  def level(self) -> str:
    """Confidence level of the intervals, such as "95%"."""
    return f"{100 * self.settings.confidence:g}%"


def read(settings: ReportSettings, workdir: str | os.PathLike) -> ReportData:
  """Reads a working directory and estimates every number of its report.

  Raises:
    ValueError: there are no verdicts, responses or metrics; a row is malformed
      or duplicated; or several judges, templates or prompt sets are mixed.
  """
  workdir = pathlib.Path(workdir)
  verdicts = winrates.current(
    _rows(workdir / settings.verdicts, records.Verdict)
  )
  ordinary = [row for row in verdicts if not row.control]
  if not ordinary:
    raise ValueError(
      f"{workdir / settings.verdicts} has no verdict rows to report: run"
      " judge.py"
    )
  responses = _responses(workdir / "responses")
  sizes = intervals.Settings(
    settings.seed, settings.resamples, settings.confidence
  )
  return ReportData(
    settings=settings,
    verdicts=ordinary,
    responses=responses,
    metrics={run: run_metrics(workdir / run) for run in settings.runs},
    manifests={
      run: _object(workdir / run / "manifest.json") for run in settings.runs
    },
    judge_run=_object(workdir / settings.verdicts / "judge.json"),
    data_fingerprint=questions.fingerprint(
      # Responses to prompts with an empty reference are not judged.
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
    controls=controls.controls(verdicts, sizes),
    differences=paired.differences(ordinary, sizes),
    slopes=paired.beta_slopes(ordinary, sizes),
    lengths=rates_lib.length_controlled(ordinary, sizes),
    by_length=rates_lib.by_length(ordinary, sizes),
    contradicted=contradicted(verdicts),
  )


def contradicted(verdicts: Iterable[records.Verdict]) -> list[records.Verdict]:
  """Judge calls whose verdict is not what the judge's reply says."""
  return [row for row in verdicts if row.raw.strip() and _contradicted(row)]


def _contradicted(row: records.Verdict) -> bool:
  possible = possible_verdicts(row.raw, row.order)
  if row.verdict in ("missing", "refusal"):
    # With a recorded error any reply will do, and a refusal may come from
    # outside the reply: only a reply that names a winner contradicts these.
    return not row.error and not possible & {row.verdict, "missing"}
  return row.verdict not in possible


def possible_verdicts(reply: str, order: str) -> set[str]:
  """Verdicts that a judge's reply parses to under some reply format."""
  rewards = _REWARDS.fullmatch(reply.strip())
  if rewards:
    first, second = map(float, rewards.groups())
    # Replies show rounded rewards: equal ones may have any order.
    letters = (
      {"A", "B", "tie"} if first == second else set("AB"[first < second])
    )
  else:
    letters = {
      read(reply, ties=ties)
      for read in (parser.read, parser.read_json)
      for ties in (False, True)
    }
    # A reply in one format is "missing" to the parsers of the others.
    letters = letters - {"missing"} or letters
  slots = {"A": "model", "B": "chosen"}
  if order == "chosen_first":
    slots = {"A": "chosen", "B": "model"}
  return {slots.get(letter, letter) for letter in letters}


def _by_subset(
  verdicts: Iterable[records.Verdict], responses: Iterable[records.Response]
) -> dict[str, list[records.Verdict]]:
  """Calls on final models by subset of their prompt; {} unless several."""
  subsets = {row.prompt_id: row.subset for row in responses if row.subset}
  found: dict[str, list[records.Verdict]] = {}
  for call in verdicts:
    if call.step is None and call.prompt_id in subsets:
      found.setdefault(subsets[call.prompt_id], []).append(call)
  return dict(sorted(found.items())) if len(found) > 1 else {}


def _responses(directory: pathlib.Path) -> list[records.Response]:
  rows = _rows(directory, records.Response)
  if not rows:
    raise ValueError(
      f"{directory} has no response rows to report: run sample.py"
    )
  counts = collections.Counter(row.unit for row in rows)
  twice = [unit for unit, count in counts.items() if count > 1]
  if twice:
    raise ValueError(
      f"{directory}: {len(twice)} responses are duplicated, the first is"
      f" (prompt, model, step, temperature, sample) = {twice[0]}"
    )
  texts: dict[str, tuple[str, str]] = {}
  for row in rows:
    pair = (row.prompt, row.chosen)
    if texts.setdefault(row.prompt_id, pair) != pair:
      raise ValueError(
        f"{directory}: prompt {row.prompt_id!r:.80} has several texts, so"
        " prompt sets are mixed; report each from a directory of its own"
      )
  return rows


def _rows(directory: pathlib.Path, cls) -> list:
  return [
    row
    for path in sorted(directory.glob("*.jsonl"))
    for row in records.read(path, cls)
  ]


def run_metrics(run: pathlib.Path) -> list[dict]:
  path = run / metrics.FILE
  if not path.is_file():
    raise ValueError(f"{path} is missing: train {run.name} or leave it out")
  rundir.refuse_damaged(run, metrics.FILE)
  return metrics.read(path)


def _object(path: pathlib.Path) -> dict:
  return strict_json.read_object(path) if path.is_file() else {}
