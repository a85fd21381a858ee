"""A run's own programs, compiled with shapes alone: no weights, no items.

What stands for the items of a batch is `Lengths`, the means of HH.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from dpo_jax import (
  config_help,
  hf,
  hlo,
  model,
  optim,
  packing,
  partitioning,
  programs,
  recipe,
  steps,
)

# Completion tokens are dealt to shards unevenly, and a run's shapes hold its
# widest batch.
_SLACK = 1.25


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Mean tokens of an item, and the places in rows that it takes."""

  tokens: float
  places: float
  completion: float
  visible: float


# Measured on the 1,551 good pairs of HH's harmless-base at hand, profile
# "paper", 512 tokens, prompt 256, and the fill of rows of 1,024 tokens on one
# shard (benchmarks/data.md). By layout; SFT's items are chosen responses.
PAIRS = {
  "shared": Lengths(207.2, 221.1, 91.2, 27_126),
  "packed": Lengths(323.3, 344.8, 91.2, 38_137),
  "padded": Lengths(323.3, 1024.0, 91.2, 38_137),
}
EXAMPLES = {
  "packed": Lengths(156.8, 166.3, 40.8, 18_031),
  "padded": Lengths(156.8, 512.0, 40.8, 18_031),
}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one program on one device; `donated` outputs take no room."""

  arguments: int
  outputs: int
  donated: int
  temporary: int
  code: int

  @property
  def total(self) -> int:
    return (
      self.arguments + self.outputs - self.donated + self.temporary + self.code
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
  """One program, or why the compiler refused it.

  Attributes:
    name: "train" or "eval".
    memory: None where it does not fit.
    cost: what it does; None where it does not fit.
    refusal: the compiler's words, "" where it fits.
    seconds: how long it took to compile.
  """

  name: str
  memory: Memory | None
  cost: hlo.Cost | None
  refusal: str
  seconds: float


def compile_one(name: str, lower: Callable[[], Any]) -> Compiled:
  """Lowers and compiles a program; too little memory is a result."""
  started = time.perf_counter()
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
    return Compiled(name, None, None, refusal, time.perf_counter() - started)
  found = compiled.memory_analysis()
  memory = Memory(
    found.argument_size_in_bytes,
    found.output_size_in_bytes,
    found.alias_size_in_bytes,
    found.temp_size_in_bytes,
    found.generated_code_size_in_bytes,
  )
  took = time.perf_counter() - started
  return Compiled(name, memory, hlo.cost(compiled.as_text()), "", took)


def lengths(config: recipe.TrainSettings) -> Lengths:
  """The means that stand for the run's items."""
  table = PAIRS if config.objective == "dpo" else EXAMPLES
  found = table[config.data.layout]
  if config.data.layout == "padded":
    rows = 2 if config.objective == "dpo" else 1
    found = dataclasses.replace(found, places=rows * config.data.row_length)
  return found


def rows_of(config: recipe.TrainSettings, items: int, shards: int) -> int:
  """Rows on one device that hold so many items."""
  needed = items * lengths(config).places / config.data.row_length
  return max(math.ceil(needed / shards), 1)


def shape_of(config: recipe.TrainSettings, name: str) -> model.ModelConfig:
  """The model's config as training would have it, from its shape alone.

  Args:
    config: of the run.
    name: a size in configs/models.py; "" where `model.path` is a directory, or
      it or the tokenizer's id names a Pythia.

  Raises:
    ValueError: nothing says which shape it is.
  """
  path = config.model.path
  sizes = re.findall(r"pythia-([\d.]+[mb])\b", f"{path} {config.tokenizer}")
  if not name and pathlib.Path(path).is_dir():
    shape = hf.read_config(path)
  elif name or sizes:
    size = name.removeprefix("pythia-") or sizes[0]
    shape = model.ModelConfig(
      **config_help.load(f"configs/models.py:{size}").to_dict()
    )
  else:
    raise ValueError(
      f"model.path={path!r} is no directory and names no Pythia; say"
      " --model=SIZE, one of configs/models.py"
    )
  return dataclasses.replace(
    shape,
    dtype=config.model.dtype,
    remat=config.model.remat,
    lora=config.lora.config(),
    attention=config.model.attention,
    logit_chunk=config.model.logit_chunk,
  )


def compile_steps(
  config: recipe.TrainSettings,
  shape: model.ModelConfig,
  mesh: jax.sharding.Mesh,
  rows: int,
  names: tuple[str, ...] = ("train", "eval"),
) -> list[Compiled]:
  """The run's steps, compiled with shapes alone.

  Args:
    config: of the run.
    shape: its model.
    mesh: of the devices to compile for.
    rows: rows on one device, in one micro-batch.
    names: which of "train" and "eval".
  """
  programs.check(config, shape, mesh)
  tx = optim.make(config.optimizer, 1000, steps.trainable(shape))
  key = jax.eval_shape(lambda: jax.random.key(0))
  kept = config.model.param_dtype
  base = jax.eval_shape(lambda key: model.init(shape, key, kept), key)
  state = jax.eval_shape(programs.initial(shape, tx, config.guards), base, key)
  state = _laid(state, mesh)
  reference = _laid(base, mesh) if programs.keeps_reference(config) else None
  train, evaluate = programs.training(config, shape, tx, state, mesh)
  many = config.microbatches
  with jax.set_mesh(mesh):
    lowered = {
      "train": lambda: train.lower(
        state, reference, batch_of(config, mesh, rows, many)
      ),
      "eval": lambda: evaluate.lower(
        state.params, reference, batch_of(config, mesh, rows, 1)
      ),
    }
    with uncached(mesh):
      return [compile_one(name, lowered[name]) for name in names]


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


def batch_of(
  config: recipe.TrainSettings,
  mesh: jax.sharding.Mesh,
  rows: int,
  microbatches: int,
) -> packing.Batch:
  """The shapes of a batch with `rows` rows on each device."""
  shards = partitioning.data_shards(mesh)
  mean = lengths(config)
  share = mean.completion / mean.places
  width = rows * config.data.row_length * min(share * _SLACK, 1.0)
  width = -(-math.ceil(width) // 128) * 128
  lying = partitioning.batch_sharding(mesh, leading=1)

  def one(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((microbatches, *sizes), dtype, sharding=lying)

  token = one(rows * shards, config.data.row_length)
  completion = one(shards, width)
  kept = None
  if config.precompute_reference:
    kept = one(shards, width, dtype=jnp.float32)
  return packing.Batch(*(token,) * 5, *(completion,) * 3, reference=kept)


def _laid(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  return jax.tree.map(
    lambda x, lying: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lying),
    tree,
    partitioning.shardings(tree, mesh),
  )


def largest_rows(fits: Callable[[int], bool], start: int, limit: int) -> int:
  """The most rows that fit, by doubling and then by halving the gap.

  Up to eight rows it is exact, beyond to an eighth.

  Args:
    fits: compiles for so many rows.
    start: a first guess.
    limit: more are not tried.

  Returns:
    0 where not even one row fits.
  """
  low, high = 0, limit + 1
  at = min(max(start, 1), limit)
  while low < limit and (high > limit or high - low > max(1, low // 8)):
    if fits(at):
      low = at
    else:
      high = at
    upwards = low > 0 and high > limit
    at = min(2 * low, limit) if upwards else (low + high) // 2
    if not at:
      break
  return low
