"""Looks up, in the peers' own files, all that docs/peers.md says of them.

  pip install --no-deps --target=DIR trl==1.16.0 ...   # as the page says
  python -m benchmarks.peers --packages=DIR

The page's last two tables are read: texts that a file must hold, and patterns
that no file below a folder may. Exits with 1 if one does not hold.
"""

import argparse
import pathlib
import re
import sys

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "peers.md"


def rows(page: str, column: str) -> list[tuple[str, str, str]]:
  """(about, path, what) of the table whose last heading is `column`."""
  found, inside = [], False
  for line in page.splitlines():
    cells = [
      cell.strip().replace("\\|", "|")
      for cell in re.split(r"(?<!\\)\|", line)[1:-1]
    ]
    if len(cells) != 3 or not line.startswith("|"):
      inside = False
    elif cells[-1] == column:
      inside = True
    elif inside and not set(cells[0]) <= {"-"}:
      about, path, what = cells
      found.append((about, path.strip("`"), what[1:-1]))
  return found


def holds(packages: pathlib.Path, path: str, text: str) -> bool:
  """Whether a file is there and holds the text."""
  file = packages / path
  return file.is_file() and text in file.read_text("utf-8")


def lacks(packages: pathlib.Path, path: str, pattern: str) -> bool:
  """Whether a folder (or file) is there and none of its files match."""
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
  page = PAGE.read_text("utf-8")
  failed = 0
  for check, column in ((holds, "text"), (lacks, "pattern")):
    found = rows(page, column)
    for about, path, what in found:
      if not check(packages, path, what):
        failed += 1
        print(f"{about}: {path}: {what!r} {check.__name__} not")
    print(f"{check.__name__}: {len(found)} rows looked up")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
