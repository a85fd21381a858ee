"""Reports put together from their material, with nothing written until asked.

A report is a few texts, the numbers in them for machines, and figures. Texts
and numbers depend on the rows alone, so that making them again and comparing
is a proof.
"""

import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from dpo_jax import winrates
from dpo_jax.io import atomic, hashing, markdown
from dpo_jax.report import checks, excerpts, figures, load, page, sections
from dpo_jax.report.page import browse

TEXT = "report.md"
PAGE = "report.html"
NUMBERS = "numbers.json"
TABLE = "win_rates.csv"

_FIRST_COLUMNS = (
  *("model", "step", "temperature"),
  *("n", "win_rate", "low", "high"),
)


@dataclasses.dataclass(frozen=True)
class Report:
  """A report before it is written.

  Texts are by file name; the page's images are drawn when it is written.
  """

  figures: list[figures.Figure]
  flags: list[checks.Flag]
  texts: dict[str, str]
  numbers: dict[str, Any]

  @property
  def sections(self) -> dict[str, str]:
    """Markdown of each section, by its title, without the figures."""
    text = re.sub(r"(?m)^!\[.*\)$", "", self.texts[TEXT])
    parts = text.split("\n## ")[1:]
    return {part.partition("\n")[0]: f"## {part}" for part in parts}


def compose(
  settings: load.ReportSettings, workdir: str | os.PathLike
) -> Report:
  """The report of `workdir`, with nothing written; errors as `report.write`."""
  found = load.read(settings, workdir)
  flags = checks.flags(found)
  drawn = figures.of(found)
  shown = {figure.name: figure.lines for figure in drawn}
  parts = [
    [f"# {markdown.literal(settings.title)}"],
    sections.flagged(flags),
    ["## Win rates", "", *sections.judged(found)],
    sections.final_table(found),
    shown.get("win_rate_temperature.png", []),
    ["### Is base < SFT < DPO?", "", *sections.ordering(found)],
    sections.step_table(found),
    shown.get("win_rate_step.png", []),
    shown.get("win_rate_length.png", []),
    sections.subset_table(found),
    sections.differences(found),
    ["## Judge health", "", *sections.judge_health(found)],
    ["## Implicit reward on held-out pairs", "", *excerpts.accuracy(found)],
    shown.get("reward_margins.png", []),
    shown.get("reward_accuracy.png", []),
    ["## Answers", "", *excerpts.answers(found)],
    excerpts.examples(found),
    excerpts.training(found, shown.get("training_curves.png", [])),
  ]
  text = "\n\n".join("\n".join(lines) for lines in parts if lines)
  return Report(
    figures=drawn,
    flags=flags,
    texts={
      TABLE: _table(found.rates),
      PAGE: _page(found, flags, drawn),
      TEXT: text + "\n",
    },
    numbers=_numbers(found, flags),
  )


def save(made: Report, directory: pathlib.Path) -> pathlib.Path:
  """Writes a report's files, report.md last, and returns its path.

  A figure that is not drawn now is removed: one of an earlier report would
  pass for this one's.
  """
  drawn = {}
  for figure in made.figures:
    path = figure.draw(directory / figure.name)
    drawn[figure.name] = {
      "data": figure.fingerprint,
      "sha256": hashing.file_hash(path),
      "vector_sha256": hashing.file_hash(figures.vector(path)),
    }
  for name in set(figures.NAMES) - drawn.keys():
    (directory / name).unlink(missing_ok=True)
    figures.vector(directory / name).unlink(missing_ok=True)
  numbers = json.dumps(
    made.numbers | {"figures": drawn}, indent=1, allow_nan=False
  )
  atomic.write_text(directory / NUMBERS, numbers + "\n")
  for name, text in made.texts.items():
    if name == PAGE:
      text = page.illustrate(text, made.figures)
    atomic.write_text(directory / name, text)
  return directory / TEXT


def _page(
  found: load.Material,
  flags: list[checks.Flag],
  drawn: list[figures.Figure],
) -> str:
  """The same sections as a page, with the answers to browse."""
  names = sections.PLAIN_NAMES
  return page.render(
    found.settings.title,
    sections.flagged(flags),
    [
      page.Section(
        "rates",
        "Win rates",
        lead=["### Is base < SFT < DPO?", "", *sections.ordering(found)],
        pictures=[figure for figure in drawn if figure.ends],
        rest=[
          *sections.judged(found),
          "",
          *sections.final_table(found),
          "",
          *sections.step_table(found),
          "",
          *sections.subset_table(found),
          "",
          *sections.differences(found),
        ],
      ),
      page.Section("judge", "Judge health", sections.judge_health(found)),
      page.Section(
        "reward",
        "Implicit reward on held-out pairs",
        excerpts.accuracy(found),
      ),
      page.Section("answers", "Answers", excerpts.answers(found)),
      page.Section("training", "Training", excerpts.training(found, [])[2:]),
    ],
    browse.prompts(found),
    names,
  )


def _numbers(found: load.Material, flags: list[checks.Flag]) -> dict[str, Any]:
  """What a machine reads of a report: every estimate, to its last digit."""
  names = ("health", "controls", "rates", "differences", "slopes")
  return _plain(
    {
      "settings": dataclasses.asdict(found.settings),
      "flags": [dataclasses.asdict(flag) for flag in flags],
      "data_fingerprint": found.data_fingerprint,
      **{
        name: getattr(found, name)
        for name in (*names, "by_subset", "lengths", "by_length")
      },
    }
  )


def _plain(value: Any) -> Any:
  """`value` as JSON holds it; a number that is not finite is None."""
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
    values = {column: getattr(rate, column) for column in columns}
    # A step of None, a final model, is written as an empty field.
    writer.writerow(
      f"{value:.6f}"
      if isinstance(value, float) and column != "temperature"
      else value
      for column, value in values.items()
    )
  return buffer.getvalue()
