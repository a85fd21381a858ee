"""Programs of a run: compiled before its loop, kept from run to run."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
from jax import monitoring

from dpo_jax import training
from dpo_jax.rows import packing, placement
from dpo_jax.running import loop, programs

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
  training.run(config, tmp_path / "run")
  for name in ("train_step", "eval_step"):
    assert sum(name in line for line in before) == 1
  assert after == before
  assert running.reached(tmp_path / "run", running.STEPS)


def test_what_is_computed_at_the_call_is_what_jax_was_told():
  before = jax.config.read(programs._DISPATCH)
  try:
    jax.config.update(programs._DISPATCH, True)
    assert not programs.computed_at_call()
    programs.compute_at_call()
    assert programs.computed_at_call()
  finally:
    jax.config.update(programs._DISPATCH, before)


def test_a_shape_that_was_not_planned_is_compiled_when_it_comes(compiled):
  step = jax.jit(lambda x, batch: x + jnp.sum(batch.tokens))
  how = placement.Packing("shared", 8, 1, 1, False, 1)
  sizes = [
    jax.tree.map(
      lambda x: np.ones(x.shape, x.dtype),
      packing._empty(how, placement.Shape(rows, 128), False),
    )
    for rows in (2, 3)
  ]
  ready = programs.ahead(step, (jnp.float32(0),), sizes[:1])
  assert len(compiled) > 0
  x = jnp.float32(1)
  del compiled[:]
  assert float(ready(x, sizes[0])) == 17
  assert not compiled
  assert float(ready(x, sizes[1])) == 25
  assert len(compiled) == 1


@pytest.mark.parametrize("told", [None, "/elsewhere"])
def test_programs_are_kept_where_the_config_says(told, tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("HOME", str(tmp_path))
  try:
    jax.config.update("jax_compilation_cache_dir", told)
    programs.keep("")
    assert jax.config.jax_compilation_cache_dir == told
    programs.keep("~/programs")
    # What JAX was told goes before.
    wanted = told or str(tmp_path / "programs")
    assert jax.config.jax_compilation_cache_dir == wanted
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
