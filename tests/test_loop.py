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
from jax import monitoring

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing
from dpo_jax.io import metrics
from dpo_jax.training import checkpoints, input_pipeline, loop, setup, train
from dpo_jax.training import step as step_lib


@pytest.fixture(scope="module")
def config(run_files):
  return running.configs(run_files)


def noted(name, call, found):
  """Appends "name 1", "name 2", ... to `found` as it is called."""

  def counted(*arguments):
    number = 1 + sum(event.startswith(name) for event in found)
    found.append(f"{name} {number}")
    return call(*arguments)

  return counted


def test_the_order_of_a_run_and_what_it_compiles(
  config, whole, tmp_path, monkeypatch, caplog
):
  """Evaluations after steps 3, 6 and 7, saves after 2, 4, 6 and 7."""
  jax.clear_caches()
  caplog.set_level(logging.DEBUG, "jax._src.interpreters.pxla")
  events, compiled = [], []
  ahead, original = setup.compile_ahead, loop.train

  def compiling():
    lines = (record.getMessage() for record in caplog.records)
    return [line for line in lines if line.startswith("Compiling")]

  def compile_ahead(step, arguments, batches):
    update = isinstance(arguments[0], step_lib.TrainState)
    step = ahead(step, arguments, batches)
    return noted("update" if update else "score", step, events)

  def watched(*arguments, **options):
    compiled.append(compiling())
    state = original(*arguments, **options)
    compiled.append(compiling())
    return state

  for owner, name, event in (
    (loop, "_add", "add"),
    (loop.StepLog, "write", "fetch"),
    (checkpoints.Checkpoints, "save", "save"),
  ):
    call = noted(event, getattr(owner, name), events)
    monkeypatch.setattr(owner, name, call)
  monkeypatch.setattr(setup, "compile_ahead", compile_ahead)
  monkeypatch.setattr(loop, "train", watched)
  train.run(config(), tmp_path / "run")
  # Four held-out pairs and two. The sums of a batch are added when the device
  # has the next one.
  evaluation = ["score", "add", "score", "add", "add"]
  assert [event.split()[0] for event in events] == [
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
  assert running.read(tmp_path / "run") == running.read(whole)
  assert running.weights(tmp_path / "run") == running.weights(whole)
  # On eight devices, nothing of it seen before: no step and no save.
  before, after = compiled
  for name in ("train_step", "eval_step"):
    assert sum(name in line for line in before) == 1
  assert after == before


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


def test_rates_are_of_steps_alone(config, tmp_path, monkeypatch):
  """By a clock that compiling, evaluating and saving take a thousand s of."""
  clock = [0.0]

  def now():
    clock[0] += 1
    return clock[0]

  def slow(call):
    def slowly(*arguments, **named):
      clock[0] += 1000
      return call(*arguments, **named)

    return slowly

  monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=now))
  for owner, name in (
    (setup, "compile_ahead"),
    (loop, "_evaluate"),
    (checkpoints.Checkpoints, "save"),
  ):
    monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
  train.run(config(), tmp_path / "run")
  rows = metrics.read(tmp_path / "run" / metrics.FILE)
  rows = [row["pairs_per_second"] for row in rows if "loss" in row]
  # Four pairs in a second, as no step looks at the clock twice.
  assert rows == [4.0] * running.STEPS


def test_a_shape_that_was_not_planned_is_compiled_when_it_comes():
  compiled = []

  def listen(event, seconds, **unused):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(seconds)

  step = jax.jit(lambda x, batch: x + jnp.sum(batch.tokens))
  how = packing.Packing("shared", 8, 1, 1, False, 1)
  batches = [
    jax.tree.map(
      lambda x: np.ones(x.shape, x.dtype),
      batch_lib._empty(how, packing.Shape(rows, 128), False),
    )
    for rows in (2, 3)
  ]
  monitoring.register_event_duration_secs_listener(listen)
  try:
    ready = setup.compile_ahead(step, (jnp.float32(0),), batches[:1])
    x = jnp.float32(1)
    assert compiled
    compiled.clear()
    assert float(ready(x, batches[0])) == 17
    assert not compiled
    assert float(ready(x, batches[1])) == 25
    assert len(compiled) == 1
  finally:
    monitoring.unregister_event_duration_listener(listen)


FAULTS = """
import ctypes, resource
from dpo_jax.training import setup
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(4):
    block = libc.malloc(ctypes.c_size_t(96 * 2**20))
    ctypes.memset(block, 1, 96 * 2**20)
    libc.free(block)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
setup.keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc has these settings"
)
def test_freed_memory_is_not_faulted_in_again():
  plain = ("MALLOC_", "GLIBC_TUNABLES")
  done = subprocess.run(
    [sys.executable, "-c", FAULTS],
    env={k: v for k, v in os.environ.items() if not k.startswith(plain)},
    cwd=running.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  before, after = map(int, done.stdout.split())
  pages = 4 * 96 * 2**20 // os.sysconf("SC_PAGE_SIZE")
  assert before > 0.9 * pages
  assert after < 0.01 * pages


@pytest.mark.parametrize("before", [None, "/elsewhere"])
def test_programs_are_kept_where_the_config_says(before, tmp_path, monkeypatch):
  own = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("HOME", str(tmp_path))
  try:
    jax.config.update("jax_compilation_cache_dir", before)
    setup.use_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir == before
    setup.use_compilation_cache("~/programs")
    # JAX_COMPILATION_CACHE_DIR takes precedence.
    wanted = before or str(tmp_path / "programs")
    assert jax.config.jax_compilation_cache_dir == wanted
  finally:
    jax.config.update("jax_compilation_cache_dir", own)
