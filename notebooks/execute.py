"""Executes notebooks from their .py files and writes the .ipynb beside them.

python notebooks/execute.py notebooks/02_dpo_by_hand.py

The .ipynb keeps a hash of the source that was executed, so that outputs of an
older source are told from those of this one. Figures keep 64 colours, which is
what they have but for the edges of letters: a third of the bytes. What was said
of how long something took is left out, as one machine's.
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
# What the package's own lines say of how long something took.
_TIMES = re.compile(r" after \d+\.\d minutes")


def digest(path: pathlib.Path) -> str:
  """The hash of a source file's cells."""
  cells = [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
  return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def tidied(outputs: list) -> list:
  """Outputs without stderr, temporary folders' names and times; see above."""
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
  """A PNG in base64, of the same size in pixels, in few colours."""
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
