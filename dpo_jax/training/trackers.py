"""Experiment trackers: CSV, TensorBoard and Weights & Biases.

metrics.jsonl is always written and is the only file that later stages read. A
tracker repeats it and cannot stop a run: at its first error it is closed with a
warning.

A resumed run continues in the same tracker run, with each step once: the CSV is
cut like metrics.jsonl, TensorBoard purges later events, and W&B, which takes
nothing back, gets only rows that it does not have.
"""

import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import logging
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any, Literal

from dpo_jax.core import console
from dpo_jax.io import atomic, metrics

_log = logging.getLogger(__name__)

# What a tracker imports, and the extra that installs it.
_NEEDS = {"tensorboard": ("tensorboardX", "tb"), "wandb": ("wandb", "wandb")}


@dataclasses.dataclass(frozen=True)
class TrackerSettings:
  """The trackers of a run; see configs/common.py."""

  use: tuple[Literal["csv", "tensorboard", "wandb"], ...]
  wandb_project: str
  wandb_mode: Literal["online", "offline"]


def check(settings: TrackerSettings) -> None:
  """ValueError if a tracker's library is missing, naming what to install."""
  for name in settings.use:
    library, extra = _NEEDS.get(name, ("", ""))
    if library and importlib.util.find_spec(library) is None:
      raise ValueError(
        f"trackers.use has {name!r}, but {library} is not installed: pip"
        f" install 'dpo-jax[{extra}]', or leave it out"
      )


class Csv:
  """metrics.csv: a line a row, a column a metric.

  All trackers are opened with (settings, directory, rows, start_step): the
  run's `TrackerSettings`, its directory, and the rows of metrics.jsonl up to
  `start_step`, which are appended to before each `write`. `Writer` catches
  their errors.
  """

  def __init__(self, settings, directory, rows, start_step):
    del settings, start_step
    self._path, self._rows = directory / "metrics.csv", rows
    self._begin()

  def write(self, row) -> None:
    if row.keys() <= self._columns.keys():
      self._writer.writerow(row)
      self._file.flush()
    else:
      # A metric that was never seen: the header changes.
      self._file.close()
      self._begin()

  def close(self) -> None:
    self._file.close()

  def _begin(self) -> None:
    keys = (key for row in self._rows for key in row)
    self._columns = dict.fromkeys(["step", *keys])
    whole = io.StringIO()
    writer = csv.DictWriter(whole, self._columns)
    writer.writeheader()
    writer.writerows(self._rows)
    atomic.write_text(self._path, whole.getvalue())
    self._file = self._path.open("a", encoding="utf-8", newline="")
    self._writer = csv.DictWriter(self._file, self._columns)


class TensorBoard:
  """Event files in tensorboard/, for `tensorboard --logdir`."""

  def __init__(self, settings, directory, rows, start_step):
    import tensorboardX

    del settings
    path = directory / "tensorboard"
    if not start_step and path.exists():
      shutil.rmtree(path)
    resumed = path.exists()
    self._writer = tensorboardX.SummaryWriter(
      str(path),
      purge_step=start_step + 1 if resumed else None,
      # Files of one second would have one name; and they are read by name.
      filename_suffix=f".{start_step:09d}.{secrets.token_hex(4)}",
    )
    for row in () if resumed else rows:
      self.write(row)

  def write(self, row) -> None:
    for key, value in row.items():
      if key != "step" and isinstance(value, int | float):
        self._writer.add_scalar(key, value, row["step"])

  def close(self) -> None:
    self._writer.close()


class Wandb:
  """A run of Weights & Biases, its files in wandb/."""

  def __init__(self, settings, directory, rows, start_step):
    import wandb

    del start_step
    # The run's id, and the position of the last row sent.
    self._file = directory / "wandb_run.json"
    self._mark = {"id": secrets.token_hex(4), "sent": [-1, False]}
    if self._file.is_file():
      self._mark = json.loads(self._file.read_text("utf-8"))
    config, manifest = (
      json.loads((directory / name).read_text("utf-8"))
      for name in ("config.json", "manifest.json")
    )
    self._run = wandb.init(
      project=settings.wandb_project,
      id=self._mark["id"],
      # Two directories may have one name: dpo in runs/a and in runs/b.
      name="/".join(directory.parts[-2:]),
      dir=str(directory),
      mode=settings.wandb_mode,
      resume="allow" if settings.wandb_mode == "online" else None,
      config=config | {"manifest": manifest},
      settings=wandb.Settings(
        silent=True, console="off", disable_git=True, save_code=False
      ),
    )
    console.say(f"W&B: {self._run.url or self._run.dir}", "tracker")
    for row in rows:
      self.write(row)

  def write(self, row) -> None:
    # A step's evaluation comes after its update.
    place = [row["step"], "eval_items" in row]
    if place <= self._mark["sent"]:
      return
    values = {key: value for key, value in row.items() if key != "step"}
    self._run.log(values, step=row["step"])
    self._mark["sent"] = place
    self._file.write_text(json.dumps(self._mark) + "\n", encoding="utf-8")

  def close(self) -> None:
    self._run.finish()


_OPEN = {"csv": Csv, "tensorboard": TensorBoard, "wandb": Wandb}


class Writer:
  """metrics.jsonl and the trackers, whose errors are caught."""

  def __init__(
    self, settings: TrackerSettings, directory: pathlib.Path, start_step: int
  ):
    """Opens all of them in a run's directory, after `start_step` updates."""
    self._metrics = metrics.Writer(directory, start_step)
    self.at, self.sync = self._metrics.at, self._metrics.sync
    self._open: dict[str, Any] = {}
    rows = self._metrics.rows
    for name in settings.use:
      with self._guarded(name):
        self._open[name] = _OPEN[name](settings, directory, rows, start_step)

  def write(self, row: dict[str, Any]) -> None:
    self._metrics.write(row)
    for name, tracker in list(self._open.items()):
      with self._guarded(name):
        tracker.write(row)

  def close(self) -> None:
    self._metrics.close()
    for name, tracker in list(self._open.items()):
      with self._guarded(name):
        tracker.close()

  @contextlib.contextmanager
  def _guarded(self, name: str) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Whatever a library or the network raises.
      self._open.pop(name, None)
      why = f"{type(error).__name__}: {error}"
      _log.warning(
        "tracker %s failed and is closed: %s; metrics.jsonl is whole", name, why
      )
