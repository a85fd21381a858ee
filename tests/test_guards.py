"""Updates that are refused: the rule, and whole runs that meet it."""

import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
import tiny

from dpo_jax.core import preemption
from dpo_jax.data import sources, tokenizer
from dpo_jax.io import metrics
from dpo_jax.model import hf
from dpo_jax.training import checks, guards, train
from dpo_jax.training import compile as compile_lib


@pytest.mark.parametrize("loss", [0.5, -1e30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [0.0, 1e30, math.nan, math.inf])
def test_an_update_is_made_where_all_is_finite(loss, norm):
  state = guards.GuardState(jnp.int32(5), jnp.int32(2))
  make, after, metrics = jax.jit(guards.decide)(
    state, jnp.float32(loss), jnp.float32(norm)
  )
  wanted = math.isfinite(loss) and math.isfinite(norm)
  assert bool(make) is wanted
  assert (int(after.made), int(after.skipped)) == (5 + wanted, 3 - wanted)
  metrics["loss"] = loss
  assert guards.told(metrics) == {"made": wanted, "skipped": 3 - wanted}
  assert metrics.keys() == {"loss"}


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"guards.not_finite": "ignore"}, "guards.not_finite='ignore'"),
    ({"guards.max_skipped": -1}, "guards.max_skipped=-1 must not be negative"),
  ],
)
def test_settings_that_make_no_sense_are_refused(config, change, words):
  with pytest.raises(ValueError, match=words):
    config(**change)


# --- whole runs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Files of which one pair makes the loss of every batch it is in NaN."""
  directory = running.make_files(tmp_path_factory.mktemp("files"))
  words = tokenizer.load(directory / "tokenizer")
  # A word whose embedding overflows in a layer norm.
  (token,) = words.encode("Z")
  base = tiny.weights(running.SHAPE)
  embed = {"kernel": base["embed"]["kernel"].at[token].set(3e38)}
  path = directory / "model"
  hf.export(path, running.SHAPE, base | {"embed": embed}, words)
  rows = list(running.rows(30, 1))
  rows[poisoned()]["rejected"] = rows[poisoned()]["rejected"][:-1] + "Z"
  running.write(directory / "train.jsonl", rows)
  return directory


def poisoned():
  """The number of a pair of step 6, from the seed that orders the data."""
  return np.random.default_rng((5, 0)).permutation(30)[5 * 4 + 1]


@pytest.fixture(scope="module")
def config(files):
  build = running.configs(files)

  def make(**changes):
    return build(
      **{
        "epochs": 2,
        "checkpoint_every": 5,
        "export_adapters": False,
        "guards.not_finite": "skip",
        "guards.max_skipped": 9,
      }
      | changes
    )

  return make


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  train.run(config(), workdir)
  return workdir


def train_rows(workdir):
  return [row for row in running.read(workdir) if "loss" in row]


def test_a_run_skips_what_is_not_finite(whole, files):
  path = whole / guards.SKIPPED
  found = {row["step"]: row for row in guards.read_skipped(path)}
  assert list(found) == [6, 12]
  made = 0
  for row in train_rows(whole):
    # A skipped update takes no turn of the schedule.
    assert row["learning_rate"] == pytest.approx(rate(made))
    made += row["step"] not in found
  loaded = sources.read_file(str(files / "train.jsonl"))
  for number, (step, one) in enumerate(found.items()):
    (row,) = [row for row in train_rows(whole) if row["step"] == step]
    assert one["cause"] == "loss is nan"
    assert (one["loss"], one["grad_norm"]) == (row["loss"], row["grad_norm"])
    assert one["skipped"] == number + 1
    assert len(one["items"]) == 4
    assert loaded.rows[poisoned()].id in one["items"]
  assert (whole / "finished.json").exists()


def rate(update):
  """Two updates of warm-up to 0.01, then a half cosine over the other 12."""
  if update < 2:
    return 0.005 * (update + 1)
  return 0.01 * math.cos(math.pi * (update - 2) / 24) ** 2


def test_what_the_guard_knows_survives_a_stop(
  config, whole, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  # One skipped update more than allowed: nothing of it is saved.
  with pytest.raises(checks.TrainingError, match=r"step 6: .*; 1 were not, mo"):
    train.run(config(**{"guards.max_skipped": 0}), workdir)
  (first,) = guards.read_skipped(workdir / guards.SKIPPED)
  assert first["step"] == 6
  more = config(allow_changes=["guards"])
  original = metrics.Writer.write

  def write(self, row):
    original(self, row)
    if row["step"] == 11 and "loss" in row:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Writer, "write", write)
    with pytest.raises(preemption.Interrupted, match="after step 12"):
      train.run(more, workdir)
  train.run(more, workdir)
  assert running.read(workdir) == running.read(whole)
  assert running.weights(workdir) == running.weights(whole)
  paths = [directory / guards.SKIPPED for directory in (workdir, whole)]
  assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_is_told_a_step_late_is_the_same(
  config, whole, tmp_path, monkeypatch
):
  """As on an accelerator, which has begun step 7 when step 6 is known."""
  monkeypatch.setattr(compile_lib, "computed_at_call", lambda: False)
  run, stopped = tmp_path / "run", tmp_path / "stopped"
  train.run(config(), run)
  assert running.read(run) == running.read(whole)
  assert running.weights(run) == running.weights(whole)
  paths = [directory / guards.SKIPPED for directory in (run, whole)]
  assert paths[0].read_bytes() == paths[1].read_bytes()
  with pytest.raises(checks.TrainingError, match="step 6: loss is nan"):
    train.run(config(**{"guards.not_finite": "stop"}), stopped)
  assert train_rows(stopped) == train_rows(whole)[:6]
  assert {p.name for p in (stopped / "checkpoints").iterdir()} == {"5"}


def test_incidents_are_read_again_or_refused(tmp_path):
  row = {"step": 3, "cause": "loss is nan", "loss": math.nan, "items": ["a"]}
  guards.SkippedUpdateLog(tmp_path, 0)
  assert not list(tmp_path.iterdir())
  writer = guards.SkippedUpdateLog(tmp_path, 0)
  for step in (3, 5):
    writer.write(row | {"step": step})
  path = tmp_path / guards.SKIPPED
  # A line that a kill cut short.
  with path.open("a") as file:
    file.write('{"step": 6, "ca')
  assert [row["step"] for row in guards.read_skipped(path)] == [3, 5]
  guards.SkippedUpdateLog(tmp_path, 4)
  assert path.read_text() == (
    '{"step": 3, "cause": "loss is nan", "loss": "nan", "items": ["a"]}\n'
  )
  path.write_text(json.dumps({"step": "3"}) + "\n")
  with pytest.raises(ValueError, match=r"jsonl:1 is not an incident with step"):
    guards.SkippedUpdateLog(tmp_path, 4)
