"""Plots from plain rows; each is called within `style.style`."""

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.colors
import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import numpy as np

from dpo_jax import winrates
from dpo_jax.report import load
from dpo_jax.report.figures import style
from dpo_jax.winrates import rates as rates_lib

Plot = matplotlib.figure.Figure
Rows = Sequence[Mapping[str, Any]]
"""Rows of a run's metrics.jsonl, in file order."""

_PANELS = (
  ("loss", "loss"),
  ("grad_norm", "gradient norm"),
  ("learning_rate", "learning rate"),
  ("rewards/accuracies", "reward accuracy"),
)
_TRAIN, _HELD_OUT = style.COLORS[1], style.COLORS[2]
_HOLLOW = {
  "marker": "o",
  "markersize": 4,
  "markerfacecolor": "none",
  "linestyle": "none",
}
_PARTS = {
  0: ("prompt", style.COLORS[0]),
  1: ("chosen", style.COLORS[3]),
  2: ("rejected", style.COLORS[4]),
}
_MASKED = 0.96  # gray


# --- win rates


def win_rate_data(rates: Sequence[winrates.WinRate]) -> list[tuple]:
  """Plain values of a plot of win rates."""
  return [
    (r.model, r.step, r.temperature, r.win_rate, r.low, r.high) for r in rates
  ]


def win_rate_by_temperature(rates: Sequence[winrates.WinRate]) -> Plot:
  """Win rates of final models against sampling temperature."""
  lines = _group(rates, lambda rate: rate.model)
  labels = [load.NAMES.get(model, model) for model in lines]
  xs = sorted({rate.temperature for rate in rates})
  figure, axes = _win_rates(
    lines, labels, lambda rate: rate.temperature, _looks(lines), xs
  )
  axes.set_xticks(xs, [str(x) for x in xs])
  axes.set_xlabel("sampling temperature")
  return figure


def win_rate_by_step(rates: Sequence[winrates.WinRate]) -> Plot:
  """Win rates of checkpoints against the training step."""
  lines = _group(rates, lambda rate: (rate.model, rate.temperature))
  models = {load.NAMES.get(model, model) for model, _ in lines}
  labels = [
    (f"{load.NAMES.get(model, model)}, " if len(models) > 1 else "")
    + f"T = {temperature}"
    for model, temperature in lines
  ]
  xs = sorted({rate.step or 0 for rate in rates})
  # From 1: gray is the base model's.
  looks = range(1, 1 + len(lines))
  figure, axes = _win_rates(lines, labels, lambda rate: rate.step, looks, xs)
  if len(xs) <= 8:
    axes.set_xticks(xs)
  else:
    axes.xaxis.set_major_locator(_integers(6))
  name = f"{models.pop()} " if len(models) == 1 else ""
  axes.set_xlabel(f"{name}training step")
  return figure


def win_rate_by_length(bins: Sequence[rates_lib.LengthBin]) -> Plot:
  """Win rates against the difference in length, at one temperature."""
  lines = _group(bins, lambda found: found.model)
  labels = [load.NAMES.get(model, model) for model in lines]
  figure, axes = _win_rates(
    lines, labels, lambda found: found.difference, _looks(lines)
  )
  axes.axvline(0, zorder=1.5, **style.guide())
  axes.set_xlabel("response longer than chosen by (characters)")
  return figure


def _looks(models) -> list[int]:
  """Indices of color and marker; a known model's are always the same."""
  others = [model for model in models if model not in winrates.MODELS]
  return [[*winrates.MODELS, *others].index(model) for model in models]


def _win_rates(lines, labels, x_of, looks, xs: Sequence[float] = ()):
  """Figure and axes with a line of rates and interval bars for each group.

  Args:
    lines: key -> rows of a line.
    labels: of each line in the legend.
    x_of: function of a row.
    looks: index of color and marker of each line.
    xs: positions at which the lines' bars are drawn side by side.
  """
  figure = style.new()
  axes = figure.subplots()
  gap = min((b - a for a, b in itertools.pairwise(xs)), default=1.0)
  width = xs[-1] - xs[0] if xs else 0.0
  # Bars are kept apart, and groups together.
  offset = min(0.025 * width, 0.8 * gap / len(lines)) if len(xs) > 1 else 0.1
  offset *= bool(xs)
  for index, (rows, label, look) in enumerate(
    zip(lines.values(), labels, looks)
  ):
    look %= len(style.COLORS)
    rows = sorted(rows, key=x_of)
    rate = np.asarray([row.win_rate for row in rows])
    bars = [
      rate - [row.low for row in rows],
      np.asarray([row.high for row in rows]) - rate,
    ]
    axes.errorbar(
      [x_of(row) + (index - (len(labels) - 1) / 2) * offset for row in rows],
      100 * rate,
      # The end of a bootstrap interval may miss the rate by rounding.
      yerr=100 * np.maximum(bars, 0.0),
      color=f"C{look}",
      marker=style.MARKERS[look],
      elinewidth=0.9,
      label=label,
    )
  if xs:
    room = max(0.05 * width, 0.3 * gap)
    axes.set_xlim(xs[0] - room, xs[-1] + room)
  axes.axhline(50, zorder=1.5, **style.guide())
  axes.set_ylabel("win rate against chosen (%)")
  # The whole scale, so that figures can be compared side by side.
  axes.set_ylim(0, 100)
  axes.set_yticks(range(0, 101, 10), minor=True)
  axes.set_yticks(range(0, 101, 25))
  axes.legend(
    loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(labels))
  )
  return figure, axes


def _group(rows, key_of: Callable[[Any], Any]) -> dict[Any, list]:
  groups = collections.defaultdict(list)
  for row in rows:
    groups[key_of(row)].append(row)
  return groups


# --- training metrics


def metric_data(rows: Rows, keys: Sequence[str]) -> dict[str, list]:
  """Plain values of a plot of metrics, held-out ones included."""
  every = [*keys, *(f"eval_{key}" for key in keys), "eval_items"]
  return {key: _points(rows, key) for key in every}


def has(rows: Rows, key: str) -> bool:
  """Whether a metric has values, in training or held out."""
  return bool(_points(rows, key) or _points(rows, f"eval_{key}"))


def training_curves(runs: Mapping[str, Rows]) -> Plot:
  """Loss, gradient norm, learning rate, reward accuracy; a column a run.

  Each column holds the metrics that its run has, at equal heights.
  """
  panels = {
    run: [(k, title) for k, title in _PANELS if k == "loss" or has(rows, k)]
    for run, rows in runs.items()
  }
  counts = [len(found) for found in panels.values()]
  figure = style.new(
    style.COLUMN_IN if len(runs) == 1 else style.PAGE_IN,
    0.35 + 1.25 * max(counts),
  )
  columns = figure.add_gridspec(1, len(runs))
  handles = {}
  for column, (run, found) in zip(columns, panels.items()):
    for place, (key, title) in zip(column.subgridspec(len(found), 1), found):
      axes = figure.add_subplot(place)
      if key == "rewards/accuracies":
        axes.axhline(0.5, **style.guide())
      handles |= _curves(axes, runs[run], key)
      axes.set_title(f"{load.NAMES.get(run, run)}: {title}")
      axes.xaxis.set_major_locator(_integers(5))
    axes.set_xlabel("step")
  _legend(figure, handles)
  return figure


def reward_margins(rows: Rows) -> Plot:
  """Implicit rewards of chosen and rejected responses, and their margin."""
  figure = style.new()
  axes = figure.subplots()
  axes.axhline(0, **style.guide())
  handles, held_out = {}, None
  for key, label, color in (
    ("rewards/chosen", "chosen", style.COLORS[3]),
    ("rewards/rejected", "rejected", style.COLORS[4]),
    ("rewards/margins", "margin", style.COLORS[0]),
  ):
    found = _curves(axes, rows, key, color, color)
    if found:
      handles[label] = next(iter(found.values()))
    if "held out" in found:
      held_out = found["held out"]
  if held_out:
    handles["held out"] = matplotlib.lines.Line2D(
      [], [], color=style.COLORS[0], **_HOLLOW
    )
  axes.set_ylabel("implicit reward (nats)")
  _step_axis(axes)
  _legend(figure, handles)
  return figure


def reward_accuracy(rows: Rows, *, confidence: float) -> Plot:
  """Share of pairs whose chosen response has the higher implicit reward.

  Held-out points have a Wilson interval where their number of pairs is
  recorded.
  """
  key = "rewards/accuracies"
  items = dict(_points(rows, "eval_items"))
  figure = style.new()
  axes = figure.subplots()
  axes.axhline(50, **style.guide())
  handles = _curves(axes, rows, key, scale=100)
  for step, share in _points(rows, f"eval_{key}"):
    if n := items.get(step):
      low, high = winrates.wilson_interval(share * n, n, confidence=confidence)
      axes.errorbar(
        [step],
        [100 * share],
        yerr=[[100 * max(0, share - low)], [100 * max(0, high - share)]],
        color=_HELD_OUT,
        elinewidth=0.8,
      )
  axes.set_ylabel("chosen ranked first (%)")
  axes.set_ylim(0, 100)
  axes.set_yticks(range(0, 101, 25))
  _step_axis(axes)
  _legend(figure, handles)
  return figure


def _curves(
  axes, rows: Rows, key: str, train_color=_TRAIN, held_color=_HELD_OUT, scale=1
) -> dict:
  """Draws training and held-out values of `key`; legend label -> handle."""
  handles = {}
  train, held_out = _points(rows, key), _points(rows, f"eval_{key}")
  if train:
    steps, values = np.asarray(train).T
    values = values * scale
    half = len(values) // 40
    if half and key != "learning_rate":
      axes.plot(steps, values, color=train_color, alpha=0.3, linewidth=0.6)
      # Whole windows only: a shorter one shows noise as a trend.
      steps = steps[half:-half]
      window = np.full(2 * half + 1, 1 / (2 * half + 1))
      values = np.convolve(values, window, mode="valid")
    (handles["training"],) = axes.plot(steps, values, color=train_color)
  if held_out:
    steps, values = np.asarray(held_out).T
    # Over a training line of the same color, rings that a line does not join.
    look = _HOLLOW if held_color == train_color else {"markersize": 3}
    (handles["held out"],) = axes.plot(
      steps, values * scale, **{"color": held_color, "marker": "o"} | look
    )
  return handles


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
  """(step, value) of the rows with a finite `key`."""
  # Values that are not finite are recorded as strings.
  return [
    (row["step"], row[key])
    for row in rows
    if isinstance(row.get(key), int | float)
  ]


def _step_axis(axes) -> None:
  axes.set_xlabel("training step")
  axes.xaxis.set_major_locator(_integers(6))


def _integers(count: int) -> matplotlib.ticker.Locator:
  return matplotlib.ticker.MaxNLocator(count, integer=True)


def _legend(figure: Plot, handles: dict) -> None:
  if handles:
    figure.legend(
      handles.values(),
      handles.keys(),
      loc="outside upper center",
      ncols=len(handles),
    )


# --- masks and meshes


def packing_mask(
  mask: np.ndarray, part_ids: np.ndarray, tokens: Sequence[str]
) -> Plot:
  """Attention mask of a packed row, colored by the query's part.

  Args:
    mask: whether a query attends to a key, bool [T, T].
    part_ids: 0 prompt, 1 chosen, 2 rejected, [T].
    tokens: text of each token, shown if there are at most 80, [T].
  """
  mask, part_ids = np.asarray(mask, bool), np.asarray(part_ids)
  size = len(tokens)
  colors = np.asarray(
    [matplotlib.colors.to_rgb(_PARTS[part][1]) for part in range(3)]
  )
  image = np.where(mask[:, :, None], colors[part_ids][:, None], _MASKED)
  figure = style.new(style.PAGE_IN * 0.75, style.PAGE_IN * 0.75)
  axes = figure.subplots()
  axes.imshow(image, interpolation="nearest")
  axes.grid(visible=False)
  axes.set_xlabel("key")
  axes.set_ylabel("query")
  if size <= 80:
    font = min(6.5, 300 / size)
    labels = [token.replace("\n", "⏎") for token in tokens]
    axes.set_xticks(range(size), labels, rotation=90, fontsize=font)
    axes.set_yticks(range(size), labels, fontsize=font)
  for part, (name, color) in _PARTS.items():
    if (part_ids == part).any():
      axes.plot([], [], "s", color=color, label=f"query in {name}")
  figure.legend(loc="outside upper center", ncols=3)
  return figure


def sharding(
  arrays: Mapping[str, tuple[Sequence[int], Mapping[int, tuple]]],
) -> Plot:
  """Shards of two-dimensional arrays, and the devices that hold them.

  Args:
    arrays: name -> (shape, device id -> its slices), as from
      `Sharding.devices_indices_map`.
  """
  lines = -(-len(arrays) // 3)
  figure = style.new(style.PAGE_IN, 0.4 + 1.9 * lines)
  grid = figure.subplots(lines, 3, squeeze=False).ravel()
  for axes, (name, (shape, slices)) in zip(grid, arrays.items()):
    shards = _shards(shape, slices).items()
    for number, ((top, left, height, width), devices) in enumerate(shards):
      color = style.COLORS[number % len(style.COLORS)]
      axes.bar(left, height, width, top, align="edge", color=color, alpha=0.45)
      axes.text(
        left + width / 2,
        top + height / 2,
        ", ".join(map(str, devices)),
        ha="center",
        va="center",
        fontsize=6.5,
      )
    axes.set_title(name)
    axes.set_xlim(0, shape[1])
    axes.set_ylim(shape[0], 0)
    axes.set_xticks([0, shape[1]])
    axes.set_yticks([0, shape[0]])
    axes.grid(visible=False)
  for axes in grid[len(arrays) :]:
    axes.set_axis_off()
  return figure


def _shards(shape, slices) -> dict[tuple[int, int, int, int], list[int]]:
  """(top, left, height, width) of each shard -> devices that hold it."""
  shards: dict[tuple[int, int, int, int], list[int]] = {}
  for device, parts in sorted(slices.items()):
    (top, bottom, _), (left, right, _) = (
      part.indices(size) for part, size in zip(parts, shape, strict=True)
    )
    place = (top, left, bottom - top, right - left)
    shards.setdefault(place, []).append(device)
  return shards
