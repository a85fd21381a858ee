"""SIGTERM, SIGINT and SIGHUP in real processes: exit codes and what is kept."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import running
import test_processes

from dpo_jax.io import step_files

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
# Where the signal comes.
PHASES = {
  "compile": ("dpo_jax.training.setup:compile_ahead", "1"),
  "step": ("dpo_jax.training.loop:StepLog.write", "2"),
  "evaluation": ("dpo_jax.training.loop:_evaluate", "2"),
  "save": ("dpo_jax.training.checkpoints:Checkpoints.save", "1"),
}
# Those that every run of the suite meets. Of one process, test_interruptions.py
# has all phases.
QUICK = {("SIGHUP", 1, "save"), ("SIGINT", 2, "evaluation")}
ALL = [
  pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow)
  for one in (
    (name, count, phase)
    for name in CODES
    for count in (1, 2)
    for phase in PHASES
  )
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A run that is not over before the two processes agree where to stop."""
  build = running.configs(running.make_files(tmp_path_factory.mktemp("files")))
  return build(
    epochs=60,
    checkpoint_every=20,
    export_adapters=False,
    **{"data.shapes": 1, "lora.dropout": 0.0},
  )


@pytest.mark.parametrize(("name", "count", "phase"), ALL)
def test_a_signal_ends_the_run_and_what_was_made_is_saved(
  config, tmp_path, name, count, phase
):
  run = tmp_path / "run"
  victim = count - 1
  where, times = PHASES[phase]
  planted = ("tests/signalled.py", "train.py", where, times, name, str(victim))
  environments = test_processes.explicit(count) if count > 1 else [{}]
  with contextlib.ExitStack() as stack:
    children = [
      stack.enter_context(
        running.Child(
          tmp_path / str(number),
          config,
          run,
          planted,
          JAX_NUM_CPU_DEVICES=str(2 // count),
          **environ,
        )
      )
      for number, environ in enumerate(environments)
    ]
    codes = [child.end(120) for child in children]
    ended_s = time.time()
    said = [child.printed() for child in children]
  sent = re.search(r"signalled at ([\d.]+)", said[victim])
  assert sent, said
  waited_s = ended_s - float(sent[1])
  print(f"{name} to 1 of {count} in {phase}: {codes} after {waited_s:.2f} s")
  assert codes[victim] == CODES[name], said
  # The other is told by jax's preemption service, whose signal is SIGTERM.
  assert codes[:victim] == [143] * victim, said
  assert waited_s < 30
  saved = step_files.steps(run / "checkpoints")
  stopped = {re.search(r"stopped by .* (\d+)", text)[1] for text in said}
  assert len(stopped) == 1
  assert stopped == {str(saved[-1] if saved else 0)}
  assert saved or phase == "compile"
  for step in saved:
    assert step_files.problem(run / "checkpoints", step) == ""


LATE = """
import signal, sys, time
import jax
from dpo_jax.core import distributed, errors, preemption

try:
  with (
    distributed.initialized(),
    preemption.watching(30) as watch,
    watch.deferred(),
  ):
    signal.raise_signal(signal.SIGTERM)
    while not watch.requested():
      pass
    distributed.barrier("all stop here")
    if jax.process_index() == 1:
      time.sleep(1)
    raise watch.interrupted("here")
except errors.Stopped as error:
  sys.exit(error.code)
"""


def test_one_that_is_late_to_stop_is_waited_for():
  """jax's service is in the first process, and ends the others when it goes."""
  children = [
    subprocess.Popen(
      [sys.executable, "-c", LATE],
      cwd=running.ROOT,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | extra,
      stderr=subprocess.PIPE,
      text=True,
    )
    for extra in test_processes.explicit(2)
  ]
  said = [child.communicate(timeout=60)[1] for child in children]
  assert [child.returncode for child in children] == [143, 143], said
  # Nor did the watchdog end them.
  assert not any("not stopped" in text for text in said), said


STUCK = """
import hashlib, sys, time
from dpo_jax.core import preemption

with preemption.watching(float(sys.argv[1])) as watch, watch.deferred():
  print("ready", flush=True)
  # It never asks whether to stop, and in native code hears of nothing.
  while True:
    time.sleep(0.01)
    if sys.argv[2] == "native":
      hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@contextlib.contextmanager
def child(*command):
  """A process that has said that it is ready."""
  with subprocess.Popen(
    command,
    cwd=running.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      assert process.stdout.readline() == "ready\n"
      yield process
    finally:
      process.kill()


@pytest.mark.parametrize(
  ("name", "where"),
  [("SIGTERM", "native"), ("SIGINT", "native"), ("SIGHUP", "Python")],
)
def test_a_run_that_does_not_stop_is_ended(name, where):
  with child(sys.executable, "-c", STUCK, "0.5", where) as process:
    process.send_signal(signal.Signals[name])
    _, stderr = process.communicate(timeout=30)
  assert process.returncode == CODES[name]
  assert f"not stopped 0.5 s after {name}" in stderr


IGNORING = """
import signal
from dpo_jax.core import preemption

with preemption.watching(30) as watch, watch.deferred():
  signal.raise_signal(signal.SIGHUP)
  print(watch.requested())
"""


def test_under_nohup_a_hangup_stays_ignored():
  done = subprocess.run(
    ["nohup", sys.executable, "-c", IGNORING],
    cwd=running.ROOT,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


INTERRUPTIBLE = """
import asyncio, signal, sys
from dpo_jax.cli import flags
from dpo_jax.core import console, errors, preemption

async def work():
  try:
    print("ready", flush=True)
    await asyncio.sleep(600)
  finally:
    print("cleaned up", flush=True)

if sys.argv[1] == "ignored":
  signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
  with preemption.interruptible():
    asyncio.run(work())
except errors.Stopped as error:
  console.error(str(error))
  sys.exit(error.code)
"""


@pytest.mark.parametrize(
  ("name", "interrupts"),
  [
    ("SIGTERM", "heard"),
    ("SIGINT", "heard"),
    ("SIGHUP", "heard"),
    # As in the background of a shell script.
    ("SIGTERM", "ignored"),
  ],
)
def test_what_may_be_interrupted_anywhere_is_cleaned_up(name, interrupts):
  with child(sys.executable, "-c", INTERRUPTIBLE, interrupts) as process:
    process.send_signal(signal.Signals[name])
    stdout, stderr = process.communicate(timeout=30)
  assert stdout == "cleaned up\n"
  assert stderr == (
    f"error: stopped by {name} with every whole row kept; run the same command"
    " again to go on\n"
  )
  assert process.returncode == CODES[name]
