"""Where what stands in a report differs from what its rows give, in words."""

import csv
import difflib
import io
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def of_values(found: Any, expected: Any, name: str = "") -> Iterator[str]:
  """Lines "a[1].b is 1, the rows give 2" for all in which two values differ."""
  if isinstance(found, dict) and isinstance(expected, dict):
    for key in [*expected, *(key for key in found if key not in expected)]:
      inner = f"{name}.{key}" if name else str(key)
      if key not in found or key not in expected:
        where = "missing" if key not in found else "not from the rows"
        yield f"{inner:.200} is {where}"
      else:
        yield from of_values(found[key], expected[key], inner)
  elif isinstance(found, list) and isinstance(expected, list):
    if len(found) != len(expected):
      yield f"{name} has {len(found)} rows, the rows give {len(expected)}"
    for index, (one, other) in enumerate(zip(found, expected)):
      yield from of_values(one, other, f"{name}[{index}]")
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


def of_tables(path: pathlib.Path, text: str, expected: str) -> list[str]:
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


def of_texts(path: pathlib.Path, text: str, expected: str) -> list[str]:
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
