"""The report of recounted eval_*.json files: a text, a table and a figure."""

import collections
import csv
import functools
import io
import math
import os
import pathlib
from collections.abc import Sequence

from dpo_jax import figures, records
from dpo_jax.interface import errors, markdown
from dpo_jax.reporting import (
  compose,
  drawings,
  eval_files,
  gates,
  page,
  sections,
)
from dpo_jax.reporting.page import browse

FIGURE = "win_rate_temperature.png"
_TITLE = "Result files, recounted"
_OUTCOMES = {"Model": "model", "Chosen": "chosen", "Tie": "tie"}


def write(
  source: str | os.PathLike, output: str | os.PathLike, *, strict: bool
) -> pathlib.Path:
  """Recounts the files of `source` and writes their report into `output`.

  Returns:
    The path of report.md.

  Raises:
    ValueError: there are no such files, or one is malformed.
    errors.Stopped: the report was written, is flagged, and `strict` is set.
  """
  made = compose_report(source)
  output = pathlib.Path(output)
  if output.resolve() == pathlib.Path(source).resolve():
    raise ValueError(f"output={output} must not be the directory of the files")
  output.mkdir(parents=True, exist_ok=True)
  made.numbers["source"] = os.path.relpath(source, output)
  path = compose.save(made, output)
  if made.flags and strict:
    raise errors.Stopped(f"{path} is flagged; see its top")
  return path


def paths(source: str | os.PathLike) -> list[pathlib.Path]:
  """The eval_*.json files of a directory; ValueError if there are none."""
  found = sorted(pathlib.Path(source).glob(eval_files.PATTERN))
  if not found:
    raise ValueError(f"{source} holds no files {eval_files.PATTERN}")
  return found


def compose_report(source: str | os.PathLike) -> compose.Report:
  """The report of the files in `source`, with nothing written."""
  files, recounts = eval_files.read_all(paths(source))
  drawn = [rate for rate in recounts if rate.n]
  pictures = []
  if drawn:
    pictures.append(
      drawings.Figure(
        FIGURE,
        figures.points(drawn),
        functools.partial(figures.win_rate_by_temperature, drawn),
        "Recounted win rate against sampling temperature. Bars are 95% Wilson"
        " intervals, drawn side by side; the dashed line is 50%.",
        drawings.by_temperature(drawn),
      )
    )
  flags = _flags(files)
  method = (
    f"{len(files)} files, {sum(file.n for file in files)} judged rows. A rate"
    " is the model's wins among all rows of a file, as the files themselves"
    " count it, with its 95% Wilson interval. Published is what the file's"
    " header says. Read again is the rate among the rows whose judge's text"
    " names a winner."
  )
  parts = [
    [f"# {_TITLE}"],
    sections.flagged(flags),
    ["## Win rates", "", method],
    _table(recounts),
    *(figure.lines for figure in pictures),
    ["## Verdicts without a winner", "", *_unread(files)],
    ["## Habits of the judge", "", *_habits(files)],
  ]
  text = "\n\n".join("\n".join(lines) for lines in parts if lines)
  numbers = {
    "files": [
      {
        "file": file.path.name,
        "header": file.header,
        "counts": file.counts,
        "missed": len(file.missed),
        "refusals": len(file.refusals),
        "contradicted": len(file.contradicted),
        **compose.plain(rate),
      }
      for file, rate in zip(files, recounts, strict=True)
    ]
  }
  return compose.Report(
    figures=pictures,
    flags=flags,
    texts={
      compose.TABLE: _csv(recounts),
      compose.PAGE: page.render(
        _TITLE,
        sections.flagged(flags),
        [
          page.Section(
            "rates",
            "Win rates",
            [method],
            pictures,
            _table(recounts),
          ),
          page.Section(
            "judge",
            "Judge health",
            ["### Verdicts without a winner", "", *_unread(files)],
            rest=["### Habits of the judge", "", *_habits(files)],
          ),
        ],
        _prompts(files, recounts),
        sections.PLAIN_NAMES,
      ),
      compose.TEXT: text + "\n",
    },
    numbers=numbers,
  )


def lines(
  files: Sequence[eval_files.EvalFile], recounts: Sequence[eval_files.Recount]
) -> list[str]:
  """The recount for a terminal: a table, and what was found on the way."""
  temperatures = sorted({rate.temperature for rate in recounts})
  by_cell = {(rate.model, rate.temperature): rate for rate in recounts}
  models = list(dict.fromkeys(rate.model for rate in recounts))
  table = [("", *(f"T={t:g}" for t in temperatures))]
  for model in models:
    cells = [by_cell.get((model, t)) for t in temperatures]
    table.append((model[:40], *(_short(cell) for cell in cells)))
  widths = [max(map(len, column)) for column in zip(*table)]
  text = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    for row in table
  ]
  missed = sum(len(file.missed) for file in files)
  refusals = sum(len(file.refusals) for file in files)
  rows = [row for file in files for row in file.rows]
  same, first = identical(rows)
  longer, unequal = longer_wins(rows)
  share = f" ({100 * longer / unequal:.1f}%)" if unequal else ""
  return [
    "Wins among all rows, recounted, % [95% Wilson interval]:",
    *text,
    f"{len(rows)} rows in {len(files)} files; {missed} verdicts that the"
    f" judge's text states were missed, {refusals} are refusals.",
    f"{same} rows compare a text with itself; the text shown first won {first}"
    " of these.",
    f"The longer text won {longer} of {unequal} decided rows{share}.",
  ]


def identical(rows: Sequence[eval_files.Row]) -> tuple[int, int]:
  """Rows of a text against itself, and those that the first slot won."""
  same = [row for row in rows if row.identical]
  return len(same), sum(bool(row.first_won) for row in same)


def longer_wins(rows: Sequence[eval_files.Row]) -> tuple[int, int]:
  """Decided rows that the longer text won, and all whose lengths differ."""
  unequal = [
    row
    for row in rows
    if row.verdict in ("Model", "Chosen")
    and row.response_chars != row.chosen_chars
  ]
  won = sum(
    (row.verdict == "Model") == (row.response_chars > row.chosen_chars)
    for row in unequal
  )
  return won, len(unequal)


def _prompts(
  files: Sequence[eval_files.EvalFile], recounts: Sequence[eval_files.Recount]
) -> list[browse.Prompt]:
  """What the files' rows say, by prompt; one prompt may stand there twice."""
  answers = collections.defaultdict(list)
  for file, rate in zip(files, recounts, strict=True):
    cell, seen = (rate.model, None, rate.temperature), collections.Counter()
    for row in file.rows:
      pair = (row.prompt, row.chosen)
      answers[pair].append(_answer(row, cell, seen[pair]))
      seen[pair] += 1
  return [
    browse.Prompt(
      records.content_hash(prompt, chosen), prompt, chosen, tuple(found)
    )
    for (prompt, chosen), found in answers.items()
  ]


def _answer(row: eval_files.Row, cell: tuple, sample: int) -> browse.Answer:
  verdict = _OUTCOMES.get(row.verdict, "missing")
  flags = browse.flagged(row.response, row.chosen, [verdict])
  if row.reread == "refusal":
    flags += ("the judge refused",)
  elif row.reread in _OUTCOMES and row.reread != row.verdict:
    flags += (f"the judge's text says {row.reread}",)
  return browse.Answer(
    cell=cell,
    sample=sample,
    text=row.response,
    tokens=None,
    finish="",
    flags=flags,
    calls=(browse.Call(row.order, verdict, None, row.raw, ""),),
  )


def _flags(files: Sequence[eval_files.EvalFile]) -> list[gates.Flag]:
  flags = []
  for file in files:
    name = markdown.literal(file.path.name)
    if file.differences:
      text = markdown.literal("; ".join(file.differences))
      flags.append(gates.Flag("INCONSISTENT", f"{name}: {text}."))
    if file.contradicted:
      flags.append(
        gates.Flag(
          "INCONSISTENT",
          f"{name}: {len(file.contradicted)} verdicts are not what the judge's"
          f" text says, the first in row {file.contradicted[0]}.",
        )
      )
  return flags


def _table(recounts: Sequence[eval_files.Recount]) -> list[str]:
  rows = [
    (
      sections.name(rate.model),
      str(rate.temperature),
      str(rate.n),
      f"{sections.percent(rate.win_rate)}"
      f" [{sections.percent(rate.low)}, {sections.percent(rate.high)}]",
      sections.percent(rate.published),
      f"{sections.percent(rate.read_rate)} of {rate.read_n}",
    )
    for rate in recounts
  ]
  header = ("model", "T", "rows", "recounted %", "published %", "read again %")
  return markdown.table(header, rows)


def _unread(files: Sequence[eval_files.EvalFile]) -> list[str]:
  rows = [
    (
      markdown.literal(file.path.name),
      str(file.counts["Tie"] + file.counts["Error"]),
      str(len(file.missed)),
      str(len(file.refusals)),
    )
    for file in files
    if file.missed or file.refusals or file.counts["Tie"] + file.counts["Error"]
  ]
  if not rows:
    return ["There are none."]
  header = ("file", "ties and errors", "the text names a winner", "refusals")
  return markdown.table(header, rows)


def _habits(files: Sequence[eval_files.EvalFile]) -> list[str]:
  rows = [row for file in files for row in file.rows]
  decided = [row.first_won for row in rows if row.first_won is not None]
  same, first = identical(rows)
  longer, unequal = longer_wins(rows)

  def share(part: int, whole: int) -> str:
    rate = part / whole if whole else math.nan
    return f"{part} of {whole} ({sections.percent(rate)}%)"

  return markdown.table(
    ("the text that won", "of decided rows"),
    [
      ("was shown first", share(sum(decided), len(decided))),
      ("was longer", share(longer, unequal)),
      ("was shown first, both being the same", share(first, same)),
    ],
  )


def _csv(recounts: Sequence[eval_files.Recount]) -> str:
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  extra = ("read_n", "read_rate", "published")
  writer.writerow([*compose.FIRST_COLUMNS, *extra])
  for rate in recounts:
    values = [getattr(rate, name) for name in (*compose.FIRST_COLUMNS, *extra)]
    writer.writerow(
      f"{value:.6f}" if isinstance(value, float) and index != 2 else value
      for index, value in enumerate(values)
    )
  return buffer.getvalue()


def _short(rate: eval_files.Recount | None) -> str:
  if rate is None:
    return ""
  ends = f"[{100 * rate.low:.0f},{100 * rate.high:.0f}]"
  return f"{sections.percent(rate.win_rate)} {ends}"
