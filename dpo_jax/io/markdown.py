"""Markdown that shows a text literally.

Responses and file names are data: they cannot break a table, nor add markup,
links, images or HTML to a report.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

# Characters that start a Markdown construct within a line, GitHub's $math$
# included; as entities they are text.
_MARKUP = re.compile(r"[\\`*_\[\]<>&|#~${}^]")
# GitHub links bare addresses after entities are resolved; an empty comment
# splits the text and shows nothing.
_ADDRESS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)


def literal(text: str) -> str:
  """Markdown that shows `text` as it is, on one line, in a table's cell too.

  Line ends become <br>. Characters that are invisible or move their
  neighbours (controls, separators, direction marks) are shown by code point.
  """
  text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " ")
  lines = []
  for line in text.strip(" \n").split("\n"):
    line = "".join(map(_visible, line))
    line = "\0".join(_ADDRESS.split(line))
    line = _MARKUP.sub(lambda match: f"&#{ord(match[0])};", line)
    lines.append(line.replace("\0", "<!-- -->"))
  return "<br>".join(lines)


def _visible(character: str) -> str:
  # Joiners (U+200C, U+200D) are part of emoji and of several scripts.
  if character in "\u200c\u200d":
    return character
  if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
    return f"(U+{ord(character):04X})"
  return character


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """Lines of a Markdown table; cells are Markdown already (see `literal`)."""
  lines = [header, ["---"] * len(header), *rows]
  return [f"| {' | '.join(cells)} |" for cells in lines]
