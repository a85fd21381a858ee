"""The wheel: its files, and commands outside of the source tree."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = (
  "LICENSE",
  "MANIFEST.in",
  "README.md",
  "judge.py",
  "pyproject.toml",
  "sample.py",
  "setup.py",
  "train.py",
)
BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""


def build(what, source, target):
  """Runs one hook of the build, as `python -m build` does."""
  done = subprocess.run(
    [sys.executable, "-c", BUILD, what, target],
    cwd=source,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  (made,) = target.iterdir()
  return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from the source distribution, so that this one is whole too."""
  directory = tmp_path_factory.mktemp("wheel")
  source = directory / "source"
  without = shutil.ignore_patterns("__pycache__", "*.egg-info")
  for name in ("dpo_jax", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=without)
  for name in FILES:
    shutil.copy(ROOT / name, source / name)
  for name in ("sdist", "unpacked", "bdist"):
    (directory / name).mkdir()
  packed = build("build_sdist", source, directory / "sdist")
  with tarfile.open(packed) as file:
    file.extractall(directory / "unpacked", filter="data")
  (unpacked,) = (directory / "unpacked").iterdir()
  return build("build_wheel", unpacked, directory / "bdist")


@pytest.fixture(scope="module")
def site(wheel):
  """The wheel unpacked, as pip would put it into site-packages."""
  path = wheel.parent / "site"
  with zipfile.ZipFile(wheel) as file:
    file.extractall(path)
  return path


def test_the_wheel_holds_every_file_and_nothing_else(site):
  def files(directory):
    return {
      str(path.relative_to(directory)): path.read_bytes()
      for path in directory.rglob("*")
      if path.is_file() and path.suffix != ".pyc"
    }

  found = files(site / "dpo_jax")
  shipped = {
    name.removeprefix("shipped/"): found.pop(name)
    for name in list(found)
    if name.startswith("shipped/")
  }
  assert found == files(ROOT / "dpo_jax")
  scripts = ("judge.py", "sample.py", "train.py")
  assert shipped == {
    f"configs/{name}": data for name, data in files(ROOT / "configs").items()
  } | {name: (ROOT / name).read_bytes() for name in scripts}
  assert {path.name for path in site.iterdir()} == {
    "dpo_jax",
    "dpo_jax-0.1.0.dist-info",
  }


def away(site, directory, *command):
  """Runs Python outside of the source tree, with the unpacked wheel alone."""
  return subprocess.run(
    [sys.executable, *command],
    cwd=directory,
    env=os.environ | {"PYTHONPATH": str(site)},
    capture_output=True,
    text=True,
  )


LOADED = """
from dpo_jax.cli import help as help_lib
print(help_lib.load("configs/sample.py").dtype)
from configs import sample
print(sample.__file__)
print(help_lib.load("configs/judge.py").fsdp)
"""


def test_configs_of_the_wheel_are_found_and_said(site, tmp_path):
  done = away(site, tmp_path, "-m", "dpo_jax", "judge", "--config=judge:oracle")
  # There are no responses.
  assert done.returncode == 2, done.stderr
  configs = site / "dpo_jax" / "shipped" / "configs"
  said = f"--config=judge:oracle is no file here: taking {configs / 'judge.py'}"
  assert said in done.stderr
  # By their paths; the user's own files come first.
  own = tmp_path / "configs" / "judge.py"
  own.parent.mkdir()
  own.write_text(
    "from configs import common\ndef get_config():\n  return common.mesh()\n"
  )
  done = away(site, tmp_path, "-c", LOADED)
  assert done.stdout.split() == ["bfloat16", str(configs / "sample.py"), "1"]


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_a_new_environment(wheel, tmp_path):
  venv.create(tmp_path / "venv", with_pip=True)
  programs = tmp_path / "venv" / "bin"
  # Not what this process was told of other environments.
  environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  for command in (
    [programs / "pip", "install", "-q", wheel],
    [programs / "dpo-jax", "replicate", "--config=demo:tiny"],
  ):
    done = subprocess.run(
      command, cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
  assert (tmp_path / "runs" / "demo" / "report" / "report.md").is_file()
