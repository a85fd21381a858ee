"""Figures of win rates and training curves, from plain rows to PNG files.

One dictionary holds the house style. Figures are made with the object API, so
nothing global is set and no display is needed: a figure is drawn with Agg
and written whole or not at all.
"""

import collections
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from dpo_jax import winrates

COLUMN_IN = 3.5  # width of a paper's column, inches
PAGE_IN = 7.2  # width of a paper's page, inches

STYLE: dict[Any, Any] = {
  "figure.dpi": 100,
  "savefig.dpi": 300,
  "figure.facecolor": "white",
  "savefig.facecolor": "white",
  "font.family": "DejaVu Sans",
  "font.size": 8,
  "axes.titlesize": 8,
  "axes.labelsize": 8,
  "xtick.labelsize": 7,
  "ytick.labelsize": 7,
  "legend.fontsize": 7,
  "legend.frameon": False,
  "legend.handlelength": 1.8,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.linewidth": 0.7,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.axisbelow": True,
  "grid.color": "#E4E4E4",
  "grid.linewidth": 0.6,
  "lines.linewidth": 1.3,
  "lines.markersize": 4,
  "errorbar.capsize": 2,
  "text.parse_math": False,
}

# Okabe and Ito's palette, told apart by every common kind of colour vision;
# markers differ as well, for print without colour.
_COLORS = ("#737373", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_NAMES = {"base": "base", "sft": "SFT", "dpo": "DPO"}
_GUIDE = {"color": "#444444", "linewidth": 0.8, "linestyle": (0, (4, 3))}


class Rate(Protocol):
  """What is drawn of a win rate; `winrates.WinRate` has it."""

  @property
  def model(self) -> str: ...
  @property
  def step(self) -> int | None: ...
  @property
  def temperature(self) -> float: ...
  @property
  def n(self) -> int: ...
  @property
  def win_rate(self) -> float: ...
  @property
  def low(self) -> float: ...
  @property
  def high(self) -> float: ...


def points(rates: Sequence[Rate]) -> list[tuple]:
  """What a figure shows of rates, as plain values."""
  return [
    (r.model, r.step, r.temperature, r.win_rate, r.low, r.high) for r in rates
  ]


def fingerprint(data: Any) -> str:
  """Hash of the plain values that a figure shows, to 9 digits.

  It stands in the figure's file, under the PNG keyword Description.
  """
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


def win_rate_by_temperature(
  rates: Sequence[Rate], path: str | os.PathLike
) -> pathlib.Path:
  """Win rate of the final models against sampling temperature.

  Args:
    rates: rows; those of checkpoints (step not None) and those without a
      verdict (n = 0) are not drawn.
    path: of the PNG file.

  Returns:
    The path.
  """
  finals = [rate for rate in rates if rate.step is None and rate.n]
  series = _group(finals, lambda rate: rate.model)
  xs = sorted({rate.temperature for rate in finals})
  labels = [_NAMES.get(model, model) for model in series]
  with matplotlib.rc_context(STYLE):
    figure, axes = _column_figure()
    offset = _offset(xs, len(series))
    # A model keeps its look when another one is not there.
    others = [model for model in series if model not in winrates.MODELS]
    looks = [[*winrates.MODELS, *others].index(model) for model in series]
    _draw(axes, series.values(), labels, lambda r: r.temperature, offset, looks)
    axes.set_xticks(xs, [str(x) for x in xs])
    _pad(axes, xs)
    axes.set_xlabel("sampling temperature")
    _finish(axes, len(labels))
    return _save(figure, path, points(finals))


def win_rate_by_step(
  rates: Sequence[Rate], path: str | os.PathLike
) -> pathlib.Path:
  """Win rate of checkpoints against the training step, a line a temperature.

  Args:
    rates: rows; those of final models (step None) and those without a verdict
      (n = 0) are not drawn.
    path: of the PNG file.

  Returns:
    The path.
  """
  steps = [rate for rate in rates if rate.step is not None and rate.n]
  series = _group(steps, lambda rate: (rate.model, rate.temperature))
  xs = sorted({rate.step for rate in steps if rate.step is not None})
  several = len({model for model, _ in series}) > 1
  labels = [
    (f"{_NAMES.get(model, model)}, " if several else "") + f"T = {temperature}"
    for model, temperature in series
  ]
  with matplotlib.rc_context(STYLE):
    figure, axes = _column_figure()
    offset = _offset(xs, len(series))
    # The grey of the base model would say something that is not meant.
    looks = range(1, 1 + len(series))
    _draw(axes, series.values(), labels, lambda r: r.step, offset, looks)
    if len(xs) <= 8:
      axes.set_xticks(xs)
    else:
      axes.xaxis.set_major_locator(_whole_numbers(6))
    _pad(axes, xs)
    models = {_NAMES.get(model, model) for model, _ in series}
    name = f"{models.pop()} " if len(models) == 1 else ""
    axes.set_xlabel(f"{name}training step")
    _finish(axes, len(labels))
    return _save(figure, path, points(steps))


def training_curves(
  runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike
) -> pathlib.Path:
  """Loss of every run; reward margin and accuracy where a run has them.

  Args:
    runs: run name to its rows of metrics.jsonl, in file order.
    path: of the PNG file.

  Returns:
    The path.
  """
  panels = [
    (run, key, guide)
    for key, guide in (
      ("loss", None),
      ("rewards/margins", 0.0),
      ("rewards/accuracies", 0.5),
    )
    for run in runs
    if key == "loss"
    or _points(runs[run], key)
    or _points(runs[run], _held(key))
  ]
  columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
  lines = max(1, math.ceil(len(panels) / columns))
  with matplotlib.rc_context(STYLE):
    figure = matplotlib.figure.Figure(
      figsize=(PAGE_IN, 0.35 + 1.85 * lines), layout="constrained"
    )
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    handles = {}
    for axes, (run, key, guide) in zip(grid, panels):
      if guide is not None:
        axes.axhline(guide, **_GUIDE)
      handles |= _curves(axes, runs[run], key)
      axes.set_title(f"{_NAMES.get(run, run)}: {_TITLES[key]}", loc="left")
      axes.set_xlabel("step")
      axes.xaxis.set_major_locator(_whole_numbers(5))
    for axes in grid[len(panels) :]:
      axes.set_axis_off()
    if handles:
      figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=len(handles),
      )
    return _save(figure, path, runs)


_TITLES = {
  "loss": "loss",
  "rewards/margins": "reward margin",
  "rewards/accuracies": "reward accuracy",
}


def _column_figure():
  figure = matplotlib.figure.Figure(
    figsize=(COLUMN_IN, 2.6), layout="constrained"
  )
  return figure, figure.subplots()


def _draw(axes, series, labels, x_of, offset: float, looks) -> None:
  """Lines with interval bars, shifted apart by `offset` in x."""
  count = len(labels)
  for index, (rows, label, look) in enumerate(zip(series, labels, looks)):
    look %= len(_COLORS)
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
      color=_COLORS[look],
      marker=_MARKERS[look],
      elinewidth=0.9,
      label=label,
    )


def _finish(axes, entries: int) -> None:
  """The parts that both win-rate figures share."""
  axes.axhline(50, zorder=1.5, **_GUIDE)
  axes.set_ylabel("win rate against chosen (%)")
  # The whole scale, so that figures can be laid side by side.
  axes.set_ylim(0, 100)
  axes.set_yticks(range(0, 101, 10), minor=True)
  axes.set_yticks(range(0, 101, 25))
  if entries:
    axes.legend(
      loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, entries)
    )


def _curves(axes, rows: Sequence[Mapping[str, Any]], key: str) -> dict:
  """Draws training and held-out points of `key`; legend label -> handle."""
  handles = {}
  train, held = _points(rows, key), _points(rows, _held(key))
  if train:
    steps, values = np.asarray(train).T
    half = len(values) // 40
    if half:
      axes.plot(steps, values, color=_COLORS[1], alpha=0.3, linewidth=0.6)
      # Whole windows only: at the ends a shorter one shows noise as a trend.
      steps = steps[half:-half]
      window = np.full(2 * half + 1, 1 / (2 * half + 1))
      values = np.convolve(values, window, mode="valid")
    (handles["training"],) = axes.plot(steps, values, color=_COLORS[1])
  if held:
    steps, values = np.asarray(held).T
    (handles["held out"],) = axes.plot(
      steps, values, color=_COLORS[2], marker="o", markersize=3
    )
  return handles


def _held(key: str) -> str:
  return f"eval_{key}"


def _points(
  rows: Sequence[Mapping[str, Any]], key: str
) -> list[tuple[float, float]]:
  """(step, value) of the rows that have a finite `key`, by step.

  Where a step stands twice, the later row is of the weights that went on.
  """
  points = {row["step"]: row[key] for row in rows if key in row}
  # A value that is not finite may be written as its name, a string.
  return sorted(
    (step, value)
    for step, value in points.items()
    if isinstance(value, int | float) and math.isfinite(value)
  )


def _group(rates, key_of) -> dict[Any, list[Rate]]:
  """Rows by key, keys in the order of the table's rows."""
  groups = collections.defaultdict(list)
  for rate in rates:
    groups[key_of(rate)].append(rate)
  return groups


def _whole_numbers(count: int) -> matplotlib.ticker.Locator:
  return matplotlib.ticker.MaxNLocator(count, integer=True)


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


def _save(
  figure: matplotlib.figure.Figure, path: str | os.PathLike, data: Any
) -> pathlib.Path:
  """Writes the whole PNG or nothing; the same rows give the same bytes."""
  path = pathlib.Path(path)
  buffer = io.BytesIO()
  metadata = {"Software": None, "Description": fingerprint(data)}
  figure.savefig(buffer, format="png", metadata=metadata)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  return path
