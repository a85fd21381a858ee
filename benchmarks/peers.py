"""Checks docs/peers.md's claims about other libraries against their packages.

  pip install --no-deps --target=DIR trl==1.16.0 ...   # as the page says
  python -m benchmarks.peers --packages=DIR

Each row of peers.csv is a claim: a "text" that a file must hold, or a regular
expression that must be "absent" from every .py file below a folder. Exits with
1 if one fails.
"""

import argparse
import csv
import pathlib
import re
import sys

EVIDENCE = pathlib.Path(__file__).with_suffix(".csv")


def rows() -> list[dict[str, str]]:
  """The claims: kind, about, path, what."""
  with EVIDENCE.open(newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def holds(packages: pathlib.Path, path: str, text: str) -> bool:
  """Whether a file exists and contains the text."""
  file = packages / path
  return file.is_file() and text in file.read_text("utf-8")


def lacks(packages: pathlib.Path, path: str, pattern: str) -> bool:
  """Whether a file or folder exists and no .py file of it matches."""
  place = packages / path
  if not place.exists():
    return False
  files = [place] if place.is_file() else sorted(place.rglob("*.py"))
  wanted = re.compile(pattern, re.IGNORECASE)
  return not any(
    wanted.search(file.read_text("utf-8", errors="replace")) for file in files
  )


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--packages", required=True, type=pathlib.Path)
  packages = parser.parse_args().packages
  found = rows()
  failed = [
    row
    for row in found
    if not {"text": holds, "absent": lacks}[row["kind"]](
      packages, row["path"], row["what"]
    )
  ]
  for row in failed:
    print("{kind} {about}: {path}: {what!r} fails".format(**row))
  print(f"{len(found)} claims checked, {len(failed)} fail")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
