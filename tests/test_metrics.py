"""metrics.jsonl holds each step once, whatever happened to the process."""

import json
import math
import types

import pytest

from dpo_jax.io import metrics


def row(step, **values):
  return {"step": step, "loss": 1 / (step + 1)} | values


def write(directory, start, rows):
  writer = metrics.Writer(directory, start)
  for values in rows:
    writer.write(values)
  writer.close()
  return writer


def test_rows_are_lines_as_soon_as_they_are_written(tmp_path):
  rows = [{"step": 0, "eval_loss": 0.7}, row(1), row(2, grad_norm=1e-30)]
  writer = metrics.Writer(tmp_path, 0)
  for values in rows:
    writer.write(values)
  assert writer.rows == rows
  # Not closed: the process might be killed now.
  assert metrics.read(tmp_path / metrics.FILE) == rows
  writer.close()
  data = (tmp_path / metrics.FILE).read_bytes()
  assert [json.loads(line) for line in data.splitlines()] == rows
  assert data.endswith(b"\n")


def test_a_resumed_run_drops_what_was_lost(tmp_path):
  first = [{"step": 0, "eval_loss": 1.0}, *[row(i) for i in range(1, 6)]]
  write(tmp_path, 0, first)
  again = write(tmp_path, 3, [row(4, again=1), row(5, again=1)])
  wanted = [*first[:4], row(4, again=1), row(5, again=1)]
  assert metrics.read(tmp_path / metrics.FILE) == wanted
  assert again.rows == wanted


def test_a_run_that_starts_over_keeps_nothing(tmp_path):
  # Killed before the first checkpoint: step 0 is evaluated again.
  write(tmp_path, 0, [{"step": 0, "eval_loss": 1.0}, row(1)])
  write(tmp_path, 0, [{"step": 0, "eval_loss": 1.0}])
  assert metrics.read(tmp_path / metrics.FILE) == [
    {"step": 0, "eval_loss": 1.0}
  ]


def test_a_cut_last_line_is_left_out(tmp_path):
  write(tmp_path, 0, [row(1), row(2)])
  path = tmp_path / metrics.FILE
  path.write_bytes(path.read_bytes()[:-7])
  assert metrics.read(path) == [row(1)]
  write(tmp_path, 2, [row(3)])
  assert metrics.read(path) == [row(1), row(3)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_a_word(tmp_path, value):
  write(tmp_path, 0, [row(1, grad_norm=value)])
  text = (tmp_path / metrics.FILE).read_text()
  # Strict JSON: any reader takes it.
  (found,) = [json.loads(text, parse_constant=pytest.fail)]
  assert found["grad_norm"] == str(value)


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  writer = write(None, 3, [row(4)])
  assert writer.at(3) == []
  assert not list(tmp_path.iterdir())


def test_throughput(monkeypatch):
  times = iter([10.0, 12.0, 12.5])
  clock = types.SimpleNamespace(perf_counter=lambda: next(times))
  monkeypatch.setattr(metrics, "time", clock)
  rates = metrics.Throughput("pairs")
  assert rates(100, 10) == {"tokens_per_second": 50, "pairs_per_second": 5}
  # Each call measures from the one before.
  assert rates(100, 10) == {"tokens_per_second": 200, "pairs_per_second": 20}
