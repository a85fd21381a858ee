"""Recomputes every number of a report, or of result files, from the rows.

  python -m dpo_jax verify runs/hh
  python -m dpo_jax verify results/eval_one.json results/

A path is a working directory or its report/, an eval_*.json file of the
dpo-replication system, or a directory of such files. Every difference is
printed with its file and both numbers. Exit codes: 0 all numbers agree; 1 some
do not; 2 there is nothing that can be verified.
"""

import argparse
import collections
import csv
import difflib
import io
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.core import console
from dpo_jax.io import hashing, strict_json
from dpo_jax.report import compose, dpo_replication, figures, load, page, report

_SHOWN = 20
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def check_report(directory: pathlib.Path) -> list[str]:
  """What differs between a report and its rows; empty if nothing does.

  Args:
    directory: the report's own directory; its rows lie beside it.

  Raises:
    ValueError: there is no report, or its rows cannot be read.
  """
  numbers = strict_json.read(directory / compose.NUMBERS)
  if not isinstance(numbers, dict):
    raise ValueError(f"{directory / compose.NUMBERS} must hold a JSON object")
  settings = report.recorded(directory / compose.NUMBERS)
  made = compose.compose(settings, directory.parent)
  found = _odd(settings, directory.parent)
  recorded = numbers.pop("figures", None)
  expected = json.loads(json.dumps(made.numbers))
  path = directory / compose.NUMBERS
  found += [f"{path}: {line}" for line in _value_differences(numbers, expected)]
  found += _figures(directory, made, recorded)
  path = directory / compose.TABLE
  found += _table_differences(path, _text(path), made.texts[compose.TABLE])
  for name in (compose.TEXT, compose.PAGE):
    path = directory / name
    text = _text(path)
    if name == compose.PAGE:
      text = page.unillustrated(text)
    found += _text_differences(path, text, made.texts[name])
  return found


def _figures(
  directory: pathlib.Path, made: compose.Report, recorded: Any
) -> list[str]:
  """Figures whose data are not the rows', or whose files were changed."""
  found = []
  recorded = recorded if isinstance(recorded, dict) else {}
  for name in sorted(
    recorded.keys() - {figure.name for figure in made.figures}
  ):
    found.append(
      f"{directory / compose.NUMBERS}: figures.{name:.100} is not from the rows"
    )
  for figure in made.figures:
    path = directory / figure.name
    if not path.is_file():
      found.append(f"{path} is missing")
      continue
    vector = figures.vector(path)
    if not vector.is_file():
      found.append(f"{vector} is missing")
      continue
    entry = recorded.get(figure.name)
    entry = entry if isinstance(entry, dict) else {}
    data = "the fingerprint of its data"
    for file, what, value, expected in (
      (path, "its file's sha256", hashing.file_hash(path), entry.get("sha256")),
      (path, data, _drawn(path), figure.fingerprint),
      (path, "its data in numbers.json", entry.get("data"), figure.fingerprint),
      (
        vector,
        "its file's sha256",
        hashing.file_hash(vector),
        entry.get("vector_sha256"),
      ),
      (vector, data, _drawn(vector), figure.fingerprint),
    ):
      if value != expected:
        found.append(
          f"{file}: {what} is {str(value)[:16]}, not {str(expected)[:16]}"
        )
  return found


def _drawn(path: pathlib.Path) -> str | None:
  return figures.drawn(strict_json.read_bytes(path))


def _odd(settings: load.ReportSettings, workdir: pathlib.Path) -> list[str]:
  """Verdict rows that are not what their own raw text says."""
  found = []
  for path, rows in load.verdict_files(settings, workdir).items():
    found += [
      f"{path}: the verdict on {row.unit} is {row.verdict}, its raw text says"
      f" {' or '.join(sorted(load.reread(row.raw, row.order)))}"
      for row in load.odd(rows)
    ]
  return found


def _value_differences(
  found: Any, expected: Any, name: str = ""
) -> Iterator[str]:
  """Lines "a[1].b is 1, the rows give 2" for all in which two values differ."""
  if isinstance(found, dict) and isinstance(expected, dict):
    for key in [*expected, *(key for key in found if key not in expected)]:
      inner = f"{name}.{key}" if name else str(key)
      if key not in found or key not in expected:
        where = "missing" if key not in found else "not from the rows"
        yield f"{inner:.200} is {where}"
      else:
        yield from _value_differences(found[key], expected[key], inner)
  elif isinstance(found, list) and isinstance(expected, list):
    if len(found) != len(expected):
      yield f"{name} has {len(found)} rows, the rows give {len(expected)}"
    for index, (one, other) in enumerate(zip(found, expected)):
      yield from _value_differences(one, other, f"{name}[{index}]")
  elif not _same(found, expected):
    yield f"{name} is {_shown(found)}, the rows give {_shown(expected)}"


def _same(found: Any, expected: Any) -> bool:
  numbers = (int, float)
  if type(found) in numbers and type(expected) in numbers:
    # Another machine may add in another order; counts are exact all the same.
    return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
  return type(found) is type(expected) and found == expected


def _shown(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 100 else f"{text[:100]}…"


def _table_differences(
  path: pathlib.Path, text: str, expected: str
) -> list[str]:
  """Differences of two CSV texts, cell by cell."""
  try:
    rows, right = (list(csv.reader(io.StringIO(t))) for t in (text, expected))
  except csv.Error as error:
    raise ValueError(f"{path}: {error}") from error
  found = []
  if len(rows) != len(right):
    found.append(f"{path} has {len(rows)} lines, the rows give {len(right)}")
  for number, (row, other) in enumerate(zip(rows, right), start=1):
    if len(row) != len(other):
      found.append(
        f"{path}:{number} has {len(row)} cells, the rows give {len(other)}"
      )
    found += [
      f"{path}:{number}: {column} is {cell:.100}, the rows give {made}"
      for column, cell, made in zip(right[0], row, other)
      if not _same_cell(cell, made)
    ]
  return found


def _same_cell(cell: str, made: str) -> bool:
  if cell == made:
    return True
  try:
    # The sixth digit may be rounded otherwise on another machine.
    return "." in made and abs(float(cell) - float(made)) < 1.5e-6
  except ValueError:
    return False


def _text_differences(
  path: pathlib.Path, text: str, expected: str
) -> list[str]:
  """Differences of two texts, each with the numbers that differ."""
  if text == expected:
    return []
  one, other = text.split("\n"), expected.split("\n")
  if len(one) > 2 * len(other) + 1000:
    # Not an edit; matching these lines one by one would take very long.
    return [f"{path} has {len(one)} lines, the rows give {len(other)}"]
  matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
  found = []
  for tag, start, end, begin, stop in matcher.get_opcodes():
    if tag == "equal":
      continue
    for offset in range(max(end - start, stop - begin)):
      left = one[start + offset] if start + offset < end else None
      right = other[begin + offset] if begin + offset < stop else None
      line = start + offset + 1
      if left is None:
        found.append(f"{path}:{line}: a line is missing: {right:.100}")
      elif right is None:
        found.append(f"{path}:{line}: the rows do not give: {left:.100}")
      else:
        found.append(f"{path}:{line}: {_pair(left, right)}")
  return found


def _pair(left: str, right: str) -> str:
  """The first number in which two lines differ, else their first words."""
  for one, other in zip(_NUMBER.findall(left), _NUMBER.findall(right)):
    if one != other:
      return f"{one} stands there, the rows give {other} ({right:.100})"
  return f"{left[:100]!r} stands there, the rows give {right[:100]!r}"


def _text(path: pathlib.Path) -> str:
  try:
    return strict_json.read_bytes(path).decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def _reports(path: pathlib.Path) -> list[pathlib.Path]:
  """The directories of the reports that a path stands for."""
  if (path / compose.NUMBERS).is_file():
    return [path]
  return sorted(file.parent for file in path.glob(f"report*/{compose.NUMBERS}"))


def _results(path: pathlib.Path) -> list[pathlib.Path]:
  """The result files of a directory without a report."""
  try:
    return dpo_replication.paths(path)
  except ValueError as error:
    raise ValueError(
      f"{error}, and no report: `python -m dpo_jax report {path}` writes one"
      " of a working directory"
    ) from None


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax verify",
    description="Recomputes every number of reports and result files.",
  )
  parser.add_argument("path", nargs="+", help="see the module's docstring")
  console.add_flag(parser)
  flags = parser.parse_args(arguments)
  found, files = [], []
  try:
    for name in flags.path:
      path = pathlib.Path(name)
      for directory in (reports := _reports(path)):
        wrong = check_report(directory)
        found += wrong
        state = f"{len(wrong)} differences" if wrong else "all numbers agree"
        _print(f"{directory}: {state} with its rows")
      if reports:
        continue
      if path.is_dir():
        files += _results(path)
      elif path.is_file():
        files.append(path)
      else:
        raise ValueError(f"{path}: no such file or directory")
    if files:
      read = dpo_replication.read_all(files)
      wrong = [dpo_replication.differences(file) for file in read]
      found += [line for lines in wrong for line in lines]
      _print("\n".join(dpo_replication.lines(read)))
      count = sum(map(bool, wrong))
      _print(f"{count} of {len(read)} files disagree with their own rows.")
  except (ValueError, OSError) as error:
    console.error(str(error))
    return 2
  _show(found)
  return 1 if found else 0


def _print(text: str) -> None:
  """Prints what may hold names from files."""
  console.result(console.visible(text))


def _show(found: Sequence[str]) -> None:
  """Prints the differences, `_SHOWN` of each file at most."""
  counts = collections.Counter()
  for line in found:
    # A path may hold a colon; it is the same for every line of its file.
    name = line.partition(": ")[0].rstrip("0123456789").rstrip(":")
    counts[name] += 1
    if counts[name] <= _SHOWN:
      _print(f"DIFFERS {line}")
  for name, count in counts.items():
    if count > _SHOWN:
      _print(f"{name}: {count - _SHOWN} differences more")


if __name__ == "__main__":
  sys.exit(main())
