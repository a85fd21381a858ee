"""SIGTERM, SIGINT and SIGHUP in real processes: exit codes and what is kept.

test_interruptions has the phases of a run in one process.
"""

import contextlib
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
# The function, and its call, before which the signal is sent.
PHASES = {
  "compile": ("jax.stages:Lowered.compile", "1"),
  "step": ("dpo_jax.training.loop:StepLog.write", "3"),
  "evaluation": (
    "dpo_jax.training.input_pipeline:InputPipeline.eval_batches",
    "2",
  ),
  "save": ("dpo_jax.training.checkpoints:Checkpoints.save", "1"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A run long enough for two processes to agree on a step to stop at."""
  build = running.configs(running.make_files(tmp_path_factory.mktemp("files")))
  return build(
    epochs=60,
    eval_every=6,
    checkpoint_every=4,
    export_adapters=False,
    **{"data.shapes": 1, "lora.dropout": 0.0},
  )


@pytest.mark.parametrize(
  ("name", "phase"),
  [
    pytest.param("SIGTERM", "compile", marks=pytest.mark.slow),
    pytest.param("SIGHUP", "step", marks=pytest.mark.slow),
    pytest.param("SIGTERM", "evaluation", marks=pytest.mark.slow),
    ("SIGINT", "save"),
  ],
)
def test_a_signal_ends_the_run_and_what_was_made_is_saved(
  config, tmp_path, name, phase
):
  run = tmp_path / "run"
  command = ("tests/signalled.py", "train.py", *PHASES[phase], name, "1")
  environments = test_processes.explicit()
  with test_processes.pair(
    tmp_path, config, run, environments, command
  ) as children:
    codes = [child.end(120) for child in children]
    ended_s = time.time()
    said = [child.printed() for child in children]
  sent = re.search(r"signalled at ([\d.]+)", said[1])
  assert sent, said
  # Process 0 learns of it by jax's preemption service, as of a SIGTERM.
  assert codes == [143, CODES[name]], said
  assert ended_s - float(sent[1]) < 30
  saved = step_files.steps(run / "checkpoints")
  stopped = {re.search(r"stopped by .* (\d+)", text)[1] for text in said}
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
  """jax's service in process 0 would end the others with it."""
  for child, _, error in test_processes.python_pair(
    test_processes.explicit(), LATE
  ):
    assert child.returncode == 143, error
    # Nor did the watchdog end it.
    assert "not stopped" not in error


STUCK = """
import hashlib, sys, time
from dpo_jax.core import preemption

with preemption.watching(float(sys.argv[1])) as watch, watch.deferred():
  print("ready", flush=True)
  # It never polls; native code does not return to Python's handlers either.
  while True:
    time.sleep(0.01)
    if sys.argv[2] == "native":
      hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@contextlib.contextmanager
def child(*command):
  """A process that has printed "ready"."""
  with subprocess.Popen(
    (sys.executable, "-c", *command),
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
  ("name", "where"), [("SIGINT", "native"), ("SIGHUP", "Python")]
)
def test_a_run_that_does_not_stop_is_ended(name, where):
  with child(STUCK, "0.5", where) as process:
    process.send_signal(signal.Signals[name])
    _, stderr = process.communicate(timeout=30)
  assert process.returncode == CODES[name]
  assert f"not stopped 0.5 s after {name}" in stderr


LEFT = """
import threading
from dpo_jax.cli import flags
from dpo_jax.core import console, errors

def main(config, workdir):
  # As Orbax's is left by a save that got no further threads.
  threading.Thread(target=threading.Event().wait).start()
  console.result("ready")
  raise errors.Stopped("can't start new thread")

flags.run(main, example="configs/dpo.py")
"""


def test_a_thread_that_never_ends_does_not_keep_a_failed_process():
  with child(LEFT, "--config=configs/dpo.py") as process:
    _, stderr = process.communicate(timeout=60)
  assert process.returncode == 1
  assert stderr.endswith("error: can't start new thread\n")


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
  ("name", "sigint"),
  # SIGINT is ignored in the background of a shell script.
  [("SIGINT", "heard"), ("SIGHUP", "heard"), ("SIGTERM", "ignored")],
)
def test_an_interruptible_block_is_cleaned_up(name, sigint):
  with child(INTERRUPTIBLE, sigint) as process:
    process.send_signal(signal.Signals[name])
    stdout, stderr = process.communicate(timeout=30)
  assert stdout == "cleaned up\n"
  assert stderr == (
    f"error: stopped by {name} with every whole row kept; run the same command"
    " again to resume\n"
  )
  assert process.returncode == CODES[name]
