"""The GPU benchmark's script at a tiny size, and what it counts."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu
from dpo_jax import model

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_floor_of_decoding_by_hand():
  base = jax.eval_shape(
    lambda: model.init(gpu.TINY, jax.random.key(0), jnp.bfloat16)
  )
  found = gpu.floor_bytes(gpu.TINY, base, [3, 5], 4, "bfloat16")
  layers, width, mlp, words = 2, 64, 128, 512
  kernels = layers * (4 * width**2 + 2 * width * mlp) + width * words
  biases = layers * (3 * width + width + mlp + width)
  norms = layers * 4 * width + 2 * width
  # Four steps; the rows have 3, 4, 5, 6 and 5, 6, 7, 8 keys and values.
  slots = (3 + 4 + 5 + 6) + (5 + 6 + 7 + 8)
  weights = 2 * (kernels + biases + norms)
  assert found == 4 * weights + slots * 2 * 2 * layers * width


def test_pairs_have_the_lengths_of_real_ones():
  found = gpu.pairs(2 * 1551, 512).lengths
  wanted = np.loadtxt(gpu.LENGTHS, int, delimiter=",", skiprows=1)
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


@pytest.mark.slow
def test_the_script_runs(tmp_path):
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
  training, sampling = found["training"], found["sampling"]
  assert training["losses"][0] == pytest.approx(np.log(2), abs=1e-3)
  assert training["pairs_per_second"] > 0
  # Nothing is faster than what it is compared with.
  assert 0 < training["mfu_of_measured_rate"] < 1
  assert 0 < sampling["share_of_floor"] < 1
  assert sampling["tokens"] <= 8 * 8
  assert list((tmp_path / "trace").rglob("*.xplane.pb"))
