"""The loop: metrics a step late, nothing else crosses, nothing is compiled."""

import logging
import os
import platform
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing
from dpo_jax.io import metrics
from dpo_jax.training import checkpoints, input_pipeline, loop, setup, train
from dpo_jax.training import step as step_lib


def noted(name, call, found):
  """Appends "name 1", "name 2", ... to `found` as it is called."""

  def counted(*arguments):
    number = 1 + sum(event.startswith(name) for event in found)
    found.append(f"{name} {number}")
    return call(*arguments)

  return counted


class Lines(logging.Handler):
  """What jax says it compiles."""

  def __init__(self):
    super().__init__()
    self.lines = []

  def emit(self, record):
    if record.getMessage().startswith("Compiling"):
      self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def observed(config, tmp_path_factory):
  """A run with evaluations at 0, 3, 6 and 7 and saves at 2, 4, 6 and 7.

  Its clock goes a second a look, and compiling, evaluating and saving take a
  thousand. `events` has the calls in order, `compiled` what was compiled before
  the loop and after it.
  """
  workdir = tmp_path_factory.mktemp("observed") / "run"
  events, compiled, clock = [], [], [0.0]
  handler, logger = Lines(), logging.getLogger("jax._src.interpreters.pxla")

  def now():
    clock[0] += 1
    return clock[0]

  def slow(call):
    def slowly(*arguments, **named):
      clock[0] += 1000
      return call(*arguments, **named)

    return slowly

  def compile_ahead(step, arguments, batches, original=setup.compile_ahead):
    update = isinstance(arguments[0], step_lib.TrainState)
    step = original(step, arguments, batches)
    return noted("update" if update else "score", step, events)

  def train_loop(*arguments, original=loop.train, **options):
    compiled.append([*handler.lines])
    state = original(*arguments, **options)
    compiled.append([*handler.lines])
    return state

  jax.clear_caches()
  with pytest.MonkeyPatch.context() as patch:
    for owner, name, event in (
      (loop, "_add", "add"),
      (loop.StepLog, "write", "fetch"),
      (checkpoints.Checkpoints, "save", "save"),
    ):
      patch.setattr(owner, name, noted(event, getattr(owner, name), events))
    patch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=now))
    patch.setattr(setup, "compile_ahead", slow(compile_ahead))
    patch.setattr(loop, "train", train_loop)
    # As on an accelerator, where a step's call returns before it is computed.
    patch.setattr(loop, "_is_synchronous", lambda: False)
    for owner, name in ((loop, "_evaluate"), (checkpoints.Checkpoints, "save")):
      patch.setattr(owner, name, slow(getattr(owner, name)))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
      train.run(config(), workdir)
    finally:
      logger.setLevel(level)
      logger.removeHandler(handler)
  return types.SimpleNamespace(
    workdir=workdir, events=events, compiled=compiled
  )


def test_metrics_are_fetched_a_step_late(observed, whole):
  # Four held-out pairs and two. The sums of a batch are added when the device
  # has the next one.
  evaluation = ["score", "add", "score", "add", "add"]
  assert [event.split()[0] for event in observed.events] == [
    *evaluation,
    # The first loss is known, and fetched at once.
    *("update", "fetch"),
    *("update", "fetch", "save"),
    *("update", "fetch", *evaluation),
    *("update", "fetch", "save"),
    # Step 5 is fetched when step 6 is under way.
    *("update", "update", "fetch", "fetch", *evaluation, "save"),
    *("update", "fetch", *evaluation, "save"),
  ]
  assert running.read(observed.workdir) == running.read(whole)
  assert running.weights(observed.workdir) == running.weights(whole)


def test_a_cpu_fetches_at_once(config, tmp_path, monkeypatch):
  """Where a step is computed at its call, a later fetch would time others."""
  events = []
  for owner, name, event in (
    (checkpoints.Checkpoints, "check", "update"),
    (loop.StepLog, "write", "fetch"),
  ):
    monkeypatch.setattr(owner, name, noted(event, getattr(owner, name), events))
  train.run(
    config(max_steps=4, eval_every=0, checkpoint_every=0), tmp_path / "r"
  )
  kinds = [event.split()[0] for event in events]
  assert kinds[:8] == ["update", "fetch"] * 4


def test_nothing_is_compiled_in_the_loop(observed):
  # On eight devices, nothing of it seen before: no step and no save.
  before, after = observed.compiled
  for name in ("train_step", "eval_step"):
    assert sum(name in line for line in before) == 1
  assert after == before


def test_rates_are_of_steps_alone(observed):
  rows = metrics.read(observed.workdir / metrics.FILE)
  rows = [row["pairs_per_second"] for row in rows if "loss" in row]
  # Four pairs in a second, as no step looks at the clock twice.
  assert rows == [4.0] * running.STEPS


def test_a_batch_that_stayed_on_the_host_is_refused(
  config, tmp_path, monkeypatch
):
  to_device = input_pipeline._to_device

  def left(batch, mesh):
    # Those of evaluations are one micro-batch.
    return batch if len(batch.tokens) > 1 else to_device(batch, mesh)

  monkeypatch.setattr(input_pipeline, "_to_device", left)
  with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-"):
    train.run(config(), tmp_path / "run")


def test_a_shape_that_was_not_planned_is_compiled_when_it_comes():
  step = jax.jit(lambda x, batch: x + jnp.sum(batch.tokens))
  how = packing.Packing("shared", 8, 1, 1, False, 1)
  batches = [
    jax.tree.map(
      lambda x: np.ones(x.shape, x.dtype),
      batch_lib._empty(how, packing.Shape(rows, 128), False, False),
    )
    for rows in (2, 3)
  ]
  ready = setup.compile_ahead(step, (jnp.float32(0),), batches[:1])
  x = jnp.float32(1)
  assert [float(ready(x, batch)) for batch in batches] == [17, 25]
  # The planned shape did not come to the jitted function.
  assert step._cache_size() == 1


FAULTS = """
import ctypes, resource
from dpo_jax.training import setup
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
setup.keep_freed_memory()
for _ in range(5):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(ctypes.c_size_t(96 * 2**20))
  ctypes.memset(block, 1, 96 * 2**20)
  libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc has these settings"
)
def test_freed_memory_is_not_faulted_in_again():
  done = subprocess.run(
    [sys.executable, "-c", FAULTS],
    cwd=running.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  # By default every page is: 24,576 of 4 KiB.
  assert int(done.stdout) < 0.01 * 96 * 2**20 / os.sysconf("SC_PAGE_SIZE")


def test_programs_are_kept_from_run_to_run(tmp_path, monkeypatch):
  own = jax.config.jax_compilation_cache_dir
  setup.use_compilation_cache()
  # JAX_COMPILATION_CACHE_DIR takes precedence.
  assert jax.config.jax_compilation_cache_dir == own
  monkeypatch.setenv("HOME", str(tmp_path))
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    setup.use_compilation_cache()
    wanted = str(tmp_path / ".cache" / "dpo_jax" / "xla")
    assert jax.config.jax_compilation_cache_dir == wanted
  finally:
    jax.config.update("jax_compilation_cache_dir", own)
