"""Report of a working directory: report.md, report.html, numbers and figures.

  python -m dpo_jax report runs/hh --strict

Every number is computed from the rows of verdicts/, responses/ and the runs'
metrics; `verify` composes the report again and compares.

Exit codes: 0 written; 1 flagged, with --strict; 2 nothing to report, or a
malformed row or setting.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from dpo_jax import winrates
from dpo_jax.cli import flags as flags_lib
from dpo_jax.core import console, errors, settings
from dpo_jax.io import atomic, hashing, markdown, strict_json
from dpo_jax.report import checks, figures, load, page
from dpo_jax.report import sections as sections_lib
from dpo_jax.report.page import browse

ReportSettings = load.ReportSettings

TEXT = "report.md"
PAGE = "report.html"
NUMBERS = "numbers.json"
TABLE = "win_rates.csv"

_DEFAULTS = ReportSettings(
  title="Win rates against chosen",
  runs=(),
  verdicts="verdicts",
  seed=0,
  resamples=2000,
  confidence=0.95,
  examples=5,
  aa_alpha=0.01,
  first_slot_limit=0.65,
  gold_floor=0.8,
  strict=False,
)
_FIRST_COLUMNS = (
  *("model", "step", "temperature"),
  *("n", "win_rate", "low", "high"),
)


@dataclasses.dataclass(frozen=True)
class Report:
  """A report in memory.

  Attributes:
    texts: of each file, by name; numbers.json without the figures' hashes,
      report.html without its images.
    sections: Markdown of each section without figures, by title.
  """

  data: load.ReportData
  flags: list[checks.Flag]
  figures: list[figures.Figure]
  texts: dict[str, str]
  sections: dict[str, str]


def write(
  report_settings: ReportSettings, workdir: str | os.PathLike
) -> pathlib.Path:
  """Writes the report of `workdir`; returns the path of report.md.

  Raises:
    ValueError: see `load.read`.
    errors.Stopped: the report was written, is flagged, and settings are
      strict.
  """
  workdir = pathlib.Path(workdir)
  composed = compose(report_settings, workdir)
  directory = workdir / report_settings.directory
  directory.mkdir(exist_ok=True)
  for figure in composed.figures:
    figure.save(directory / figure.name)
  for name in set(figures.NAMES) - {figure.name for figure in composed.figures}:
    # A figure of an earlier report would pass for one of this report.
    for path in (directory / name, (directory / name).with_suffix(".pdf")):
      path.unlink(missing_ok=True)
  numbers = json.loads(composed.texts[NUMBERS])
  numbers["figures"] = figure_hashes(composed, directory)
  texts = composed.texts | {
    NUMBERS: to_json(numbers),
    PAGE: page.with_images(composed.texts[PAGE], composed.figures),
  }
  # report.md is last: `replicate` skips the stage when it exists.
  for name, text in texts.items():
    atomic.write_text(directory / name, text)
  path = directory / TEXT
  if composed.flags and report_settings.strict:
    names = ", ".join(dict.fromkeys(flag.name for flag in composed.flags))
    raise errors.Stopped(f"{path} is flagged: {names}; see its top")
  return path


def of(workdir: str | os.PathLike) -> Report:
  """The report of `workdir`, not written.

  Settings are those of the last report, or defaults.

  Raises:
    ValueError: see `load.read`.
  """
  return compose(_settings(workdir, _DEFAULTS.verdicts), workdir)


def _settings(workdir: str | os.PathLike, verdicts: str) -> ReportSettings:
  """Settings of the last report of these verdicts, or defaults."""
  defaults = dataclasses.replace(_DEFAULTS, verdicts=verdicts)
  path = pathlib.Path(workdir, defaults.directory, NUMBERS)
  return recorded(path) if path.is_file() else defaults


def compose(
  report_settings: ReportSettings, workdir: str | os.PathLike
) -> Report:
  """The report of `workdir`, not written; raises as `load.read`."""
  data = load.read(report_settings, workdir)
  flags = checks.flags(data)
  drawn = figures.of(data)
  sections = _sections(data, drawn)
  notes = sections_lib.flags(flags)
  title = [f"# {markdown.literal(data.settings.title)}"]
  shown = {section.title: section.markdown() for section in sections}
  parts = ["\n".join(lines) for lines in (title, notes) if lines]
  return Report(
    data=data,
    flags=flags,
    figures=drawn,
    texts={
      NUMBERS: _numbers(data, flags),
      TABLE: _table(data.rates),
      # The page has the browser instead of examples.
      PAGE: page.render(
        data.settings.title,
        notes,
        [section for section in sections if section.id != "examples"],
        browse.prompts(data.responses, data.verdicts, data.contradicted),
      ),
      TEXT: "\n\n".join([*parts, *shown.values()]) + "\n",
    },
    sections={
      section.title: section.markdown(images=False) for section in sections
    },
  )


def recorded(path: pathlib.Path) -> ReportSettings:
  """Settings of a written report, from its numbers.json."""
  found = strict_json.read_object(path)
  if "settings" not in found:
    raise ValueError(f"{path} has no field 'settings'")
  return settings.build(ReportSettings, found["settings"], f"{path}: settings")


def figure_hashes(
  composed: Report, directory: pathlib.Path
) -> dict[str, dict[str, str]]:
  """Fingerprint of each figure's data, and SHA-256 of its PNG and PDF."""
  found = {}
  for figure in composed.figures:
    png = directory / figure.name
    found[figure.name] = {"data": figure.fingerprint} | {
      key: hashing.file_hash(path) if path.is_file() else "missing"
      for key, path in (
        ("sha256", png),
        ("vector_sha256", png.with_suffix(".pdf")),
      )
    }
  return found


def _sections(
  data: load.ReportData, drawn: Sequence[figures.Figure]
) -> list[page.Section]:
  by_name = {figure.name: figure for figure in drawn}

  def shown(*names):
    return [by_name[name] for name in names if name in by_name]

  sections = [
    page.Section(
      "rates",
      "Win rates",
      [
        ["### Is base < SFT < DPO?", "", *sections_lib.ordering(data)],
        *shown(
          "win_rate_temperature.png",
          "win_rate_step.png",
          "win_rate_length.png",
        ),
        ["### Final models", "", *sections_lib.final_models(data)],
        sections_lib.over_training(data),
        sections_lib.by_subset(data),
        sections_lib.differences(data),
      ],
    ),
    page.Section("judge", "Judge health", [sections_lib.judge_health(data)]),
    page.Section(
      "reward",
      "Implicit reward on held-out pairs",
      [
        sections_lib.reward_accuracy(data),
        *shown("reward_margins.png", "reward_accuracy.png"),
      ],
    ),
    page.Section("responses", "Responses", [sections_lib.responses(data)]),
    page.Section("examples", "Examples", [sections_lib.examples(data)]),
    page.Section(
      "training",
      "Training",
      [*shown("training_curves.png"), sections_lib.training_data(data)],
    ),
  ]
  return [section for section in sections if any(section.blocks)]


def _numbers(data: load.ReportData, flags: list[checks.Flag]) -> str:
  """Every estimate in full precision, as JSON."""
  names = ("health", "controls", "rates", "differences", "slopes")
  return to_json(
    {
      "settings": data.settings,
      "flags": flags,
      "data_fingerprint": data.data_fingerprint,
      **{
        name: getattr(data, name)
        for name in (*names, "by_subset", "lengths", "by_length")
      },
    }
  )


def to_json(value: Any) -> str:
  """Text of numbers.json."""
  return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
  """`value` as plain JSON; None for a number that is not finite."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = dataclasses.asdict(value)
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _table(rates: Sequence[winrates.WinRate]) -> str:
  """The rates as CSV, a column for each field, `_FIRST_COLUMNS` first."""
  fields = [field.name for field in dataclasses.fields(winrates.WinRate)]
  columns = sorted(fields, key=lambda name: name not in _FIRST_COLUMNS)
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(columns)
  for rate in rates:
    writer.writerow(_cell(column, getattr(rate, column)) for column in columns)
  return buffer.getvalue()


def _cell(column: str, value: Any) -> Any:
  """A cell of the CSV; None, the step of a final model, is empty."""
  if isinstance(value, float) and column != "temperature":
    return f"{value:.6f}"
  # A spreadsheet would compute such a name as a formula.
  if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
    return f"'{value}"
  return value


def main(arguments: Sequence[str] | None = None) -> int:
  flags = _parser().parse_args(arguments)
  given = {
    field.name: getattr(flags, field.name)
    for field in dataclasses.fields(ReportSettings)
    if getattr(flags, field.name) is not None
  }

  def call():
    base = _settings(flags.directory, flags.verdicts or _DEFAULTS.verdicts)
    values = dataclasses.asdict(base) | given
    path = write(
      settings.build(ReportSettings, values, "report"), flags.directory
    )
    console.result(str(path), path=str(path))
    return 0

  return flags_lib.checked(call)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax report",
    description="Writes DIRECTORY/report from the rows in DIRECTORY. Flags that"
    " are not given are those of the last report, or defaults.",
  )
  parser.add_argument("directory", help="of a run")
  console.add_flag(parser)
  for field in dataclasses.fields(ReportSettings):
    default = getattr(_DEFAULTS, field.name)
    flag = f"--{field.name}"
    if field.name == "strict":
      parser.add_argument(flag, action="store_true", help="flags are failures")
    elif field.name == "runs":
      parser.add_argument(
        flag, nargs="*", help="training runs in DIRECTORY (default: none)"
      )
    else:
      text = f"see configs/demo.py (default: {default})"
      parser.add_argument(flag, type=type(default), help=text)
  return parser


if __name__ == "__main__":
  sys.exit(main())
