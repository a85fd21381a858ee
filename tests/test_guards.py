"""Updates that are refused: the rule by hand, and whole runs that meet it."""

import dataclasses
import functools
import json
import math
import signal
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
import tiny

from dpo_jax import hf, metrics, sources, tokenizer, training
from dpo_jax.running import checks, guards, incidents, interruption, programs


def settings(**changes):
  return dataclasses.replace(
    guards.GuardSettings("skip", "skip", 2.0, 4, 9), **changes
  )


@functools.partial(jax.jit, static_argnums=0)
def decide(how, state, loss, grad_norm):
  return guards.decide(how, state, loss, grad_norm)


def fed(how, losses):
  """The state after made updates of these losses."""
  state = guards.init(how)
  for loss in losses:
    make, state, _ = decide(how, state, jnp.float32(loss), jnp.float32(1))
    assert make
  return state


@pytest.mark.parametrize(
  ("losses", "limit"),
  [
    # Median 2.5; distances 1.5, 0.5, 0.5, 1.5, whose median is 1.
    ((1, 2, 3, 4), 2.5 + 2 * 1),
    # No distance: a hundredth of the median stands for it, of either sign.
    ((2, 2, 2, 2), 2 + 2 * 0.02),
    ((-2, -2, -2, -2), -2 + 2 * 0.02),
    # The last four of five: 2, 3, 4, 4.25; 3.5 and 0.5, 0.5, 0.75, 1.5.
    ((1, 2, 3, 4, 4.25), 3.5 + 2 * 0.625),
  ],
)
def test_the_limit_by_hand(losses, limit):
  how = settings()
  state = fed(how, losses)
  for loss, wanted in ((limit - 0.001, True), (limit + 0.001, False)):
    make, after, told = decide(how, state, jnp.float32(loss), jnp.float32(1))
    assert bool(make) is wanted
    assert float(told["guard/limit"]) == pytest.approx(limit, rel=1e-6)
    assert int(after.made) == len(losses) + wanted
    assert int(after.skipped) == (not wanted)
    assert np.array_equal(after.losses, state.losses) is not wanted
  # Not looked for: as high as can be is no spike.
  off = settings(spike="off")
  make, _, told = decide(off, state, jnp.float32(1e30), jnp.float32(1))
  assert make
  assert float(told["guard/limit"]) == math.inf


class Twin:
  """The same rule in plain Python, from all losses so far."""

  def __init__(self, how):
    self.how, self.made, self.skipped = how, [], 0

  def __call__(self, loss, grad_norm=1.0):
    limit, last = math.inf, self.made[-self.how.spike_window :]
    if len(last) == self.how.spike_window:
      middle = statistics.median(last)
      spread = statistics.median(abs(x - middle) for x in last)
      spread = max(spread, 0.01 * abs(middle))
      limit = middle + self.how.spike_factor * spread
    make = math.isfinite(loss) and math.isfinite(grad_norm) and loss <= limit
    self.skipped += not make
    if make:
      self.made.append(loss)
    return make, limit


def test_it_decides_what_plain_python_decides():
  rng = np.random.default_rng(0)
  how = settings(spike_window=7)
  state, twin = guards.init(how), Twin(how)
  kinds = {"made": 0, "spike": 0, "not finite": 0}
  for _ in range(400):
    loss = float(np.float32(rng.normal(1, 0.3) * rng.choice((1, 1, 1, 3))))
    norm = 1.0
    match rng.integers(12):
      case 0:
        loss = float(rng.choice((math.nan, math.inf, -math.inf)))
      case 1:
        norm = float(rng.choice((math.nan, math.inf)))
    make, limit = twin(loss, norm)
    found, state, told = decide(
      how, state, jnp.float32(loss), jnp.float32(norm)
    )
    assert bool(found) is make
    assert float(told["guard/limit"]) == pytest.approx(limit, rel=1e-5)
    finite = math.isfinite(loss) and math.isfinite(norm)
    kinds["made" if make else "spike" if finite else "not finite"] += 1
  assert min(kinds.values()) > 20
  assert int(state.made) == len(twin.made)
  assert int(state.skipped) == twin.skipped


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"guards.not_finite": "ignore"}, "guards.not_finite='ignore'"),
    ({"guards.spike": "on"}, "guards.spike='on'"),
    ({"guards.spike_factor": 0.0}, "guards.spike_factor=0.0 must be positive"),
    ({"guards.spike_factor": math.nan}, "guards.spike_factor=nan"),
    ({"guards.spike_window": 1}, "guards.spike_window=1 must be at least 2"),
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
        "guards.spike": "skip",
        "guards.spike_factor": 0.2,
        "guards.spike_window": 3,
        "guards.max_skipped": 9,
      }
      | changes
    )

  return make


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  training.run(config(), workdir)
  return workdir


def train_rows(workdir):
  return [row for row in running.read(workdir) if "loss" in row]


def test_a_run_skips_what_plain_python_skips(config, whole, files):
  how = config().guards
  found = {row["step"]: row for row in incidents.read(whole / incidents.FILE)}
  twin = Twin(how)
  for row in train_rows(whole):
    make, limit = twin(float(row["loss"]))
    assert make is (row["step"] not in found), row
    # A skipped update takes no turn of the schedule.
    assert row["learning_rate"] == pytest.approx(rate(len(twin.made) - make))
    if not make:
      one = found[row["step"]]
      assert one["skipped"] == twin.skipped
      assert one["loss"] == row["loss"]
      assert one["limit"] == pytest.approx(limit, rel=1e-5)
      assert len(one["items"]) == 4
  spikes = [row for row in found.values() if not row["not_finite"]]
  others = [row for row in found.values() if row["not_finite"]]
  # Each kind more than once, and some after step 12: see below.
  assert [row["step"] for row in others] == [6, 12]
  assert len(spikes) >= 2
  assert max(row["step"] for row in spikes) > 12
  loaded = sources.read_file(str(files / "train.jsonl"))
  for row in others:
    assert loaded.rows[poisoned()].id in row["items"]
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
    training.run(config(**{"guards.max_skipped": 0}), workdir)
  (first,) = incidents.read(workdir / incidents.FILE)
  assert first["step"] == 6
  more = config(allow_changes=["guards"])
  original = metrics.Writer.write

  def write(self, row):
    original(self, row)
    if row["step"] == 11 and "loss" in row:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Writer, "write", write)
    with pytest.raises(interruption.Interrupted, match="after step 12"):
      training.run(more, workdir)
  training.run(more, workdir)
  assert running.read(workdir) == running.read(whole)
  assert running.weights(workdir) == running.weights(whole)
  paths = [directory / incidents.FILE for directory in (workdir, whole)]
  assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_is_told_a_step_late_is_the_same(
  config, whole, tmp_path, monkeypatch
):
  """As on an accelerator, which has begun step 7 when step 6 is known."""
  monkeypatch.setattr(programs, "computed_at_call", lambda: False)
  run, stopped = tmp_path / "run", tmp_path / "stopped"
  training.run(config(), run)
  assert running.read(run) == running.read(whole)
  assert running.weights(run) == running.weights(whole)
  paths = [directory / incidents.FILE for directory in (run, whole)]
  assert paths[0].read_bytes() == paths[1].read_bytes()
  with pytest.raises(checks.TrainingError, match="step 6: loss is nan"):
    training.run(config(**{"guards.not_finite": "stop"}), stopped)
  assert train_rows(stopped) == train_rows(whole)[:6]
  assert {p.name for p in (stopped / "checkpoints").iterdir()} == {"5"}


def test_a_spike_stops_where_it_is_told_to(config, whole, tmp_path):
  first = min(
    row["step"]
    for row in incidents.read(whole / incidents.FILE)
    if not row["not_finite"]
  )
  with pytest.raises(
    checks.TrainingError, match=rf"step {first}: loss is 0\.\d+, a spike: it is"
  ):
    training.run(config(**{"guards.spike": "stop"}), tmp_path / "run")
  assert train_rows(tmp_path / "run") == train_rows(whole)[:first]


def test_incidents_are_read_again_or_refused(tmp_path):
  row = {"step": 3, "cause": "loss is nan", "loss": math.nan, "items": ["a"]}
  incidents.Writer(tmp_path, 0)
  assert not list(tmp_path.iterdir())
  writer = incidents.Writer(tmp_path, 0)
  for step in (3, 5):
    writer.write(row | {"step": step})
  path = tmp_path / incidents.FILE
  # A line that a kill cut short.
  with path.open("a") as file:
    file.write('{"step": 6, "ca')
  assert [row["step"] for row in incidents.read(path)] == [3, 5]
  incidents.Writer(tmp_path, 4)
  assert path.read_text() == (
    '{"step": 3, "cause": "loss is nan", "loss": "nan", "items": ["a"]}\n'
  )
  path.write_text(json.dumps({"step": "3"}) + "\n")
  with pytest.raises(ValueError, match=r"jsonl:1 is not an incident with step"):
    incidents.Writer(tmp_path, 4)
