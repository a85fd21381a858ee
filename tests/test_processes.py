"""Several processes of one run: initialization, equal numbers, shared errors.

Real processes, each with some CPU devices, that communicate over gloo.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import running
import safetensors.numpy

from dpo_jax.core import distributed, preemption, sharding
from dpo_jax.io import locks, records
from dpo_jax.training import eval_samples, train

ROOT = running.ROOT
# Of two processes together; the tests' own process has eight.
DEVICES = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Runs of all weights, split over the devices of both processes."""
  build = running.configs(running.make_files(tmp_path_factory.mktemp("files")))
  changes = {
    "mesh.data": 1,
    "mesh.fsdp": DEVICES,
    "lora.rank": 0,
    "export_adapters": False,
    "heartbeat_s": 10,
    "samples.prompts": 3,
    "samples.every": 3,
    "samples.temperature": 0.0,
    "samples.max_new_tokens": 4,
    "samples.max_prompt_tokens": 28,
  }
  return lambda **more: build(**changes, **more)


@pytest.fixture
def alone(monkeypatch):
  """Gives this process by itself as many devices as the two have."""
  make = sharding.make_mesh
  devices = jax.devices()[:DEVICES]
  monkeypatch.setattr(
    sharding, "make_mesh", lambda **sizes: make(**sizes, devices=devices)
  )


def free_port():
  with socket.socket() as one:
    one.bind(("localhost", 0))
    return one.getsockname()[1]


def explicit():
  port = free_port()
  return [
    {
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": "2",
      "JAX_PROCESS_ID": str(rank),
    }
    for rank in range(2)
  ]


def slurm():
  """Variables of srun. jax derives the port from the job's id."""
  job = str(free_port() % 4096)
  return [
    {
      "SLURM_JOB_ID": job,
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": "2",
      "SLURM_STEP_NUM_TASKS": "2",
      "SLURM_PROCID": str(rank),
      "SLURM_LOCALID": str(rank),
    }
    for rank in range(2)
  ]


def open_mpi():
  """Variables of mpirun, of the only task of its node and of one of two."""
  job = (free_port() % 4096) * 4096
  return [
    {
      "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:1",
      "OMPI_COMM_WORLD_SIZE": "2",
      "OMPI_COMM_WORLD_RANK": str(rank),
      "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
      "OMPI_COMM_WORLD_LOCAL_SIZE": str(rank + 1),
    }
    for rank in range(2)
  ]


@contextlib.contextmanager
def pair(directory, config, workdir, environments, command=("train.py",)):
  """`python train.py` in two processes, killed at the end."""
  with contextlib.ExitStack() as stack:
    yield [
      stack.enter_context(
        running.Child(
          directory / f"process{rank}",
          config,
          workdir,
          command,
          JAX_NUM_CPU_DEVICES=str(DEVICES // 2),
          **extra,
        )
      )
      for rank, extra in enumerate(environments)
    ]


def run_pair(*arguments):
  with pair(*arguments) as children:
    codes = [child.end() for child in children]
    assert codes == [0, 0], [child.printed() for child in children]


def python_pair(environments, *arguments):
  """Two finished processes of `python -c`, and their stdout and stderr."""
  # A test that compiled for a TPU leaves libtpu's variables.
  own = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
  children = [
    subprocess.Popen(
      [sys.executable, "-c", *arguments],
      cwd=ROOT,
      env=own | {"JAX_NUM_CPU_DEVICES": "1"} | extra,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for extra in environments
  ]
  return [(child, *child.communicate(timeout=120)) for child in children]


def moved(name, value):
  """A weight, but for entries that rounding alone moves.

  The key bias of dimensions without rotation adds one number to all scores of a
  query: its gradient is zero but for rounding, which AdamW normalizes.
  """
  if not name.endswith("query_key_value.bias"):
    return value
  value = value.reshape(running.SHAPE.heads, 3, running.SHAPE.head_dim).copy()
  value[:, 1, running.SHAPE.rotary_dim :] = 0
  return value


def test_two_processes_do_what_one_does(config, alone, tmp_path, monkeypatch):
  """One begins, two end: as one alone."""
  whole, run = tmp_path / "whole", tmp_path / "run"
  train.run(config(), whole)
  with monkeypatch.context() as patch:
    running.at_step(patch, 1, running.terminate)
    with pytest.raises(preemption.Interrupted, match="after step 2"):
      train.run(config(), run)
  run_pair(tmp_path / "pair", config(), run, slurm())
  starts = json.loads((run / "manifest.json").read_text())["starts"]
  assert [start["processes"] for start in starts] == [1, 2]
  # Two devices of each process.
  assert [len(start["devices"]) for start in starts] == [DEVICES] * 2
  assert [start["step"] for start in starts] == [0, 2]
  one, two = running.read(whole), running.read(run)
  # The same items in the same steps.
  assert [row["step"] for row in two] == [row["step"] for row in one]
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      # Sums in another order.
      assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
  # Sampled by both together, written by process 0.
  a_rows, b_rows = (
    records.read(d / eval_samples.FILE, records.Response) for d in (whole, run)
  )
  for a, b in zip(a_rows, b_rows, strict=True):
    assert b.mean_logp == pytest.approx(a.mean_logp, abs=1e-4)
    assert dataclasses.replace(b, mean_logp=a.mean_logp) == a
  weights = [
    safetensors.numpy.load_file(d / "export" / "model.safetensors")
    for d in (whole, run)
  ]
  assert weights[0].keys() == weights[1].keys()
  for name, value in weights[0].items():
    np.testing.assert_allclose(
      moved(name, weights[1][name]), moved(name, value), rtol=0, atol=1e-4
    )


@pytest.fixture(scope="module")
def whole_pair(config, tmp_path_factory):
  """An uninterrupted run of 21 steps in two processes."""
  directory = tmp_path_factory.mktemp("pair")
  run_pair(directory, config(epochs=3), directory / "run", explicit())
  return directory / "run"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_what_happens_to_one_of_two_stops_both(
  config, whole_pair, tmp_path, number, victim
):
  long, run = config(epochs=3), tmp_path / "run"
  with pair(tmp_path / "first", long, run, explicit()) as children:
    other = children[1 - victim]
    other.until(lambda: running.reached(run, 5))
    children[victim].process.send_signal(number)
    # A stopped process keeps its connections: it only misses heartbeats.
    assert other.end(60) != 0, other.printed()
  assert not (run / "finished.json").exists()
  run_pair(tmp_path / "again", long, run, explicit())
  assert running.read(run) == running.read(whole_pair)
  assert running.weights(run) == running.weights(whole_pair)


SHARED = """
import pathlib, signal, sys
from dpo_jax.core import distributed, errors, preemption
from dpo_jax.io import locks

with distributed.initialized():
  import jax, numpy as np
  from jax.sharding import NamedSharding, PartitionSpec

  me = jax.process_index()
  assert distributed.all_gather(10 * me + 1).tolist() == [1, 11]
  assert distributed.is_main() == (me == 0)
  mesh = jax.make_mesh((2,), ("x",))
  value = np.arange(6).reshape(2, 3)
  split = jax.make_array_from_callback(
    (2, 3), NamedSharding(mesh, PartitionSpec("x")), lambda i: value[i]
  )
  assert not split.is_fully_addressable
  np.testing.assert_array_equal(distributed.fetch(split), value)
  distributed.assert_equal("the same", "text")
  try:
    distributed.assert_equal("the data", f"text {me}")
  except ValueError as error:
    print(error)
  try:
    with distributed.raise_on_all("reading"):
      if me == 1:
        raise ValueError("no such file")
  except (ValueError, errors.Stopped) as error:
    print(type(error).__name__, error)
  with distributed.on_main(locks.Lock(sys.argv[1])):
    distributed.require_shared(pathlib.Path(sys.argv[1]))
    distributed.barrier("held")
  try:
    with distributed.on_main(locks.Lock(sys.argv[2])):
      raise AssertionError("another process holds it")
  except errors.Stopped as error:
    print(type(error).__name__)
  # A signal to one of them stops both at the same point.
  with preemption.watching(30) as watch, watch.deferred():
    if me == 1:
      signal.raise_signal(signal.SIGINT)
    polls = 1
    while not watch.requested():
      polls += 1
  points = distributed.all_gather(polls).tolist()
  print("together" if points[0] == points[1] else points)
  if me == 1:
    raise RuntimeError("alone")
  distributed.barrier("never complete")
"""


def test_what_one_process_meets_all_of_them_learn(tmp_path):
  with locks.Lock(tmp_path / "held"):
    ended = python_pair(
      explicit(), SHARED, tmp_path / "free", tmp_path / "held"
    )
  said = []
  for child, output, error in ended:
    assert child.returncode != 0
    lines = [x for x in output.splitlines() if not x.startswith("[Gloo]")]
    assert lines[0].startswith("the data differs between the 2"), error
    said.append(lines[1:])
  assert said[0] == [
    "Stopped reading: failed in process [1], see its output",
    "Held",
    "together",
  ]
  assert said[1] == ["ValueError no such file", "Stopped", "together"]
  assert "RuntimeError: alone" in ended[1][2]


KILLED = """
import os, signal
from dpo_jax.core import distributed

with distributed.initialized(heartbeat_s=10):
  distributed.barrier("both")
  if not distributed.is_main():
    os.kill(os.getpid(), signal.SIGKILL)
  distributed.barrier("never complete")
"""


def test_a_killed_process_ends_the_other():
  (main, _, error), (killed, _, _) = python_pair(explicit(), KILLED)
  assert killed.returncode == -signal.SIGKILL
  assert main.returncode not in (0, None), error


SLURM = slurm()[1]
ALL = {"local_device_ids": []}


@pytest.mark.parametrize(
  ("environ", "wanted"),
  [
    ({}, None),
    (
      {
        "JAX_COORDINATOR_ADDRESS": "host:1234",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
      },
      {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 3,
      },
    ),
    (SLURM, {}),
    # A single task of srun, in a job of eight.
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, None),
    # A batch script, or a shell of salloc that is no step.
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
    # One task a node, with all of its GPUs.
    (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, ALL),
    # Two that see the same GPUs, or each its own.
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, {}),
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, ALL),
    (
      SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "a100:2"},
      ALL,
    ),
    (SLURM | {"SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "3"}, {}),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {}),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ALL),
    # mpirun in a job of Slurm, whose step is its daemon's.
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "2"}, {}),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b"}, {}),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_ML_PLATFORM": "JAX"}, {}),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
  ],
)
def test_arguments_by_environment(environ, wanted):
  assert distributed.initialize_arguments(environ) == wanted


@pytest.mark.parametrize(
  "environ",
  [
    {"JAX_COORDINATOR_ADDRESS": "host:1234"},
    explicit()[0] | {"JAX_NUM_PROCESSES": "two"},
  ],
)
def test_an_incomplete_environment_is_refused(environ):
  with pytest.raises(ValueError, match="several processes need all of"):
    distributed.initialize_arguments(environ)


FOUND = """
import jax
from dpo_jax.core import distributed

with distributed.initialized():
  print(
    distributed.all_gather(jax.process_index()).tolist(),
    jax.config.read("jax_cuda_visible_devices"),
  )
"""


def test_jax_detects_the_processes_of_mpirun_and_their_gpus():
  """The only task of its node has all GPUs, one of two its own."""
  ended = python_pair(open_mpi(), FOUND)
  for (child, output, error), own in zip(ended, ("all", "1")):
    assert child.returncode == 0, error
    assert output.splitlines()[-1] == f"[0, 1] {own}"


def test_a_single_process_is_not_initialized(monkeypatch):
  for name in os.environ:
    if name.startswith(("JAX_COORD", "JAX_NUM_PROC", "SLURM_", "OMPI_")):
      monkeypatch.delenv(name)
  with distributed.initialized():
    assert not jax.distributed.is_initialized()
  assert distributed.all_gather(5).tolist() == [5]
  with pytest.raises(KeyError), distributed.raise_on_all("nothing"):
    raise KeyError
