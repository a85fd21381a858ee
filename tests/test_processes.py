"""Several processes of one run: how they find and follow each other.

Real processes, each with four CPU devices, that talk over gloo.
"""

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
import safetensors.numpy
import tiny

from configs import common
from configs import data as data_config
from dpo_jax import (
  hf,
  metrics,
  model,
  processes,
  recipe,
  records,
  samples,
  settings,
  tokenizer,
  training,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPE = model.ModelConfig(
  vocab_size=320,
  width=16,
  layers=2,
  heads=2,
  mlp_width=32,
  rotary_fraction=0.5,
  rotary_base=10000.0,
  norm_eps=1e-5,
  max_positions=64,
)
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Of a row of metrics, what depends on the clock.
SPEED = {"tokens_per_second", "pairs_per_second", "data_wait_seconds"}
CONFIG = """
import json, pathlib
from ml_collections import config_dict

def get_config():
  text = pathlib.Path(__file__).with_suffix(".json").read_text()
  return config_dict.ConfigDict(json.loads(text))
"""


def rows(count, seed):
  rng = np.random.default_rng(seed)
  for i in range(count):
    prompt = f"\n\nHuman: {' '.join(rng.choice(WORDS, 8))} {i}\n\nAssistant:"
    chosen, rejected = rng.choice(WORDS, 2, replace=False)
    yield {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A directory with tokenizer, model and data."""
  directory = tmp_path_factory.mktemp("files")
  texts = []
  for name, count, seed in (("train", 16, 1), ("test", 6, 2)):
    found = list(rows(count, seed))
    texts += [text for row in found for text in row.values()]
    lines = "".join(json.dumps(row) + "\n" for row in found)
    (directory / f"{name}.jsonl").write_text(lines)
  words = tokenizer.train(texts * 3, 320, directory / "tokenizer")
  hf.export(directory / "model", SHAPE, tiny.weights(SHAPE), words)
  return directory


def config(files, **changes):
  """A DPO run of four updates of all weights."""
  c = common.training()
  c.objective = "dpo"
  c.tokenizer, c.model.path = str(files / "tokenizer"), str(files / "model")
  c.model.dtype, c.model.remat = "float32", "none"
  c.data.use = ("files",)
  c.data.sources = {
    "files": data_config.pairs(
      str(files / "train.jsonl"), str(files / "test.jsonl")
    ).to_dict()
  }
  c.data.token_cache = ""
  c.data.max_eval = 0
  c.data.max_length, c.data.max_prompt_length = 40, 36
  c.data.layout, c.data.row_length = "shared", 64
  c.loss.beta = 0.5
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 0
  c.batch_size, c.microbatches, c.eval_batch_size = 4, 1, 4
  c.checkpoint_every, c.eval_every = 2, 2
  c.mesh.data, c.mesh.fsdp = 1, 8
  c.samples.prompts, c.samples.every, c.samples.temperature = 3, 2, 0.0
  c.samples.max_new_tokens, c.samples.max_prompt_tokens = 4, 36
  c.update(changes)
  return c


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


def train(directory, configs, environments):
  """Runs `python train.py` with each config and environment, all at once.

  Returns:
    (exit code, standard output, standard error) of each.
  """
  running = []
  for number, (values, extra) in enumerate(zip(configs, environments)):
    file = directory / f"process{number}.py"
    file.write_text(CONFIG)
    file.with_suffix(".json").write_text(json.dumps(values.to_dict()))
    running.append(
      subprocess.Popen(
        [
          *(sys.executable, "train.py"),
          *(f"--config={file}", f"--workdir={directory / 'run'}"),
        ],
        cwd=ROOT,
        env=os.environ
        | {
          "JAX_NUM_CPU_DEVICES": "4",
          "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        }
        | extra,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  found = [child.communicate(timeout=300) for child in running]
  return [(c.returncode, *text) for c, text in zip(running, found)]


def test_two_processes_do_what_one_does(files, tmp_path):
  values = config(files)
  alone = tmp_path / "alone"
  training.run(settings.build(recipe.TrainSettings, values.to_dict()), alone)
  for code, _, error in train(tmp_path, [values] * 2, slurm(2)):
    assert code == 0, error
  run = tmp_path / "run"
  manifest = json.loads((run / "manifest.json").read_text())
  # Four devices of each: no process ran by itself.
  assert manifest["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
  assert len(manifest["devices"]) == 8
  one, two = (metrics.read(d / metrics.FILE) for d in (alone, run))
  assert [row["step"] for row in two] == [row["step"] for row in one]
  assert [row["step"] for row in one if "loss" in row] == [1, 2, 3, 4]
  for a, b in zip(one, two):
    for key in a.keys() - SPEED:
      assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5), key
  assert abs(one[-2]["rewards/margins"]) > 1e-3
  # Answered by both together, at steps 0, 2 and 4, and written by one.
  answered = [
    records.read(d / samples.FILE, records.Response) for d in (alone, run)
  ]
  assert [row.step for row in answered[1]] == [0] * 3 + [2] * 3 + [4] * 3
  for a, b in zip(*answered, strict=True):
    assert b.mean_logp == pytest.approx(a.mean_logp, abs=1e-5)
    assert dataclasses.replace(b, mean_logp=a.mean_logp) == a
  # Gathered from both; moved by sums in another order.
  weights = [
    safetensors.numpy.load_file(d / "export" / "model.safetensors")
    for d in (alone, run)
  ]
  assert weights[0].keys() == weights[1].keys()
  for name, value in weights[0].items():
    np.testing.assert_allclose(weights[1][name], value, rtol=0, atol=1e-6)
  # What two wrote, one goes on from: nothing is left to do but the export.
  (run / "finished.json").unlink()
  training.run(settings.build(recipe.TrainSettings, values.to_dict()), run)
  assert metrics.read(run / metrics.FILE) == two
  again = safetensors.numpy.load_file(run / "export" / "model.safetensors")
  for name, value in again.items():
    np.testing.assert_array_equal(value, weights[1][name])


CHILD = """
import sys
from dpo_jax import errors, processes, records

with processes.joined():
  import jax, numpy as np
  from jax.sharding import NamedSharding, PartitionSpec

  me = jax.process_index()
  assert processes.everywhere(10 * me + 1).tolist() == [1, 11]
  assert processes.first() == (me == 0)
  mesh = jax.make_mesh((2,), ("x",))
  value = np.arange(6).reshape(2, 3)
  split = jax.make_array_from_callback(
    (2, 3), NamedSharding(mesh, PartitionSpec("x")), lambda i: value[i]
  )
  assert not split.is_fully_addressable
  np.testing.assert_array_equal(processes.fetch(split), value)
  processes.agree("the same", "text")
  try:
    processes.agree("the data", f"text {me}")
  except ValueError as error:
    print(error)
  try:
    with processes.together("reading"):
      if me == 1:
        raise ValueError("no such file")
  except (ValueError, errors.Stopped) as error:
    print(type(error).__name__, error)
  with processes.owned(records.Lock(sys.argv[1])):
    processes.shared(__import__("pathlib").Path(sys.argv[1]))
    processes.wait("held")
  try:
    with processes.owned(records.Lock(sys.argv[2])):
      raise AssertionError("it is held by another")
  except errors.Stopped as error:
    print(type(error).__name__)
  if me == 1:
    raise RuntimeError("alone")
  processes.wait("never comes")
"""


def test_what_one_process_meets_all_of_them_learn(tmp_path):
  with records.Lock(tmp_path / "held"):
    running = [
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
    found = [child.communicate(timeout=120) for child in running]
  said = []
  for child, (output, error) in zip(running, found):
    assert child.returncode != 0
    lines = [x for x in output.splitlines() if not x.startswith("[Gloo]")]
    assert lines[0].startswith("the data differs between the 2"), error
    said.append(lines[1:])
  assert said[0] == [
    "Stopped reading: stopped with process [1], which tells why",
    "Held",
  ]
  assert said[1] == ["ValueError no such file", "Stopped"]
  assert "RuntimeError: alone" in found[1][1]


SLURM = slurm(2)[1]


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
    (SLURM | {"SLURM_NTASKS": "1"}, None),
    # A shell of salloc or a batch script, not a task of srun.
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b"}, {}),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_PROCESS_ADDRESSES": "a:1,b:1"}, {}),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_ML_PLATFORM": "JAX"}, {}),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
  ],
)
def test_what_the_environment_says(environ, wanted):
  assert processes.arguments_of(environ) == wanted


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
    processes.arguments_of(environ)


def test_one_process_alone_is_left_alone(monkeypatch):
  for name in os.environ:
    if name.startswith(("JAX_COORD", "JAX_NUM_PROC", "SLURM_", "OMPI_")):
      monkeypatch.delenv(name)
  with processes.joined():
    assert not jax.distributed.is_initialized()
  assert processes.everywhere(5).tolist() == [5]
  with pytest.raises(KeyError), processes.together("nothing"):
    raise KeyError
