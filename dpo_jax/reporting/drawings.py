"""The figures of a report: what there is to draw, from which numbers."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
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
    ends: where the lines of a figure on the page begin and end, in words.
  """

  name: str
  data: Any
  draw: Callable[..., pathlib.Path]
  caption: str
  ends: str = ""

  @property
  def fingerprint(self) -> str:
    return figures.fingerprint(self.data)

  @property
  def title(self) -> str:
    return self.caption.partition(".")[0]

  @property
  def alt(self) -> str:
    """What an image of it says to those who do not see it, as plain text."""
    return f"{self.title}. {self.ends}"

  @property
  def lines(self) -> list[str]:
    """Markdown that shows the figure."""
    return [f"![{self.title}]({self.name})", "", self.caption]


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
        functools.partial(figures.win_rate_by_temperature, finals),
        "Win rate of the final models against sampling temperature."
        f" {bars} 50%.",
        by_temperature(finals),
      )
    )
  if steps:
    drawn.append(
      Figure(
        NAMES[1],
        figures.points(steps),
        functools.partial(figures.win_rate_by_step, steps),
        f"Win rate of checkpoints against the training step. {bars} 50%.",
        _ends(
          steps,
          lambda r: f"{_plain(r.model)}, T = {r.temperature}",
          lambda r: f"step {r.step}",
        ),
      )
    )
  if len({row.difference for row in found.by_length}) > 1:
    drawn.append(
      Figure(
        NAMES[2],
        figures.length_points(found.by_length),
        functools.partial(figures.win_rate_by_length, found.by_length),
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
        functools.partial(figures.training_curves, found.metrics),
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
      functools.partial(figures.reward_margins, rows),
      f"Implicit rewards of {name}. Pale: every step; dark: running mean;"
      " points: held out.",
    ),
    Figure(
      NAMES[5],
      [*accuracy.values(), confidence],
      functools.partial(figures.reward_accuracy, rows, confidence=confidence),
      f"Reward accuracy of {name}. Bars are {found.level} Wilson intervals of"
      " the held-out pairs.",
    ),
  ]


def by_temperature(rates: Sequence) -> str:
  """Where the lines of rates against temperature begin and end."""
  return _ends(
    rates, lambda r: _plain(r.model), lambda r: f"T = {r.temperature}"
  )


def _ends(rates, line_of, place_of) -> str:
  """First and last rate of each line, in words; rates as a table has them."""
  lines = {}
  for rate in rates:
    text = f"{sections.percent(rate.win_rate)}% at {place_of(rate)}"
    lines.setdefault(line_of(rate), []).append(text)
  return " ".join(
    f"{line}: {' to '.join(dict.fromkeys((texts[0], texts[-1])))}."
    for line, texts in lines.items()
  )


def _plain(model: str) -> str:
  return sections.PLAIN_NAMES.get(model, model)
