"""Where a run's metrics go beside metrics.jsonl: CSV, TensorBoard, W&B.

metrics.jsonl is always written and is the one file that later stages read. A
tracker only repeats it for people who watch, so none can stop a run: the first
error of one is warned of, the tracker is left alone from then on, and the end
of the run says so. What it missed is sent again from metrics.jsonl by

  python -m dpo_jax.trackers runs/dpo --use csv tensorboard

A run that is resumed goes on in the same tracker run, each step standing once:
the CSV is cut like metrics.jsonl, TensorBoard is told from which step on
earlier events are void, and W&B, which takes nothing back, is sent only steps
that it does not have.
"""

import argparse
import csv
import dataclasses
import importlib.util
import json
import logging
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from dpo_jax import metrics, tracker_sinks
from dpo_jax.interface import console

_log = logging.getLogger(__name__)

NAMES = ("csv", "tensorboard", "wandb")
# What a tracker imports, and the extra that installs it.
_NEEDS = {"tensorboard": ("tensorboardX", "tb"), "wandb": ("wandb", "wandb")}
_OPEN = {
  "csv": tracker_sinks.Csv,
  "tensorboard": tracker_sinks.TensorBoard,
  "wandb": tracker_sinks.Wandb,
}

Rows = Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class TrackerSettings:
  """Which trackers a run has; explained in configs/common.py."""

  use: tuple[str, ...]
  wandb_project: str
  wandb_mode: Literal["online", "offline"]

  def __post_init__(self):
    for name in self.use:
      if name not in NAMES:
        raise ValueError(
          f"trackers.use={self.use}: {name!r} must be one of {list(NAMES)}"
        )
    if len(set(self.use)) != len(self.use):
      raise ValueError(f"trackers.use={self.use} names one twice")
    if not re.fullmatch(r"[\w.-]{1,128}", self.wandb_project):
      raise ValueError(
        f"trackers.wandb_project={self.wandb_project!r} must be 1 to 128"
        " letters, digits, '_', '-' or '.'"
      )


def check(settings: TrackerSettings) -> None:
  """ValueError if a tracker's library is missing, naming what to install."""
  for name in settings.use:
    library, extra = _NEEDS.get(name, ("", ""))
    if library and importlib.util.find_spec(library) is None:
      raise ValueError(
        f"trackers.use has {name!r}, but {library} is not installed: pip"
        f" install 'dpo-jax[{extra}]', or leave it out"
      )


class Trackers:
  """The trackers of one run; none of their errors gets out."""

  def __init__(
    self,
    settings: TrackerSettings,
    directory: pathlib.Path,
    rows: Sequence[dict[str, Any]],
    start_step: int,
  ):
    """Opens the trackers, with the run's config and manifest attached.

    Args:
      settings: which.
      directory: of the run.
      rows: of metrics.jsonl, up to and including `start_step`.
      start_step: updates that are done; 0 begins anew.
    """
    self.use = settings.use
    self._sinks: dict[str, Any] = {}
    # The tracker, the step it had come to, and why it was left alone.
    self.failed: dict[str, tuple[int, str]] = {}
    self._step = start_step
    about = {
      name: json.loads(path.read_text("utf-8"))
      for name in ("config", "manifest")
      if (path := directory / f"{name}.json").is_file()
    }
    for name in settings.use:
      try:
        self._sinks[name] = _OPEN[name](
          settings, directory, rows, start_step, about
        )
      except Exception as error:  # Whatever a library or the network raises.
        self._fail(name, error)

  def write(self, row: dict[str, Any]) -> None:
    """A row of metrics.jsonl."""
    self._step = row["step"]
    self._each(lambda sink: sink.write(row))

  def table(
    self, step: int, name: str, columns: Sequence[str], rows: Rows
  ) -> None:
    """Texts and numbers in columns, such as sampled answers."""
    self._each(lambda sink: sink.table(step, name, columns, rows))

  def figure(self, step: int, name: str, path: pathlib.Path) -> None:
    """A PNG file."""
    self._each(lambda sink: sink.figure(step, name, path))

  def close(self) -> None:
    """Ends the trackers, and says which of them do not have everything."""
    self._each(lambda sink: sink.close())
    self._sinks = {}
    for name, (step, why) in self.failed.items():
      console.say(
        f"{name} has nothing after step {step} ({why}); metrics.jsonl is whole,"
        " and python -m dpo_jax.trackers sends it again",
        "tracker_failed",
        tracker=name,
        step=step,
      )

  def _each(self, call: Callable[[Any], None]) -> None:
    for name, sink in list(self._sinks.items()):
      try:
        call(sink)
      except Exception as error:  # As in __init__.
        self._fail(name, error)

  def _fail(self, name: str, error: Exception) -> None:
    self._sinks.pop(name, None)
    why = f"{type(error).__name__}: {error}"
    self.failed[name] = (self._step, why)
    _log.warning("tracker %s failed and is left alone: %s", name, why)


class Writer:
  """metrics.jsonl and the trackers, as one writer of rows."""

  def __init__(
    self, settings: TrackerSettings, directory: pathlib.Path, start_step: int
  ):
    self._metrics = metrics.Writer(directory, start_step)
    self.trackers = Trackers(
      settings, directory, self._metrics.rows, start_step
    )

  def write(self, row: dict[str, Any]) -> None:
    self._metrics.write(row)
    self.trackers.write(row)

  def table(
    self, step: int, name: str, columns: Sequence[str], rows: Rows
  ) -> None:
    self.trackers.table(step, name, columns, rows)

  def at(self, step: int) -> list[dict[str, Any]]:
    return self._metrics.at(step)

  def sync(self) -> None:
    self._metrics.sync()

  def conclude(
    self, step: int, draw: Callable[[list[dict[str, Any]]], list[pathlib.Path]]
  ) -> None:
    """Hands the trackers a table of all evaluations, and figures.

    Args:
      step: the last one.
      draw: makes PNG files of the rows of metrics.jsonl. It is called only if
        there is a tracker, and can stop a run as little as one.
    """
    if not self.trackers.use:
      return
    rows = self._metrics.rows
    evaluated = [row for row in rows if "eval_items" in row]
    columns = list(dict.fromkeys(key for row in evaluated for key in row))
    cells = [[row.get(key, "") for key in columns] for row in evaluated]
    self.trackers.table(step, "evaluations", columns, cells)
    try:
      drawn = draw(rows)
    except Exception as error:  # Whatever of matplotlib, fonts or the disk.
      _log.warning("no figures: %s: %s", type(error).__name__, error)
      return
    for path in drawn:
      self.trackers.figure(step, path.stem, path)

  def close(self) -> None:
    self._metrics.close()
    self.trackers.close()


def add_report(
  settings: TrackerSettings, directory: pathlib.Path, report: pathlib.Path
) -> None:
  """Hands a finished run's trackers the win rates that were made of it.

  Args:
    settings: which trackers.
    directory: of the run.
    report: directory of a report, whose win_rates.csv and PNG files are read.
  """
  if not settings.use:
    return
  rows = metrics.read(directory / metrics.FILE)
  step = rows[-1]["step"]
  opened = Trackers(settings, directory, rows, step)
  with (report / "win_rates.csv").open(encoding="utf-8", newline="") as file:
    columns, *cells = csv.reader(file)
  opened.table(step, "report/win_rates", columns, cells)
  for path in sorted(report.glob("win_rate_*.png")):
    opened.figure(step, f"report/{path.stem}", path)
  opened.close()


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax.trackers",
    description="Sends the metrics of a training run to trackers again, from"
    " its metrics.jsonl, and its figures; tables are not sent again.",
  )
  parser.add_argument("directory", type=pathlib.Path, help="of the run")
  parser.add_argument("--use", nargs="+", required=True, choices=NAMES)
  parser.add_argument("--wandb_project", default="dpo_jax")
  parser.add_argument(
    "--wandb_mode", default="online", choices=("online", "offline")
  )
  console.add_flag(parser)
  flags = parser.parse_args(arguments)
  path = flags.directory.absolute()
  try:
    settings = TrackerSettings(
      tuple(flags.use), flags.wandb_project, flags.wandb_mode
    )
    check(settings)
    if not (path / metrics.FILE).is_file():
      raise ValueError(f"{path} holds no {metrics.FILE}: name a training run")
    rows = metrics.read(path / metrics.FILE)
  except ValueError as error:
    console.error(str(error))
    return 2
  for name in settings.use:
    # Anew: a run of W&B that has a part of it cannot be filled up.
    found = path / {"wandb": "wandb_run.json"}.get(name, name)
    if name == "wandb":
      found.unlink(missing_ok=True)
    elif name == "tensorboard":
      shutil.rmtree(found, ignore_errors=True)
  last = rows[-1]["step"] if rows else 0
  sent = Trackers(settings, path, rows, last)
  for figure in sorted((path / "figures").glob("*.png")):
    sent.figure(last, figure.stem, figure)
  sent.close()
  return 1 if sent.failed else 0


if __name__ == "__main__":
  sys.exit(main())
