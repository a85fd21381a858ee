"""Updates that are skipped and losses that stop a run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
import safetensors.numpy
import tiny

from dpo_jax.core import preemption
from dpo_jax.data import sources, tokenizer
from dpo_jax.model import hf
from dpo_jax.training import guards, losses, train

LOSS = tiny.loss(beta=0.5)


@pytest.mark.parametrize(
  ("loss", "norm", "applied"),
  [
    (-1e30, 1e30, True),
    (math.nan, 0.0, False),
    (math.inf, 0.0, False),
    (0.5, math.nan, False),
    (0.5, math.inf, False),
  ],
)
def test_an_update_is_applied_where_all_is_finite(loss, norm, applied):
  found = guards.finite(jnp.float32(loss), jnp.float32(norm))
  assert bool(found) is applied


@pytest.mark.parametrize(
  ("platform", "precision", "precomputed", "off", "passes"),
  [
    ("cpu", None, False, 5e-7, True),
    ("cpu", None, False, 1e-5, False),
    # Float32 products are rounded only if jax is set to.
    ("tpu", None, False, 1e-5, False),
    ("gpu", "float32", False, 1e-5, False),
    ("gpu", "tensorfloat32", False, 1e-5, True),
    ("gpu", "tensorfloat32", False, 0.02, False),
    # A slope of beta / 2 = 0.25 on 1e-4 nats.
    ("cpu", None, True, 2e-5, True),
    ("cpu", None, True, 4e-5, False),
  ],
)
def test_how_near_the_first_loss_must_be(
  monkeypatch, platform, precision, precomputed, off, passes
):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)

  def check():
    metrics = {"loss": math.log(2) + off}
    start = losses.at_start(LOSS)
    guards.check_first_loss(metrics, start, "float32", precomputed=precomputed)

  with jax.default_matmul_precision(precision):
    if passes:
      check()
      return
    with pytest.raises(guards.TrainingError, match="policy and reference"):
      check()


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
  skip = {"guards.not_finite": "skip", "guards.max_skipped": 9, "epochs": 2}

  def make(**changes):
    return build(**skip | {"checkpoint_every": 5} | changes)

  return make


@pytest.fixture(scope="module")
def skipping(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("skipping") / "run"
  train.run(config(), workdir)
  return workdir


def train_rows(workdir):
  return [row for row in running.read(workdir) if "loss" in row]


def rate(update):
  """Two updates of warm-up to 0.01, then a half cosine over the other 12."""
  if update < 2:
    return 0.005 * (update + 1)
  return 0.01 * math.cos(math.pi * (update - 2) / 24) ** 2


def test_a_run_skips_what_is_not_finite(skipping, files):
  found = {
    row["step"]: row["skipped_items"].split()
    for row in train_rows(skipping)
    if "skipped_items" in row
  }
  assert list(found) == [6, 12]
  applied = 0
  for row in train_rows(skipping):
    # A skipped update takes no turn of the schedule.
    assert row["learning_rate"] == pytest.approx(rate(applied))
    applied += row["step"] not in found
  loaded = sources.read_file(str(files / "train.jsonl"))
  for items in found.values():
    assert len(items) == 4
    assert loaded.rows[poisoned()].id in items
  assert (skipping / "finished.json").exists()


def test_skipped_updates_are_counted_over_a_stop(
  config, skipping, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  # One skipped update more than allowed: nothing of it is saved.
  with pytest.raises(guards.TrainingError, match=r"step 6: .*; 1 were, more"):
    train.run(config(**{"guards.max_skipped": 0}), workdir)
  more = config(allow_changes=["guards"])
  with monkeypatch.context() as patch:
    running.at_step(patch, 11, running.terminate)
    # Step 11 is fetched when step 12 is under way.
    with pytest.raises(preemption.Interrupted, match="after step 12"):
      train.run(more, workdir)
  train.run(more, workdir)
  assert running.read(workdir) == running.read(skipping)
  assert running.weights(workdir) == running.weights(skipping)


def test_a_loss_that_is_not_finite_stops_before_the_update(
  config, files, skipping, tmp_path
):
  stop, workdir = config(**{"guards.not_finite": "stop"}), tmp_path / "run"
  loaded = sources.read_file(str(files / "train.jsonl"))
  # Running it again stops at the same place and loses nothing.
  for _ in range(2):
    with pytest.raises(guards.TrainingError, match="step 6: loss is nan") as e:
      train.run(stop, workdir)
    assert loaded.rows[poisoned()].id in str(e.value)
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"5"}
    assert train_rows(workdir) == train_rows(skipping)[:6]
  assert not (workdir / "export").exists()
  assert not (workdir / "finished.json").exists()
  for content in running.weights(workdir).values():
    for leaf in safetensors.numpy.load(content).values():
      assert np.isfinite(leaf).all()
