"""Executes notebooks from their .py files and writes the .ipynb beside them.

python notebooks/execute.py notebooks/02_dpo_by_hand.py
"""

import pathlib
import sys

import jupytext
import nbclient


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
      cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
  notebook.metadata.pop("language_info", None)
  return notebook


if __name__ == "__main__":
  for name in sys.argv[1:]:
    source = pathlib.Path(name)
    jupytext.write(execute(source), source.with_suffix(".ipynb"))
