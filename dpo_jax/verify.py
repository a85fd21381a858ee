"""Recomputes every number of a report, or of result files, from the rows.

  python -m dpo_jax.verify runs/hh
  python -m dpo_jax.verify results/eval_one.json results/

A path is a working directory or its report/, an eval_*.json file of the
dpo-replication system, or a directory of such files. Every difference is
printed with its file and both numbers. Exit codes: 0 all numbers agree; 1 some
do not; 2 there is nothing that can be verified.
"""

import argparse
import collections
import json
import pathlib
import re
import struct
import sys
import zlib
from collections.abc import Sequence
from typing import Any

from dpo_jax import report
from dpo_jax.interface import console
from dpo_jax.reporting import (
  compose,
  differences,
  material,
  page,
  seed_files,
)
from dpo_jax.storage import strict_json

_SHOWN = 20
_SUBJECT = re.compile(rb"/Subject \(([0-9a-f]{64})\)")


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
  figures = numbers.pop("figures", None)
  expected = json.loads(json.dumps(made.numbers))
  path = directory / compose.NUMBERS
  found += [
    f"{path}: {line}" for line in differences.of_values(numbers, expected)
  ]
  found += _figures(directory, made, figures)
  path = directory / compose.TABLE
  found += differences.of_tables(path, _text(path), made.texts[compose.TABLE])
  for name in (compose.TEXT, compose.PAGE):
    path = directory / name
    text = _text(path)
    if name == compose.PAGE:
      text = page.unillustrated(text)
    found += differences.of_texts(path, text, made.texts[name])
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
    vector = path.with_suffix(".pdf")
    if not vector.is_file():
      found.append(f"{vector} is missing")
      continue
    drawn = description(strict_json.read_bytes(path))
    entry = recorded.get(figure.name)
    entry = entry if isinstance(entry, dict) else {}
    for what, value, expected in (
      ("its file's sha256", compose.digest(path), entry.get("sha256")),
      ("the fingerprint of its data", drawn, figure.fingerprint),
      ("its data in numbers.json", entry.get("data"), figure.fingerprint),
    ):
      if value != expected:
        found.append(
          f"{path}: {what} is {str(value)[:16]}, not {str(expected)[:16]}"
        )
    for what, value, expected in (
      ("its file's sha256", compose.digest(vector), entry.get("vector_sha256")),
      (
        "the fingerprint of its data",
        subject(strict_json.read_bytes(vector)),
        figure.fingerprint,
      ),
    ):
      if value != expected:
        found.append(
          f"{vector}: {what} is {str(value)[:16]}, not {str(expected)[:16]}"
        )
  return found


def description(data: bytes) -> str | None:
  """The text under the keyword Description of a PNG; None if it has none."""
  if not data.startswith(b"\x89PNG\r\n\x1a\n"):
    return None
  at = 8
  while at + 12 <= len(data):
    length, kind = struct.unpack(">I4s", data[at : at + 8])
    body = data[at + 8 : at + 8 + length]
    check = data[at + 8 + length : at + 12 + length]
    if struct.pack(">I", zlib.crc32(kind + body)) != check:
      return None
    if kind == b"tEXt" and body.startswith(b"Description\0"):
      return body.partition(b"\0")[2].decode("latin-1")
    at += 12 + length
  return None


def subject(data: bytes) -> str | None:
  """The hash under Subject of a PDF that `figures` wrote; None without one."""
  match = _SUBJECT.search(data) if data.startswith(b"%PDF-") else None
  return match[1].decode() if match else None


def _odd(settings: material.ReportSettings, workdir: pathlib.Path) -> list[str]:
  """Verdict rows that are not what their own raw text says."""
  found = []
  for path, rows in material.verdict_files(settings, workdir).items():
    found += [
      f"{path}: the verdict on {row.unit} is {row.verdict}, its raw text says"
      f" {' or '.join(sorted(material.reread(row.raw, row.order)))}"
      for row in material.odd(rows)
    ]
  return found


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
    return seed_files.paths(path)
  except ValueError as error:
    raise ValueError(
      f"{error}, and no report: `python -m dpo_jax.report {path}` writes one"
      " of a working directory"
    ) from None


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax.verify",
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
      read = seed_files.read_all(files)
      wrong = [seed_files.differences(file) for file in read]
      found += [line for lines in wrong for line in lines]
      _print("\n".join(seed_files.lines(read)))
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
