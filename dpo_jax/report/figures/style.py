"""What all figures share: the style, sizes, colours, and how they are saved.

The style is a file, style.mplstyle, for other people's figures too. Figures are
made with the object API, so that nothing global is set and no display is
needed: a figure is drawn whole, as PNG and as PDF or as SVG, or not at all.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker

from dpo_jax.io import atomic

COLUMN_IN = 3.25  # width of a paper's column, inches
PAGE_IN = 6.75  # of two columns and the gap between them
HEIGHT_IN = 2.3

# As in the style file; the markers differ as well, for print without colour.
COLORS = ("#737373", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
_CARRIED = re.compile(
  rb"(?:tEXtDescription\0|/Subject \(|<dc:description>)([0-9a-f]{64})"
)
NAMES = {"base": "base", "sft": "SFT", "dpo": "DPO"}


def style(dark: bool = False) -> contextlib.AbstractContextManager[None]:
  """Within it, figures are drawn in the house style, whatever a user set.

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


def guide() -> dict[str, Any]:
  """Keywords of the dashed line at what chance or nothing gives."""
  return {
    "color": matplotlib.rcParams["axes.edgecolor"],
    "linewidth": 0.7,
    "linestyle": (0, (4, 3)),
  }


def new(width: float = COLUMN_IN, height: float = HEIGHT_IN):
  """An empty figure of so many inches."""
  return matplotlib.figure.Figure(figsize=(width, height))


def whole_numbers(count: int) -> matplotlib.ticker.Locator:
  return matplotlib.ticker.MaxNLocator(count, integer=True)


def vector(path: str | os.PathLike) -> pathlib.Path:
  """Where the PDF of a PNG is."""
  return pathlib.Path(path).with_suffix(".pdf")


def save(
  figure: matplotlib.figure.Figure, path: str | os.PathLike, data: Any
) -> pathlib.Path:
  """Writes the PNG and, beside it, the PDF, each whole or not at all.

  A path that ends in .svg is one SVG with a transparent background, for a page.

  The same data give the same bytes. Their fingerprint stands in every file,
  under Description or Subject.
  """
  path = pathlib.Path(path)
  mark = fingerprint(data)
  unsaid = dict.fromkeys(("Creator", "Producer", "CreationDate"))
  files = [
    (vector(path), "pdf", unsaid | {"Subject": mark}),
    (path, "png", {"Software": None, "Description": mark}),
  ]
  if path.suffix == ".svg":
    unsaid = dict.fromkeys(("Creator", "Date"))
    files = [(path, "svg", unsaid | {"Description": mark})]
  for target, kind, metadata in files:
    buffer = io.BytesIO()
    figure.savefig(
      buffer, format=kind, metadata=metadata, transparent=kind == "svg"
    )
    with atomic.replacing(target) as temporary:
      temporary.write_bytes(buffer.getvalue())
  return path


def drawn(data: bytes) -> str | None:
  """The fingerprint that a file of `save` carries; None if it has none."""
  match = _CARRIED.search(data)
  return match[1].decode() if match else None


def fingerprint(data: Any) -> str:
  """Hash of the plain values that a figure shows, to 9 digits."""
  text = json.dumps(_rounded(data), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _rounded(value: Any) -> Any:
  # Another machine may add in another order.
  if isinstance(value, float):
    return f"{value:.9g}"
  if isinstance(value, Mapping):
    return {str(key): _rounded(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_rounded(item) for item in value]
  return value
