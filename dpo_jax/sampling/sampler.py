"""Answers from a policy: what is asked for, and how it is told.

A request is a prompt with an adapter and sampling parameters; requests of any
of them are answered in one program, by `generate`. A row's noise is keyed by
(seed, prompt, sample id, number of the token, token) and by nothing else, so
neither batch nor order nor mesh changes its tokens; rows of one prompt at
several temperatures, and the same prompt under several policies, share their
noise, which makes comparing them a paired comparison.

What is guaranteed of the arithmetic: with equal `batch_size`, cache and prefill
shapes on one machine a row's numbers are the same to the last bit, whatever its
slot, its neighbours and the time at which it entered. Other shapes may round
otherwise, by some 1e-6 of a logit, and change a token only where two candidates
are as close as that.
"""

import dataclasses
import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import jax

from dpo_jax.core import settings
from dpo_jax.data import preferences
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.model import gpt_neox, kv_cache
from dpo_jax.sampling import scheduler, stop


@dataclasses.dataclass(frozen=True)
class Request:
  """One answer to generate.

  Attributes:
    prompt: token ids.
    stream: 32 bits that stand for the prompt in its random key; see `stream`.
    sample_id: tells several answers to one prompt apart.
    temperature: 0 is greedy.
    top_k: draw among the k likeliest tokens; 0 is off.
    top_p: draw among the likeliest tokens that together reach this
      probability, after `temperature` and `top_k`; 1 is off.
    max_new_tokens: at most so many are generated.
    adapter: which adapter of a stack; -1 is none, the base itself.
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
  """One generated answer.

  `tokens` goes up to and including the token that ended it: EOS, or the one
  that completed a new human turn, or the last that was allowed. `text` leaves
  out EOS, and everything from the human turn on. `logps` has the log-prob of
  each token under the model itself, in nats: at temperature 1, before top_k and
  top_p.
  """

  tokens: tuple[int, ...]
  text: str
  finish_reason: Literal["eos", "turn", "length"]
  logps: tuple[float, ...] = dataclasses.field(default=(), compare=False)

  @property
  def mean_logp(self) -> float:
    """Mean of `logps`, to six digits: more are not the same on all shapes."""
    return float(f"{math.fsum(self.logps) / len(self.logps):.6g}")


@dataclasses.dataclass(frozen=True)
class Engine:
  """Shapes of the compiled programs; requests never change them.

  Attributes:
    batch_size: rows decoded at once; 0 takes as many as memory holds.
    length_multiple: prompts are read in lengths of such multiples.
    prefill_tokens: prompt tokens that are read in one call, about.
    chunk: steps between two looks at which rows have ended, at most.
    span: the cache is attended to in multiples of so many slots; 0 is whole.
    cache: what keys and values are kept in.
    cache_gib: memory for them where the device does not tell how much is free.
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
  """The 32 bits of a prompt's id that key its noise."""
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
  """Generates the answers of `requests`, lists of those that have ended.

  Args:
    config: the model's shape.
    base: base weights, already on the mesh if there is one.
    lora: None; or one adapter, which all rows take; or a stack of adapters, of
      which each request names its own.
    tokenizer: the model's tokenizer; rows of the unembedding at or past its
      `vocab_size` are never drawn.
    requests: what to generate.
    engine: the shapes and the seed.
    mesh: of `sharding.make_mesh`; rows are split over data and fsdp.
    wanted: indices of the requests to answer; all by default. Shapes depend on
      all of them, so that what is left of an interrupted run is the same.

  Yields:
    Pairs of a request's index and its sample.

  Raises:
    ValueError: a request does not fit the model, its adapters or the engine.
  """
  longest = max((len(r.prompt) for r in requests), default=0)
  newest = max((r.max_new_tokens for r in requests), default=0)
  check_positions(config, longest, newest)
  if config.vocab_size < tokenizer.vocab_size:
    raise ValueError(
      f"the model has {config.vocab_size} embeddings and the tokenizer"
      f" {tokenizer.vocab_size} tokens: they do not belong together"
    )
  _check_adapters(lora, requests)
  config = served(config, adapted=lora is not None)
  wanted = range(len(requests)) if wanted is None else sorted(wanted)
  serving = scheduler.Slots(
    config, base, lora, tokenizer, requests, engine, mesh, wanted
  )
  for ended in serving.run():
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
    adapted: whether there are adapters beside the base.
  """
  lora = config.lora if adapted else None
  return dataclasses.replace(config, lora=lora, remat="none", attention="dense")


def check_positions(
  config: gpt_neox.ModelConfig, prompt_tokens: int, new_tokens: int
) -> None:
  """Refuses lengths that the model has no positions for, with ValueError."""
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
  """The sample that a row's tokens make; the text has the last word."""
  end = stop.turn_end(tokenizer, tokens) or len(tokens)
  ids = tokens[:end]
  ended = ids[-1] == tokenizer.eos_id
  text = tokenizer.decode(ids[:-1] if ended else ids)
  before, turn, _ = text.partition(preferences.HUMAN)
  reason = "turn" if turn else "eos" if ended else "length"
  return Sample(tuple(ids), before, reason, tuple(logps[:end]))


def _check_adapters(lora: gpt_neox.Tree | None, requests) -> None:
  asked = {request.adapter for request in requests}
  leaves = jax.tree.leaves(lora)
  count = leaves[0].shape[1] if leaves and leaves[0].ndim == 4 else 0
  if bad := sorted(index for index in asked if not -1 <= index < count):
    raise ValueError(
      f"requests name adapter {bad[0]}, but there is no stack that holds it"
      f" ({count} stacked)"
    )
