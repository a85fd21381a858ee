"""The report of a working directory: report.md, win_rates.csv and figures.

Nothing is stored that could be recomputed: every number is made here from the
rows of verdicts/, responses/ and the runs' metrics.
"""

import collections
import csv
import dataclasses
import io
import json
import os
import pathlib
import re
from collections.abc import Sequence

from dpo_jax import figures, markdown, metrics, records, sections, winrates

_CSV_COLUMNS = ("model", "step", "temperature", "n", "win_rate", "low", "high")


@dataclasses.dataclass(frozen=True)
class ReportSettings:
  """What a report shows.

  Fields:
    title: heading of the report.
    runs: run directories beneath the working directory, in training order.
    seed: of the bootstrap and of the choice of examples.
    resamples: bootstrap resamples.
    confidence: of every interval, in (0, 1).
    examples: prompts shown with the answers of all final models.
  """

  title: str
  runs: tuple[str, ...]
  seed: int
  resamples: int
  confidence: float
  examples: int

  def __post_init__(self):
    for run in self.runs:
      if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run):
        raise ValueError(
          f"run {run!r:.80} must be the name of a directory in the working"
          " directory: letters, digits, '.', '_' and '-', at most 100"
        )
    if len(set(self.runs)) < len(self.runs):
      raise ValueError(f"runs={self.runs} names a run twice")
    if self.examples < 0:
      raise ValueError(f"examples={self.examples} must be 0 or more")
    if self.seed < 0:
      raise ValueError(f"seed={self.seed} must be 0 or more")


def write(settings: ReportSettings, workdir: str | os.PathLike) -> pathlib.Path:
  """Makes `workdir`/report from the rows beneath `workdir`.

  Returns:
    The path of report.md, which is written last.

  Raises:
    ValueError: there are no verdicts, responses or metrics to report, a row
      is malformed, stands twice, or rows of several judges are mixed.
  """
  workdir = pathlib.Path(workdir)
  material = _read(settings, workdir)
  directory = workdir / "report"
  directory.mkdir(exist_ok=True)
  pictures = _draw(material, directory)
  records.write_atomic(directory / "win_rates.csv", _csv(material.rates))
  parts = [
    [f"# {markdown.literal(settings.title)}"],
    sections.warnings(material),
    ["## Win rates", "", *sections.judged(material)],
    sections.final_table(material),
    pictures.get("win_rate_temperature", []),
    ["### Is base < SFT < DPO?", "", *sections.ordering(material)],
    sections.step_table(material),
    pictures.get("win_rate_step", []),
    ["## Judge health", "", *sections.health(material)],
    ["## Implicit reward on held-out pairs", "", *sections.accuracy(material)],
    ["## Answers", "", *sections.answers(material)],
    sections.examples(material),
    sections.training(material, pictures.get("training_curves", [])),
  ]
  text = "\n\n".join("\n".join(lines) for lines in parts if lines)
  path = directory / "report.md"
  records.write_atomic(path, text + "\n")
  return path


def _read(settings: ReportSettings, workdir: pathlib.Path) -> sections.Material:
  verdicts = winrates.current(
    _rows(workdir / "verdicts", records.Verdict, "judge.py")
  )
  responses = _rows(workdir / "responses", records.Response, "sample.py")
  counts = collections.Counter(row.unit for row in responses)
  twice = [unit for unit, count in counts.items() if count > 1]
  if twice:
    raise ValueError(
      f"{workdir / 'responses'}: {len(twice)} responses stand more than once,"
      f" the first is (prompt, model, step, temperature, sample) = {twice[0]}"
    )
  rates = winrates.win_rates(
    verdicts,
    seed=settings.seed,
    resamples=settings.resamples,
    confidence=settings.confidence,
  )
  return sections.Material(
    seed=settings.seed,
    resamples=settings.resamples,
    confidence=settings.confidence,
    examples=settings.examples,
    verdicts=verdicts,
    responses=responses,
    rates=rates,
    metrics={run: _metrics(workdir / run) for run in settings.runs},
    manifests={run: _manifest(workdir / run) for run in settings.runs},
  )


def _rows(directory: pathlib.Path, cls, maker: str) -> list:
  files = sorted(directory.glob("*.jsonl"))
  rows = [row for file in files for row in records.read(file, cls)]
  if not rows:
    raise ValueError(
      f"{directory} has no {cls.__name__.lower()} rows to report: run {maker}"
    )
  return rows


def _metrics(run: pathlib.Path) -> list[dict]:
  path = run / metrics.FILE
  if not path.is_file():
    raise ValueError(f"{path} is missing: train {run.name} or leave it out")
  try:
    rows = metrics.read(path)
  except ValueError as error:
    raise ValueError(f"{path} holds a line that is not JSON: {error}") from None
  for number, row in enumerate(rows, start=1):
    if not isinstance(row, dict) or type(row.get("step")) is not int:
      raise ValueError(f"{path}:{number} is not a row of metrics with a step")
  return rows


def _manifest(run: pathlib.Path) -> dict:
  path = run / "manifest.json"
  if not path.is_file():
    return {}
  try:
    manifest = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if not isinstance(manifest, dict):
    raise ValueError(f"{path} must hold a JSON object")
  return manifest


def _draw(
  material: sections.Material, directory: pathlib.Path
) -> dict[str, list[str]]:
  """Draws what there is to draw; lines of Markdown that show each figure."""
  level = sections.level_of(material)
  rates = material.rates
  made = {}

  def picture(name: str, wanted: bool, draw, data, caption: str) -> None:
    path = directory / f"{name}.png"
    if wanted:
      draw(data, path)
      title, _, _ = caption.partition(".")
      made[name] = [f"![{title}]({path.name})", "", caption]
    else:
      # One of an earlier report would pass for this one's.
      path.unlink(missing_ok=True)

  picture(
    "win_rate_temperature",
    any(rate.step is None and rate.n for rate in rates),
    figures.win_rate_by_temperature,
    rates,
    "Win rate of the final models against sampling temperature. Bars are"
    f" {level} intervals, drawn side by side; the dashed line is 50%.",
  )
  picture(
    "win_rate_step",
    any(rate.step is not None and rate.n for rate in rates),
    figures.win_rate_by_step,
    rates,
    "Win rate of checkpoints against the training step. Bars are"
    f" {level} intervals, drawn side by side; the dashed line is 50%.",
  )
  picture(
    "training_curves",
    any(material.metrics.values()),
    figures.training_curves,
    material.metrics,
    "Training curves. Pale: every step; dark: running mean; points: held out.",
  )
  return made


def _csv(rates: Sequence[winrates.WinRate]) -> str:
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(_CSV_COLUMNS)
  for rate in rates:
    numbers = (rate.win_rate, rate.low, rate.high)
    # A step of None, a final model, is written as an empty field.
    writer.writerow(
      [rate.model, rate.step, rate.temperature, rate.n]
      + [f"{number:.6f}" for number in numbers]
    )
  return buffer.getvalue()
