"""What each tracker does with a row, a table and a figure.

All are opened with (settings, directory, rows, start_step, about): the run's
`trackers.TrackerSettings`, its directory, the rows of metrics.jsonl up to and
including `start_step`, and its config and manifest by name. They let every
error out; `trackers.Trackers` keeps it from the run.
"""

import csv
import json
import os
import re
import secrets
import shutil

from dpo_jax.interface import console, markdown


class Csv:
  """metrics.csv: a line a row, a column a metric."""

  def __init__(self, settings, directory, rows, start_step, about):
    del settings, start_step, about
    self._directory = directory
    self._rows = list(rows)
    self._columns: list[str] = []
    self._file = None
    self._begin()

  def write(self, row) -> None:
    self._rows.append(row)
    if row.keys() <= set(self._columns):
      self._writer.writerow(row)
      self._file.flush()
    else:
      # A metric that was never seen: the header changes.
      self._begin()

  def table(self, step, name, columns, rows) -> None:
    path = self._directory / "tables" / f"{_file_name(name)}-{step:06d}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
      csv.writer(file).writerows([columns, *rows])

  def figure(self, step, name, path) -> None:
    """A figure is a file already."""

  def close(self) -> None:
    self._file.close()

  def _begin(self) -> None:
    if self._file is not None:
      self._file.close()
    seen = dict.fromkeys(key for row in self._rows for key in row)
    self._columns = ["step", *(key for key in seen if key != "step")]
    path = self._directory / "metrics.csv"
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", encoding="utf-8", newline="") as file:
      writer = csv.DictWriter(file, self._columns)
      writer.writeheader()
      writer.writerows(self._rows)
    os.replace(scratch, path)
    self._file = path.open("a", encoding="utf-8", newline="")
    self._writer = csv.DictWriter(self._file, self._columns)


class TensorBoard:
  """Event files in tensorboard/, for `tensorboard --logdir`."""

  def __init__(self, settings, directory, rows, start_step, about):
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
    if not resumed:
      for name, values in about.items():
        text = json.dumps(values, indent=2)
        self._writer.add_text(name, f"```json\n{text}\n```", 0)
      for row in rows:
        self.write(row)

  def write(self, row) -> None:
    for key, value in row.items():
      if key != "step" and isinstance(value, int | float):
        self._writer.add_scalar(key, value, row["step"])

  def table(self, step, name, columns, rows) -> None:
    cells = [[markdown.literal(str(cell)) for cell in row] for row in rows]
    text = "\n".join(markdown.table(columns, cells))
    self._writer.add_text(name, text, step)

  def figure(self, step, name, path) -> None:
    import matplotlib.image

    pixels = matplotlib.image.imread(path)
    self._writer.add_image(name, pixels[..., :3], step, dataformats="HWC")

  def close(self) -> None:
    self._writer.close()


class Wandb:
  """A run of Weights & Biases, its files in wandb/."""

  def __init__(self, settings, directory, rows, start_step, about):
    import wandb

    del start_step
    self._wandb = wandb
    # Which run this is, and how many rows up to which step it was sent.
    self._file = directory / "wandb_run.json"
    self._mark = {"id": secrets.token_hex(4), "step": -1, "rows": 0}
    if self._file.is_file():
      self._mark = json.loads(self._file.read_text("utf-8"))
    # Rows of that step that come again.
    self._again = self._mark["rows"]
    self._run = wandb.init(
      project=settings.wandb_project,
      id=self._mark["id"],
      # Two directories may have one name: dpo in runs/a and in runs/b.
      name="/".join(directory.parts[-2:]),
      dir=str(directory),
      mode=settings.wandb_mode,
      resume="allow" if settings.wandb_mode == "online" else None,
      config=about.get("config", {}) | {"manifest": about.get("manifest", {})},
      settings=wandb.Settings(
        silent=True, console="off", disable_git=True, save_code=False
      ),
    )
    console.say(f"W&B: {self._run.url or self._run.dir}", "tracker")
    for row in rows:
      self.write(row)

  def write(self, row) -> None:
    step = row["step"]
    if step < self._mark["step"]:
      return
    if step == self._mark["step"] and self._again:
      self._again -= 1
      return
    values = {key: value for key, value in row.items() if key != "step"}
    self._run.log(values, step=step)
    new = step > self._mark["step"]
    rows = 1 if new else self._mark["rows"] + 1
    self._mark |= {"step": step, "rows": rows}
    self._file.write_text(json.dumps(self._mark) + "\n", encoding="utf-8")

  def table(self, step, name, columns, rows) -> None:
    table = self._wandb.Table(list(columns), [list(row) for row in rows])
    self._run.log({name: table}, step=max(step, self._mark["step"]))

  def figure(self, step, name, path) -> None:
    image = self._wandb.Image(str(path))
    self._run.log({name: image}, step=max(step, self._mark["step"]))

  def close(self) -> None:
    self._run.finish()


def _file_name(name: str) -> str:
  return re.sub(r"[^\w.-]", "_", name)
