"""What all sides of benchmarks/gpu.py work on: one model, one set of ids.

Weights are random, and tokens are random in the real lengths of HH's pairs,
which stand in hh_lengths.csv (prompt, chosen, rejected; harmless-base, rules
"paper", 512 tokens). `write` leaves them in files for those that are not ours.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import numpy as np

from configs import dpo, sample
from dpo_jax.core import settings, sharding
from dpo_jax.data import loader, token_table, tokenizer
from dpo_jax.model import gpt_neox, hf
from dpo_jax.plan import compile_training
from dpo_jax.sampling import jobs
from dpo_jax.training import config as config_lib

LENGTHS = pathlib.Path(__file__).with_name("hh_lengths.csv")
# For a check of the scripts.
TINY = gpt_neox.ModelConfig(
  vocab_size=512,
  width=64,
  layers=2,
  heads=4,
  mlp_width=128,
  rotary_fraction=0.25,
  rotary_base=10000.0,
  norm_eps=1e-5,
  max_positions=2048,
)


def config(
  flags: argparse.Namespace, attention: str
) -> config_lib.TrainSettings:
  """The LoRA recipe of configs/dpo.py; its memory is what --set is for."""
  size = "14m" if flags.size == "tiny" else flags.size
  c = dpo.get_config(f"pythia-{size}-lora")
  c.batch_size = c.eval_batch_size = flags.batch_size
  c.microbatches = flags.microbatches
  c.model.dtype = c.model.param_dtype = "bfloat16"
  c.model.remat, c.model.attention = "full", attention
  c.model.attention_block = 128
  c.precompute_reference = True
  # As TRL has it unless told otherwise.
  c.lora.dropout = 0.0
  c.optimizer.schedule, c.optimizer.warmup_steps = "constant", 0
  with c.unlocked():
    c.update_from_flattened_dict(json.loads(flags.set))
  return settings.build(config_lib.TrainSettings, c.to_dict())


def shape_of(
  flags: argparse.Namespace, run: config_lib.TrainSettings
) -> gpt_neox.ModelConfig:
  found = compile_training.shape_of(
    run, "14m" if flags.size == "tiny" else flags.size
  )
  if flags.size != "tiny":
    return found
  return dataclasses.replace(
    TINY,
    dtype=found.dtype,
    remat=found.remat,
    lora=found.lora,
    attention=found.attention,
  )


def alone() -> jax.sharding.Mesh:
  """A mesh of the first device."""
  return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def weights(run: config_lib.TrainSettings, shape: gpt_neox.ModelConfig):
  """Random weights, made on the device in what they are kept in; adapters."""
  kept = run.model.param_dtype
  make = jax.jit(
    lambda key: gpt_neox.init(shape, key, kept),
    out_shardings=sharding.shardings(
      jax.eval_shape(lambda: gpt_neox.init(shape, jax.random.key(0), kept)),
      alone(),
    ),
  )
  # Those of `compile.initial` with the same key.
  return make(jax.random.key(0)), gpt_neox.init_lora(shape, jax.random.key(1))


def lengths() -> np.ndarray:
  """Tokens of prompt, chosen and rejected of real pairs, [1551, 3]."""
  return np.loadtxt(LENGTHS, int, delimiter=",", skiprows=1)


def pairs(count: int, words: int) -> token_table.Table:
  """Random tokens in the lengths of real pairs, over and over."""
  real = lengths()
  rng = np.random.default_rng(0)
  order = rng.permutation(len(real))
  chosen = real[order[np.arange(count) % len(real)]]
  return token_table.from_items(
    [
      token_table.Pair(
        f"pair-{i}",
        *(tuple(map(int, rng.integers(2, words, size))) for size in sizes),
      )
      for i, sizes in enumerate(chosen)
    ]
  )


def schedule(
  flags: argparse.Namespace, table: token_table.Table
) -> loader.Schedule:
  """Which pairs each update takes."""
  return loader.Schedule((len(table),), (1.0,), flags.batch_size, 0, 1)


def answering(flags: argparse.Namespace) -> jobs.SamplingSettings:
  c = sample.get_config("paper")
  c.batch_size, c.max_new_tokens = flags.rows, flags.new_tokens
  c.cache_gib = 64.0
  return settings.build(jobs.SamplingSettings, c.to_dict())


def prompts(flags: argparse.Namespace) -> list[tuple[int, ...]]:
  """Prompts to answer, of real lengths."""
  rng = np.random.default_rng(1)
  sizes = rng.choice(lengths()[:, 0], flags.rows)
  sizes = np.minimum(sizes, answering(flags).max_prompt_tokens)
  return [tuple(map(int, rng.integers(2, 250, size))) for size in sizes]


def small_tokenizer(directory: pathlib.Path) -> tokenizer.Tokenizer:
  """Its text is of no matter here; its ids are the model's first ones."""
  texts = ["\n\nHuman: Hello there!\n\nAssistant: Good day to you."] * 3
  return tokenizer.train(texts, 300, directory)


def write(flags: argparse.Namespace) -> None:
  """Model, adapters and ids, as dpo_step_trl.py and gpu_torch.py read them."""
  case = flags.case
  run = config(flags, "dense")
  shape = shape_of(flags, run)
  base, adapters = weights(run, shape)
  words = small_tokenizer(case / "tokenizer")
  hf.export(case / "model", shape, base, words)
  hf.export_adapter(
    case / "adapter", shape, adapters, str(case / "model"), base
  )
  table = pairs(flags.steps * run.batch_size, shape.vocab_size)
  order = schedule(flags, table)
  updates = [
    [
      [list(map(int, part)) for part in (p.prompt, p.chosen, p.rejected)]
      for p in table.take(order.items(step))
    ]
    for step in range(flags.steps)
  ]
  text = {
    "model": str(case / "model"),
    "max_length": run.data.max_length,
    "settings": dataclasses.asdict(run.optimizer)
    | dataclasses.asdict(run.lora)
    | {"beta": run.loss.beta},
    "steps": updates,
  }
  (case / "case.json").write_text(json.dumps(text))
  asked = {"prompts": prompts(flags), "new_tokens": flags.new_tokens}
  (case / "prompts.json").write_text(json.dumps(asked))
