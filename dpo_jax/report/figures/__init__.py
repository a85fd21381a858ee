"""Figures in one style, from plain rows to PNG, PDF and SVG files.

What other modules use is here: one function a figure, and `of`, the figures of
a report. `style` has the style and the files, `rates` win rates, `runs`
training, `layout` token and array layouts. The style itself is style.mplstyle:
plt.style.use("dpo_jax.report.figures.style").
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from dpo_jax.io import markdown
from dpo_jax.report import load
from dpo_jax.report.figures import layout, rates, runs, style

drawn = style.drawn
fingerprint = style.fingerprint
points = rates.points
length_points = rates.length_points
vector = style.vector
win_rate_by_temperature = rates.win_rate_by_temperature
win_rate_by_step = rates.win_rate_by_step
win_rate_by_length = rates.win_rate_by_length
training_curves = runs.training_curves
reward_margins = runs.reward_margins
reward_accuracy = runs.reward_accuracy
has_rewards = runs.has_rewards
shown = runs.shown
packing_mask = layout.packing_mask
sharding = layout.sharding

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
    return fingerprint(self.data)

  @property
  def title(self) -> str:
    return self.caption.partition(".")[0]

  @property
  def alt(self) -> str:
    """Text in place of an image of it, plain."""
    return f"{self.title}. {self.ends}"

  @property
  def lines(self) -> list[str]:
    """Markdown that shows the figure."""
    return [f"![{self.title}]({self.name})", "", self.caption]


def of(found: load.Material) -> list[Figure]:
  """What there is to draw."""
  level = found.level
  finals = [rate for rate in found.rates if rate.step is None and rate.n]
  steps = [rate for rate in found.rates if rate.step is not None and rate.n]
  bars = f"Bars are {level} intervals, drawn side by side; the dashed line is"
  made = []
  if finals:
    made.append(
      Figure(
        NAMES[0],
        points(finals),
        functools.partial(win_rate_by_temperature, finals),
        "Win rate of the final models against sampling temperature."
        f" {bars} 50%.",
        _ends(
          finals, lambda r: _name(r.model), lambda r: f"T = {r.temperature}"
        ),
      )
    )
  if steps:
    made.append(
      Figure(
        NAMES[1],
        points(steps),
        functools.partial(win_rate_by_step, steps),
        f"Win rate of checkpoints against the training step. {bars} 50%.",
        _ends(
          steps,
          lambda r: f"{_name(r.model)}, T = {r.temperature}",
          lambda r: f"step {r.step}",
        ),
      )
    )
  if len({row.difference for row in found.by_length}) > 1:
    made.append(
      Figure(
        NAMES[2],
        length_points(found.by_length),
        functools.partial(win_rate_by_length, found.by_length),
        "Win rate against the difference in length. A point is the mean of one"
        f" group of prompts, T = {found.by_length[0].temperature}; bars are"
        f" {level} intervals.",
      )
    )
  if any(found.metrics.values()):
    made.append(
      Figure(
        NAMES[3],
        found.metrics,
        functools.partial(training_curves, found.metrics),
        "Training curves. Pale: every step; dark: running mean; points: held"
        " out.",
      )
    )
  return [*made, *_reward_figures(found)]


def _reward_figures(found: load.Material) -> list[Figure]:
  """Of the last run that has rewards: the one that the others lead to."""
  rewarded = [item for item in found.metrics.items() if has_rewards(item[1])]
  if not rewarded:
    return []
  run, rows = rewarded[-1]
  name = style.NAMES.get(run) or markdown.literal(run)
  confidence = found.settings.confidence
  keys = [f"rewards/{kind}" for kind in ("chosen", "rejected", "margins")]
  accuracy = shown(rows, ["rewards/accuracies"])
  return [
    Figure(
      NAMES[4],
      shown(rows, keys),
      functools.partial(reward_margins, rows),
      f"Implicit rewards of {name}. Pale: every step; dark: running mean;"
      " points: held out.",
    ),
    Figure(
      NAMES[5],
      [*accuracy.values(), confidence],
      functools.partial(reward_accuracy, rows, confidence=confidence),
      f"Reward accuracy of {name}. Bars are {found.level} Wilson intervals of"
      " the held-out pairs.",
    ),
  ]


def _ends(rates, line_of, place_of) -> str:
  """First and last rate of each line, in words; rates as a table has them."""
  lines = {}
  for rate in rates:
    text = f"{100 * rate.win_rate:.1f}% at {place_of(rate)}"
    lines.setdefault(line_of(rate), []).append(text)
  return " ".join(
    f"{line}: {' to '.join(dict.fromkeys((texts[0], texts[-1])))}."
    for line, texts in lines.items()
  )


def _name(model: str) -> str:
  return style.NAMES.get(model, model)
