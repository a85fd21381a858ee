"""A sampling run's own programs, compiled with shapes alone.

What stands for the requests are prompts of the greatest length, enough of them
to fill every slot, each at all of the run's temperatures: no real set of
prompts needs larger programs.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp

from dpo_jax.core import sharding
from dpo_jax.model import gpt_neox, lora
from dpo_jax.plan import compile_training
from dpo_jax.sampling import capacity, decode, jobs, sampler, stop

# Pythia's tokenizer; rows of the unembedding beyond it are padding.
TOKENS = 50_277


@dataclasses.dataclass(frozen=True)
class SamplingPrograms:
  """The programs of a sampling run, and what they work on.

  Attributes:
    shapes: the run's shapes.
    rows: rows decoded on one device.
    weights: bytes of the base and adapters on a device.
    cache: bytes of the keys and values on a device.
    programs: "prefill", "insert" and "decode".
  """

  shapes: capacity.Shapes
  rows: int
  weights: int
  cache: int
  programs: list[compile_training.Compiled]


def stand_ins(
  settings: jobs.SamplingSettings, rows: int, adapter: int
) -> list[sampler.Request]:
  """At least so many requests, as long as the settings allow."""
  temperatures = sorted(
    {t for policy in settings.policies.values() for t in policy.temperatures}
  )
  each = len(temperatures) * settings.samples_per_prompt
  return [
    sampler.Request(
      prompt=(number,) * settings.max_prompt_tokens,
      stream=number,
      sample_id=sample,
      temperature=temperature,
      top_k=settings.top_k,
      top_p=settings.top_p,
      max_new_tokens=settings.max_new_tokens,
      adapter=adapter,
    )
    for number in range(-(-rows // each))
    for temperature in temperatures
    for sample in range(settings.samples_per_prompt)
  ]


def compile_programs(
  settings: jobs.SamplingSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  hbm: int | None,
) -> SamplingPrograms:
  """The programs with which a model would answer.

  Args:
    settings: of the sampling run.
    shape: the model; with `shape.lora` one adapter stands beside the base.
    mesh: of the devices to compile for.
    hbm: bytes of a device; None takes `settings.cache_gib` for the cache.

  Raises:
    ValueError: not one row fits beside the weights.
  """
  adapted = shape.lora is not None
  shape = dataclasses.replace(shape, dtype=settings.dtype)
  config = sampler.served(shape, adapted=adapted)
  base, stack = _weights(config, settings, mesh)
  weights = compile_training.bytes_on_device((base, stack))
  engine = settings.engine()
  free = int(engine.cache_gib * 2**30)
  if hbm is not None:
    free = max(int((hbm - weights) * capacity.CACHE_SHARE), 0)
  shards = sharding.data_shards(mesh)
  most = engine.batch_size or capacity.MOST_ROWS * shards
  requests = stand_ins(settings, most, 0 if adapted else -1)
  tokenizer = types.SimpleNamespace(
    eos_id=0, vocab_size=min(TOKENS, config.vocab_size)
  )
  shapes = capacity.shapes(
    config, tokenizer, requests, engine, mesh, range(len(requests)), free
  )
  with jax.set_mesh(mesh), compile_training.uncached(mesh):
    state = _state(shapes, mesh)
    found = _compile(shapes, base, stack, state, mesh, tokenizer)
  return SamplingPrograms(
    shapes=shapes,
    rows=shapes.size // shards,
    weights=weights,
    cache=compile_training.bytes_on_device((state.cache, state.prompts)),
    programs=found,
  )


def _weights(config, settings, mesh):
  """The base, and a stack of one adapter or None, as `answers` loads them."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  base = jax.eval_shape(
    lambda key: gpt_neox.init(config, key, settings.dtype), key
  )
  base = compile_training.sharded(base, mesh)
  if config.lora is None:
    return base, None
  stack = jax.eval_shape(
    lambda key: lora.stack(config, [gpt_neox.init_lora(config, key)]), key
  )
  return base, compile_training.sharded(stack, mesh)


def _described(tree, mesh):
  """Shapes with the shardings of a `decode.State` or `decode.Prefix`."""
  return jax.tree.map_with_path(
    lambda path, leaf: jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=sharding.named(mesh, *decode.axes(path, leaf)),
    ),
    tree,
  )


def _state(shapes, mesh) -> decode.State:
  program, shared = shapes.program, shapes.program.shared
  prompt_slots = shared.slots if shared is not None else 0
  state = jax.eval_shape(
    lambda: decode.empty(program, shapes.size, program.slots, prompt_slots)
  )
  return _described(state, mesh)


def _compile(shapes, base, stack, state, mesh, tokenizer):
  """The programs, each with the bytes of what else is on the device."""
  program, batch = shapes.program, shapes.prefills[0]
  everywhere = sharding.replicated(mesh)
  by_rows = sharding.batch_sharding(mesh)

  def whole(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

  def split(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=by_rows)

  table = whole((tokenizer.vocab_size, stop.TURN + 1), jnp.int8)
  rows = jax.tree.map(lambda x: whole(x.shape, x.dtype), state.rows)
  prompts = (split(batch.size, batch.padded), split(batch.size))
  prompts += (split(batch.size),)
  prefix = jax.eval_shape(
    lambda *args: decode.prefill(program, *args), base, stack, *prompts
  )
  prefix = _described(prefix, mesh)
  weights, waiting, kept = (
    compile_training.bytes_on_device(x) for x in ((base, stack), state, prefix)
  )
  prompt_source = prefixes = None
  if (shared := program.shared) is not None:
    prompt_source = whole((shared.prompts,))
    prefixes = decode.PrefixTable(
      prefix_to_rows=whole((shared.prompts, shared.rows)),
      row_to_prefix=whole((shapes.size,)),
      length=prompt_source,
    )
  decoded, reads = (base, stack), (program.slots, shared.slots if shared else 0)
  if sampler.unstacks(mesh):
    decoded = jax.eval_shape(decode.unstack, base, stack)
  slots = whole((shapes.size,))
  seed = whole((), jnp.uint32)
  lower = {
    "prefill": (
      waiting,
      lambda: decode.prefill.lower(program, base, stack, *prompts),
    ),
    "insert": (
      weights,
      lambda: decode.insert.lower(
        program, state, prefix, slots, rows, table, seed, prompt_source
      ),
    ),
    "decode": (
      kept,
      lambda: decode.advance.lower(
        program, reads, *decoded, state, table, whole(()), whole(()), prefixes
      ),
    ),
  }
  return [
    compile_training.compile_one(name, lowered, beside)
    for name, (beside, lowered) in lower.items()
  ]
