"""The GPU benchmark's script at a tiny size, and what it counts."""

import argparse
import ast
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, gpu_answers, gpu_case, gpu_step
from dpo_jax.data import batch as batch_lib
from dpo_jax.model import flops, gpt_neox

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_floor_of_decoding_by_hand():
  base = jax.eval_shape(
    lambda: gpt_neox.init(gpu_case.TINY, jax.random.key(0), jnp.bfloat16)
  )
  found = gpu_answers.floor_bytes(gpu_case.TINY, base, [3, 5], 4, "bfloat16")
  layers, width, mlp, words = 2, 64, 128, 512
  kernels = layers * (4 * width**2 + 2 * width * mlp) + width * words
  biases = layers * (3 * width + width + mlp + width)
  norms = layers * 4 * width + 2 * width
  # Four steps; the rows have 3, 4, 5, 6 and 5, 6, 7, 8 keys and values.
  slots = (3 + 4 + 5 + 6) + (5 + 6 + 7 + 8)
  weights = 2 * (kernels + biases + norms)
  assert found == 4 * weights + slots * 2 * 2 * layers * width


def test_pairs_have_the_lengths_of_real_ones():
  found = gpu_case.pairs(2 * 1551, 512).lengths
  wanted = gpu_case.lengths()
  assert wanted.shape == (1551, 3)
  np.testing.assert_array_equal(
    np.sort(found, 0), np.sort(np.concatenate([wanted, wanted]), 0)
  )
  # As compiling's means, which were measured on the same pairs.
  assert wanted.sum(1).mean() == pytest.approx(207.2, abs=0.1)


def test_wheels_are_those_that_the_package_requires():
  tree = ast.parse((ROOT / "setup.py").read_text())
  (required,) = (
    ast.literal_eval(keyword.value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    for keyword in node.keywords
    if keyword.arg == "install_requires"
  )
  listed = (ROOT / "benchmarks" / "gpu_requirements.txt").read_text()
  lines = [x for x in listed.splitlines() if x and not x.startswith("#")]
  assert [x.replace("[cuda12]", "") for x in lines] == sorted(
    required, key=lambda x: not x.startswith("jax")
  )


def test_rates_of_updates_by_hand():
  """Two updates of two pairs, in two seconds and in three."""
  lora = gpt_neox.LoraConfig(16, 32.0, 0.0, gpt_neox.TARGETS)
  shape = dataclasses.replace(gpu_case.TINY, lora=lora)
  counts = [
    batch_lib.Counts(
      ids=(), tokens=tokens, completion_tokens=9, visible=100, slots=64
    )
    for tokens in (30, 50)
  ]
  found = gpu_step.rates(shape, 2, counts, [2.0, 3.0])
  assert found["pairs_per_second"] == 4 / 5
  assert found["tokens_per_second"] == 80 / 5
  assert found["tokens_a_pair"] == 80 / 4
  assert found["row_fill"] == 80 / 128
  assert found["median_step_seconds"] == 2.5
  useful = flops.step(shape, flops.Work(80, 18, 200), reference=False)
  assert found["useful_flops_per_second"] == useful / 5


def test_ratios_by_hand():
  refused = {"refused": "no such kernel"}
  found = {
    "peaks": {"matmul_flops": 1e12, "copy_bytes": 2e9},
    "updates": {
      "dense": {"useful_flops_per_second": 4e11, "pairs_per_second": 30},
      "flash": {"useful_flops_per_second": 5e11, "pairs_per_second": 40},
      "cudnn": refused,
    },
    # Three seconds of reading, in four.
    "answers": {
      "floor_bytes": 6e9,
      "median_seconds": 4.0,
      "tokens_per_second": 600,
    },
    "trl": {"pairs_per_second": 16},
    "others": {"generate": {"tokens_per_second": 200}, "vllm": refused},
  }
  assert gpu.ratios(found) == {
    "mfu, dense": 0.4,
    "mfu, flash": 0.5,
    "share of the floor": 0.75,
    "updates, ours over trl": 2.5,
    "answers, ours over generate": 3.0,
  }
  # What is missing leaves the rest.
  found |= {"peaks": refused, "trl": refused}
  assert set(gpu.ratios(found)) == {"answers, ours over generate"}


@pytest.mark.parametrize(
  ("code", "limit", "words"),
  [
    ("raise ValueError('no such kernel')", 60, "ValueError: no such kernel"),
    ("import os; os.abort()", 60, "SIGABRT"),
    ("import time; time.sleep(60)", 0.2, "took more than 0.2 s"),
  ],
)
def test_what_fails_is_reported(code, limit, words, tmp_path):
  command = [sys.executable, "-c", code]
  how = argparse.Namespace(limit_s=limit)
  found = gpu.child(how, tmp_path, command)
  assert list(found) == ["refused"]
  assert words in found["refused"]


@pytest.mark.slow
def test_the_script_runs(tmp_path):
  """All parts but TRL, and without vLLM; flash and cuDNN are not for a CPU."""
  output = tmp_path / "out.json"
  subprocess.run(
    [
      "benchmarks/gpu.sh",
      "--size=tiny",
      f"--output={output}",
      "--batch_size=8",
      "--microbatches=2",
      "--steps=4",
      "--rows=8",
      "--new_tokens=8",
      f"--profile={tmp_path / 'trace'}",
      f"--torch={sys.executable}",
      "--others_device=cpu",
    ],
    cwd=ROOT,
    env=os.environ
    | {
      "PYTHON": sys.executable,
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "1",
    },
    check=True,
  )
  found = json.loads(output.read_text())
  updates, answers = found["updates"], found["answers"]
  for name in ("dense", "blocks"):
    assert updates[name]["losses"][0] == pytest.approx(np.log(2), abs=1e-3)
  for name in ("flash", "cudnn"):
    assert "model.attention" in updates[name]["refused"]
  assert answers["tokens"] <= 8 * 8
  assert found["others"]["generate"]["tokens"] == 8 * 8
  assert found["others"]["generate, static cache"]["tokens"] == 8 * 8
  if importlib.util.find_spec("vllm") is None:
    assert "vllm" in found["others"]["vllm"]["refused"]
  ratios = found["ratios"]
  # Nothing is faster than what it is compared with.
  assert 0 < ratios["mfu, dense"] < 1
  assert 0 < ratios["share of the floor"] < 1
  assert ratios["answers, ours over generate"] > 0
  assert list((tmp_path / "trace" / "dense").rglob("*.xplane.pb"))
  assert list((tmp_path / "trace" / "sampling").rglob("*.xplane.pb"))
