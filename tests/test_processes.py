"""Several processes of one run: how they find and follow each other.

Real processes, each with some CPU devices, that talk over gloo.
"""

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import running
import safetensors.numpy

from dpo_jax.core import distributed, preemption, sharding
from dpo_jax.io import locks, records, step_files
from dpo_jax.training import eval_samples, train

ROOT = running.ROOT
# Of the two processes together; the tests' own process has eight.
DEVICES = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Runs of all weights, split over the devices of both processes."""
  build = running.configs(running.make_files(tmp_path_factory.mktemp("files")))

  def make(**changes):
    split = {"mesh.data": 1, "mesh.fsdp": DEVICES}
    full = {"lora.rank": 0, "export_adapters": False, "heartbeat_s": 10}
    answers = {
      "samples.prompts": 3,
      "samples.every": 3,
      "samples.temperature": 0.0,
      "samples.max_new_tokens": 4,
      "samples.max_prompt_tokens": 28,
    }
    return build(**split, **full, **answers, **changes)

  return make


@pytest.fixture
def alone(monkeypatch):
  """This process by itself has as many devices as the two."""
  make = sharding.make_mesh
  devices = jax.devices()[:DEVICES]
  monkeypatch.setattr(
    sharding, "make_mesh", lambda **sizes: make(**sizes, devices=devices)
  )


def free_port():
  with socket.socket() as one:
    one.bind(("localhost", 0))
    return one.getsockname()[1]


def slurm(count):
  """What srun says to each of two tasks. jax makes the port of the job's id."""
  job = str(free_port() % 4096)
  return [
    {
      "SLURM_JOB_ID": job,
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": "2",
      "SLURM_STEP_NUM_TASKS": "2",
      "SLURM_PROCID": str(number),
      "SLURM_LOCALID": str(number),
    }
    for number in range(count)
  ]


def explicit(count):
  port = free_port()
  return [
    {
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(number),
    }
    for number in range(count)
  ]


@contextlib.contextmanager
def pair(directory, config, workdir, environments):
  """`python train.py` in two processes, which are killed at the end."""
  with contextlib.ExitStack() as stack:
    yield [
      stack.enter_context(
        running.Child(
          directory / f"process{number}",
          config,
          workdir,
          JAX_NUM_CPU_DEVICES=str(DEVICES // 2),
          **extra,
        )
      )
      for number, extra in enumerate(environments)
    ]


def ended(children, timeout_s=180):
  """The exit codes of all, and how long they took to end."""
  begun = time.monotonic()
  codes = [child.end(timeout_s) for child in children]
  return codes, time.monotonic() - begun


def moved(name, value):
  """A weight, without what only rounding moves.

  A bias of keys where they are not rotated adds one number to all scores of a
  query: its gradient is zero but for rounding, of which AdamW makes steps.
  """
  if not name.endswith("query_key_value.bias"):
    return value
  value = value.reshape(running.SHAPE.heads, 3, running.SHAPE.head_dim).copy()
  value[:, 1, running.SHAPE.rotary_dim :] = 0
  return value


def test_two_processes_do_what_one_does(config, alone, tmp_path, monkeypatch):
  """One begins, two go on, one of them is killed, two end: as one alone."""
  whole, run = tmp_path / "whole", tmp_path / "run"
  train.run(config(), whole)
  with monkeypatch.context() as patch:
    terminate = functools.partial(signal.raise_signal, signal.SIGTERM)
    running.at_step(patch, 1, terminate)
    with pytest.raises(preemption.Interrupted, match="after step 2"):
      train.run(config(), run)
  with pair(tmp_path / "killed", config(), run, explicit(2)) as children:
    children[0].until(lambda: running.reached(run, 3))
    children[1].process.kill()
    # Nobody is left waiting for the dead, who said nothing.
    codes, waited_s = ended(children, 60)
    assert codes[0] not in (0, None), children[0].printed()
    assert codes[1] == -signal.SIGKILL
  print(f"the other ended {waited_s:.1f} s later")
  assert not (run / "finished.json").exists()
  with pair(tmp_path / "last", config(), run, slurm(2)) as children:
    codes, _ = ended(children)
    assert codes == [0, 0], [child.printed() for child in children]
  starts = json.loads((run / "manifest.json").read_text())["starts"]
  assert [start["processes"] for start in starts] == [1, 2, 2]
  # Two devices of each: no process ran by itself.
  assert [len(start["devices"]) for start in starts] == [DEVICES] * 3
  assert [start["step"] for start in starts[:2]] == [0, 2]
  one, two = running.read(whole), running.read(run)
  # Each step once, and its items in the same order.
  assert [row["step"] for row in two] == [row["step"] for row in one]
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
  assert abs(one[-2]["rewards/margins"]) > 1e-3
  # Answered by both together, and written by one.
  answered = [
    records.read(d / eval_samples.FILE, records.Response) for d in (whole, run)
  ]
  assert [row.step for row in answered[1]] == [
    0,
    0,
    0,
    3,
    3,
    3,
    6,
    6,
    6,
    7,
    7,
    7,
  ]
  for a, b in zip(*answered, strict=True):
    assert b.mean_logp == pytest.approx(a.mean_logp, abs=1e-4)
    assert dataclasses.replace(b, mean_logp=a.mean_logp) == a
  # Gathered from both; moved by sums in another order.
  weights = [
    safetensors.numpy.load_file(d / "export" / "model.safetensors")
    for d in (whole, run)
  ]
  assert weights[0].keys() == weights[1].keys()
  for name, value in weights[0].items():
    np.testing.assert_allclose(
      moved(name, weights[1][name]), moved(name, value), rtol=0, atol=1e-4
    )
  # What two wrote, one goes on from: nothing is left to do but the export.
  (run / "finished.json").unlink()
  train.run(config(), run)
  assert running.read(run) == two
  again = safetensors.numpy.load_file(run / "export" / "model.safetensors")
  for name, value in again.items():
    np.testing.assert_array_equal(value, weights[1][name])


# --- what happens to one of two


@pytest.fixture(scope="module")
def whole_pair(config, tmp_path_factory):
  """What two processes that nothing happened to leave of 21 steps."""
  directory = tmp_path_factory.mktemp("pair")
  long = config(epochs=3)
  with pair(directory, long, directory / "run", explicit(2)) as children:
    codes, _ = ended(children)
    assert codes == [0, 0], [child.printed() for child in children]
  return directory / "run"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
  "number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT]
)
def test_what_happens_to_one_of_two_stops_both(
  config, whole_pair, tmp_path, number, victim
):
  long, run = config(epochs=3), tmp_path / "run"
  with pair(tmp_path / "first", long, run, explicit(2)) as children:
    other = children[1 - victim]
    other.until(lambda: running.reached(run, 5))
    children[victim].process.send_signal(number)
    if number in preemption.SIGNALS:
      codes, waited_s = ended(children, 60)
      # The other one was told by the preemption service, whose signal is that.
      assert codes[victim] == 128 + number
      assert codes[1 - victim] == 143
      said = [
        re.search(r"(after step \d+), which is saved", child.printed())
        for child in children
      ]
      assert said[0][1] == said[1][1]
      step = step_files.steps(run / "checkpoints")[-1]
      assert said[0][1] == f"after step {step}"
    else:
      # One that is stopped keeps its connections: only its silence tells.
      codes, waited_s = ended([other], 60)
      assert codes[0] not in (0, None), other.printed()
      children[victim].process.kill()
    print(f"{number.name} to process {victim}: {codes} after {waited_s:.1f} s")
  assert not (run / "finished.json").exists()
  with pair(tmp_path / "again", long, run, explicit(2)) as children:
    codes, _ = ended(children)
    assert codes == [0, 0], [child.printed() for child in children]
  assert running.read(run) == running.read(whole_pair)
  assert running.weights(run) == running.weights(whole_pair)


CHILD = """
import signal, sys
from dpo_jax.core import errors
from dpo_jax.core import preemption
from dpo_jax.core import distributed
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
    distributed.require_shared(__import__("pathlib").Path(sys.argv[1]))
    distributed.barrier("held")
  try:
    with distributed.on_main(locks.Lock(sys.argv[2])):
      raise AssertionError("it is held by another")
  except errors.Stopped as error:
    print(type(error).__name__)
  # A signal to one of them stops both at the same point.
  with preemption.watching(30) as watch, watch.deferred():
    if me == 1:
      signal.raise_signal(signal.SIGINT)
    asked = 1
    while not watch.requested():
      asked += 1
  points = distributed.all_gather(asked).tolist()
  print("together" if points[0] == points[1] else points)
  if me == 1:
    raise RuntimeError("alone")
  distributed.barrier("never comes")
"""


def test_what_one_process_meets_all_of_them_learn(tmp_path):
  with locks.Lock(tmp_path / "held"):
    children = [
      subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path / "free", tmp_path / "held"],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | extra,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for extra in explicit(2)
    ]
    # One that fails alone does not leave the other waiting.
    found = [child.communicate(timeout=120) for child in children]
  said = []
  for child, (output, error) in zip(children, found):
    assert child.returncode != 0
    lines = [x for x in output.splitlines() if not x.startswith("[Gloo]")]
    assert lines[0].startswith("the data differs between the 2"), error
    said.append(lines[1:])
  assert said[0] == [
    "Stopped reading: stopped with process [1], which tells why",
    "Held",
    "together",
  ]
  assert said[1] == ["ValueError no such file", "Stopped", "together"]
  assert "RuntimeError: alone" in found[1][1]


SLURM = slurm(2)[1]
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
    # A lone task of srun, and a shell of salloc, in a job of eight.
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, None),
    # A batch script, or a shell of salloc that is no step.
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
    # One task a node, which has all GPUs of it.
    (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, ALL),
    (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, {}),
    # Two, that see the same GPUs, or each its own.
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, {}),
    (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, ALL),
    (
      SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "a100:2"},
      ALL,
    ),
    (SLURM | {"SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "3"}, {}),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {}),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ALL),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    # mpirun in a job of Slurm, whose step is its daemon's.
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "2"}, {}),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b"}, {}),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_PROCESS_ADDRESSES": "a:1,b:1"}, {}),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_ML_PLATFORM": "JAX"}, {}),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
  ],
)
def test_what_the_environment_says(environ, wanted):
  assert distributed.arguments_of(environ) == wanted


@pytest.mark.parametrize(("nodes", "gpus"), [("1", "1"), ("2", "all")])
def test_the_only_task_of_a_node_takes_all_its_gpus(nodes, gpus):
  """What jax makes of it: of several tasks, each takes the one of its number.

  It is asked of a process that is alone, and does not wait for others.
  """
  code = """
import os, jax
from dpo_jax.core import distributed
arguments = distributed.arguments_of(os.environ)
jax.distributed.initialize(
  os.environ["ADDRESS"], num_processes=1, process_id=0, **arguments
)
print(jax.config.read("jax_cuda_visible_devices"))
"""
  environ = SLURM | {
    "SLURM_STEP_NUM_NODES": nodes,
    "ADDRESS": f"localhost:{free_port()}",
  }
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env=os.environ | environ,
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  assert done.stdout.splitlines()[-1] == gpus


FOUND = """
import os
import jax
from dpo_jax.core import distributed

# There are no TPUs here, of which jax takes note.
if "JAX_FORCE_TPU_INIT" in os.environ:
  del os.environ["TPU_SKIP_MDS_QUERY"]
with distributed.initialized():
  print(distributed.all_gather(jax.process_index()).tolist())
"""


def open_mpi(count):
  """What mpirun says. jax makes the port of the job's number."""
  job = (free_port() % 4096) * 4096
  return [
    {
      "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:1",
      "OMPI_COMM_WORLD_SIZE": str(count),
      "OMPI_COMM_WORLD_RANK": str(number),
      "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    }
    for number in range(count)
  ]


@contextlib.contextmanager
def metadata(number, count):
  """The address of what a Cloud TPU host is told of itself."""
  told = {
    "agent-worker-number": str(number),
    "worker-network-endpoints": ",".join(["unknown:unknown:127.0.0.1"] * count),
    "tpu-env": "ZONE: 'nowhere'",
  }

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      text = told[self.path.rpartition("/")[2]].encode()
      self.send_response(200)
      self.send_header("Content-Length", str(len(text)))
      self.end_headers()
      self.wfile.write(text)

    def log_message(self, *unused):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
  ("launcher", "count"), [("mpirun", 2), ("TPU", 1), ("TPU", 2)]
)
def test_processes_find_each_other_by_what_they_are_told(launcher, count):
  with contextlib.ExitStack() as stack:
    if launcher == "mpirun":
      environments = open_mpi(count)
    else:
      port = str(free_port())
      environments = [
        {
          "GCE_METADATA_IP": stack.enter_context(metadata(number, count)),
          "JAX_COORDINATOR_PORT": port,
          "JAX_FORCE_TPU_INIT": "1",
        }
        for number in range(count)
      ]
    # A test that compiled for a TPU leaves what libtpu wrote there.
    own = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
    children = [
      subprocess.Popen(
        [sys.executable, "-c", FOUND],
        cwd=ROOT,
        env=own | {"JAX_NUM_CPU_DEVICES": "1"} | extra,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for extra in environments
    ]
    for child in children:
      output, error = child.communicate(timeout=60)
      assert child.returncode == 0, error
      assert output.splitlines()[-1] == str([*range(count)])


@pytest.mark.parametrize(
  "environ",
  [
    {"JAX_COORDINATOR_ADDRESS": "host:1234"},
    {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
    {
      "JAX_COORDINATOR_ADDRESS": "host:1234",
      "JAX_NUM_PROCESSES": "two",
      "JAX_PROCESS_ID": "0",
    },
  ],
)
def test_half_an_environment_is_refused(environ):
  with pytest.raises(ValueError, match="several processes need all of"):
    distributed.arguments_of(environ)


def test_one_process_alone_is_left_alone(monkeypatch):
  for name in os.environ:
    if name.startswith(("JAX_COORD", "JAX_NUM_PROC", "SLURM_", "OMPI_")):
      monkeypatch.delenv(name)
  with distributed.initialized():
    assert not jax.distributed.is_initialized()
  assert distributed.all_gather(5).tolist() == [5]
  with pytest.raises(KeyError), distributed.raise_on_all("nothing"):
    raise KeyError
