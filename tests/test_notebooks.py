"""Notebooks are in sync with their .py, executed, and only use the package."""

import ast
import importlib
import os
import pathlib
import re
import subprocess
import sys

import jupytext
import pytest
import reported

import dpo_jax

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9]*.py"))
NAMES = [path.stem for path in SOURCES]


@pytest.fixture(params=SOURCES, ids=NAMES)
def source(request):
  return request.param


def test_every_notebook_has_its_source():
  assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == NAMES
  assert NAMES


def test_pairs_are_in_sync(source):
  cells = [
    [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    for path in (source, source.with_suffix(".ipynb"))
  ]
  assert cells[0] == cells[1]


def test_outputs_are_there_and_small(source):
  path = source.with_suffix(".ipynb")
  assert path.stat().st_size < 1_000_000
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
  tree = ast.parse(source.read_text("utf-8"))
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  assert not [node for node in ast.walk(tree) if isinstance(node, kinds)]
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        importlib.import_module(alias.name)
    elif isinstance(node, ast.ImportFrom):
      module = importlib.import_module(node.module)
      for alias in node.names:
        if not hasattr(module, alias.name):
          importlib.import_module(f"{node.module}.{alias.name}")


def test_links_lead_to_the_one_repository(source):
  text = source.read_text("utf-8")
  home = dpo_jax.REPOSITORY.removeprefix("https://github.com/")
  colab = "https://colab.research.google.com/github/"
  links = re.findall(re.escape(colab) + r"[^)\s]*", text)
  assert links == [f"{colab}{home}/blob/main/notebooks/{source.stem}.ipynb"]
  clones = re.findall(r"https://github\.com/[^\"\s)]*", text)
  assert clones == [dpo_jax.REPOSITORY]


@pytest.mark.slow
def test_it_runs(source, tmp_path):
  reported.make_run(tmp_path / "run")
  copy = tmp_path / "notebooks" / source.name
  copy.parent.mkdir()
  copy.write_bytes(source.read_bytes())
  environment = os.environ | {
    "PYTHONPATH": str(NOTEBOOKS.parent),
    "DPO_JAX_RESULTS": str(tmp_path / "run"),
  }
  subprocess.run(
    [sys.executable, NOTEBOOKS / "execute.py", copy],
    env=environment,
    check=True,
  )
  assert jupytext.read(copy.with_suffix(".ipynb")).cells
