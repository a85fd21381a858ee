"""All that a run needs before its first step, read, checked and compiled.

What can be wrong is found here, cheapest first: settings, data, model, then
the checkpoint that the run goes on from.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.core import distributed, sharding
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.model import gpt_neox, hf
from dpo_jax.training import checkpoints as checkpoints_lib
from dpo_jax.training import compile as compile_lib
from dpo_jax.training import config as config_lib
from dpo_jax.training import input_pipeline, optimizer, step

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
  """What stays the same through a run.

  Attributes:
    mesh: where everything lies.
    tokenizer: the model's own.
    feed: the run's items and batches.
    model: its config, with the adapters' if they are trained.
    name: the trained subtree, "base" or "lora".
    fingerprint: of all base weights that the run began with, as they were read.
    adapted: their `hf.fingerprint`, by which adapters know them.
    rates: the learning rate of each update.
    reference: base weights of the reference, where they are a second tree.
    train_step: see `step.make_train_step`.
    eval_step: see `step.make_eval_step`.
  """

  mesh: jax.sharding.Mesh
  tokenizer: tokenizer_lib.Tokenizer
  feed: input_pipeline.Feed
  model: gpt_neox.ModelConfig
  name: str
  fingerprint: str
  adapted: str
  rates: np.ndarray
  reference: Tree | None
  train_step: Callable
  eval_step: Callable

  def made_of(self, seed: int) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that reads it."""
    report = self.feed.items.report
    return {
      "train_data": report["train"]["tokens"],
      "held_out_data": report["held_out"]["tokens"],
      "tokenizer": self.tokenizer.fingerprint,
      "base": self.fingerprint,
      # What the random numbers of a run follow from.
      "randomness": {
        "seed": seed,
        "generator": jax.config.jax_default_prng_impl,
        "partitionable": jax.config.jax_threefry_partitionable,
      },
    }


def prepare(
  config: config_lib.TrainSettings,
  workdir: pathlib.Path,
  checkpoints: checkpoints_lib.Checkpoints,
) -> tuple[Run, step.TrainState, list[str]]:
  """Reads data and model and makes, or restores, the state.

  Returns:
    What stays, the state, and in which inputs, of those that the config allows
    to differ, it is not what the checkpoint was made of.

  Raises:
    ValueError: settings or input are wrong, or the checkpoint is of others.
  """
  with distributed.raise_on_all("reading the data"):
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    tokenizer = tokenizer_lib.load(config.tokenizer)
    fed = input_pipeline.make(config, tokenizer, mesh)
  distributed.assert_equal("the data", json.dumps(fed.items.report))
  with distributed.raise_on_all("reading the model"):
    shape, base = _load_model(config, tokenizer, mesh)
  name = step.trainable(shape)
  fingerprint, adapted = hf.content_hash(base), hf.fingerprint(base)
  if config.model.param_dtype == "int8":
    base = compile_lib.quantize(base, mesh)
  reference = None
  if config.precompute_reference:
    fed = input_pipeline.with_reference(
      fed, config, shape, base, fingerprint, workdir
    )
  elif compile_lib.keeps_reference(config):
    # Full fine-tuning moves the base: the reference is a second tree.
    reference = base
  tx = optimizer.make(config.optimizer, fed.steps, name)
  state = _make_state(config, shape, base, tx, mesh, keep=reference is not None)
  del base
  rates = optimizer.schedule(config.optimizer, fed.steps)
  train_step, eval_step = compile_lib.training(config, shape, tx, state, mesh)
  assembled = Run(
    mesh=mesh,
    tokenizer=tokenizer,
    feed=fed,
    model=shape,
    name=name,
    fingerprint=fingerprint,
    adapted=adapted,
    rates=np.asarray(jax.vmap(rates)(jnp.arange(fed.steps))),
    reference=reference,
    train_step=train_step,
    eval_step=eval_step,
  )
  changed: list[str] = []
  if checkpoints.latest() is not None:
    state, meta = checkpoints.restore(state, name)
    changed = _changed(
      workdir,
      meta["made_of"],
      assembled.made_of(config.seed)
      | {"position": fed.schedule.state(meta["step"])},
      config.allow_changes,
    )
  return assembled, state, changed


def kept_as(config: config_lib.TrainSettings) -> Literal["float32", "bfloat16"]:
  """What weights are read as; those of eight bits are made of float32."""
  kept = config.model.param_dtype
  return "float32" if kept == "int8" else kept


def _load_model(config, tokenizer, mesh) -> tuple[gpt_neox.ModelConfig, Tree]:
  compile_lib.check(config, hf.read_config(config.model.path), mesh)
  shape, base = hf.load(
    config.model.path,
    dtype=config.model.dtype,
    remat=config.model.remat,
    lora=config.lora.config(),
    param_dtype=kept_as(config),
    mesh=mesh,
  )
  shape = dataclasses.replace(
    shape,
    attention=config.model.attention,
    logit_chunk=config.model.logit_chunk,
    vocab_tile=config.model.vocab_tile,
  )
  if tokenizer.vocab_size > shape.vocab_size:
    raise ValueError(
      f"tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens,"
      f" but model {config.model.path} only {shape.vocab_size}"
    )
  if config.data.max_length > shape.max_positions:
    raise ValueError(
      f"data.max_length={config.data.max_length} is more than the"
      f" {shape.max_positions} positions of {config.model.path}"
    )
  return shape, base


def weights_as_read(config: config_lib.TrainSettings, made: Run) -> Tree:
  """The base that the run began with, read again.

  Raises:
    ValueError: it is no longer the same.
  """
  _, base = hf.load(
    config.model.path,
    dtype=config.model.dtype,
    remat=config.model.remat,
    lora=None,
    param_dtype=kept_as(config),
    mesh=made.mesh,
  )
  found = hf.content_hash(base)
  if found != made.fingerprint:
    raise ValueError(
      f"{config.model.path} holds other weights than when the run began"
      f" ({found}, not {made.fingerprint}): put those back, and run again"
    )
  return base


def _make_state(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  base: Tree,
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  *,
  keep: bool,
) -> step.TrainState:
  """The state of step 0 on the mesh.

  `base` is given away unless it is to be kept: there are never two of them
  unless one is the reference.
  """

  make = compile_lib.initial(shape, tx)
  # Another stream than the one of dropout, which folds steps into the seed.
  key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
  lying = sharding.shardings(jax.eval_shape(make, base, key), mesh)
  given = () if keep else (0,)
  return jax.jit(make, out_shardings=lying, donate_argnums=given)(base, key)


def _changed(
  workdir: pathlib.Path,
  found: dict[str, Any],
  wanted: dict[str, Any],
  allowed: tuple[str, ...],
) -> list[str]:
  """Lines "tokenizer: a -> b" of inputs that changed and may."""
  lines = [
    f"{key}: {found.get(key)} -> {value}"
    for key, value in wanted.items()
    if found.get(key) != value
  ]
  refused = [line for line in lines if line.split(":")[0] not in allowed]
  if refused:
    raise ValueError(
      f"{workdir}: the checkpoint was made with other inputs:\n  "
      + "\n  ".join(refused)
      + "\nrestore them, use another --workdir, or name them in allow_changes"
    )
  return lines
