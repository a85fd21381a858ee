"""report.html: one self-contained page with figures and a response browser.

The page loads nothing: style and script are inline, and its
Content-Security-Policy allows nothing else. Text of models and judges enters as
HTML entities or JSON and is shown as text only.

A figure is an SVG for light and one for dark themes, inserted by `with_images`.
`render` puts the fingerprint of the figure's data in their place, so that
pages can be compared without drawing.
"""

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import itertools
import re
from collections.abc import Sequence
from typing import Any

from dpo_jax.report import figures
from dpo_jax.report.page import browse

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_SVG = "data:image/svg+xml;base64,"
_IMAGE = re.compile(f'(?<=[ct]="){re.escape(_SVG)}([^"]*)(?=")')
_DESCRIPTION = re.compile(rb"<dc:description>([0-9a-f]{64})<")
_TAGS = ("<br>", "<!-- -->")
_NUMBER = re.compile(r"[-+−<>]? ?\d[\d.,]*.*|n/a|")
# Wide tables scroll in a box of their own, reachable by keyboard.
_TABLE = (
  '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>\n'
)


@dataclasses.dataclass(frozen=True)
class Section:
  """A section of a report.

  Attributes:
    id: of the HTML element, for links.
    title: as Markdown.
    blocks: lines of Markdown, and figures; empty lists are skipped.
  """

  id: str
  title: str
  blocks: Sequence[Sequence[str] | figures.Figure]

  def markdown(self, *, images: bool = True) -> str:
    """The section as Markdown, with or without its figures."""
    parts = [f"## {self.title}"]
    for block in self.blocks:
      if isinstance(block, figures.Figure):
        parts += block.lines if images else []
      elif block:
        parts.append("\n".join(block))
    return "\n\n".join(parts)

  def html(self) -> str:
    """The section's body as HTML, with fingerprints in place of images."""
    return "".join(
      _img(block) if isinstance(block, figures.Figure) else to_html(block)
      for block in self.blocks
    )


def render(
  title: str,
  flags: Sequence[str],
  sections: Sequence[Section],
  prompts: Sequence[dict[str, Any]],
) -> str:
  """The page without its images, which `with_images` inserts.

  Args:
    title: as plain text.
    flags: Markdown above the first section.
    sections: in order; those without content are skipped.
    prompts: content of the response browser, see `browse.prompts`.
  """
  style, script = _asset("page.css"), _asset("page.js")
  bodies = [(section, section.html()) for section in sections]
  shown = [(section, body) for section, body in bodies if body]
  policy = (
    "default-src 'none'",
    f"style-src '{_digest(style)}'",
    f"script-src '{_digest(script)}'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
  )
  values = {
    "policy": "; ".join(policy),
    "title": html.escape(title),
    "style": style,
    "script": script,
    "contents": "".join(
      f'<a href="#{section.id}">{_inline(section.title)}</a>'
      for section, _ in shown
    ),
    "flags": f'<aside class="flags">{to_html(flags)}</aside>' if flags else "",
    "sections": "\n".join(
      f'<section id="{section.id}"><h2>{_inline(section.title)}</h2>\n'
      f"{body}</section>"
      for section, body in shown
    ),
    "data": browse.to_json(prompts),
  }
  # In one pass, since a value may look like a placeholder.
  return _PLACEHOLDER.sub(lambda match: values[match[1]], _asset("page.html"))


def with_images(text: str, drawn: Sequence[figures.Figure]) -> str:
  """The page with its figures drawn, for light and for dark themes."""
  for figure in drawn:
    for name, dark in (("src", False), ("srcset", True)):
      placeholder = f'{name}="{figure.fingerprint}"'
      if placeholder in text:
        image = base64.b64encode(figure.svg(dark=dark)).decode()
        text = text.replace(placeholder, f'{name}="{_SVG}{image}"')
  return text


def without_images(text: str) -> str:
  """The page with the fingerprints of its images in their place."""

  def fingerprint(match) -> str:
    try:
      found = _DESCRIPTION.search(base64.b64decode(match[1]))
    except ValueError:
      found = None
    return found[1].decode() if found else "an image without a fingerprint"

  return _IMAGE.sub(fingerprint, text)


def to_html(lines: Sequence[str]) -> str:
  """The HTML of Markdown lines, without images.

  Text of models is escaped already (`markdown.literal`): of HTML the lines hold
  `_TAGS` only, and any other tag is shown as text.
  """
  import markdown_it

  parser = markdown_it.MarkdownIt("commonmark").enable("table")
  parser.add_render_rule("html_inline", _html)
  parser.add_render_rule("html_block", _html)
  parser.add_render_rule("image", lambda *_: "")
  parser.add_render_rule("table_open", lambda *_: _TABLE)
  parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
  for name in ("td_open", "th_open"):
    parser.add_render_rule(name, _cell)
  tokens = parser.parse("\n".join(lines))
  _mark_numbers(tokens)
  return parser.renderer.render(tokens, parser.options, {})


def _html(renderer, tokens, index, options, env) -> str:
  text = tokens[index].content
  return text if text in _TAGS else html.escape(text, quote=False)


def _cell(renderer, tokens, index, options, env) -> str:
  token = tokens[index]
  scope = ' scope="col"' if token.tag == "th" else ""
  kind = ' class="number"' if token.meta.get("number") else ""
  return f"<{token.tag}{scope}{kind}>"


def _mark_numbers(tokens) -> None:
  """Marks cells of numeric columns, which are aligned right."""
  columns: list[list] = []
  column = 0
  for token, content in itertools.pairwise(tokens):
    if token.type == "table_open":
      columns = []
    elif token.type == "tr_open":
      column = 0
    elif token.type in ("th_open", "td_open"):
      columns[column:] = columns[column:] or [[]]
      columns[column].append((token, content.content))
      column += 1
    elif token.type == "tbody_close":
      for cells in columns:
        body = [text for cell, text in cells if cell.tag == "td"]
        if any(body) and all(map(_NUMBER.fullmatch, body)):
          for cell, _ in cells:
            cell.meta["number"] = True


def _img(figure: figures.Figure) -> str:
  if not figure.on_page:
    return ""
  # page.js sets `media` when the theme is switched by hand.
  return (
    '<figure><picture><source media="(prefers-color-scheme: dark)"'
    f' srcset="{figure.fingerprint}"><img src="{figure.fingerprint}"'
    f' alt="{html.escape(figure.title)}"></picture>'
    f"<figcaption>{to_html([figure.caption])}</figcaption></figure>\n"
  )


def _inline(markdown: str) -> str:
  return to_html([markdown]).strip().removeprefix("<p>").removesuffix("</p>")


def _asset(name: str) -> str:
  return importlib.resources.files(__name__).joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
  """Hash of an inline element for a Content-Security-Policy."""
  digest = hashlib.sha256(text.encode()).digest()
  return f"sha256-{base64.b64encode(digest).decode()}"
