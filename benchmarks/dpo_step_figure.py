"""The figure of dpo_step: pairs a second and peak memory of each contender."""

import pathlib

from dpo_jax.report.figures import style

Bars = dict[str, dict[str, tuple[float, float]]]


def draw(bars: Bars, path: pathlib.Path) -> pathlib.Path:
  """Draws a row of two panels for each model, as PNG and PDF.

  Args:
    bars: {model: {contender: (pairs a second, peak GiB)}}, this package first.
    path: of the PNG.
  """
  many = max(len(found) for found in bars.values())
  with style.style():
    figure = style.new(style.PAGE_IN, (0.45 + 0.22 * many) * len(bars) + 0.2)
    axes = figure.subplots(len(bars), 2, squeeze=False)
    for line, (model, found) in zip(axes, bars.items()):
      names = ["dpo_jax" if name == "shared" else name for name in found]
      colors = [style.COLORS[1]] + [style.COLORS[0]] * (len(names) - 1)
      columns = zip(*found.values())
      for axis, values, what in zip(
        line, columns, ("pairs a second", "peak memory, GiB")
      ):
        drawn = axis.barh(names, values, color=colors, height=0.6)
        axis.bar_label(drawn, fmt="%.1f", padding=2, fontsize=6.5)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.grid(visible=False)
        axis.set_title(f"{model}: {what}")
      line[1].set_yticklabels([])
    return style.save(figure, path)
