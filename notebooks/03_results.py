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
# # Results: win rates with intervals
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-jax/dpo_jax/blob/main/notebooks/03_results.ipynb)
#
# The report of a run directory. Nothing is written.

# %%
# On Colab: install the project, with jax and jaxlib pinned to Colab's versions.
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
  pins = [
    f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib")
  ]
  subprocess.run(
    [sys.executable, "-m", "pip", "install", "-q", "-e", "dpo_jax", *pins],
    check=True,
  )
  os.chdir("dpo_jax/notebooks")
root = pathlib.Path.cwd()
root = root.parent if root.name == "notebooks" else root
sys.path.insert(0, str(root))

# %%
from IPython.display import Image, Markdown, display

from dpo_jax.report import report

# The default is the output of `python -m dpo_jax.replicate
# --config=configs/demo.py`.
RESULTS = os.environ.get("DPO_JAX_RESULTS", root / "runs" / "demo")

composed = report.of(RESULTS)
print(len(composed.flags), "flags")
for flag in composed.flags:
  display(Markdown(f"**{flag.name}**: {flag.text}"))

# %% [markdown]
# ## Figures
#
# The run's `report/` directory has them as PDF too.

# %%
for figure in composed.figures:
  if figure.name != "training_curves.png":  # large
    display(Image(figure.png(), width=420), Markdown(figure.caption))

# %% [markdown]
# ## Tables

# %%
display(Markdown(composed.sections["Win rates"]))

# %% [markdown]
# ## The judge

# %%
display(Markdown(composed.sections["Judge health"]))
