"""The pipeline with the oldest dependencies that setup.py takes."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def floors():
  """`name==version` for each `name>=version` of install_requires."""
  text = (ROOT / "setup.py").read_text("utf-8")
  required = text.partition("install_requires=[")[2].partition("]")[0]
  return [line.replace(">=", "==") for line in re.findall(r'"(.+?)"', required)]


def test_every_dependency_has_a_floor():
  found = floors()
  assert {"jax==0.10", "flax==0.12.7"} < {*found}
  assert [line for line in found if "==" not in line] == []


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_pipeline_runs_on_the_floors(version, tmp_path):
  python = f"python{version}"
  found = shutil.which(python)
  # A shim of a version manager may stand for no Python.
  if not found or subprocess.run([found, "-V"], check=False).returncode:
    pytest.skip(f"no {python} on this machine")
  environment = tmp_path / "environment"
  subprocess.run([found, "-m", "venv", environment], check=True)
  run = environment / "bin" / "python"
  subprocess.run([run, "-m", "pip", "install", "-q", *floors()], check=True)
  config = "--config=configs/demo.py:tiny"
  subprocess.run(
    [run, "-m", "dpo_jax.replicate", config, f"--workdir={tmp_path / 'run'}"],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    check=True,
  )
  assert (tmp_path / "run" / "report" / "report.md").is_file()
