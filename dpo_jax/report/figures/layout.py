"""Figures of where things lie: tokens in a row, and arrays on a mesh."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dpo_jax.report.figures import style

_PARTS = {0: ("prompt", style.COLORS[0])}
_PARTS[1] = ("chosen", style.COLORS[3])
_PARTS[2] = ("rejected", style.COLORS[4])
_HIDDEN = 0.96  # grey of what is not seen


def packing_mask(
  mask: np.ndarray,
  part_ids: np.ndarray,
  tokens: Sequence[str],
  path: str | os.PathLike,
) -> pathlib.Path:
  """Which tokens of a row see which, a square each.

  Args:
    mask: whether a query sees a key, bool [T, T].
    part_ids: part of each token, 0 prompt, 1 chosen, 2 rejected, [T].
    tokens: text of each token, [T]; shown where there is room.
    path: of the PNG file; the PDF stands beside it.

  Raises:
    ValueError: the shapes do not agree.
  """
  mask, part_ids = np.asarray(mask, bool), np.asarray(part_ids)
  size = len(tokens)
  if mask.shape != (size, size) or part_ids.shape != (size,):
    raise ValueError(
      f"mask {mask.shape} and part_ids {part_ids.shape} must be of {size}"
      f" tokens"
    )
  image = mask_image(mask, part_ids)
  with style.style():
    figure = style.new(style.PAGE_IN * 0.75, style.PAGE_IN * 0.75)
    axes = figure.subplots()
    axes.imshow(image, interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xlabel("key: what is seen")
    axes.set_ylabel("query: who sees")
    if size <= 80:
      font = min(6.5, 300 / size)
      labels = [token.replace("\n", "⏎") for token in tokens]
      axes.set_xticks(range(size), labels, rotation=90, fontsize=font)
      axes.set_yticks(range(size), labels, fontsize=font)
    for part, (name, color) in _PARTS.items():
      if (part_ids == part).any():
        axes.plot([], [], "s", color=color, label=f"seen by {name}")
    figure.legend(loc="outside upper center", ncols=3)
    return style.save(figure, path, [mask.tolist(), part_ids.tolist()])


def mask_image(mask: np.ndarray, part_ids: np.ndarray) -> np.ndarray:
  """The colours of a mask, [T, T, 3]: what is seen, by who sees it."""
  colors = np.asarray([_rgb(_PARTS[part][1]) for part in range(3)])
  seen = np.broadcast_to(colors[part_ids][:, None], (*mask.shape, 3))
  return np.where(mask[:, :, None], seen, _HIDDEN)


def sharding(
  arrays: Mapping[str, tuple[Sequence[int], Mapping[int, tuple]]],
  path: str | os.PathLike,
) -> pathlib.Path:
  """Which device holds which part of arrays of two axes.

  Args:
    arrays: name -> (shape, device id -> the slices it holds), as
      `Sharding.devices_indices_map` gives them.
    path: of the PNG file; the PDF stands beside it.

  Raises:
    ValueError: an array has not two axes.
  """
  with style.style():
    figure = style.new(style.PAGE_IN, 0.4 + 1.9 * -(-len(arrays) // 3))
    grid = figure.subplots(-(-len(arrays) // 3), 3, squeeze=False).ravel()
    for axes, (name, (shape, held)) in zip(grid, arrays.items()):
      if len(shape) != 2:
        raise ValueError(f"{name} {tuple(shape)} must have two axes")
      for number, (place, devices) in enumerate(_tiles(shape, held).items()):
        top, left, height, width = place
        color = style.COLORS[number % len(style.COLORS)]
        axes.bar(
          left, height, width, top, align="edge", color=color, alpha=0.45
        )
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
    data = {
      name: [list(shape), sorted(_tiles(shape, held).items())]
      for name, (shape, held) in arrays.items()
    }
    return style.save(figure, path, data)


def _tiles(shape, held) -> dict[tuple[int, int, int, int], list[int]]:
  """(top, left, height, width) of each part, and the devices that hold it."""
  tiles: dict[tuple[int, int, int, int], list[int]] = {}
  for device, slices in sorted(held.items()):
    (top, bottom, _), (left, right, _) = (
      part.indices(size) for part, size in zip(slices, shape, strict=True)
    )
    place = (top, left, bottom - top, right - left)
    tiles.setdefault(place, []).append(device)
  return tiles


def _rgb(color: str) -> list[float]:
  return [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
