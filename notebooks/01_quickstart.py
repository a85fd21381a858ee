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
# # Quickstart: SFT and DPO in minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-jax/dpo_jax/blob/main/notebooks/01_quickstart.ipynb)
#
# The whole pipeline on synthetic data with a known true reward: supervised
# fine-tuning, DPO with LoRA, sampling, judging, win rates. It runs on any device
# and downloads nothing but the project.

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
import tempfile

import jax
import numpy as np
from IPython.display import Image, Markdown, display

from configs import demo
from dpo_jax import replicate
from dpo_jax.data import preferences
from dpo_jax.demo import world as world_lib
from dpo_jax.io import markdown, records
from dpo_jax.report import report

folder = pathlib.Path(tempfile.mkdtemp()) / "quickstart"
print("jax", jax.__version__, jax.devices())

# %% [markdown]
# ## The pairs
#
# Dialogues about animals. The reward of a response is higher if it is true, to
# the point and polite; preferences follow a Bradley-Terry model of that reward.

# %%
world = world_lib.generate(0, pretrain=0, train=1, test=0)
pair = preferences.parse(world.train[0])
print(pair.prompt)
for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
  reward = world_lib.reward(pair.prompt, text)
  print(f"\n{name}, true reward {reward:.2f}:\n{text}")

# %% [markdown]
# ## The config
#
# A smaller `configs/demo.py`: a randomly initialized model of 0.7 million
# parameters is fine-tuned on the chosen responses (SFT), then trained on the
# pairs with LoRA (DPO). All fields:
# `python -m dpo_jax.replicate --config=configs/demo.py --help`.

# %%
c = demo.get_config()
c.init.architecture.update(width=128, mlp_width=512, layers=2)
c.pretrain = None  # SFT starts from random weights
c.world.update(pretrain=1, train=4096, test=256)
c.vocabulary.texts = "{world}/train.jsonl"

c.sft.model.path = "{workdir}/init"
c.sft.data.loss_on_prompt = True  # the model has seen no text yet
c.sft.update(batch_size=8, epochs=3, eval_every=0)
c.sft.optimizer.learning_rate = 4e-3

c.dpo.update(max_steps=64, eval_every=32, checkpoint_every=0)
c.dpo.export_adapters = False
c.dpo.optimizer.learning_rate = 1e-3

del c.sample.policies.base, c.sample.policies.checkpoints
for name in ("sft", "dpo"):
  c.sample.policies[name].temperatures = (0.25, 0.75)
c.judge.controls.update(aa=0, gold=0, retests=0)  # the judge is an oracle
c.report.update(title="Quickstart", runs=("sft", "dpo"))

# %% [markdown]
# ## Run
#
# The same as `python -m dpo_jax.replicate`. Finished stages are skipped, so an
# interrupted run resumes.

# %%
replicate.run(c.to_dict(), folder)

# %% [markdown]
# ## Responses before and after DPO
#
# The first six test prompts at T = 0.25, with the true reward of each response.

# %%
responses = {
  name: records.read(folder / "responses" / f"{name}.jsonl", records.Response)
  for name in ("sft", "dpo")
}
rows = [
  [
    markdown.literal(
      before.prompt.split("Human:")[-1].removesuffix("Assistant:")
    )
  ]
  + [
    markdown.literal(
      f"{row.response} ({world_lib.reward(row.prompt, row.response):.1f})"
    )
    for row in (before, after)
  ]
  for before, after in zip(responses["sft"], responses["dpo"], strict=True)
  if before.temperature == 0.25
]
table = markdown.table(("prompt", "before DPO", "after DPO"), rows[:6])
display(Markdown("\n".join(table)))

# %%
for temperature in (0.25, 0.75):
  before, after = (
    np.array(
      [
        world_lib.reward(row.prompt, row.response)
        for row in responses[name]
        if row.temperature == temperature
      ]
    )
    for name in ("sft", "dpo")
  )
  gain = after - before
  print(
    f"T = {temperature}: mean true reward {before.mean():.2f} -> {after.mean():.2f},"
    f" gain {gain.mean():.2f} +- {1.96 * gain.std() / len(gain) ** 0.5:.2f} (95%)"
  )

# %% [markdown]
# ## Win rates and curves
#
# Against the chosen response of each pair, with 95% intervals.
# `report/report.html` has the same report with a response browser; notebook 03
# shows the report of any run.

# %%
composed = report.of(folder)
display(Markdown(composed.sections["Win rates"]))
for figure in composed.figures:
  if figure.name in ("win_rate_temperature.png", "reward_margins.png"):
    display(Image(figure.png(), width=420))

# %% [markdown]
# ## Next
#
# - a larger model, with intervals that do not overlap, in about six minutes on
#   two cores: `python -m dpo_jax.replicate --config=configs/demo.py`
# - Pythia on Anthropic's HH: `docs/replicate.md`
# - your own pairs: `docs/add_a_dataset.md`
