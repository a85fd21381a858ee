"""Programs of a run: compiled before its loop, kept from run to run."""

import logging
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
from jax import monitoring

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing
from dpo_jax.training import compile as compile_lib
from dpo_jax.training import loop, train

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
  """Grows with every program that is compiled, or read from the cache."""
  heard = []

  def listen(event, seconds, **unused):
    if event == COMPILED:
      heard.append(seconds)

  monitoring.register_event_duration_secs_listener(listen)
  yield heard
  monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_in_the_loop(tmp_path, monkeypatch, caplog):
  """On eight devices, nothing of it seen before: no step, save or export."""
  files = running.make_files(tmp_path)
  config = running.configs(files)()
  jax.clear_caches()
  caplog.set_level(logging.DEBUG, "jax._src.interpreters.pxla")
  original = loop.Loop._loop
  before, after = [], []

  def compiling():
    lines = (record.getMessage() for record in caplog.records)
    return [line for line in lines if line.startswith("Compiling")]

  def watched(self):
    before.extend(compiling())
    original(self)
    after.extend(compiling())

  monkeypatch.setattr(loop.Loop, "_loop", watched)
  train.run(config, tmp_path / "run")
  for name in ("train_step", "eval_step"):
    assert sum(name in line for line in before) == 1
  assert after == before
  assert running.reached(tmp_path / "run", running.STEPS)


def test_a_shape_that_was_not_planned_is_compiled_when_it_comes(compiled):
  step = jax.jit(lambda x, batch: x + jnp.sum(batch.tokens))
  how = packing.Packing("shared", 8, 1, 1, False, 1)
  sizes = [
    jax.tree.map(
      lambda x: np.ones(x.shape, x.dtype),
      batch_lib._empty(how, packing.Shape(rows, 128), False),
    )
    for rows in (2, 3)
  ]
  ready = compile_lib.ahead(step, (jnp.float32(0),), sizes[:1])
  assert len(compiled) > 0
  x = jnp.float32(1)
  del compiled[:]
  assert float(ready(x, sizes[0])) == 17
  assert not compiled
  assert float(ready(x, sizes[1])) == 25
  assert len(compiled) == 1


# --- memory that was freed

SCRIPT = """
import ctypes, resource, sys
from dpo_jax.training import compile as compile_lib
if "keep" in sys.argv:
  compile_lib.keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]

def touch():
  block = library.malloc(ctypes.c_size_t(96 * 2**20))
  ctypes.memset(block, 1, 96 * 2**20)
  library.free(block)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
  touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(compile_lib.computed_at_call())
"""
# Of four blocks of 96 MiB, were each of their pages faulted in.
ALL = 4 * 96 * 2**20 // os.sysconf("SC_PAGE_SIZE")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
CLEAN.pop("GLIBC_TUNABLES", None)


def run(*flags, **environment):
  """Page faults of blocks after the first, and where steps are computed."""
  process = subprocess.run(
    [sys.executable, "-c", SCRIPT, *flags],
    env=CLEAN | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  faults, at_call = process.stdout.split()
  return int(faults), at_call


glibc = pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc has these settings"
)


@glibc
def test_freed_memory_is_not_faulted_in_again():
  faults, at_call = run("keep")
  assert faults < 0.01 * ALL
  assert at_call == "True"
  faults, at_call = run()
  assert faults > 0.9 * ALL
  assert at_call == "False"


@glibc
@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("GLIBC_TUNABLES", "glibc.malloc.top_pad=0"),
    # A block of 96 MiB is over any threshold that glibc finds by itself.
    ("MALLOC_MMAP_MAX_", "65536"),
  ],
)
def test_settings_of_the_environment_are_left_alone(name, value):
  faults, _ = run("keep", **{name: value})
  assert faults > 0.9 * ALL


# --- kept from run to run


@pytest.mark.parametrize("told", [None, "/elsewhere"])
def test_programs_are_kept_where_the_config_says(told, tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("HOME", str(tmp_path))
  try:
    jax.config.update("jax_compilation_cache_dir", told)
    compile_lib.keep("")
    assert jax.config.jax_compilation_cache_dir == told
    compile_lib.keep("~/programs")
    # What JAX was told goes before.
    wanted = told or str(tmp_path / "programs")
    assert jax.config.jax_compilation_cache_dir == wanted
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
