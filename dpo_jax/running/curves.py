"""The figures of one training run, drawn at its end for its trackers.

The report draws the same ones of several runs together.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

DIRECTORY = "figures"
# Of the intervals of the share of pairs that are ranked rightly.
_CONFIDENCE = 0.95


def draw(
  directory: pathlib.Path, rows: Sequence[Mapping[str, Any]]
) -> list[pathlib.Path]:
  """Draws a run's curves into `directory`/figures; the paths of the PNG files.

  Args:
    directory: of the run; its name is the run's.
    rows: of metrics.jsonl.
  """
  # Slow to import, and of no use to a run without trackers.
  from dpo_jax import figures

  target = directory / DIRECTORY
  target.mkdir(exist_ok=True)
  found = [
    figures.training_curves(
      {directory.name: rows}, target / "training_curves.png"
    )
  ]
  if figures.has_rewards(rows):
    found += [
      figures.reward_margins(rows, target / "reward_margins.png"),
      figures.reward_accuracy(
        rows, target / "reward_accuracy.png", confidence=_CONFIDENCE
      ),
    ]
  return found
