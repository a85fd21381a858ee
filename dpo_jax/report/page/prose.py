"""A report's Markdown as HTML.

The sections of a report are written once, as Markdown in which foreign text
stands as entities (`markdown.literal`). Of HTML they hold line ends and empty
comments only; whatever else looks like a tag is shown, not obeyed.
"""

import itertools
import re
from collections.abc import Sequence

_HTML = ("<br>", "<!-- -->")
_NUMBER = re.compile(r"[-+−<>]? ?\d[\d.,]*.*|n/a|")


def html(lines: Sequence[str]) -> str:
  """The HTML of Markdown lines; images are left out: a page draws its own."""
  import markdown_it

  parser = markdown_it.MarkdownIt("commonmark").enable("table")
  parser.add_render_rule("html_inline", _inline)
  parser.add_render_rule("html_block", _inline)
  parser.add_render_rule("image", lambda *_: "")
  parser.add_render_rule("table_open", lambda *_: _OPEN)
  parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
  for name in ("td_open", "th_open"):
    parser.add_render_rule(name, _cell)
  tokens = parser.parse("\n".join(lines))
  _mark_numbers(tokens)
  return parser.renderer.render(tokens, parser.options, {})


# A wide table scrolls in its own box, which the keyboard reaches as well.
_OPEN = '<div class="scroll" tabindex="0" role="region" aria-label="table">'
_OPEN += "<table>\n"


def _inline(renderer, tokens, index, options, env) -> str:
  text = tokens[index].content
  if text in _HTML:
    return text
  return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cell(renderer, tokens, index, options, env) -> str:
  token = tokens[index]
  scope = ' scope="col"' if token.tag == "th" else ""
  kind = ' class="number"' if token.meta.get("number") else ""
  return f"<{token.tag}{scope}{kind}>"


def _mark_numbers(tokens) -> None:
  """Marks the cells of columns that hold numbers alone."""
  columns: list[list] = []
  at = 0
  for token, content in itertools.pairwise(tokens):
    if token.type == "table_open":
      columns = []
    elif token.type == "tr_open":
      at = 0
    elif token.type in ("th_open", "td_open"):
      columns[at:] = columns[at:] or [[]]
      columns[at].append((token, content.content))
      at += 1
    elif token.type == "tbody_close":
      for column in columns:
        body = [text for cell, text in column if cell.tag == "td"]
        if any(body) and all(map(_NUMBER.fullmatch, body)):
          for cell, _ in column:
            cell.meta["number"] = True
