"""One self-contained page of a report: report.html.

The page takes nothing from anywhere: its style and its script stand in it, and
its policy (Content-Security-Policy) lets nothing else run or load. Foreign text
comes in as entities or as JSON and is only ever shown as text.
"""

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import re
from collections.abc import Sequence

from dpo_jax.reporting.page import browse, prose

_SCRIPTS = ("filter.js", "view.js", "list.js", "keys.js")
_HOLE = re.compile(r"\{\{(\w+)\}\}")


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of a page.

  Attributes:
    id: of its heading, for links.
    title: of the heading, as Markdown, and in the page's contents.
    lead: Markdown before the charts.
    charts: (SVG, caption as Markdown); an empty SVG is left out.
    rest: Markdown after them.
  """

  id: str
  title: str
  lead: Sequence[str] = ()
  charts: Sequence[tuple[str, str]] = ()
  rest: Sequence[str] = ()


def render(
  title: str,
  flags: Sequence[str],
  sections: Sequence[Section],
  prompts: Sequence[browse.Prompt],
  names: dict[str, str],
) -> str:
  """The page as text.

  Args:
    title: as plain text.
    flags: Markdown of what must be known before any number.
    sections: in order; those without content are left out.
    prompts: what can be browsed.
    names: model -> how it is called, as plain text.
  """
  style = _asset("page.css")
  script = "\n".join(map(_asset, _SCRIPTS))
  bodies = {section.id: _body(section) for section in sections}
  shown = [section for section in sections if bodies[section.id]]
  contents = "".join(
    f'<a href="#{section.id}">{_inline(section.title)}</a>' for section in shown
  )
  values = {
    "policy": "; ".join(
      (
        "default-src 'none'",
        f"style-src '{_digest(style)}'",
        f"script-src '{_digest(script)}'",
        "base-uri 'none'",
        "form-action 'none'",
      )
    ),
    "title": html.escape(title),
    "style": style,
    "script": script,
    "contents": contents,
    "flags": f'<aside class="flags">{prose.html(flags)}</aside>'
    if flags
    else "",
    "sections": "\n".join(
      f'<section id="{section.id}"><h2>{_inline(section.title)}</h2>\n'
      f"{bodies[section.id]}</section>"
      for section in shown
    ),
    "data": browse.data(prompts, names),
  }
  # One pass: a value that looks like a hole is not filled.
  return _HOLE.sub(lambda match: values[match[1]], _asset("page.html"))


def _body(section: Section) -> str:
  charts = "".join(
    f"<figure>{svg}<figcaption>{prose.html([caption])}</figcaption></figure>"
    for svg, caption in section.charts
    if svg
  )
  if charts:
    charts = f'<div class="charts">{charts}</div>\n'
  return prose.html(section.lead) + charts + prose.html(section.rest)


def _inline(markdown: str) -> str:
  return prose.html([markdown]).strip().removeprefix("<p>").removesuffix("</p>")


def _asset(name: str) -> str:
  return importlib.resources.files(__name__).joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
  """The hash of an element's text, as a policy names it."""
  digest = hashlib.sha256(text.encode()).digest()
  return f"sha256-{base64.b64encode(digest).decode()}"
