"""docs/reliability.md names tests that exist, for every fault of its tables."""

import ast
import pathlib
import re

TESTS = pathlib.Path(__file__).resolve().parent
DOCUMENT = TESTS.parent / "docs" / "reliability.md"
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def functions(file):
  tree = ast.parse((TESTS / file).read_text("utf-8"))
  return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists():
  named = NAMED.findall(DOCUMENT.read_text("utf-8"))
  assert len(named) > 60
  for file, name in named:
    assert name in functions(file), f"{file}::{name}"


def test_every_fault_has_its_proof():
  section, faults = "", {}
  for line in DOCUMENT.read_text("utf-8").splitlines():
    if line.startswith("## "):
      section = line[3:]
    elif line.startswith("| ") and not line.startswith(("| fault", "| bound")):
      fault = line.split(" | ")[0]
      faults.setdefault(section, []).append((fault, NAMED.findall(line)))
  sections = ["Training and checkpoints", "Data", "Model files", "Sampling"]
  for name in (*sections, "Judge", "Results and names"):
    assert len(faults[name]) >= 5
    for fault, proofs in faults[name]:
      assert proofs, f"{name}: {fault}"
