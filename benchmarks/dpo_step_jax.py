"""The JAX sides of dpo_step: the product's own training run, and a plain step.

Run as a child process by dpo_step, one contender a process. The product is
`train.run` with the settings of configs/dpo.py, so what is timed is what
`python train.py` does: host work, transfers and metrics included. The plain
step is what one writes first: every sequence a padded row of its own, logits
of all positions, one `jax.jit`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import data as data_config
from configs import dpo
from dpo_jax.core import settings
from dpo_jax.data import dataset, tokenizer
from dpo_jax.io import metrics
from dpo_jax.model import gpt_neox, hf
from dpo_jax.training import config as config_lib
from dpo_jax.training import optimizer, train

# What a contender changes in the settings that all of them share.
PRODUCTS = {
  "shared": {},
  "shared, reference computed": {"precompute_reference": False},
  "shared, dropout 0.1": {"lora.dropout": 0.1},
  "packed": {"data.layout": "packed"},
  "padded": {
    "data.layout": "padded",
    "data.row_length": 512,
    "model.attention": "dense",
  },
}
PLAIN = "plain JAX, padded"


def config(flags: argparse.Namespace) -> config_lib.TrainSettings:
  """The LoRA recipe of configs/dpo.py on the pairs and model of the flags."""
  c = dpo.get_config(f"{flags.variant}-lora")
  c.model.path = c.tokenizer = str(flags.model)
  c.model.dtype = "float32"
  c.data.use = ("pairs",)
  c.data.sources = {"pairs": data_config.pairs(flags.pairs, flags.pairs)}
  c.data.filters.skip_bad = 10**6
  c.data.tokenization = "paper"
  c.data.max_length, c.data.max_prompt_length = 512, 256
  c.data.max_train = flags.steps * flags.batch_size
  c.data.max_eval = flags.batch_size
  c.data.token_cache = ""
  c.precompute_reference = True
  c.batch_size = c.eval_batch_size = flags.batch_size
  c.eval_every = c.checkpoint_every = 0
  c.export_adapters = False
  # TRL switches dropout off unless told otherwise.
  c.lora.dropout = 0.0
  c.optimizer.schedule, c.optimizer.warmup_steps = "constant", 0
  c.optimizer.learning_rate = 1e-3
  c.loss.beta = 0.1
  with c.unlocked():
    c.update_from_flattened_dict(PRODUCTS.get(flags.child, {}))
    c.update_from_flattened_dict(json.loads(flags.set))
  return settings.build(config_lib.TrainSettings, c.to_dict())


def write_case(directory: pathlib.Path, flags: argparse.Namespace) -> None:
  """Token ids of every step, settings, and the adapters that all start from."""
  run = config(flags)
  items = dataset.prepare(run.data, "dpo", tokenizer.load(run.tokenizer))
  schedule = items.schedule(
    batch_size=run.batch_size, seed=run.seed, epochs=run.epochs
  )
  table = items.train.table
  steps = []
  for step in range(schedule.steps):
    pairs = table.take(schedule.items(step))
    steps.append(
      [
        [list(map(int, part)) for part in (p.prompt, p.chosen, p.rejected)]
        for p in pairs
      ]
    )
  case = {
    "model": run.model.path,
    "max_length": run.data.max_length,
    "settings": dataclasses.asdict(run.optimizer)
    | dataclasses.asdict(run.lora)
    | {"beta": run.loss.beta},
    "steps": steps,
  }
  (directory / "case.json").write_text(json.dumps(case))
  shape, base = load(run)
  hf.export_adapter(
    directory / "adapter", shape, start(run, shape), run.model.path, base
  )


def load(run):
  return hf.load(
    run.model.path,
    dtype=run.model.dtype,
    remat=run.model.remat,
    lora=run.lora.config(),
    param_dtype=run.model.param_dtype,
  )


def start(run, shape):
  """The adapters that `training` starts from."""
  key = jax.random.fold_in(jax.random.key(run.seed), 2**31 - 1)
  return gpt_neox.init_lora(shape, key)


def product(flags: argparse.Namespace) -> dict[str, list[float]]:
  run = config(flags)
  with tempfile.TemporaryDirectory() as workdir:
    train.run(run, pathlib.Path(workdir))
    rows = metrics.read(pathlib.Path(workdir) / metrics.FILE)
  rows = [row for row in rows if "loss" in row]
  return {
    "losses": [row["loss"] for row in rows],
    "seconds": [flags.batch_size / row["pairs_per_second"] for row in rows],
  }


def plain(flags: argparse.Namespace) -> dict[str, list[float]]:
  """Two padded sequences a pair, logits of all places, four pairs at a time."""
  run = config(flags)
  case = json.loads((flags.case / "case.json").read_text())
  shape, base = load(run)
  lora = start(run, shape)
  tx = optimizer.make(run.optimizer, len(case["steps"]), "lora")
  opt_state = tx.init({"base": base, "lora": lora})
  size = run.data.max_length
  places = jnp.broadcast_to(jnp.arange(size), (8, size))
  causal = jnp.tril(jnp.ones((1, size, size), bool))

  def logps(lora, tokens, wanted):
    hidden, _ = gpt_neox.apply(shape, base, lora, tokens, places, causal)
    logits = gpt_neox.unembed(base, hidden)[:, :-1]
    every = jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(every, tokens[:, 1:, None], -1)[..., 0]
    return jnp.sum(taken * wanted[:, 1:], -1).reshape(-1, 2).T

  def loss(lora, tokens, wanted, reference):
    ratios = logps(lora, tokens, wanted) - reference
    margin = run.loss.beta * (ratios[0] - ratios[1])
    return -jnp.mean(jax.nn.log_sigmoid(margin))

  @jax.jit
  def step(lora, opt_state, batch):
    def one(total, micro):
      value, grad = jax.value_and_grad(loss)(lora, *micro)
      return jax.tree.map(jnp.add, total, grad), value

    zeros = jax.tree.map(jnp.zeros_like, lora)
    grads, values = jax.lax.scan(one, zeros, batch)
    grads = jax.tree.map(lambda x: x / len(values), grads)
    updates, opt_state = tx.update(
      {"base": None, "lora": grads}, opt_state, {"base": base, "lora": lora}
    )
    lora = optax.apply_updates(lora, updates["lora"])
    return lora, opt_state, jnp.mean(values)

  reference_of = jax.jit(lambda tokens, wanted: logps(None, tokens, wanted))
  feed = []
  for pairs in case["steps"]:
    tokens, wanted = padded(pairs, size)
    tokens, wanted = (x.reshape(-1, 8, size) for x in (tokens, wanted))
    reference = [reference_of(*micro) for micro in zip(tokens, wanted)]
    feed.append((tokens, wanted, jnp.stack(reference)))
  # Compiled before the clock starts.
  jax.block_until_ready(step(lora, opt_state, feed[0]))
  seconds, values = [], []
  for batch in feed:
    started = time.perf_counter()
    lora, opt_state, value = step(lora, opt_state, batch)
    values.append(float(value))
    seconds.append(time.perf_counter() - started)
  return {"losses": values, "seconds": seconds}


def padded(pairs, size):
  """Sequences of pairs, chosen before rejected, and their loss masks."""
  tokens = np.ones((2 * len(pairs), size), np.int32)
  wanted = np.zeros(tokens.shape, np.float32)
  for i, (prompt, *responses) in enumerate(pairs):
    for j, response in enumerate(responses):
      end = len(prompt) + len(response)
      tokens[2 * i + j, :end] = prompt + response
      wanted[2 * i + j, len(prompt) : end] = 1
  return tokens, wanted


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--child", choices=[*PRODUCTS, PLAIN, "case"])
  parser.add_argument("--case", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  parser.add_argument("--model", required=True)
  parser.add_argument("--pairs", required=True)
  parser.add_argument("--variant", required=True)
  parser.add_argument("--steps", type=int, required=True)
  parser.add_argument("--batch_size", type=int, required=True)
  parser.add_argument("--set", default="{}")
  flags = parser.parse_args()
  if flags.child == "case":
    return write_case(flags.case, flags)
  found = plain(flags) if flags.child == PLAIN else product(flags)
  versions = {
    name: importlib.metadata.version(name) for name in ("jax", "jaxlib")
  }
  flags.output.write_text(json.dumps(found | {"versions": versions}))


if __name__ == "__main__":
  main()
