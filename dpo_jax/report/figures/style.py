"""Style and file formats of all figures.

Figures use matplotlib's object API: nothing global is set, and no display is
needed.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib
import matplotlib.figure

from dpo_jax.io import atomic

COLUMN_IN = 3.25  # width of a paper's column, inches
PAGE_IN = 6.75  # of two columns and the gap between them
HEIGHT_IN = 2.3

# As in style.mplstyle; markers differ too, for print without color.
COLORS = ("#737373", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
# Without dates and versions the same data give the same bytes.
_METADATA = {
  "png": ("Software",),
  "pdf": ("Creator", "Producer", "CreationDate"),
  "svg": ("Creator", "Date"),
}


def style(dark: bool = False) -> contextlib.AbstractContextManager[None]:
  """Context in which figures are created and saved in this style.

  Args:
    dark: with the colors of dark.mplstyle, for a dark page.
  """
  here = pathlib.Path(__file__).parent
  colors = matplotlib.rc_params_from_file(
    here / "dark.mplstyle", use_default_template=False
  )
  return matplotlib.rc_context(
    colors if dark else None, fname=here / "style.mplstyle"
  )


def new(width: float = COLUMN_IN, height: float = HEIGHT_IN):
  """An empty figure, sizes in inches."""
  return matplotlib.figure.Figure(figsize=(width, height))


def guide() -> dict[str, Any]:
  """Line style of a reference line, such as at 50%."""
  return {
    "color": matplotlib.rcParams["axes.edgecolor"],
    "linewidth": 0.7,
    "linestyle": (0, (4, 3)),
  }


def render(
  figure: matplotlib.figure.Figure, kind: str, **metadata: str
) -> bytes:
  """The figure as "png", "pdf" or "svg"; an SVG has no background."""
  buffer = io.BytesIO()
  figure.savefig(
    buffer,
    format=kind,
    metadata=dict.fromkeys(_METADATA[kind]) | metadata,
    transparent=kind == "svg",
  )
  return buffer.getvalue()


def save(
  figure: matplotlib.figure.Figure, path: str | os.PathLike
) -> pathlib.Path:
  """Writes the PNG to `path` and a PDF next to it; returns `path`."""
  path = pathlib.Path(path)
  for file, kind in ((path.with_suffix(".pdf"), "pdf"), (path, "png")):
    data = render(figure, kind)
    with atomic.replacing(file) as temporary:
      temporary.write_bytes(data)
  return path


def fingerprint(data: Any) -> str:
  """SHA-256 of the plain values that a figure shows, to 9 digits."""
  text = json.dumps(_rounded(data), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _rounded(value: Any) -> Any:
  # Another machine may sum in another order.
  if isinstance(value, float):
    return f"{value:.9g}"
  if isinstance(value, Mapping):
    return {str(key): _rounded(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_rounded(item) for item in value]
  return value
