"""Notebooks are in sync with their .py, executed, and only call the package."""

import ast
import base64
import importlib.metadata
import importlib.util
import io
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import types

import jupytext
import matplotlib.figure
import numpy as np
import pytest
import reported
from PIL import Image

import dpo_jax
from notebooks import execute

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.py"))
NAMES = [path.stem for path in SOURCES]


@pytest.fixture(params=SOURCES, ids=NAMES)
def source(request):
  return request.param


def test_pairs_are_in_sync_and_executed():
  assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == NAMES
  assert NAMES
  for path in SOURCES:
    source, notebook = map(jupytext.read, (path, path.with_suffix(".ipynb")))
    cells = [
      [(cell.cell_type, cell.source) for cell in found.cells]
      for found in (source, notebook)
    ]
    assert cells[0] == cells[1], path.stem
    # Only an execution records the hash of the code.
    stamp = notebook.metadata["executed"]["source_sha256"]
    assert stamp == execute.digest(path), f"run notebooks/execute.py {path}"


@pytest.mark.parametrize(
  ("cell", "same"), [("# %% [markdown]\n# Text.\n", True), ("# %%\n1\n", False)]
)
def test_a_changed_code_cell_needs_an_execution(tmp_path, cell, same):
  copy = tmp_path / "copy.py"
  copy.write_text(SOURCES[2].read_text("utf-8") + "\n" + cell)
  assert (execute.digest(copy) == execute.digest(SOURCES[2])) == same


def test_outputs_are_tidied(monkeypatch):
  monkeypatch.setattr(execute.tempfile, "tempdir", "/tmp")
  outputs = [
    {"name": "stderr", "text": "a bar"},
    {"name": "stdout", "text": "/tmp/tmp_a-1/run/report.md is there"},
    {"data": {"text/plain": "'/tmp/tmpx/run'", "image/svg": "/tmp/tmpx/"}},
    {
      "name": "stdout",
      "text": "2 bytes\na after 1.5 minutes",
    },
  ]
  assert execute.tidied(outputs) == [
    {"name": "stdout", "text": "run/report.md is there"},
    {"data": {"text/plain": "'run'", "image/svg": "/tmp/tmpx/"}},
    {"name": "stdout", "text": "2 bytes\na"},
  ]


def test_fewer_colors_keep_a_figure():
  axes = matplotlib.figure.Figure(figsize=(3.25, 2.3)).subplots()
  for number in range(6):
    axes.plot(range(9), [number * x for x in range(9)], label=str(number))
  axes.legend()
  buffer = io.BytesIO()
  axes.figure.savefig(buffer, format="png", dpi=300)
  before = buffer.getvalue()
  after = base64.b64decode(execute.smaller(base64.b64encode(before).decode()))
  assert len(after) < len(before) / 2
  one, two = (
    np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)
    for data in (before, after)
  )
  # Edges of letters have many grays, on few pixels.
  assert np.mean(np.abs(one - two).max(-1) > 32) < 0.002


def test_outputs_are_there_and_small(source):
  path = source.with_suffix(".ipynb")
  # 03 has the most figures.
  assert path.stat().st_size < 200_000
  notebook = jupytext.read(path)
  codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
  numbers = [cell.execution_count for cell in codes]
  assert numbers == list(range(1, 1 + len(codes)))
  outputs = [output for cell in codes for output in cell.outputs]
  assert not [o for o in outputs if o.output_type == "error"]
  assert not [o for o in outputs if o.get("name") == "stderr"]
  assert any("image/png" in o.get("data", {}) for o in outputs)
  assert not re.search(r"/(root|home|tmp|work)/", path.read_text("utf-8"))


def test_cells_define_nothing_and_imports_resolve(source):
  nodes = [*ast.walk(ast.parse(source.read_text("utf-8")))]
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  assert not [node for node in nodes if isinstance(node, kinds)]
  found = {}
  for node in nodes:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      exec(ast.unparse(node), found)
  # Attributes of imported modules exist.
  for node in nodes:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      module = found.get(node.value.id)
      if isinstance(module, types.ModuleType):
        assert hasattr(module, node.attr), ast.unparse(node)


def test_links_lead_to_the_repository(source):
  text = source.read_text("utf-8")
  links = re.findall(r"https://[^\"\s)]*github[^\"\s)]*", text)
  home = dpo_jax.REPOSITORY.removeprefix("https://github.com/")
  colab = f"https://colab.research.google.com/github/{home}/blob/main/"
  assert links == [f"{colab}notebooks/{source.stem}.ipynb", dpo_jax.REPOSITORY]


def test_on_colab_jax_is_left_as_it_is(source, monkeypatch):
  """The first code cell as on Colab, with recorded instead of run commands."""
  cell = next(c for c in jupytext.read(source).cells if c.cell_type == "code")
  ran, moved = [], []
  monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append(words))
  monkeypatch.setattr(os, "chdir", moved.append)
  monkeypatch.setattr(sys, "path", [*sys.path])
  exec(compile(cell.source, str(source), "exec"), {})
  clone, install = ran
  assert clone[:2] == ["git", "clone"]
  assert install[:4] == [sys.executable, "-m", "pip", "install"]
  assert not {"--upgrade", "-U"} & {*install}
  for name in ("jax", "jaxlib"):
    assert f"{name}=={importlib.metadata.version(name)}" in install
  assert moved == ["dpo_jax/notebooks"]


@pytest.mark.slow
def test_all_run_within_five_minutes_of_two_cores(tmp_path):
  reported.make_run(tmp_path / "run")
  folder = tmp_path / "notebooks"
  folder.mkdir()
  copies = [pathlib.Path(shutil.copy(path, folder)) for path in SOURCES]
  # As a user's: conftest.py trades the programs' speed for the compiler's.
  ours = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
  environment = {k: v for k, v in os.environ.items() if k not in ours} | {
    "PYTHONPATH": str(NOTEBOOKS.parent),
    "DPO_JAX_RESULTS": str(tmp_path / "run"),
  }
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run(
    [sys.executable, NOTEBOOKS / "execute.py", *copies],
    env=environment,
    check=True,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  for copy in copies:
    assert jupytext.read(copy.with_suffix(".ipynb")).cells
  # Processor time, since others may be at work on the machine too.
  spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  print(f"{spent:.0f} s of processor time")
  assert 0 < spent < 2 * 300
