"""The figures of a report: what there is to draw, from which numbers."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from dpo_jax import figures
from dpo_jax.reporting import material, sections

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
  """A figure that a report shows.

  Attributes:
    name: of its file.
    data: what is drawn, from which its fingerprint is made.
    draw: draws it into a path.
    caption: Markdown; its first sentence is the figure's title.
  """

  name: str
  data: Any
  draw: Callable[[pathlib.Path], pathlib.Path]
  caption: str

  @property
  def fingerprint(self) -> str:
    return figures.fingerprint(self.data)

  @property
  def lines(self) -> list[str]:
    """Markdown that shows the figure."""
    title = self.caption.partition(".")[0]
    return [f"![{title}]({self.name})", "", self.caption]


def of(found: material.Material) -> list[Figure]:
  """What there is to draw."""
  level = found.level
  finals = [rate for rate in found.rates if rate.step is None and rate.n]
  steps = [rate for rate in found.rates if rate.step is not None and rate.n]
  bars = f"Bars are {level} intervals, drawn side by side; the dashed line is"
  drawn = []
  if finals:
    drawn.append(
      Figure(
        NAMES[0],
        figures.points(finals),
        lambda path: figures.win_rate_by_temperature(finals, path),
        "Win rate of the final models against sampling temperature."
        f" {bars} 50%.",
      )
    )
  if steps:
    drawn.append(
      Figure(
        NAMES[1],
        figures.points(steps),
        lambda path: figures.win_rate_by_step(steps, path),
        f"Win rate of checkpoints against the training step. {bars} 50%.",
      )
    )
  if len({row.difference for row in found.by_length}) > 1:
    drawn.append(
      Figure(
        NAMES[2],
        figures.length_points(found.by_length),
        lambda path: figures.win_rate_by_length(found.by_length, path),
        "Win rate against the difference in length. A point is the mean of one"
        f" group of prompts, T = {found.by_length[0].temperature}; bars are"
        f" {level} intervals.",
      )
    )
  if any(found.metrics.values()):
    drawn.append(
      Figure(
        NAMES[3],
        found.metrics,
        lambda path: figures.training_curves(found.metrics, path),
        "Training curves. Pale: every step; dark: running mean; points: held"
        " out.",
      )
    )
  return [*drawn, *_reward_figures(found)]


def _reward_figures(found: material.Material) -> list[Figure]:
  """Of the last run that has rewards: the one that the others lead to."""
  runs = [
    run for run, rows in found.metrics.items() if figures.has_rewards(rows)
  ]
  if not runs:
    return []
  run, rows = runs[-1], found.metrics[runs[-1]]
  name, confidence = sections.name(run), found.settings.confidence
  keys = [f"rewards/{kind}" for kind in ("chosen", "rejected", "margins")]
  accuracy = figures.shown(rows, ["rewards/accuracies"])
  return [
    Figure(
      NAMES[4],
      figures.shown(rows, keys),
      lambda path: figures.reward_margins(rows, path),
      f"Implicit rewards of {name}. Pale: every step; dark: running mean;"
      " points: held out.",
    ),
    Figure(
      NAMES[5],
      [*accuracy.values(), confidence],
      lambda path: figures.reward_accuracy(rows, path, confidence=confidence),
      f"Reward accuracy of {name}. Bars are {found.level} Wilson intervals of"
      " the held-out pairs.",
    ),
  ]
