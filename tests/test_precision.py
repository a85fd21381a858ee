"""Float32 is float32 on every device: in what is given to the compiler."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import tiny

from dpo_jax.data import batch as batch_lib
from dpo_jax.data import packing
from dpo_jax.model import gpt_neox
from dpo_jax.sampling import decode, draw, stop
from dpo_jax.training import optimizer, step

LOSS = tiny.loss(beta=0.5)
OPTIMIZER = optimizer.OptimizerSettings(
  "adamw", 0.01, "constant", 0, 0.0, 0.1, 0.9, 0.99, 1e-8, 1.0
)
WIDE = ("HIGHEST", "HIGHEST")
DEFAULT = ("DEFAULT", "DEFAULT")


def products(lowered):
  """(types of the operands, precisions) of all products of a program."""
  found = set()
  for line in lowered.as_text().splitlines():
    if "stablehlo.dot_general" not in line:
      continue
    types = re.search(
      r": \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>", line
    )
    said = re.search(r"precision = \[(\w+), (\w+)\]", line)
    found.add((types.groups(), said.groups() if said else DEFAULT))
  return found


def batch(layout, row_length):
  # Rows of eight tokens are blocks that pairs run through.
  how = packing.Packing(
    layout=layout,
    row_length=row_length,
    shards=1,
    microbatches=1,
    loss_on_prompt=False,
    pad_id=1,
    spans_rows=row_length == 8,
  )
  return batch_lib.pack(tiny.pairs(4, 1), how)[0]


def training(config, packed, kind="dpo"):
  """The lowered training step and evaluation."""
  base = tiny.weights(config)
  lora = tiny.adapters(config) if config.lora else {}
  tx = optimizer.make(OPTIMIZER, 9, step.trainable(config))
  objective = step.Objective(kind, LOSS, 4)
  state = step.init_state(base, lora, tx)
  reference = None if config.lora else base
  train = jax.jit(step.make_train_step(config, objective, tx, 0))
  evaluate = jax.jit(step.make_eval_step(config, objective))
  yield train.lower(state, reference, packed)
  yield evaluate.lower(state.params, reference, packed)
  score = jax.jit(functools.partial(step.token_logps, config))
  micro = jax.tree.map(lambda x: x[0], packed)
  yield score.lower(base, lora or None, micro)


def sampling(config):
  """The lowered prefill, and decoding with both layouts of the cache."""
  base, adapters = tiny.weights(config), tiny.adapters(config)
  for unstacked in (False, True):
    program = decode.Program(
      config=config,
      slots=16,
      max_new_tokens=4,
      eos_id=0,
      vocab_size=config.vocab_size,
      paths=draw.Paths(0, False, False),
      cache=config.dtype,
      unstacked=unstacked,
    )
    count = jax.ShapeDtypeStruct((4,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    yield decode.prefill.lower(program, base, adapters, prompts, count, count)
    state = jax.eval_shape(
      lambda program=program: decode.empty(program, 4, 16, 0)
    )
    number = jax.ShapeDtypeStruct((), jnp.int32)
    table = jax.ShapeDtypeStruct((config.vocab_size, stop.TURN + 1), jnp.int8)
    weights = (base, adapters)
    if unstacked:
      weights = jax.eval_shape(decode.unstack, *weights)
    yield decode.advance.lower(
      program, (16, 0), *weights, state, table, number, number
    )


def configs(dtype):
  lora = gpt_neox.LoraConfig(2, 4.0, 0.0, gpt_neox.TARGETS)
  return [
    (dataclasses.replace(tiny.CONFIG, dtype=dtype, **values), layout, length)
    for values, layout, length in (
      (
        {"lora": lora, "attention": "blocks", "remat": "save_projections"},
        "shared",
        8,
      ),
      ({"lora": lora, "vocab_tile": 16, "logit_chunk": 8}, "shared", 40),
      ({"remat": "full", "vocab_tile": 16}, "packed", 40),
    )
  ]


def test_products_of_float32_are_not_rounded():
  every = []
  for config, layout, length in configs("float32"):
    every += map(products, training(config, batch(layout, length)))
  every += map(products, sampling(configs("float32")[0][0]))
  assert all(every)
  assert set().union(*every) == {(("f32", "f32"), WIDE)}


def test_bfloat16_is_as_it_was():
  config, layout, length = configs("bfloat16")[1]
  every = set()
  for one in (*training(config, batch(layout, length)), *sampling(config)):
    every |= products(one)
  assert (("bf16", "bf16"), DEFAULT) in every
  assert {said for _, said in every} == {DEFAULT}


def test_what_jax_was_told_stays():
  config, layout, length = configs("float32")[1]
  with jax.default_matmul_precision("tensorfloat32"):
    train = next(training(config, batch(layout, length)))
  assert (("f32", "f32"), WIDE) not in products(train)
