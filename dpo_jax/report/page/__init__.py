"""One self-contained page of a report: report.html.

The page takes nothing from anywhere: its style and its script stand in it, and
its policy (Content-Security-Policy) lets nothing else run or load. Foreign text
comes in as entities or as JSON and is only ever shown as text.

A figure is an image of a light and a dark SVG. A page is made with their
fingerprints in place of the SVGs, so that it can be compared without drawing.
"""

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import pathlib
import re
import tempfile
from collections.abc import Sequence

from dpo_jax.report import figures
from dpo_jax.report.page import browse, prose

_SCRIPTS = ("filter.js", "view.js", "list.js", "keys.js")
_HOLE = re.compile(r"\{\{(\w+)\}\}")
_SVG = "data:image/svg+xml;base64,"
_IMAGE = re.compile(f'(?<=[ct]="){re.escape(_SVG)}([^"]*)(?=")')


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of a page.

  Attributes:
    id: of its heading, for links.
    title: of the heading, as Markdown, and in the page's contents.
    lead: Markdown before the figures.
    pictures: figures shown side by side.
    rest: Markdown after them.
  """

  id: str
  title: str
  lead: Sequence[str] = ()
  pictures: Sequence[figures.Figure] = ()
  rest: Sequence[str] = ()


def render(
  title: str,
  flags: Sequence[str],
  sections: Sequence[Section],
  prompts: Sequence[browse.Prompt],
  names: dict[str, str],
) -> str:
  """The page as text, to be given its images by `illustrate`.

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
        "img-src data:",
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


def illustrate(text: str, drawn: Sequence[figures.Figure]) -> str:
  """A page with its figures drawn, in light and in dark."""
  with tempfile.TemporaryDirectory() as directory:
    for figure in drawn:
      for name, dark in (("src", False), ("srcset", True)):
        hole = f'{name}="{figure.fingerprint}"'
        if hole in text:
          path = figure.draw(pathlib.Path(directory) / "x.svg", dark=dark)
          image = base64.b64encode(path.read_bytes()).decode()
          text = text.replace(hole, f'{name}="{_SVG}{image}"')
  return text


def unillustrated(text: str) -> str:
  """A page as `render` made it: what its images say of their data for them."""

  def fingerprint(match) -> str:
    try:
      found = figures.drawn(base64.b64decode(match[1]))
    except ValueError:
      found = None
    return found or "an image without a fingerprint"

  return _IMAGE.sub(fingerprint, text)


def _body(section: Section) -> str:
  shown = "".join(map(_figure, section.pictures))
  if shown:
    shown = f'<div class="figures">{shown}</div>\n'
  return prose.html(section.lead) + shown + prose.html(section.rest)


def _figure(figure: figures.Figure) -> str:
  # The script sets `media` for whoever overrules the system's theme.
  return (
    '<figure><picture><source media="(prefers-color-scheme: dark)"'
    f' srcset="{figure.fingerprint}"><img src="{figure.fingerprint}"'
    f' alt="{html.escape(figure.alt)}"></picture>'
    f"<figcaption>{prose.html([figure.caption])}</figcaption></figure>\n"
  )


def _inline(markdown: str) -> str:
  return prose.html([markdown]).strip().removeprefix("<p>").removesuffix("</p>")


def _asset(name: str) -> str:
  return importlib.resources.files(__name__).joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
  """The hash of an element's text, as a policy names it."""
  digest = hashlib.sha256(text.encode()).digest()
  return f"sha256-{base64.b64encode(digest).decode()}"
