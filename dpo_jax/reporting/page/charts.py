"""Win rates as inline SVG, coloured by the page's own style sheet.

A chart depends on its rows alone, to the last character, so that a page can be
made again and compared. What it shows is also told without sight: a title, and
a text at every point.
"""

import html
import itertools
from collections.abc import Callable, Sequence

from dpo_jax import winrates

# A chart is half a page wide and as wide as a phone: its units are near pixels.
_WIDTH, _HEIGHT = 440, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 74, 26, 40
_LABEL_GAP = 15
_LOOKS = 6
"""Colours of the style sheet, `look-0` to `look-5`; 0 is the grey of base."""


def by_temperature(
  rates: Sequence[winrates.WinRate], names: dict[str, str]
) -> str:
  """Win rate of final models against temperature; "" if there are none."""
  rates = [rate for rate in rates if rate.step is None and rate.n]
  models = list(dict.fromkeys(rate.model for rate in rates))
  # A model keeps its look when another one is not there.
  others = [model for model in models if model not in winrates.MODELS]
  order = [*winrates.MODELS, *others]
  series = [
    _Series(
      names.get(model, model),
      order.index(model) % _LOOKS,
      [(r.temperature, r) for r in rates if r.model == model],
    )
    for model in models
  ]
  return _chart(
    series,
    "Win rate of the final models against sampling temperature",
    "sampling temperature",
    lambda x: f"T = {x:g}",
    ticks=sorted({rate.temperature for rate in rates}),
  )


def by_step(rates: Sequence[winrates.WinRate], names: dict[str, str]) -> str:
  """Win rate of checkpoints against the step; "" if there are none."""
  rates = [rate for rate in rates if rate.step is not None and rate.n]
  lines = list(dict.fromkeys((r.model, r.temperature) for r in rates))
  several = len({model for model, _ in lines}) > 1
  series = [
    _Series(
      f"{names.get(model, model)} " * several + f"T = {temperature:g}",
      # The grey of base would say something that is not meant.
      1 + index % (_LOOKS - 1),
      [
        (r.step or 0, r)
        for r in rates
        if (r.model, r.temperature) == (model, temperature)
      ],
    )
    for index, (model, temperature) in enumerate(lines)
  ]
  steps = sorted({rate.step for rate in rates if rate.step is not None})
  every = max(1, -(-len(steps) // 7))
  return _chart(
    series,
    "Win rate of checkpoints against the training step",
    "training step",
    lambda x: f"step {x:g}",
    ticks=steps[::every],
  )


class _Series:
  """A line: its name, its look, and (x, rate) of its points."""

  def __init__(self, name: str, look: int, points: list):
    self.name, self.look = name, look
    self.points = sorted(points, key=lambda point: point[0])


def _chart(
  series: Sequence[_Series],
  title: str,
  axis: str,
  named: Callable[[float], str],
  ticks: Sequence[float],
) -> str:
  if not series:
    return ""
  xs = sorted({x for line in series for x, _ in line.points})
  place = _scale(xs, len(series))
  bottom = _HEIGHT - _BOTTOM
  parts = [
    f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
    f"<title>{html.escape(title)}, in percent</title>",
    f'<text class="axis" x="{_LEFT}" y="12">win rate against chosen, %</text>',
  ]
  for percent in range(0, 101, 25):
    y = _y(percent / 100)
    kind = "guide" if percent == 50 else "grid"
    parts.append(
      f'<path class="{kind}" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
      f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{percent}</text>'
    )
  for x in ticks:
    parts.append(
      f'<text class="tick middle" x="{place(x):.1f}" y="{bottom + 18}">'
      f"{x:g}</text>"
    )
  middle = (_LEFT + _WIDTH - _RIGHT) / 2
  parts.append(
    f'<text class="axis middle" x="{middle:g}" y="{_HEIGHT - 4}">'
    f"{html.escape(axis)}</text>"
  )
  labels = _spread([_y(line.points[-1][1].win_rate) for line in series])
  # Bars that stand at one x are drawn side by side, in the order of the list.
  gap = _gap(xs, place, len(series))
  for index, (line, label) in enumerate(zip(series, labels)):
    shift = (index - (len(series) - 1) / 2) * gap
    parts += _line(line, lambda x, s=shift: place(x) + s, named)
    parts.append(
      f'<text class="label look-{line.look}" x="{_WIDTH - _RIGHT + 8}"'
      f' y="{label + 4:.1f}">{html.escape(_short(line.name))}</text>'
    )
  return "".join([*parts, "</svg>"])


def _line(
  line: _Series, place: Callable[[float], float], named: Callable[[float], str]
) -> list[str]:
  path = "L".join(
    f"{place(x):.1f} {_y(r.win_rate):.1f}" for x, r in line.points
  )
  parts = [
    f'<g class="series look-{line.look}"><path class="line" d="M{path}"/>'
  ]
  for x, rate in line.points:
    at = f"{place(x):.1f}"
    text = (
      f"{line.name}, {named(x)}: {_percent(rate.win_rate)}%"
      f" [{_percent(rate.low)}, {_percent(rate.high)}], {rate.n} prompts"
    )
    parts.append(
      f'<g class="point"><title>{html.escape(text)}</title>'
      f'<path class="bar" d="M{at} {_y(rate.low):.1f}V{_y(rate.high):.1f}"/>'
      f'<circle cx="{at}" cy="{_y(rate.win_rate):.1f}" r="3.6"/>'
      # What is pointed at need not be hit to the pixel.
      f'<circle class="target" cx="{at}" cy="{_y(rate.win_rate):.1f}" r="12"/>'
      "</g>"
    )
  return [*parts, "</g>"]


def _scale(xs: Sequence[float], count: int) -> Callable[[float], float]:
  """Places on the x axis, with room at both ends."""
  low, high = xs[0], xs[-1]
  start, stop = _LEFT + 16 + 2 * count, _WIDTH - _RIGHT - 12 - 2 * count
  if low == high:
    return lambda x: (start + stop) / 2
  return lambda x: start + (stop - start) * (x - low) / (high - low)


def _gap(xs: Sequence[float], place, count: int) -> float:
  near = min(
    (place(b) - place(a) for a, b in itertools.pairwise(xs)), default=9
  )
  return min(5.0, 0.6 * near / count)


def _y(rate: float) -> float:
  return _TOP + (1 - rate) * (_HEIGHT - _BOTTOM - _TOP)


def _spread(ys: Sequence[float]) -> list[float]:
  """Labels near `ys` that do not lie upon each other, in the same order."""
  order = sorted(range(len(ys)), key=lambda index: ys[index])
  placed = list(ys)
  for above, below in itertools.pairwise(order):
    placed[below] = max(placed[below], placed[above] + _LABEL_GAP)
  # Too far down: push back up from the floor.
  limit = _HEIGHT - _BOTTOM - 2.0
  for index in reversed(order):
    placed[index] = limit = min(placed[index], limit)
    limit -= _LABEL_GAP
  return placed


def _short(name: str) -> str:
  return name if len(name) <= 11 else f"{name[:10]}…"


def _percent(share: float) -> str:
  return f"{100 * share:.1f}"
