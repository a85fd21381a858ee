"""Figures of win rates: against temperature, training step and length."""

import collections
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dpo_jax import winrates
from dpo_jax.report.figures import style


class Estimate(Protocol):
  """A win rate with its interval, of one model at one temperature."""

  @property
  def model(self) -> str: ...
  @property
  def temperature(self) -> float: ...
  @property
  def win_rate(self) -> float: ...
  @property
  def low(self) -> float: ...
  @property
  def high(self) -> float: ...


class Rate(Estimate, Protocol):
  """What is drawn of a win rate; `winrates.WinRate` has it."""

  @property
  def step(self) -> int | None: ...
  @property
  def n(self) -> int: ...


class Bin(Estimate, Protocol):
  """What is drawn of the rate at some lengths; `winrates.rates` has it."""

  @property
  def difference(self) -> float: ...


def points(rates: Sequence[Rate]) -> list[tuple]:
  """What a figure shows of rates, as plain values."""
  return [
    (r.model, r.step, r.temperature, r.win_rate, r.low, r.high) for r in rates
  ]


def win_rate_by_temperature(
  rates: Sequence[Rate], path: str | os.PathLike, *, dark: bool = False
) -> pathlib.Path:
  """Win rate of the final models against sampling temperature.

  Args:
    rates: rows; those of checkpoints (step not None) and those without a
      verdict (n = 0) are not drawn.
    path: of the PNG file; the PDF stands beside it. Or of an SVG file.
    dark: in the colors of a dark page.

  Returns:
    The path.
  """
  finals = [rate for rate in rates if rate.step is None and rate.n]
  series = _group(finals, lambda rate: rate.model)
  xs = sorted({rate.temperature for rate in finals})
  labels = [style.NAMES.get(model, model) for model in series]
  with style.style(dark):
    figure = style.new()
    axes = figure.subplots()
    offset = _offset(xs, len(series))
    looks = _looks(series)
    _draw(axes, series.values(), labels, lambda r: r.temperature, offset, looks)
    axes.set_xticks(xs, [str(x) for x in xs])
    _pad(axes, xs)
    axes.set_xlabel("sampling temperature")
    _finish(axes, len(labels))
    return style.save(figure, path, points(finals))


def win_rate_by_step(
  rates: Sequence[Rate], path: str | os.PathLike, *, dark: bool = False
) -> pathlib.Path:
  """Win rate of checkpoints against the training step, a line a temperature.

  Args:
    rates: rows; those of final models (step None) and those without a verdict
      (n = 0) are not drawn.
    path: of the PNG file; the PDF stands beside it. Or of an SVG file.
    dark: in the colors of a dark page.

  Returns:
    The path.
  """
  steps = [rate for rate in rates if rate.step is not None and rate.n]
  series = _group(steps, lambda rate: (rate.model, rate.temperature))
  xs = sorted({rate.step for rate in steps if rate.step is not None})
  several = len({model for model, _ in series}) > 1
  labels = [
    (f"{style.NAMES.get(model, model)}, " if several else "")
    + f"T = {temperature}"
    for model, temperature in series
  ]
  with style.style(dark):
    figure = style.new()
    axes = figure.subplots()
    offset = _offset(xs, len(series))
    # The grey of the base model would say something that is not meant.
    looks = range(1, 1 + len(series))
    _draw(axes, series.values(), labels, lambda r: r.step, offset, looks)
    if len(xs) <= 8:
      axes.set_xticks(xs)
    else:
      axes.xaxis.set_major_locator(style.whole_numbers(6))
    _pad(axes, xs)
    models = {style.NAMES.get(model, model) for model, _ in series}
    name = f"{models.pop()} " if len(models) == 1 else ""
    axes.set_xlabel(f"{name}training step")
    _finish(axes, len(labels))
    return style.save(figure, path, points(steps))


def length_points(bins: Sequence[Bin]) -> list[tuple]:
  """What a figure shows of rates by length, as plain values."""
  return [
    (b.model, b.temperature, b.difference, b.win_rate, b.low, b.high)
    for b in bins
  ]


def win_rate_by_length(
  bins: Sequence[Bin], path: str | os.PathLike
) -> pathlib.Path:
  """Win rate against how much longer an answer is than the chosen one.

  Args:
    bins: of one temperature.
    path: of the PNG file; the PDF stands beside it.

  Returns:
    The path.
  """
  series = _group(bins, lambda found: found.model)
  with style.style():
    figure = style.new()
    axes = figure.subplots()
    axes.axvline(0, **style.guide())
    labels = [style.NAMES.get(model, model) for model in series]
    looks = _looks(series)
    _draw(axes, series.values(), labels, lambda b: b.difference, 0.0, looks)
    axes.set_xlabel("answer longer than chosen by (characters)")
    _finish(axes, len(labels))
    return style.save(figure, path, length_points(bins))


def _looks(models) -> list[int]:
  """A model keeps its look when another one is not there."""
  others = [model for model in models if model not in winrates.MODELS]
  return [[*winrates.MODELS, *others].index(model) for model in models]


def _draw(axes, series, labels, x_of, offset: float, looks) -> None:
  """Lines with interval bars, shifted apart by `offset` in x."""
  count = len(labels)
  for index, (rows, label, look) in enumerate(zip(series, labels, looks)):
    look %= len(style.COLORS)
    rows = sorted(rows, key=x_of)
    rate = np.asarray([row.win_rate for row in rows])
    bars = [
      rate - [row.low for row in rows],
      np.asarray([row.high for row in rows]) - rate,
    ]
    axes.errorbar(
      [x_of(row) + (index - (count - 1) / 2) * offset for row in rows],
      100 * rate,
      # A bootstrap's end may miss the rate by a rounding error.
      yerr=100 * np.maximum(bars, 0.0),
      color=f"C{look}",
      marker=style.MARKERS[look],
      elinewidth=0.9,
      label=label,
    )


def _finish(axes, entries: int) -> None:
  """The parts that both win-rate figures share."""
  axes.axhline(50, zorder=1.5, **style.guide())
  axes.set_ylabel("win rate against chosen (%)")
  # The whole scale, so that figures can be laid side by side.
  axes.set_ylim(0, 100)
  axes.set_yticks(range(0, 101, 10), minor=True)
  axes.set_yticks(range(0, 101, 25))
  if entries:
    axes.legend(
      loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, entries)
    )


def _group(rates, key_of) -> dict[Any, list[Rate]]:
  """Rows by key, keys in the order of the table's rows."""
  groups = collections.defaultdict(list)
  for rate in rates:
    groups[key_of(rate)].append(rate)
  return groups


def _gap(xs: Sequence[float]) -> float:
  return min((b - a for a, b in itertools.pairwise(xs)), default=1.0)


def _offset(xs: Sequence[float], series: int) -> float:
  """Shift in x between series: bars stand apart, groups stay together."""
  if len(xs) < 2:
    return 0.1
  return min(0.025 * (xs[-1] - xs[0]), 0.8 * _gap(xs) / series)


def _pad(axes, xs: Sequence[float]) -> None:
  """Room at both ends for bars that were shifted apart."""
  if xs:
    room = max(0.05 * (xs[-1] - xs[0]), 0.3 * _gap(xs))
    axes.set_xlim(xs[0] - room, xs[-1] + room)
