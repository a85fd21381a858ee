"""Responses of a policy to requests: prefill, continuous batching, stopping.

A request is a prompt with an adapter and sampling parameters; `generate` serves
requests with any of them in one compiled program. A row's noise is keyed by
(seed, prompt, sample id, index of the token, token) and by nothing else, so
neither batch nor order nor mesh changes its tokens; rows of one prompt at
several temperatures, and the same prompt under several policies, share their
noise, which makes comparing them a paired comparison.

With equal `batch_size`, cache and prefill shapes on one machine a row's numbers
are the same to the last bit, whatever its slot, its neighbors and the time at
which it enters. Other shapes may round otherwise, by some 1e-6 of a logit, and
change a token only where two candidates are as close as that.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from dpo_jax.core import settings
from dpo_jax.core import sharding as sharding_lib
from dpo_jax.data import preferences
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.model import gpt_neox, kv_cache
from dpo_jax.sampling import capacity, decode, stop
from dpo_jax.sampling import scheduler as scheduler_lib


@dataclasses.dataclass(frozen=True)
class Request:
  """One response to generate.

  Attributes:
    prompt: token ids.
    stream: the prompt's part of the random key, see `stream`.
    sample_id: distinguishes responses to one prompt.
    temperature: 0 is greedy.
    top_k: draw among the k likeliest tokens; 0 is off.
    top_p: draw among the likeliest tokens that together reach this
      probability, after `temperature` and `top_k`; 1 is off.
    max_new_tokens: EOS included.
    adapter: index in the adapter stack; -1 is the base itself.
  """

  prompt: tuple[int, ...]
  stream: int
  sample_id: int
  temperature: float
  top_k: int
  top_p: float
  max_new_tokens: int
  adapter: int = -1

  def __post_init__(self):
    settings.check(self)
    if not self.prompt:
      raise ValueError("a request's prompt must have at least one token")


@dataclasses.dataclass(frozen=True)
class Sample:
  """One response.

  `tokens` includes the token that ended it: EOS, or the one that completed a
  new human turn, or the last allowed. `text` is without EOS and everything from
  the human turn on. `logps` are log-probs of the tokens under the model, in
  nats: at temperature 1, before top_k and top_p.
  """

  tokens: tuple[int, ...]
  text: str
  finish_reason: Literal["eos", "turn", "length"]
  logps: tuple[float, ...] = dataclasses.field(default=(), compare=False)

  @property
  def mean_logp(self) -> float:
    """Mean of `logps`, to six digits: more depend on batch shapes."""
    return float(f"{math.fsum(self.logps) / len(self.logps):.6g}")


@dataclasses.dataclass(frozen=True)
class Engine:
  """Settings of compiled shapes, independent of the requests, and the seed.

  Attributes:
    batch_size: rows decoded together; 0 takes as many as memory holds.
    length_multiple: prompts are padded to multiples of this.
    prefill_tokens: about this many prompt tokens a prefill batch.
    chunk: most decoding steps between two looks at which rows have ended.
    span: the cache grows and shrinks by this many slots; 0 keeps it whole.
    cache: dtype of keys and values.
    cache_gib: their memory where a device does not report what is free.
    seed: of all noise.
  """

  batch_size: int
  length_multiple: int
  prefill_tokens: int
  chunk: int
  span: int
  cache: kv_cache.Kind
  cache_gib: float
  seed: int

  def __post_init__(self):
    settings.check(self)


def stream(prompt_id: str) -> int:
  """32 bits of the hash of a prompt's id, which key its noise."""
  return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:4], "big")


def generate(
  config: gpt_neox.ModelConfig,
  base: gpt_neox.Tree,
  lora: gpt_neox.Tree | None,
  tokenizer: tokenizer_lib.Tokenizer,
  requests: Sequence[Request],
  engine: Engine,
  mesh: Any = None,
  wanted: Collection[int] | None = None,
) -> Iterator[list[tuple[int, Sample]]]:
  """Generates responses to `requests`, in lists of those that ended together.

  Args:
    config: the model's shape.
    base: base weights, on the mesh if there is one.
    lora: None; or one adapter, for all rows; or a stack of adapters, of which
      each request names its own.
    tokenizer: the model's; ids at or past its `vocab_size` are never drawn.
    requests: what to generate.
    engine: shapes and seed.
    mesh: of `sharding.make_mesh`; rows are split over data and fsdp.
    wanted: indices of the requests to serve; all by default. Shapes depend on
      all of them, so that an interrupted run continues with the same ones.

  Yields:
    Pairs of a request's index and its sample.

  Raises:
    ValueError: a request does not fit the model, its adapters or the engine.
  """
  _check(config, lora, tokenizer, requests)
  config = served(config, adapted=lora is not None)
  wanted = range(len(requests)) if wanted is None else sorted(wanted)
  shapes = capacity.shapes(config, tokenizer, requests, engine, mesh, wanted)
  capacity.say(shapes, engine)
  program = shapes.program
  scheduler = scheduler_lib.Scheduler(shapes, requests, engine)
  if not scheduler.unfinished:
    return
  with _on(mesh):
    table, seed, chunk = _replicated(
      (stop.table(tokenizer), np.uint32(engine.seed), np.int32(engine.chunk)),
      mesh,
    )
    state = decode.empty(program, shapes.size, *scheduler.slots)
    weights = (base, lora)
    if unstacks(mesh):
      weights = decode.unstack(base, lora)
  prefix = None
  while scheduler.unfinished:
    with _on(mesh):
      while True:
        if batch := scheduler.next_prefill():
          prompts = _prompts(batch, requests, tokenizer.eos_id, mesh)
          prefix = decode.prefill(program, base, lora, *prompts)
        insertion = scheduler.insert()
        if insertion is None:
          break
        state = decode.resize(state, *scheduler.slots)
        source, rows, prompt_source = _replicated(
          (insertion.source, insertion.rows, insertion.prompt_source), mesh
        )
        state = decode.insert(
          program, state, prefix, source, rows, table, seed, prompt_source
        )
      quota = _replicated(np.int32(scheduler.quota()), mesh)
      state = decode.resize(state, *scheduler.slots)
      prefixes = None
      if scheduler.prefixes is not None:
        prefixes = _replicated(scheduler.prefixes.arrays(), mesh)
      state = decode.advance(
        program, scheduler.slots, *weights, state, table, chunk, quota, prefixes
      )
      ended, again = scheduler.collect(tokenizer, _fetched(state))
      if again.any():
        state = decode.resume(state, _replicated(again, mesh))
    if ended:
      yield [
        (index, finish(tokenizer, tokens, logps))
        for index, tokens, logps in ended
      ]


def served(
  config: gpt_neox.ModelConfig, *, adapted: bool
) -> gpt_neox.ModelConfig:
  """The config that sampling programs are compiled for.

  Args:
    config: of the model, however it was trained.
    adapted: whether there are adapters.
  """
  lora = config.lora if adapted else None
  return dataclasses.replace(config, lora=lora, remat="none", attention="dense")


def check_positions(
  config: gpt_neox.ModelConfig, prompt_tokens: int, new_tokens: int
) -> None:
  """Refuses lengths past the model's positions, with ValueError."""
  if prompt_tokens + new_tokens > config.max_positions:
    raise ValueError(
      f"{prompt_tokens} prompt tokens and max_new_tokens={new_tokens} pass the"
      f" model's {config.max_positions} positions: lower max_prompt_tokens or"
      " max_new_tokens"
    )


def finish(
  tokenizer: tokenizer_lib.Tokenizer,
  tokens: list[int],
  logps: list[float],
) -> Sample:
  """The sample of a row's tokens, cut where the text begins a human turn."""
  end = stop.turn_end(tokenizer, tokens) or len(tokens)
  ids = tokens[:end]
  ended = ids[-1] == tokenizer.eos_id
  text = tokenizer.decode(ids[:-1] if ended else ids)
  before, turn, _ = text.partition(preferences.HUMAN)
  reason = "turn" if turn else "eos" if ended else "length"
  return Sample(tuple(ids), before, reason, tuple(logps[:end]))


def _check(config, lora, tokenizer, requests) -> None:
  longest = max((len(r.prompt) for r in requests), default=0)
  newest = max((r.max_new_tokens for r in requests), default=0)
  check_positions(config, longest, newest)
  if config.vocab_size < tokenizer.vocab_size:
    raise ValueError(
      f"the model has {config.vocab_size} embeddings and the tokenizer"
      f" {tokenizer.vocab_size} tokens: they do not belong together"
    )
  leaves = jax.tree.leaves(lora)
  count = leaves[0].shape[1] if leaves and leaves[0].ndim == 4 else 0
  adapters = {request.adapter for request in requests}
  if bad := sorted(index for index in adapters if not -1 <= index < count):
    raise ValueError(
      f"requests name adapter {bad[0]}, but there is no stack that holds it"
      f" ({count} stacked)"
    )


def unstacks(mesh) -> bool:
  """Whether to decode with a copy of the weights, unstacked and transposed.

  On one CPU device, which would copy each layer's slice of a stack at every
  step. Accelerators read slices in place and have no memory to spare; meshes of
  CPUs are for tests, and training samples from the very arrays it trains.
  """
  alone = mesh is None or mesh.size == 1
  return alone and capacity.platform(mesh) == "cpu"


def _on(mesh):
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _replicated(tree, mesh):
  """NumPy arrays, equal in all processes, on every device."""
  if mesh is None:
    return jax.device_put(tree)
  sharding = sharding_lib.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      np.shape(x), sharding, lambda index: np.asarray(x)[index]
    ),
    tree,
  )


def _prompts(batch, requests, eos_id, mesh):
  """Arguments of `decode.prefill`: prompts [P, T], lengths and adapters [P]."""
  prompts = np.full((batch.size, batch.padded), eos_id, np.int32)
  length = np.ones(batch.size, np.int32)
  adapter = np.full(batch.size, -1, np.int32)
  for row, group in enumerate(batch.groups):
    request = requests[group[0]]
    length[row] = len(request.prompt)
    prompts[row, : length[row]] = request.prompt
    adapter[row] = request.adapter
  arrays = (prompts, length, adapter)
  if mesh is None:
    return jax.device_put(arrays)
  return sharding_lib.put(arrays, mesh)


def _fetched(state):
  """What the scheduler reads of a state, in NumPy."""
  return dataclasses.replace(
    state,
    **jax.device_get(
      {
        name: getattr(state, name)
        for name in ("tokens", "logps", "count", "done", "turn")
      }
    ),
  )
