"""Executes notebooks from their .py files and writes the .ipynb beside them.

python notebooks/execute.py notebooks/02_dpo_by_hand.py

The .ipynb keeps a hash of the source that was executed, so that outputs of an
older source are told from those of this one.
"""

import hashlib
import json
import pathlib
import re
import sys
import tempfile

import jupytext
import nbclient


def digest(path: pathlib.Path) -> str:
  """The hash of a source file's cells."""
  cells = [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
  return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def tidied(outputs: list) -> list:
  """Outputs without what went to stderr and the names of temporary folders."""
  folder = re.compile(re.escape(tempfile.gettempdir()) + r"/[\w-]+/")
  kept = [output for output in outputs if output.get("name") != "stderr"]
  for output in kept:
    if "text" in output:
      output["text"] = folder.sub("", output["text"])
    data = output.get("data", {})
    for kind in [kind for kind in data if kind.startswith("text/")]:
      data[kind] = folder.sub("", data[kind])
  return kept


def execute(path: pathlib.Path):
  """The executed notebook of a .py file, without what went to stderr."""
  notebook = jupytext.read(path)
  resources = {"metadata": {"path": str(path.parent)}}
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name="python3", resources=resources
  ).execute()
  for cell in notebook.cells:
    # Bars and warnings, with paths of the machine that ran it.
    cell.metadata.pop("execution", None)
    if cell.cell_type == "code":
      cell.outputs = tidied(cell.outputs)
  notebook.metadata.pop("language_info", None)
  notebook.metadata["executed"] = {"source_sha256": digest(path)}
  return notebook


if __name__ == "__main__":
  for name in sys.argv[1:]:
    source = pathlib.Path(name)
    jupytext.write(execute(source), source.with_suffix(".ipynb"))
