"""Recomputes every number of a report, or of result files, from the rows.

  python -m dpo_jax verify runs/hh
  python -m dpo_jax verify results/eval_one.json results/

A path is a working directory or its report/, an eval_*.json file of the
dpo-replication system, or a directory of such files. Every difference is
printed with its file, its line and both values. Exit codes: 0 all numbers
agree; 1 some do not; 2 nothing that can be verified.
"""

import argparse
import itertools
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dpo_jax.cli import flags
from dpo_jax.core import console
from dpo_jax.io import strict_json
from dpo_jax.report import dpo_replication, load, page, report

_SHOWN = 20
_NUMBER = re.compile(r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
# Another machine may sum in another order, and round the last of six decimals
# the other way. Counts, without a decimal point, are exact.
_TOLERANCE = {
  report.NUMBERS: {"rel_tol": 1e-9, "abs_tol": 1e-12},
  report.TABLE: {"rel_tol": 0.0, "abs_tol": 1.5e-6},
}


def check_report(directory: pathlib.Path) -> list[str]:
  """Differences between a report and its rows; empty if there are none.

  Args:
    directory: the report's own directory; the working directory is its parent.

  Raises:
    ValueError: there is no report, or its rows cannot be read.
  """
  numbers = strict_json.read_object(directory / report.NUMBERS)
  settings = report.recorded(directory / report.NUMBERS)
  composed = report.compose(settings, directory.parent)
  verdicts = directory.parent / settings.verdicts
  wrong = [
    f"{verdicts}: the verdict on {row.unit} is"
    f" {row.verdict}, the judge's reply says"
    f" {' or '.join(sorted(load.possible_verdicts(row.raw, row.order)))}"
    for row in composed.data.contradicted
  ]
  recorded = numbers.pop("figures", None)
  hashes = report.figure_hashes(composed, directory)
  found = _first(verdicts, wrong)
  found += _figure_differences(directory, recorded, hashes)
  for name, expected in composed.texts.items():
    text = _text(directory / name)
    if name == report.NUMBERS:
      text = report.to_json(numbers)
    elif name == report.PAGE:
      text = page.without_images(text)
    path = directory / name
    found += _first(path, _line_differences(path, text, expected))
  return found


def _first(path: pathlib.Path, differences: Iterable[str]) -> list[str]:
  """At most `_SHOWN` differences of a file, and the number of the others."""
  found = [*differences]
  more = len(found) - _SHOWN
  return found[:_SHOWN] + [f"{path}: {more} more differences"] * (more > 0)


def _figure_differences(
  directory: pathlib.Path, recorded: Any, hashes: dict[str, dict[str, str]]
) -> Iterator[str]:
  """Figures of other data than the rows', or whose files were changed."""
  recorded = recorded if isinstance(recorded, dict) else {}
  for name in recorded.keys() - hashes.keys():
    yield f"{directory / report.NUMBERS}: figures.{name:.100}: not of the rows"
  for name, values in hashes.items():
    entry = recorded.get(name)
    entry = entry if isinstance(entry, dict) else {}
    for key, value in values.items():
      if value != entry.get(key):
        suffix = ".pdf" if key == "vector_sha256" else ".png"
        yield (
          f"{(directory / name).with_suffix(suffix)}: {key} is {value:.16},"
          f" recorded is {entry.get(key)!s:.16}"
        )


def _line_differences(
  path: pathlib.Path, text: str, expected: str
) -> Iterator[str]:
  """Lines in which two texts differ; the first only, if their numbers do."""
  lines, right = text.split("\n"), expected.split("\n")
  tolerance = _TOLERANCE.get(path.name)
  wrong = (
    (number, line, other)
    for number, (line, other) in enumerate(
      itertools.zip_longest(lines, right, fillvalue="(nothing)"), 1
    )
    if not _agree(line, other, tolerance)
  )
  if len(lines) == len(right):
    for number, line, other in wrong:
      yield f"{path}:{number}: {_pair(line, other)}"
  else:
    number, line, other = next(wrong)
    yield (
      f"{path} has {len(lines)} lines, the rows give {len(right)}; line"
      f" {number} is {line.strip()!r:.100}, the rows give"
      f" {other.strip()!r:.100}"
    )


def _agree(line: str, other: str, tolerance: dict[str, float] | None) -> bool:
  """Whether two lines are equal but for rounding of their decimals."""
  if line == other or tolerance is None:
    return line == other
  parts, others = _NUMBER.split(line), _NUMBER.split(other)
  return len(parts) == len(others) and all(
    part == right
    or (
      # Odd parts are the numbers.
      index % 2
      and "." in part
      and "." in right
      and math.isclose(float(part), float(right), **tolerance)
    )
    for index, (part, right) in enumerate(zip(parts, others))
  )


def _pair(line: str, other: str) -> str:
  """The first number in which two lines differ, else the start of both."""
  for one, right in zip(_NUMBER.findall(line), _NUMBER.findall(other)):
    if one != right:
      return f"{one}, the rows give {right} ({other.strip():.100})"
  return f"{line.strip()!r:.100}, the rows give {other.strip()!r:.100}"


def _text(path: pathlib.Path) -> str:
  try:
    return strict_json.read_bytes(path).decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax verify",
    description="Recomputes every number of reports and result files.",
  )
  parser.add_argument("path", nargs="+", help="see the module's docstring")
  console.add_flag(parser)
  paths = parser.parse_args(arguments).path
  return flags.checked(lambda: _verify(map(pathlib.Path, paths)))


def _verify(paths: Iterable[pathlib.Path]) -> int:
  found, files = [], []
  for path in paths:
    reports = _reports(path)
    for directory in reports:
      wrong = check_report(directory)
      found += wrong
      state = "differs from" if wrong else "all numbers agree with"
      _print(f"{directory}: {state} its rows")
    if not reports:
      files += _results(path)
  if files:
    evals = dpo_replication.read_all(files)
    wrong = [
      _first(file.path, dpo_replication.differences(file)) for file in evals
    ]
    found += [line for lines in wrong for line in lines]
    _print("\n".join(dpo_replication.lines(evals)))
    count = sum(map(bool, wrong))
    _print(f"{count} of {len(evals)} files disagree with their own rows.")
  for line in found:
    _print(f"DIFFERS {line}")
  return 1 if found else 0


def _reports(path: pathlib.Path) -> list[pathlib.Path]:
  """Report directories of a path."""
  if (path / report.NUMBERS).is_file():
    return [path]
  return sorted(file.parent for file in path.glob(f"report*/{report.NUMBERS}"))


def _results(path: pathlib.Path) -> list[pathlib.Path]:
  """Result files of a path that has no report."""
  if path.is_file():
    return [path]
  if not path.is_dir():
    raise ValueError(f"{path}: no such file or directory")
  files = sorted(path.glob("eval_*.json"))
  if not files:
    raise ValueError(
      f"{path} holds no files eval_*.json, and no report: `python -m dpo_jax"
      f" report {path}` writes one of a working directory"
    )
  return files


def _print(text: str) -> None:
  """Prints text that may hold names from files."""
  console.result(console.visible(text))


if __name__ == "__main__":
  sys.exit(main())
