"""Trackers repeat metrics.jsonl, each step once, and can stop nothing.

What they wrote is read back by TensorBoard's own reader, and from W&B's own
transaction log.
"""

import csv
import importlib.util
import json
import logging
import os
import pathlib
import struct
import sys

import numpy as np
import planted
import pytest

from dpo_jax.data import dataset
from dpo_jax.io import metrics
from dpo_jax.training import trackers, train

ROOT = pathlib.Path(__file__).resolve().parent.parent


def settings(*use):
  return trackers.TrackerSettings(use, "dpo_jax", "offline")


def rows(first, last):
  """Rows of steps [first, last], an evaluation after each even one."""
  for step in range(first, last + 1):
    if step:
      yield {"step": step, "loss": 1 / (step + 1), "rewards/margins": step / 4}
    if step % 2 == 0:
      yield {"step": step, "eval_loss": 2.0 + step, "eval_items": 3}


@pytest.fixture
def directory(tmp_path):
  path = tmp_path / "runs" / "dpo"
  path.mkdir(parents=True)
  (path / "config.json").write_text('{"seed": 3, "loss": {"beta": 0.5}}')
  (path / "manifest.json").write_text('{"data": {"tokens": "0123abcd"}}')
  return path


def interrupted_at_6_resumed_from_3(directory, *use):
  """Two processes' worth of writing: to step 6, and on from a checkpoint at 3.

  The first one never comes to the evaluation of step 6.
  """
  for start, written in ((0, [*rows(0, 6)][:-1]), (3, rows(4, 6))):
    writer = trackers.Writer(settings(*use), directory, start)
    for row in written:
      writer.write(row)
    writer.close()


def test_csv_has_a_line_a_row_and_a_column_a_metric(directory):
  interrupted_at_6_resumed_from_3(directory, "csv")
  with (directory / "metrics.csv").open(newline="") as file:
    found = list(csv.DictReader(file))
  wanted = metrics.read(directory / metrics.FILE)
  assert [row["step"] for row in wanted] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
  assert [
    {key: float(value) for key, value in row.items() if value} for row in found
  ] == wanted


def events(directory):
  """Scalars by tag, read by TensorBoard itself."""
  from tensorboard.backend.event_processing import event_accumulator

  reader = event_accumulator.EventAccumulator(str(directory / "tensorboard"))
  reader.Reload()
  return {
    tag: [(event.step, event.value) for event in reader.Scalars(tag)]
    for tag in reader.Tags()["scalars"]
  }


def test_tensorboard_has_each_step_once(directory):
  # Events of a run that starts over are dropped.
  for _ in range(2):
    interrupted_at_6_resumed_from_3(directory, "tensorboard")
  scalars = events(directory)
  assert scalars.keys() == {
    "loss",
    "rewards/margins",
    "eval_loss",
    "eval_items",
  }
  loss = scalars["loss"]
  assert [step for step, _ in loss] == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(
    [value for _, value in loss], [1 / (i + 1) for i in range(1, 7)], rtol=1e-6
  )
  assert scalars["eval_loss"] == [(0, 2), (2, 4), (4, 6), (6, 8)]


# --- W&B

_BLOCK = 32768


def log_records(path):
  """The records of a .wandb file, which is LevelDB's log after 7 bytes.

  References:
    https://github.com/google/leveldb/blob/main/doc/log_format.md
  """
  data = path.read_bytes()
  assert data[:4] == b":W&B"
  place, whole = 7, b""
  while place + 7 <= len(data):
    left = _BLOCK - place % _BLOCK
    if left < 7:
      place += left
      continue
    _, size, kind = struct.unpack("<IHB", data[place : place + 7])
    whole += data[place + 7 : place + 7 + size]
    place += 7 + size
    # 1: all of a record; 2, 3: its first and middle parts; 4: the last.
    if kind in (1, 4):
      yield whole
      whole = b""


def offline_runs(directory):
  """What W&B's offline runs hold: [(id, config, [history row])]."""
  from wandb.proto import wandb_internal_pb2

  found = []
  for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
    run_id, config, history = "", {}, []
    for blob in log_records(path):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(blob)
      if record.HasField("run"):
        run_id = record.run.run_id
        config |= {
          item.key: json.loads(item.value_json)
          for item in record.run.config.update
        }
      if record.HasField("history"):
        history.append(
          {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
          }
        )
    found.append((run_id, config, history))
  return found


def test_wandb_offline_has_each_step_once_in_one_run(directory):
  child = """
import pathlib, sys
sys.path[:0] = sys.argv[2:]
import test_trackers
path = pathlib.Path(sys.argv[1])
test_trackers.interrupted_at_6_resumed_from_3(path, "wandb")
"""
  home = directory.parent / "home"
  home.mkdir()
  # With keys in the environment, W&B's own among them, to be searched for in
  # all that it and its service print, are called by, and write.
  done = planted.run(
    [sys.executable, "-c", child, directory, ROOT, ROOT / "tests"],
    env=os.environ | {"HOME": str(home)},
    cwd=ROOT,
    timeout=180,
  )
  assert done.returncode == 0, done.stderr
  assert planted.search(directory.parent) > 10
  found = offline_runs(directory)
  # Two processes, one run: W&B merges what is synced under one id.
  assert len(found) == 2
  assert len({run_id for run_id, _, _ in found}) == 1
  _, config, _ = found[0]
  assert config["loss"] == {"beta": 0.5}
  assert config["manifest"] == {"data": {"tokens": "0123abcd"}}
  history = [row for _, _, rows in found for row in rows if "loss" in row]
  assert [row["_step"] for row in history] == [1, 2, 3, 4, 5, 6]
  assert [row["loss"] for row in history] == [1 / (i + 1) for i in range(1, 7)]
  evaluated = [
    row for _, _, rows in found for row in rows if "eval_loss" in row
  ]
  assert [row["_step"] for row in evaluated] == [0, 2, 4, 6]
  for file in directory.rglob("*"):
    if file.is_file():
      assert b"0" * 40 not in file.read_bytes(), file


# --- faults


def test_a_tracker_that_fails_is_named_once_and_stops_nothing(
  directory, caplog
):
  # tensorboard/ cannot be made where a file of that name lies.
  (directory / "tensorboard").write_text("in the way")
  with caplog.at_level(logging.WARNING):
    writer = trackers.Writer(settings("csv", "tensorboard"), directory, 3)
    for row in rows(4, 6):
      writer.write(row)
    # On a full disk.
    closed = writer._open["csv"]
    closed._file.close()
    for row in rows(7, 8):
      writer.write(row)
    writer.close()
  steps = [row["step"] for row in metrics.read(directory / metrics.FILE)]
  assert steps == [4, 4, 5, 6, 6, 7, 8, 8]
  warned = [record.getMessage() for record in caplog.records]
  assert len(warned) == 2
  assert "tracker tensorboard failed" in warned[0]
  assert "tracker csv failed" in warned[1]


@pytest.mark.parametrize(
  ("name", "extra"), [("wandb", "wandb"), ("tensorboard", "tb")]
)
def test_a_missing_library_is_refused_before_anything_is_read(
  config, tmp_path, monkeypatch, name, extra
):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(dataset, "prepare", pytest.fail)
  with pytest.raises(ValueError, match=rf"pip install 'dpo-jax\[{extra}\]'"):
    train.run(config(**{"trackers.use": ["csv", name]}), tmp_path / "run")
