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
# The whole line on a small world whose true reward is known: pairs, supervised
# fine-tuning, DPO with adapters, answers, verdicts, win rates. Nothing is
# fetched but the project itself, and any device will do.

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
# Dialogues about the animals of a valley. An answer is good if it is true, to
# the point and polite; which of two is preferred is drawn from Bradley-Terry on
# that reward.

# %%
world = world_lib.generate(0, pretrain=0, train=1, test=0)
pair = preferences.parse(world.train[0])
print(pair.prompt)
for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
  reward = world_lib.reward(pair.prompt, text)
  print(f"\n{name}, true reward {reward:.2f}:\n{text}")

# %% [markdown]
# ## The recipe
#
# `configs/demo.py` with everything smaller: a model of 0.7 million weights that
# knows nothing learns to answer from the chosen texts (SFT), and is then trained
# on the pairs with adapters (DPO). Every field is explained by
# `python -m dpo_jax.replicate --config=configs/demo.py --help`.

# %%
c = demo.get_config()
c.init.architecture.update(width=128, mlp_width=512, layers=2)
c.pretrain = None  # SFT begins with the random model
c.world.update(pretrain=1, train=4096, test=256)
c.vocabulary.texts = "{world}/train.jsonl"

c.sft.model.path = "{workdir}/init"
c.sft.data.loss_on_prompt = True  # all text is news to it
c.sft.update(batch_size=8, epochs=3, eval_every=0)
c.sft.optimizer.learning_rate = 4e-3

c.dpo.update(max_steps=64, eval_every=32, checkpoint_every=0)
c.dpo.export_adapters = False
c.dpo.optimizer.learning_rate = 1e-3

del c.sample.policies.base, c.sample.policies.checkpoints
for name in ("sft", "dpo"):
  c.sample.policies[name].temperatures = (0.25, 0.75)
c.judge.controls.update(aa=0, gold=0, retests=0)  # an oracle needs none
c.report.update(title="Quickstart", runs=("sft", "dpo"))

# %% [markdown]
# ## All of it
#
# What `python -m dpo_jax.replicate` does. A stage that is finished is skipped,
# so running the cell again goes on where it was stopped.

# %%
replicate.run(c.to_dict(), folder)

# %% [markdown]
# ## Before and after
#
# The first six of the prompts that no training saw, at T = 0.25, with the true
# reward of each answer.

# %%
answers = {
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
  for before, after in zip(answers["sft"], answers["dpo"], strict=True)
  if before.temperature == 0.25
]
table = markdown.table(("asked", "before DPO", "after DPO"), rows[:6])
display(Markdown("\n".join(table)))

# %%
for temperature in (0.25, 0.75):
  before, after = (
    np.array(
      [
        world_lib.reward(row.prompt, row.response)
        for row in answers[name]
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
# Against the preferred answer of each pair, in percent with 95% intervals. The
# same report as a page with every answer to browse is written to
# `report/report.html`; notebook 03 shows any run's.

# %%
made = report.of(folder)
rates, *rest = made.sections["Win rates"].split("### ")
(differences,) = (part for part in rest if part.startswith("Differences"))
display(Markdown(rates.partition("\n\n\n")[0]))
display(Markdown("### " + differences))
for figure in made.figures:
  if figure.name in ("win_rate_temperature.png", "reward_margins.png"):
    path = folder / "report" / f"notebook_{figure.name}"
    display(Image(figure.draw(path), width=420))

# %% [markdown]
# ## From here
#
# - the same line with a larger model and intervals that do not overlap, about
#   six minutes on two cores: `python -m dpo_jax.replicate --config=configs/demo.py`
# - Pythia on Anthropic's HH: `docs/replicate.md`
# - your own pairs: `docs/add_a_dataset.md`
