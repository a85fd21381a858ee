"""Figures of training runs, from their rows of metrics.jsonl.

Pale: every step. Dark: the running mean. Points: on held-out pairs.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax import winrates
from dpo_jax.report.figures import style

Rows = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Rows]
"""Run name to its rows of metrics.jsonl, in file order."""

_PANELS = (
  ("loss", "loss"),
  ("grad_norm", "gradient norm"),
  ("learning_rate", "learning rate"),
  # Last: runs without it leave no hole among the panels.
  ("rewards/accuracies", "reward accuracy"),
)
_TRAIN, _HELD = style.COLORS[1], style.COLORS[2]


def training_curves(runs: Runs, path: str | os.PathLike) -> pathlib.Path:
  """Loss, gradient norm, learning rate, reward accuracy; a run a column.

  Args:
    runs: what was measured; a row of panels that no run has is left out.
    path: of the PNG file; the PDF stands beside it.

  Returns:
    The path.
  """
  panels = [
    (key, title)
    for key, title in _PANELS
    if key == "loss" or any(_has(rows, key) for rows in runs.values())
  ]
  columns = max(1, len(runs))
  with style.style():
    figure = style.new(
      style.COLUMN_IN if columns == 1 else style.PAGE_IN,
      0.35 + 1.25 * len(panels),
    )
    grid = figure.subplots(len(panels), columns, squeeze=False)
    handles = {}
    lowest = {}
    for line, (key, title) in zip(grid, panels):
      for axes, (run, rows) in zip(line, runs.items()):
        if not _has(rows, key) and key != "loss":
          axes.set_axis_off()
          continue
        if key == "rewards/accuracies":
          axes.axhline(0.5, **style.guide())
        handles |= _curves(axes, rows, key)
        axes.set_title(f"{style.NAMES.get(run, run)}: {title}")
        axes.xaxis.set_major_locator(style.whole_numbers(5))
        lowest[run] = axes
    for axes in lowest.values():
      axes.set_xlabel("step")
    _legend(figure, handles)
    return style.save(figure, path, runs)


def reward_margins(rows: Rows, path: str | os.PathLike) -> pathlib.Path:
  """Implicit rewards of chosen and rejected answers, and their margin.

  Args:
    rows: of one run with rewards.
    path: of the PNG file; the PDF stands beside it.
  """
  kinds = (
    ("rewards/chosen", "chosen", style.COLORS[3]),
    ("rewards/rejected", "rejected", style.COLORS[4]),
    ("rewards/margins", "margin", style.COLORS[0]),
  )
  with style.style():
    figure = style.new()
    axes = figure.subplots()
    axes.axhline(0, **style.guide())
    handles = {}
    for key, label, color in kinds:
      found = _curves(axes, rows, key, color, color)
      if found:
        handles[label] = next(iter(found.values()))
    axes.set_ylabel("implicit reward (nats)")
    _steps(axes)
    _legend(figure, handles)
    return style.save(figure, path, shown(rows, [key for key, *_ in kinds]))


def reward_accuracy(
  rows: Rows, path: str | os.PathLike, *, confidence: float
) -> pathlib.Path:
  """Share of pairs whose chosen answer the implicit reward ranks first.

  Args:
    rows: of one run with rewards; where a held-out row says its number of
      pairs, a Wilson interval is drawn.
    path: of the PNG file; the PDF stands beside it.
    confidence: of the intervals, in (0, 1).
  """
  key = "rewards/accuracies"
  items = dict(_points(rows, "eval_items"))
  with style.style():
    figure = style.new()
    axes = figure.subplots()
    axes.axhline(50, **style.guide())
    handles = _curves(axes, rows, key, scale=100)
    for step, share in _points(rows, _held(key)):
      if n := items.get(step):
        low, high = winrates.wilson_interval(
          share * n, n, confidence=confidence
        )
        axes.errorbar(
          [step],
          [100 * share],
          yerr=[[100 * max(0, share - low)], [100 * max(0, high - share)]],
          color=_HELD,
          elinewidth=0.8,
        )
    axes.set_ylabel("chosen ranked first (%)")
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 25))
    _steps(axes)
    _legend(figure, handles)
    data = [*shown(rows, [key]).values(), confidence]
    return style.save(figure, path, data)


def shown(rows: Rows, keys: Sequence[str]) -> dict[str, list]:
  """What a figure of some keys shows of rows, as plain values."""
  every = [*keys, *map(_held, keys), "eval_items"]
  return {key: _points(rows, key) for key in every}


def has_rewards(rows: Rows) -> bool:
  return _has(rows, "rewards/margins")


def _curves(
  axes, rows: Rows, key: str, train_color=_TRAIN, held_color=_HELD, scale=1
) -> dict:
  """Draws training and held-out points of `key`; legend label -> handle."""
  handles = {}
  train, held = _points(rows, key), _points(rows, _held(key))
  if train:
    steps, values = np.asarray(train).T
    values = values * scale
    half = len(values) // 40
    if half and key != "learning_rate":
      axes.plot(steps, values, color=train_color, alpha=0.3, linewidth=0.6)
      # Whole windows only: at the ends a shorter one shows noise as a trend.
      steps = steps[half:-half]
      window = np.full(2 * half + 1, 1 / (2 * half + 1))
      values = np.convolve(values, window, mode="valid")
    (handles["training"],) = axes.plot(steps, values, color=train_color)
  if held:
    steps, values = np.asarray(held).T
    (handles["held out"],) = axes.plot(
      steps, values * scale, color=held_color, marker="o", markersize=3
    )
  return handles


def _steps(axes) -> None:
  axes.set_xlabel("training step")
  axes.xaxis.set_major_locator(style.whole_numbers(6))


def _legend(figure, handles: dict) -> None:
  if handles:
    figure.legend(
      handles.values(),
      handles.keys(),
      loc="outside upper center",
      ncols=len(handles),
    )


def _has(rows: Rows, key: str) -> bool:
  return bool(_points(rows, key) or _points(rows, _held(key)))


def _held(key: str) -> str:
  return f"eval_{key}"


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
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
