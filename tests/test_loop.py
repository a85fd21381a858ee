"""The loop as accelerators run it: metrics a step late, nothing else crosses.

On a CPU the loop reads each step at once, unless it is told that programs are
computed while Python goes on, as they are on an accelerator.
"""

import signal
import types

import jax
import pytest
import running

from dpo_jax import metrics, steps, training
from dpo_jax.running import feed, interruption, loop, programs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return running.configs(running.make_files(tmp_path_factory.mktemp("files")))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """A run whose steps are read at once."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  training.run(config(), workdir)
  return workdir


@pytest.fixture
def late(monkeypatch):
  monkeypatch.setattr(programs, "computed_at_call", lambda: False)


@pytest.fixture
def events(monkeypatch):
  """What the loop does, in order: "give N" to the device, "read N"."""
  found = []
  ahead, record = programs.ahead, loop.Loop._record

  def noted(step, arguments, *rest):
    call = ahead(step, arguments, *rest)
    if not isinstance(arguments[0], steps.TrainState):
      return call

    def given(*arguments):
      number = 1 + sum(event.startswith("give") for event in found)
      found.append(f"give {number}")
      return call(*arguments)

    return given

  def read(self, done, *rest):
    found.append(f"read {done}")
    record(self, done, *rest)

  monkeypatch.setattr(programs, "ahead", noted)
  monkeypatch.setattr(loop.Loop, "_record", read)
  return found


def test_a_step_is_read_when_the_next_was_given(
  config, whole, tmp_path, late, events
):
  rare = config(eval_every=0, checkpoint_every=0)
  training.run(rare, tmp_path / "run")
  # The first at once, as its loss is known; the last has no next.
  wanted = ["give 1", "read 1", "give 2"]
  for number in range(3, running.STEPS + 1):
    wanted += [f"give {number}", f"read {number - 1}"]
  assert events == [*wanted, f"read {running.STEPS}"]
  found, known = (
    [row for row in running.read(path) if "loss" in row]
    for path in (tmp_path / "run", whole)
  )
  assert found == known


def test_before_anything_else_all_steps_are_read(
  config, whole, tmp_path, late, events
):
  """Evaluations after steps 3 and 6, checkpoints after 2, 4 and 6."""
  training.run(config(), tmp_path / "run")
  assert events.index("read 2") < events.index("give 3")
  assert events.index("give 6") < events.index("read 5")
  assert running.read(tmp_path / "run") == running.read(whole)
  assert running.weights(tmp_path / "run") == running.weights(whole)


def test_a_signal_saves_the_step_that_was_given(
  config, whole, tmp_path, late, monkeypatch
):
  run = tmp_path / "run"
  rare = config(checkpoint_every=0)
  with monkeypatch.context() as patch:
    running.at_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    # Step 4 is read when step 5 was given.
    with pytest.raises(interruption.Interrupted, match="after step 5, which"):
      training.run(rare, run)
  training.run(rare, run)
  assert running.read(run) == running.read(whole)


def test_a_batch_that_stayed_on_the_host_is_refused(
  config, tmp_path, monkeypatch
):
  placed = feed._placed

  def left(batch, mesh):
    # Those of evaluations are one micro-batch.
    return batch if len(batch.tokens) > 1 else placed(batch, mesh)

  monkeypatch.setattr(feed, "_placed", left)
  with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-"):
    training.run(config(), tmp_path / "run")


def test_rates_are_of_steps_alone(config, tmp_path, monkeypatch):
  """By a clock that compiling and saving take a thousand seconds of."""
  clock = [0.0]

  def now():
    clock[0] += 1
    return clock[0]

  def slow(method):
    def call(*arguments, **named):
      clock[0] += 1000
      return method(*arguments, **named)

    return call

  monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=now))
  for name in ("_compile", "_save", "_evaluate"):
    monkeypatch.setattr(loop.Loop, name, slow(getattr(loop.Loop, name)))
  run = tmp_path / "run"
  with monkeypatch.context() as patch:
    running.at_step(patch, 2, running.interrupt)
    with pytest.raises(KeyboardInterrupt):
      training.run(config(checkpoint_every=1), run)
  training.run(config(checkpoint_every=1), run)
  rows = [row for row in metrics.read(run / metrics.FILE) if "loss" in row]
  assert len(rows) == running.STEPS
  # Four pairs in a second, as no step looks at the clock twice.
  assert [row["pairs_per_second"] for row in rows] == [4.0] * len(rows)
