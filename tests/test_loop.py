"""The loop as accelerators run it: metrics a step late, nothing else crosses.

On a CPU the loop reads each step at once, unless it is told that programs are
computed while Python goes on, as they are on an accelerator.
"""

import signal
import types

import jax
import pytest
import running

from dpo_jax.core import preemption
from dpo_jax.io import metrics
from dpo_jax.training import compile as compile_lib
from dpo_jax.training import input_pipeline, loop
from dpo_jax.training import step as step_lib
from dpo_jax.training import train as train_lib


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return running.configs(running.make_files(tmp_path_factory.mktemp("files")))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """A run whose steps are read at once."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  train_lib.run(config(), workdir)
  return workdir


@pytest.fixture
def late(monkeypatch):
  monkeypatch.setattr(compile_lib, "computed_at_call", lambda: False)


@pytest.fixture
def events(monkeypatch):
  """What the loop does, in order, numbered apart.

  "give" hands a step to the device and "score" a batch of an evaluation; "read"
  and "add" ask for what they made.
  """
  found = []
  ahead = compile_lib.ahead

  def noted(name, call):
    def counted(*arguments):
      number = 1 + sum(event.startswith(name) for event in found)
      found.append(f"{name} {number}")
      return call(*arguments)

    return counted

  def compiled(step, arguments, *rest):
    train = isinstance(arguments[0], step_lib.TrainState)
    return noted("give" if train else "score", ahead(step, arguments, *rest))

  def add(totals, sums):
    if sums:
      found.append(f"add {1 + sum(x.startswith('add') for x in found)}")
    original(totals, sums)

  original = loop._add
  monkeypatch.setattr(compile_lib, "ahead", compiled)
  monkeypatch.setattr(loop, "_add", add)
  monkeypatch.setattr(loop.Loop, "_record", noted("read", loop.Loop._record))
  return found


def test_a_step_is_read_when_the_next_was_given(
  config, whole, tmp_path, late, events
):
  rare = config(eval_every=0, checkpoint_every=0)
  train_lib.run(rare, tmp_path / "run")
  # Four held-out pairs and two, before training and after it.
  evaluated = ["score 1", "score 2", "add 1", "add 2"]
  assert events[:4] == evaluated
  assert events[-4:] == [f"{x[:-1]}{int(x[-1]) + 2}" for x in evaluated]
  # The first at once, as its loss is known; the last has no next.
  wanted = ["give 1", "read 1", "give 2"]
  for number in range(3, running.STEPS + 1):
    wanted += [f"give {number}", f"read {number - 1}"]
  assert events[4:-4] == [*wanted, f"read {running.STEPS}"]
  found, known = (
    [row for row in running.read(path) if "loss" in row]
    for path in (tmp_path / "run", whole)
  )
  assert found == known


def test_before_anything_else_all_steps_are_read(
  config, whole, tmp_path, late, events
):
  """Evaluations after steps 3 and 6, checkpoints after 2, 4 and 6."""
  train_lib.run(config(), tmp_path / "run")
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
    with pytest.raises(preemption.Interrupted, match="after step 5, which"):
      train_lib.run(rare, run)
  train_lib.run(rare, run)
  assert running.read(run) == running.read(whole)


def test_a_batch_that_stayed_on_the_host_is_refused(
  config, tmp_path, monkeypatch
):
  placed = input_pipeline._placed

  def left(batch, mesh):
    # Those of evaluations are one micro-batch.
    return batch if len(batch.tokens) > 1 else placed(batch, mesh)

  monkeypatch.setattr(input_pipeline, "_placed", left)
  with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-"):
    train_lib.run(config(), tmp_path / "run")


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
      train_lib.run(config(checkpoint_every=1), run)
  train_lib.run(config(checkpoint_every=1), run)
  rows = [row for row in metrics.read(run / metrics.FILE) if "loss" in row]
  assert len(rows) == running.STEPS
  # Four pairs in a second, as no step looks at the clock twice.
  assert [row["pairs_per_second"] for row in rows] == [4.0] * len(rows)
