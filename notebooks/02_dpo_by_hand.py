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
# # DPO by hand, on one pair
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-jax/dpo_jax/blob/main/notebooks/02_dpo_by_hand.ipynb)
#
# One preference pair and a tiny random model with LoRA adapters: the attention
# mask of a packed row, log-probs, the loss and its gradient, and the implicit
# reward, each computed by hand.

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
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display

from configs import demo
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing, preferences, tokenization
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.demo import world as world_lib
from dpo_jax.model import attention, gpt_neox
from dpo_jax.report.figures import plots, style
from dpo_jax.training import losses
from dpo_jax.training import step as step_lib

folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## The pair
#
# Synthetic dialogues about animals; preferences follow a Bradley-Terry model of a
# known reward.

# %%
world = world_lib.generate(0, pretrain=64, train=8, test=0)
pair = preferences.parse(world.train[0])
print(pair.prompt, "\n\nCHOSEN  ", pair.chosen, "\n\nREJECTED", pair.rejected)
print(
  "\ntrue rewards:",
  world_lib.reward(pair.prompt, pair.chosen),
  world_lib.reward(pair.prompt, pair.rejected),
)

# %% [markdown]
# ## One row for both responses
#
# The prompt is shared: both responses attend to it, neither attends to the other,
# and positions of the rejected response restart after the prompt.

# %%
tokenizer = tokenizer_lib.train(
  (row["chosen"] for row in world.pretrain), 512, folder / "tokenizer"
)
table = tokenization.tokenize(
  tokenizer, [pair], rules="paper", max_length=128, max_prompt_length=96
).table
how = packing.Packing(
  "shared",
  row_length=sum(map(int, table.lengths[0])),
  shards=1,
  microbatches=1,
  loss_on_prompt=False,
  pad_id=tokenizer.pad_id,
)
batch, counts = batch_lib.pack(table, how)
batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)  # the one micro-batch
print(counts)

# %%
segments = attention.Segments(batch.segment_ids[:1], batch.part_ids[:1])
words = [
  tokenizer.backend.decode([token]) for token in np.asarray(batch.tokens[0])
]
with style.style():
  mask = plots.packing_mask(segments.mask()[0], batch.part_ids[0], words)
  display(Image(style.render(mask, "png"), width=620))

# %% [markdown]
# ## Log-probs
#
# The policy is the base model with adapters, the reference the same base without.
# Adapters are initialized to zero, so at first both give the same log-probs.

# %%
shape = demo.architecture()
shape.update(vocab_size=512, width=64, mlp_width=128, layers=2)
config = gpt_neox.ModelConfig(
  **shape.to_dict(), lora=gpt_neox.LoraConfig(4, 8.0, 0.0, gpt_neox.TARGETS)
)
base = gpt_neox.init(config, jax.random.key(0))
lora = gpt_neox.init_lora(config, jax.random.key(1))
reference, lengths = step_lib.sequence_logps(config, base, None, batch, 2)
policy, _ = step_lib.sequence_logps(config, base, lora, batch, 2)
print("log pi(chosen|x), log pi(rejected|x):", policy, "of", lengths, "tokens")
assert jnp.array_equal(policy, reference)

# %% [markdown]
# ## The loss, by hand
#
# With $h = (\log\pi_c - \log\pi_r) - (\log\pi^{ref}_c - \log\pi^{ref}_r)$ the loss
# is $-\log\sigma(\beta h)$, so $\ln 2$ at the start. Its gradient with respect to
# $h$ is $-\beta\,\sigma(-\beta h)$.

# %%
beta = 0.2
h = float((policy[0] - policy[1]) - (reference[0] - reference[1]))
by_hand = np.log1p(np.exp(-beta * h))
ours = float(
  losses.dpo_loss(policy[0] - policy[1], reference[0] - reference[1], beta=beta)
)
print(
  f"h = {h:.4f}   by hand {by_hand:.6f}   dpo_loss {ours:.6f}   ln 2 = {np.log(2):.6f}"
)
np.testing.assert_allclose(ours, by_hand, rtol=1e-6)

# %%
margins = jnp.linspace(-20, 20, 201)
slope = jax.vmap(jax.grad(lambda m: losses.dpo_loss(m, 0.0, beta=beta)))(
  margins
)
np.testing.assert_allclose(
  slope, -beta / (1 + np.exp(beta * np.asarray(margins))), rtol=1e-5
)
plt.style.use("dpo_jax.report.figures.style")
figure, (left, right) = plt.subplots(1, 2, figsize=(6.75, 2.2))
left.plot(margins, losses.dpo_loss(margins, 0.0, beta=beta))
left.set(xlabel="h (nats)", ylabel="loss")
right.plot(margins, slope)
right.set(xlabel="h (nats)", ylabel="gradient")

# %% [markdown]
# ## A few steps on this pair
#
# Gradient descent on the adapters only. The implicit reward of a response is
# $\beta\,(\log\pi - \log\pi^{ref})$.

# %%
pair_loss = lambda lora: losses.dpo_loss(
  jnp.subtract(*step_lib.sequence_logps(config, base, lora, batch, 2)[0]),
  reference[0] - reference[1],
  beta=beta,
)
step = jax.jit(
  lambda lora: (
    jax.value_and_grad(pair_loss)(lora),
    step_lib.sequence_logps(config, base, lora, batch, 2)[0],
  )
)
rows = []
for number in range(30):
  (loss, gradient), policy = step(lora)
  chosen, rejected = map(float, beta * (policy - reference))
  rows.append(
    {
      "step": number,
      "loss": float(loss),
      "rewards/chosen": chosen,
      "rewards/rejected": rejected,
      "rewards/margins": chosen - rejected,
    }
  )
  lora = jax.tree.map(
    lambda weight, slope: weight - 0.1 * slope, lora, gradient
  )
print(
  f"loss {rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}, margin {rows[-1]['rewards/margins']:.3f}"
)
assert rows[-1]["loss"] < rows[0]["loss"]
with style.style():
  margins = plots.reward_margins(rows)
  display(Image(style.render(margins, "png"), width=420))
