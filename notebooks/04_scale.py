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
# # Scale: meshes, sharding and the planner
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dpo-jax/dpo_jax/blob/main/notebooks/04_scale.ipynb)
#
# One table of rules shards every weight. This notebook draws the shards on eight
# virtual devices, checks that a mesh does not change log-probs, and plans the
# memory of a run on this machine and on a TPU slice.

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
import math
import tempfile

import jax

# Eight CPU devices, set before JAX initializes its backends.
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
from IPython.display import Image, Markdown, display

from configs import dpo, models
from dpo_jax.core import hardware, settings, sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing, preferences, tokenization
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.demo import world as world_lib
from dpo_jax.io import markdown
from dpo_jax.model import gpt_neox
from dpo_jax.plan import compile_training, plan, topology
from dpo_jax.report.figures import plots, style
from dpo_jax.training import config, step

folder = pathlib.Path(tempfile.mkdtemp())
os.chdir(root)  # configs/ is found from there
print("jax", jax.__version__, jax.devices())

# %% [markdown]
# ## The mesh and its rules
#
# `data` shards the batch, `fsdp` the batch and the width of weights, `tensor`
# heads, MLP and vocabulary. The rules are in `dpo_jax/core/sharding.py`; sizes are
# set by `--config.mesh.data=...`, `.fsdp` and `.tensor`.

# %%
mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices("cpu"))
print(dict(mesh.shape))
rows = [(markdown.literal(path), str(axes)) for path, axes in sharding.PATHS]
display(Markdown("\n".join(markdown.table(("weight", "axes"), rows))))
print(sharding.RULES)

# %% [markdown]
# ## Shards
#
# Pythia-160m from shapes alone. Numbers are devices; several in one shard hold
# copies. Of stacked layers one is shown, of the QKV kernel the width and heads
# axes.

# %%
shape = gpt_neox.ModelConfig(**models.pythia("160m").to_dict())
base = jax.eval_shape(lambda: gpt_neox.init(shape, jax.random.key(0)))
lying = sharding.shardings(base, mesh)
batch = sharding.batch_sharding(mesh)
drawn = {
  "a batch: rows, tokens": ((16, 1024), batch.devices_indices_map((16, 1024)))
}
for name, path, axes in (
  ("embed: vocab, width", ("embed", "kernel"), (0, 1)),
  ("unembed: width, vocab", ("unembed", "kernel"), (0, 1)),
  (
    "query_key_value: width, heads",
    ("blocks", "query_key_value", "kernel"),
    (1, 2),
  ),
  ("dense_h_to_4h: width, mlp", ("blocks", "dense_h_to_4h", "kernel"), (1, 2)),
  ("dense_4h_to_h: mlp, width", ("blocks", "dense_4h_to_h", "kernel"), (1, 2)),
):
  leaf, where = base, lying
  for key in path:
    leaf, where = leaf[key], where[key]
  drawn[name] = (
    [leaf.shape[axis] for axis in axes],
    {
      device: [parts[axis] for axis in axes]
      for device, parts in where.devices_indices_map(leaf.shape).items()
    },
  )
drawn = {
  name: (sizes, {device.id: tuple(parts) for device, parts in held.items()})
  for name, (sizes, held) in drawn.items()
}
with style.style():
  display(Image(style.render(plots.sharding(drawn), "png"), width=720))

# %% [markdown]
# ## Memory of the weights
#
# Pythia-2.8B in float32 on one device of several meshes, without activations,
# gradients and optimizer state.

# %%
big = gpt_neox.ModelConfig(**models.pythia("2.8b").to_dict())
weights = jax.eval_shape(lambda: gpt_neox.init(big, jax.random.key(0)))
rows = []
for sizes in ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8)):
  of = sharding.shardings(
    weights, sharding.make_mesh(*sizes, devices=jax.devices("cpu"))
  )
  held = sum(
    math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, where in zip(
      jax.tree.leaves(weights), jax.tree.leaves(of), strict=True
    )
  )
  rows.append((*map(str, sizes), f"{held / hardware.GIB:.2f}"))
display(
  Markdown(
    "\n".join(markdown.table(("data", "fsdp", "tensor", "GiB a device"), rows))
  )
)

# %% [markdown]
# ## A mesh does not change log-probs
#
# Eight pairs under a small model, on one device and sharded over eight.

# %%
world = world_lib.generate(0, pretrain=64, train=8, test=0)
tokenizer = tokenizer_lib.train(
  (row["chosen"] for row in world.pretrain), 512, folder / "tokenizer"
)
table = tokenization.tokenize(
  tokenizer,
  [preferences.parse(row) for row in world.train],
  rules="paper",
  max_length=128,
  max_prompt_length=96,
).table
how = packing.Packing(
  "shared",
  row_length=192,
  shards=sharding.data_shards(mesh),
  microbatches=1,
  loss_on_prompt=False,
  pad_id=tokenizer.pad_id,
)
packed, counts = batch_lib.pack(table, how)
small = gpt_neox.ModelConfig(
  **models.pythia("14m").to_dict() | {"vocab_size": 512}
)
weights = gpt_neox.init(small, jax.random.key(0))
logps = jax.jit(step.sequence_logps, static_argnums=(0, 4))

one, lengths = logps(
  small, weights, None, jax.tree.map(lambda x: x[0], packed), 16
)
with jax.set_mesh(mesh):
  split, _ = logps(
    small,
    jax.device_put(weights, sharding.shardings(weights, mesh)),
    None,
    jax.tree.map(lambda x: x[0], sharding.put(packed, mesh, leading=1)),
    16,
  )
print(f"{counts.tokens} tokens in {counts.slots} places")
print("tokens of the responses:", np.asarray(lengths, int))
print("one device:   ", np.asarray(one).round(3))
print("eight devices:", np.asarray(split).round(3))
np.testing.assert_allclose(split, one, rtol=1e-5)

# %% [markdown]
# ## Plan for this machine
#
# The training and evaluation steps are compiled from shapes; no weights are
# loaded. The plan gives memory and how full rows are, and a lower bound of a
# step's time for devices whose peak rates are in `dpo_jax/core/hardware.py`.

# %%
c = dpo.get_config("pythia-14m-lora")
c.batch_size = 8
built = settings.build(config.TrainSettings, c.to_dict())
shape = compile_training.shape_of(built, "")
assert plan.plan_training(built, shape, jax.devices()[:1], search=0)

# %% [markdown]
# ## Plan for a TPU slice
#
# libtpu has the TPU compiler and needs no TPU (`pip install libtpu`, Linux). The
# same steps for one v5e chip. `docs/scaling.md` has the smallest slice for each
# Pythia; `python -m dpo_jax plan --topology=v5e:2x4 --config=...` plans any other,
# sampling included.

# %%
if importlib.util.find_spec("libtpu") is None:
  print("libtpu is not installed here")
else:
  assert plan.plan_training(built, shape, topology.devices("v5e:1x1"), search=0)

# %% [markdown]
# ## Next
#
# - a TPU VM from scratch, one host or a pod slice: `docs/tpu.md`
# - one GPU, several, Slurm: `docs/gpu.md`
