"""Executes notebooks from their .py files and writes the .ipynb.

python notebooks/execute.py notebooks/02_dpo_by_hand.py

The .ipynb records a hash of the executed code, so that outdated outputs are
detected. After a change of Markdown cells only, update the .ipynb with
`jupytext --update --to ipynb`. Figures are reduced to 64 colors, a third of the
bytes, and durations are removed.
"""

import base64
import hashlib
import io
import json
import pathlib
import re
import sys
import tempfile

import jupytext
import nbclient
from PIL import Image

_COLORS = 64
# Durations in lines of the package.
_TIMES = re.compile(r" after \d+\.\d minutes")


def digest(path: pathlib.Path) -> str:
  """Hash of the code cells of a source file."""
  cells = [
    cell.source
    for cell in jupytext.read(path).cells
    if cell.cell_type == "code"
  ]
  return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def tidied(outputs: list) -> list:
  """Outputs without stderr, names of temporary folders, and durations."""
  folder = re.compile(re.escape(tempfile.gettempdir()) + r"/[\w-]+/")

  def clean(text):
    return _TIMES.sub("", folder.sub("", text))

  kept = [output for output in outputs if output.get("name") != "stderr"]
  for output in kept:
    if "text" in output:
      output["text"] = clean(output["text"])
    data = output.get("data", {})
    for kind, content in data.items():
      if kind.startswith("text/"):
        data[kind] = clean(content)
      elif kind == "image/png":
        data[kind] = smaller(content)
  return kept


def smaller(png: str) -> str:
  """A base64 PNG with fewer colors, of the same size in pixels."""
  with Image.open(io.BytesIO(base64.b64decode(png))) as image:
    few = image.convert("RGB").quantize(
      _COLORS,
      method=Image.Quantize.MAXCOVERAGE,
      dither=Image.Dither.NONE,
    )
  buffer = io.BytesIO()
  few.save(buffer, format="png", optimize=True)
  return base64.b64encode(buffer.getvalue()).decode()


def execute(path: pathlib.Path):
  """The executed notebook of a .py file."""
  notebook = jupytext.read(path)
  resources = {"metadata": {"path": str(path.parent)}}
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name="python3", resources=resources
  ).execute()
  for cell in notebook.cells:
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
