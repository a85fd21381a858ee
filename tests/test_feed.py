"""What steps are fed with: the same stream on any number of hosts."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

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


def hosts(values, directory, count, start):
  """Runs `count` processes with eight devices in all; their files."""
  config = directory / "config.json"
  config.write_text(json.dumps(values), "utf-8")
  with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
  env = os.environ | {"JAX_NUM_CPU_DEVICES": str(8 // count)}
  outputs = [directory / f"{count}-{start}-{i}.npz" for i in range(count)]
  running = [
    subprocess.Popen(
      [sys.executable, "tests/feeding.py", config, output]
      + [str(x) for x in (start, count, index, port)],
      cwd=ROOT,
      env=env,
      stderr=subprocess.PIPE,
    )
    for index, output in enumerate(outputs)
  ]
  for process in running:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
  return [dict(np.load(output)) for output in outputs]


def test_any_number_of_hosts_sees_one_stream(values, tmp_path):
  made = make(values)
  assert made.steps == 15
  two = hosts(values, tmp_path, 2, 0)
  # Gone on with by one host, from the middle of the second epoch.
  (one,) = hosts(values, tmp_path, 1, 11)
  assert str(two[0]["state"]) == str(two[1]["state"]) == str(one["state"])
  assert json.loads(str(one["state"])) == made.schedule.state(15)
  for step, fed in enumerate(made.training(0)):
    for held in (*two, one) if step >= 11 else two:
      assert tuple(held[f"{step}/ids"]) == fed.counts.ids
    for name in ("tokens", "source", "target", "sequence_ids", "dropout_ids"):
      whole = np.asarray(getattr(fed.batch, name))
      prefix = f"{step}/{name}/"
      for parts in (two, [one]) if step >= 11 else (two,):
        found = {
          int(key.removeprefix(prefix)): part
          for held in parts
          for key, part in held.items()
          if key.startswith(prefix)
        }
        # Each host holds its own half, and together they hold all.
        assert len(found) == 8
        rows = [found[start] for start in sorted(found)]
        np.testing.assert_array_equal(np.concatenate(rows, 1), whole)
  share = [sum(key.startswith("0/tokens/") for key in held) for held in two]
  assert share == [4, 4]


def test_the_stream_does_not_depend_on_the_mesh(values):
  orders = [
    [fed.counts.ids for fed in make(values, mesh).training(0)]
    for mesh in (
      sharding.make_mesh(8, 1, 1),
      sharding.make_mesh(1, 2, 4),
      sharding.make_mesh(1, 1, 1, jax.devices()[:1]),
    )
  ]
  assert orders[0] == orders[1] == orders[2]


def test_a_run_meets_only_the_shapes_that_were_planned(values):
  made = make(values)
  planned = {(1, s.rows, 384) for s in made.train.shapes}
  met, widths = set(), set()
  for fed in made.training(0):
    met.add(fed.batch.tokens.shape)
    widths.add(fed.batch.sequence_ids.shape)
    assert fed.counts.tokens == int(
      (np.asarray(fed.batch.segment_ids) > 0).sum()
    )
    assert fed.waited_s >= 0
  assert met == planned
  assert len(planned) <= 4
  assert widths == {(1, 8, s.width) for s in made.train.shapes}
  assert len(list(made.training(3))) == made.steps - 3
  evaluated = list(made.evaluation())
  assert len({batch.tokens.shape for batch in evaluated}) == 1
  owners = np.concatenate(
    [np.unique(np.asarray(b.sequence_ids)) for b in evaluated]
  )
  # Twenty pairs, of which the last batch has four; -1 in each.
  assert (owners >= 0).sum() == 2 * len(made.items.held_out.table)


def test_the_report_says_how_an_epoch_is_made_up(values):
  made = make(values, batch_size=12)
  size = len(made.items.train.table)
  report = made.report()
  assert report["items of an epoch by source"] == [size]
  assert report["steps of an epoch"] == size // 12
  assert report["items left out of each epoch"] == size % 12 > 0
  assert len(report["shapes"]) == len(made.train.shapes)


def test_waiting_for_data_is_measured(values, monkeypatch):
  """A slow source shows in what the step waited, a fast one does not."""
  made = make(values)
  waits = [fed.waited_s for fed in made.training(0)]
  pack = input_pipeline.loader.batch.pack

  def slowly(*arguments):
    total = 0
    # Far longer than a batch takes on its way to the devices.
    for i in range(3_000_000):
      total += i
    return pack(*arguments)

  monkeypatch.setattr(input_pipeline.loader.batch, "pack", slowly)
  slow = [fed.waited_s for fed in made.training(0)]
  assert np.median(slow[8:]) > 2 * np.median(waits[8:])
