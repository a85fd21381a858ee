"""A run's own programs, compiled with shapes alone: no weights, no items.

What stands for the items of a batch is in `mean_batch`.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax.cli import help as help_lib
from dpo_jax.core import hardware, sharding
from dpo_jax.model import gpt_neox, hf, quantization
from dpo_jax.plan import mean_batch
from dpo_jax.training import config as config_lib
from dpo_jax.training import optimizer, setup, step


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one program on one device; `donated` outputs take no room.

  `beside` is what stays there meanwhile though the program does not take it.
  """

  arguments: int
  outputs: int
  donated: int
  temporary: int
  code: int
  beside: int = 0

  @property
  def total(self) -> int:
    made = self.outputs - self.donated + self.temporary + self.code
    return self.arguments + made + self.beside


@dataclasses.dataclass(frozen=True)
class Compiled:
  """One program, or why the compiler refused it.

  Attributes:
    name: "train", "eval", or of `compile_sampling`.
    memory: None where it does not fit.
    refusal: the compiler's words, "" where it fits.
  """

  name: str
  memory: Memory | None
  refusal: str = ""

  def fits(self, chip: hardware.Chip | None) -> bool:
    """Whether it fits a device; its memory may be unknown."""
    if self.memory is None:
      return False
    return chip is None or self.memory.total <= chip.hbm_bytes


def compile_one(
  name: str, lower: Callable[[], Any], beside: int = 0
) -> Compiled:
  """Lowers and compiles a program; too little memory is a result.

  Args:
    name: of the program.
    lower: gives the lowered program.
    beside: bytes that stay on the device and that it does not take.
  """
  try:
    compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
      raise
    wanted = re.search(
      r"[Uu]sed [\d.]+\w+ of [\d.]+\w+|total.*?\(.*?\).*?\)", text
    )
    refusal = wanted[0] if wanted else text.splitlines()[0]
    return Compiled(name, None, refusal)
  found = compiled.memory_analysis()
  memory = Memory(
    found.argument_size_in_bytes,
    found.output_size_in_bytes,
    found.alias_size_in_bytes,
    found.temp_size_in_bytes,
    found.generated_code_size_in_bytes,
    beside,
  )
  return Compiled(name, memory)


def shape_of(
  config: config_lib.TrainSettings, name: str
) -> gpt_neox.ModelConfig:
  """The model's config as training would have it, from its shape alone.

  Args:
    config: of the run.
    name: a size in configs/models.py; "" where `model.path` is a directory, or
      it or the tokenizer's id names a Pythia.

  Raises:
    ValueError: nothing says which shape it is.
  """
  path = config.model.path
  if not name and pathlib.Path(path).is_dir():
    shape = hf.read_config(path)
  else:
    shape = shape_named(name, path, config.tokenizer)
  return dataclasses.replace(
    shape,
    dtype=config.model.dtype,
    remat=config.model.remat,
    lora=config.lora.config(),
    attention=config.model.attention,
    logit_chunk=config.model.logit_chunk,
    vocab_tile=config.model.vocab_tile,
  )


def shape_named(name: str, *ids: str) -> gpt_neox.ModelConfig:
  """The Pythia of this size, or if it is "", the one that an id names.

  Raises:
    ValueError: none does.
  """
  sizes = re.findall(r"pythia-([\d.]+[mb])\b", " ".join(ids))
  size = name.removeprefix("pythia-") or next(iter(sizes), "")
  if not size:
    raise ValueError(
      f"{' and '.join(map(repr, ids))} are no directory and name no Pythia; say"
      " --model=SIZE, one of configs/models.py"
    )
  return gpt_neox.ModelConfig(
    **help_lib.load(f"configs/models.py:{size}").to_dict()
  )


def random_base(
  shape: gpt_neox.ModelConfig, key: jax.Array, param_dtype: str
) -> dict[str, Any]:
  """Random base weights, stored as `model.param_dtype` says."""
  if param_dtype == "int8":
    return quantization.base(gpt_neox.init(shape, key))
  return gpt_neox.init(shape, key, param_dtype)


def compile_steps(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  rows: int,
  names: tuple[str, ...] = ("train", "eval"),
) -> list[Compiled]:
  """The run's steps, compiled with shapes alone.

  Args:
    config: of the run.
    shape: its model.
    mesh: of the devices to compile for.
    rows: of a training micro-batch on one device; an evaluation's batch is not
      split.
    names: which of "train" and "eval".
  """
  setup.check_attention(config, shape, mesh)
  tx = optimizer.make(config.optimizer, 1000, step.trainable(shape))
  key = jax.eval_shape(lambda: jax.random.key(0))
  kept = config.model.param_dtype
  base = jax.eval_shape(lambda key: random_base(shape, key, kept), key)
  state = jax.eval_shape(setup.initial_state(shape, tx), base, key)
  state = laid(state, mesh)
  reference = laid(base, mesh) if config.keeps_reference else None
  train, evaluate = setup.jit_steps(config, shape, tx, state, mesh)
  many = config.microbatches
  at_once = mean_batch.rows_of(
    config, config.eval_batch_size, sharding.data_shards(mesh)
  )
  least = bytes_on_device((state, reference))
  chip = hardware.chip(mesh.devices.flat[0].device_kind)
  if chip and least > chip.hbm_bytes:
    # No compiler is needed to know.
    refusal = (
      f"state and reference alone take {least / hardware.GIB:.2f} of"
      f" {chip.hbm_bytes / hardware.GIB:.2f} GiB a device"
    )
    return [Compiled(name, None, refusal) for name in names]
  # An evaluation has no use for the optimizer's state, but it is there.
  beside = {"train": 0, "eval": bytes_on_device(state.opt_state)}
  with jax.set_mesh(mesh):
    lowered = {
      "train": lambda: train.lower(
        state, reference, mean_batch.batch_of(config, mesh, rows, many)
      ),
      "eval": lambda: evaluate.lower(
        state.params, reference, mean_batch.batch_of(config, mesh, at_once, 1)
      ),
    }
    with uncached(mesh):
      return [compile_one(name, lowered[name], beside[name]) for name in names]


@contextlib.contextmanager
def uncached(mesh: jax.sharding.Mesh) -> Iterator[None]:
  """Programs for devices that are elsewhere cannot be read from a cache."""
  if mesh.devices.flat[0].platform in ("cpu", jax.default_backend()):
    yield
    return
  before = jax.config.jax_enable_compilation_cache
  # JAX looks at the setting once a process, unless the cache is reset.
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def laid(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """A tree's shapes as they lie on a mesh, by the rules of `sharding`."""
  return jax.tree.map(
    lambda x, lying: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lying),
    tree,
    sharding.shardings(tree, mesh),
  )


def bytes_on_device(tree: Any) -> int:
  """Bytes of a tree of shapes with shardings on one device, without padding."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  )
