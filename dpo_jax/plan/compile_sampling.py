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
class Answering:
  """The programs of a sampling run, and what they work on.

  Attributes:
    layout: the run's shapes.
    rows: rows decoded on one device.
    weights: bytes of the base and adapters on a device.
    cache: bytes of the keys and values on a device.
    programs: "read", "enter" and "decode".
  """

  layout: capacity.Layout
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


def compile_answers(
  settings: jobs.SamplingSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  hbm: int | None,
) -> Answering:
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
  layout = capacity.layout(
    config, tokenizer, requests, engine, mesh, range(len(requests)), free
  )
  with jax.set_mesh(mesh), compile_training.uncached(mesh):
    state = _state(layout, mesh)
    found = _compile(layout, base, stack, state, mesh, tokenizer)
  return Answering(
    layout=layout,
    rows=layout.size // shards,
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


def _state(layout, mesh) -> decode.State:
  program, shared = layout.program, layout.program.shared
  prompt_slots = shared.slots if shared is not None else 0
  state = jax.eval_shape(
    lambda: decode.empty(program, layout.size, program.slots, prompt_slots)
  )
  return jax.tree.map_with_path(
    lambda path, leaf: jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=sharding.named(mesh, *decode.axes(path, leaf)),
    ),
    state,
  )


def _compile(layout, base, stack, state, mesh, tokenizer):
  """The programs, each with what lies beside it meanwhile."""
  program, reading = layout.program, layout.readings[0]
  everywhere = sharding.replicated(mesh)

  def whole(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

  def split(*sizes):
    lying = sharding.batch_sharding(mesh)
    return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=lying)

  table = whole((tokenizer.vocab_size, stop.TURN + 1), jnp.int8)
  rows = jax.tree.map(lambda x: whole(x.shape, x.dtype), state.rows)
  one = reading.size
  prompts = (split(one, reading.padded), split(one), split(one))
  prefix = jax.eval_shape(
    lambda *args: decode.read(program, *args), base, stack, *prompts
  )
  # As XLA lays them where nothing is said: rows apart, of the cache heads too.
  before = 0 if program.apart else 1
  cache = jax.tree.map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      sharding=sharding.named(mesh, *decode.cache_axes(path, x, before)),
    ),
    prefix.cache,
  )
  logits = jax.ShapeDtypeStruct(
    prefix.logits.shape,
    prefix.logits.dtype,
    sharding=sharding.named(mesh, "batch", "vocab"),
  )
  prefix = decode.Prefix(cache, logits)
  weights, waiting, kept = (
    compile_training.bytes_on_device(x) for x in ((base, stack), state, prefix)
  )
  int32 = whole((), jnp.int32)
  laid = seats = None
  if (shared := program.shared) is not None:
    laid = whole((shared.prompts,), jnp.int32)
    seats = decode.Seats(
      members=whole((shared.prompts, shared.places), jnp.int32),
      place=whole((layout.size,), jnp.int32),
      length=laid,
      span=shared.slots,
    )
  decoded = (base, stack)
  if program.apart:
    decoded = jax.eval_shape(decode.apart, base, stack)
  lower = {
    "read": (
      waiting,
      lambda: decode.read.lower(program, base, stack, *prompts),
    ),
    "enter": (
      weights,
      lambda: decode.enter.lower(
        program,
        state,
        prefix,
        whole((layout.size,), jnp.int32),
        rows,
        table,
        whole((), jnp.uint32),
        laid,
      ),
    ),
    "decode": (
      kept,
      lambda: decode.advance.lower(
        program,
        program.slots,
        *decoded,
        state,
        table,
        int32,
        int32,
        seats,
      ),
    ),
  }
  return [
    compile_training.compile_one(name, lowered, beside)
    for name, (beside, lowered) in lower.items()
  ]
