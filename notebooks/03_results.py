# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Results: win rates with their intervals
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-jax/dpo_jax/blob/main/notebooks/03_results.ipynb)
#
# Shows any run's directory. Nothing is written but figures in a temporary
# folder.

# %%
# On Colab: fetch the project. Its own jax and jaxlib are named as they are, so
# that pip leaves them alone.
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

if (
  importlib.util.find_spec("dpo_jax") is None
  and "COLAB_RELEASE_TAG" in os.environ
):
  subprocess.run(
    ["git", "clone", "--depth=1", "https://github.com/dpo-jax/dpo_jax"],
    check=True,
  )
  held = [
    f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib")
  ]
  subprocess.run(
    [sys.executable, "-m", "pip", "install", "-q", "-e", "dpo_jax", *held],
    check=True,
  )
  os.chdir("dpo_jax/notebooks")
root = (
  pathlib.Path.cwd().parent
  if pathlib.Path.cwd().name == "notebooks"
  else pathlib.Path.cwd()
)
sys.path.insert(0, str(root))

# %%
import tempfile

from IPython.display import Image, Markdown, display

from dpo_jax.report import report

# The directory to show; runs/demo is what `python -m dpo_jax.replicate
# --config=configs/demo.py` makes.
RESULTS = os.environ.get("DPO_JAX_RESULTS", root / "runs" / "demo")

folder = pathlib.Path(tempfile.mkdtemp())
made = report.of(RESULTS)
print(len(made.flags), "flags")
for flag in made.flags:
  display(Markdown(f"**{flag.name}**: {flag.text}"))

# %% [markdown]
# ## Figures
#
# Each is made anew from the rows; a run's own `report/` has them as PDF too.

# %%
for figure in made.figures:
  if figure.name == "training_curves.png":
    continue  # large; it stands in the run's report
  display(Image(figure.draw(folder / figure.name), width=420))
  display(Markdown(figure.caption))

# %% [markdown]
# ## Tables

# %%
display(Markdown(made.sections["Win rates"]))

# %% [markdown]
# ## The judge

# %%
display(Markdown(made.sections["Judge health"]))
