"""Batches of a run: the same stream on any number of hosts and devices."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import feeding
import jax
import numpy as np
import pytest

from configs import common
from configs import data as data_config
from dpo_jax.core import settings, sharding
from dpo_jax.data import tokenizer
from dpo_jax.training import config as config_lib
from dpo_jax.training import input_pipeline

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def values(shared):
  """A config of real rows: 15 steps of 8 pairs over two epochs."""
  c = common.training()
  c.objective = "dpo"
  c.tokenizer = str(shared / "tokenizer" / "pythia")
  directory = str(shared / "data" / "hh-rlhf")
  c.data.sources.hh = data_config.hh(directory)
  c.data.sources.hh.subsets = ("harmless-base",)
  c.data.layout = "shared"
  c.data.max_train, c.data.max_eval = 64, 20
  c.data.max_length, c.data.max_prompt_length = 192, 96
  c.data.row_length = 384
  c.data.token_cache = ""
  c.batch_size = c.eval_batch_size = 8
  c.microbatches = 1
  c.epochs = 2
  c.max_steps = 15
  return c.to_dict()


def make(values, mesh=None, **changes):
  built = settings.build(config_lib.TrainSettings, values)
  built = dataclasses.replace(built, **changes)
  mesh = mesh or sharding.make_mesh()
  return input_pipeline.make(built, tokenizer.load(built.tokenizer), mesh)


@pytest.fixture(scope="module")
def pipeline(values):
  return make(values)


@pytest.fixture(scope="module")
def batches(pipeline):
  return list(pipeline.train_batches(0))


def test_two_hosts_see_one_stream(values, batches, tmp_path):
  config = tmp_path / "config.json"
  config.write_text(json.dumps(values), "utf-8")
  with socket.create_server(("localhost", 0)) as free:
    port = str(free.getsockname()[1])
  outputs = [tmp_path / f"{index}.npz" for index in range(2)]
  hosts = [
    subprocess.Popen(
      [sys.executable, "tests/feeding.py", config, output, str(index), port],
      cwd=ROOT,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)},
      stderr=subprocess.PIPE,
    )
    for index, output in enumerate(outputs)
  ]
  for process in hosts:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
  two = [dict(np.load(output)) for output in outputs]
  assert len(batches) == 15
  for step, fed in enumerate(batches):
    for host in two:
      assert tuple(host[f"{step}/ids"]) == fed.counts.ids
    for name in feeding.NAMES:
      prefix = f"{step}/{name}/"
      shards = [
        {
          int(k.removeprefix(prefix)): host[k]
          for k in host
          if k.startswith(prefix)
        }
        for host in two
      ]
      # Each host holds its own half, and together they hold all.
      assert [len(one) for one in shards] == [4, 4]
      both = shards[0] | shards[1]
      rows = [both[start] for start in sorted(both)]
      whole = np.asarray(getattr(fed.batch, name))
      np.testing.assert_array_equal(np.concatenate(rows, 1), whole)


def test_the_stream_resumes_at_any_step(pipeline, batches):
  """From the middle of the second epoch."""
  found = list(pipeline.train_batches(11))
  for a, b in zip(found, batches[11:], strict=True):
    assert a.counts == b.counts
    for x, y in zip(*map(jax.tree.leaves, (a.batch, b.batch)), strict=True):
      np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 1, 1)])
def test_the_stream_does_not_depend_on_the_mesh(values, batches, sizes):
  devices = jax.devices()[: np.prod(sizes)]
  mesh = sharding.make_mesh(*sizes, devices)
  found = [fed.counts.ids for fed in make(values, mesh).train_batches(0)]
  assert found == [fed.counts.ids for fed in batches]


def test_a_run_meets_only_the_shapes_that_were_planned(pipeline, batches):
  planned = {(1, s.rows, 384) for s in pipeline.train.shapes}
  assert {fed.batch.tokens.shape for fed in batches} == planned
  assert len(planned) <= 4
  widths = {fed.batch.sequence_ids.shape for fed in batches}
  assert widths == {(1, 8, s.width) for s in pipeline.train.shapes}
  for fed in batches:
    tokens = (np.asarray(fed.batch.segment_ids) > 0).sum()
    assert fed.counts.tokens == int(tokens)
  evaluated = list(pipeline.eval_batches())
  assert len({batch.tokens.shape for batch in evaluated}) == 1
  sequences = np.concatenate(
    [np.unique(np.asarray(b.sequence_ids)) for b in evaluated]
  )
  # Twenty pairs, of which the last batch has four; -1 in each.
  assert (sequences >= 0).sum() == 2 * len(pipeline.items.held_out.table)


def test_waiting_for_data_is_measured(pipeline, monkeypatch):
  """By a clock that the source takes 7 s of, and placing a batch 1,000."""
  clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

  def later(call, seconds):
    def slowly(*arguments):
      clock.now += seconds
      return call(*arguments)

    return slowly

  def stream(*arguments, original=input_pipeline.loader.stream, **options):
    source = original(*arguments, **options)
    while True:
      yield later(next, 7)(source)

  monkeypatch.setattr(input_pipeline, "time", clock)
  monkeypatch.setattr(input_pipeline.loader, "stream", stream)
  placed = later(input_pipeline._to_device, 1000)
  monkeypatch.setattr(input_pipeline, "_to_device", placed)
  assert [fed.waited_s for fed in pipeline.train_batches(13)] == [7.0, 7.0]
