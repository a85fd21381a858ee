"""Figures of a report.

`plots` has a function for each plot, `style` the style and file formats. The
style is also for other figures: plt.style.use("dpo_jax.report.figures.style").
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib.figure

from dpo_jax.io import markdown
from dpo_jax.report import load
from dpo_jax.report.figures import plots, style

NAMES = (
  "win_rate_temperature.png",
  "win_rate_step.png",
  "win_rate_length.png",
  "training_curves.png",
  "reward_margins.png",
  "reward_accuracy.png",
)


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of a report.

  Attributes:
    name: file name of its PNG.
    data: the plain values that it shows.
    plot: draws it, within `style.style`.
    caption: Markdown; its first sentence is the figure's title.
    on_page: whether report.html shows it, too.
  """

  name: str
  data: Any
  plot: Callable[[], matplotlib.figure.Figure]
  caption: str
  on_page: bool = False

  @property
  def fingerprint(self) -> str:
    return style.fingerprint(self.data)

  @property
  def title(self) -> str:
    return self.caption.partition(".")[0]

  @property
  def lines(self) -> list[str]:
    """Markdown paragraphs that show the figure."""
    return [f"![{self.title}]({self.name})", self.caption]

  def save(self, path: pathlib.Path) -> None:
    """Writes the PNG to `path`, and a PDF next to it."""
    with style.style():
      style.save(self.plot(), path)

  def png(self) -> bytes:
    with style.style():
      return style.render(self.plot(), "png")

  def svg(self, *, dark: bool = False) -> bytes:
    """SVG with the fingerprint of its data as its description."""
    with style.style(dark):
      return style.render(self.plot(), "svg", Description=self.fingerprint)


def of(data: load.ReportData) -> list[Figure]:
  """All figures that the data have values for."""
  level = data.level
  finals = [rate for rate in data.rates if rate.step is None and rate.n]
  steps = [rate for rate in data.rates if rate.step is not None and rate.n]
  bars = f"Bars are {level} intervals, drawn side by side; the dashed line is"
  found = []
  if finals:
    found.append(
      Figure(
        NAMES[0],
        plots.win_rate_data(finals),
        functools.partial(plots.win_rate_by_temperature, finals),
        "Win rate of the final models against sampling temperature."
        f" {bars} 50%.",
        on_page=True,
      )
    )
  if steps:
    found.append(
      Figure(
        NAMES[1],
        plots.win_rate_data(steps),
        functools.partial(plots.win_rate_by_step, steps),
        f"Win rate of checkpoints against the training step. {bars} 50%.",
        on_page=True,
      )
    )
  bins = data.by_length
  if len({row.difference for row in bins}) > 1:
    found.append(
      Figure(
        NAMES[2],
        [
          (b.model, b.temperature, b.difference, b.win_rate, b.low, b.high)
          for b in bins
        ],
        functools.partial(plots.win_rate_by_length, bins),
        "Win rate against the difference in length. A point is the mean of one"
        f" group of prompts, T = {bins[0].temperature}; bars are {level}"
        " intervals.",
      )
    )
  if any(data.metrics.values()):
    found.append(
      Figure(
        NAMES[3],
        data.metrics,
        functools.partial(plots.training_curves, data.metrics),
        "Training curves. Pale: every step; dark: running mean; points: held"
        " out.",
      )
    )
  return [*found, *_rewards(data)]


def _rewards(data: load.ReportData) -> list[Figure]:
  """Figures of the last run that has rewards."""
  rewarded = [
    (run, rows)
    for run, rows in data.metrics.items()
    if plots.has(rows, "rewards/margins")
  ]
  if not rewarded:
    return []
  run, rows = rewarded[-1]
  name = load.NAMES.get(run) or markdown.literal(run)
  confidence = data.settings.confidence
  keys = [f"rewards/{kind}" for kind in ("chosen", "rejected", "margins")]
  accuracy = plots.metric_data(rows, ["rewards/accuracies"])
  return [
    Figure(
      NAMES[4],
      plots.metric_data(rows, keys),
      functools.partial(plots.reward_margins, rows),
      f"Implicit rewards of {name}. Pale: every step; dark: running mean;"
      " rings: held out.",
    ),
    Figure(
      NAMES[5],
      [*accuracy.values(), confidence],
      functools.partial(plots.reward_accuracy, rows, confidence=confidence),
      f"Reward accuracy of {name}. Bars are {data.level} Wilson intervals of"
      " the held-out pairs.",
    ),
  ]
