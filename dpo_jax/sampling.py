"""Answers from a policy: one prefill a prompt, one decode loop a batch.

A batch is a fixed number of prompt slots, each answered by a fixed number of
rows that differ in temperature and sample id: the prompt is read once and its
cache is repeated. Prompts are padded on the left to a multiple of
`length_multiple`, so that all rows of a batch write the same cache slot at the
same step, and so that the padding of a prompt depends on its own length alone.

A row's noise is keyed by (seed, prompt, sample id, token number) and by nothing
else, so neither batch nor order nor mesh changes its tokens; rows of one prompt
at several temperatures, and the same prompt under several policies, share
their noise, which makes comparing them a paired comparison.

Letters: B rows, P prompt slots, T prompt tokens, M new tokens.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from dpo_jax import comparisons, decoding, model, partitioning
from dpo_jax import tokenizer as tokenizer_lib

# Below this a float32 temperature only adds rounding to what greedy gives.
LOWEST_TEMPERATURE = 1e-4


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
  """

  prompt: tuple[int, ...]
  stream: int
  sample_id: int
  temperature: float
  top_k: int
  top_p: float
  max_new_tokens: int

  def __post_init__(self):
    check(self.temperature, self.top_k, self.top_p, self.max_new_tokens)
    if not self.prompt:
      raise ValueError("a request's prompt must have at least one token")
    if not 0 <= self.stream < 2**32 or not 0 <= self.sample_id < 2**32:
      raise ValueError(
        f"stream={self.stream} and sample_id={self.sample_id} must be in"
        " [0, 2^32)"
      )


@dataclasses.dataclass(frozen=True)
class Sample:
  """One generated answer.

  `tokens` goes up to and including the token that ended it: EOS, or the one
  that completed a new human turn, or the last that was allowed. `text` leaves
  out EOS, and everything from the human turn on.
  """

  tokens: tuple[int, ...]
  text: str
  finish_reason: Literal["eos", "turn", "length"]


@dataclasses.dataclass(frozen=True)
class Engine:
  """Shapes of the compiled programs; requests never change them.

  Attributes:
    batch_size: rows decoded at once, at most.
    rows_per_prompt: rows that share one prefill.
    length_multiple: prompts are padded to a multiple of so many tokens.
    max_new_tokens: room for new tokens in the cache.
    chunk: steps between two looks at the text for a new human turn.
    seed: of all noise.
  """

  batch_size: int
  rows_per_prompt: int
  length_multiple: int
  max_new_tokens: int
  chunk: int
  seed: int

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      low = 0 if field.name == "seed" else 1
      if not low <= value < 2**32:
        raise ValueError(f"{field.name}={value} must be at least {low}")


@dataclasses.dataclass(frozen=True)
class Batch:
  """One call of the programs: what stands in each row, and static shapes.

  `slots` holds, for each prompt slot, its rows as indices of requests; a slot
  with fewer than `rows_per_prompt` is filled with idle rows.
  """

  slots: tuple[tuple[int, ...], ...]
  prompt_slots: int
  rows_per_prompt: int
  padded: int
  candidates: int

  @property
  def requests(self) -> tuple[int, ...]:
    return tuple(index for slot in self.slots for index in slot)


def check(temperature, top_k, top_p, max_new_tokens) -> None:
  """Refuses sampling parameters that mean nothing, with ValueError."""
  if not math.isfinite(temperature) or temperature < 0:
    raise ValueError(
      f"temperature={temperature} must be finite and at least 0 (0 is greedy)"
    )
  if 0 < temperature < LOWEST_TEMPERATURE:
    raise ValueError(
      f"temperature={temperature} is too small for float32: use 0 for greedy"
      f" decoding or at least {LOWEST_TEMPERATURE}"
    )
  if top_k < 0:
    raise ValueError(f"top_k={top_k} must be at least 0 (0 is off)")
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p} must be in (0, 1] (1 is off)")
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")


def stream(prompt_id: str) -> int:
  """The 32 bits of a prompt's id that key its noise."""
  return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:4], "big")


def plan(
  requests: Sequence[Request], engine: Engine, *, vocab_size: int, shards: int
) -> list[Batch]:
  """Batches that hold every request once, longest prompts first.

  The longest come first so that a lack of memory shows at once.

  Args:
    requests: what to generate.
    engine: the shapes.
    vocab_size: of the tokenizer.
    shards: into how many parts a mesh splits the rows.

  Raises:
    ValueError: `shards` does not divide `batch_size`, or a request wants more
      new tokens than the cache has room for.
  """
  if engine.batch_size % shards:
    raise ValueError(
      f"batch_size={engine.batch_size} must be a multiple of the data shards"
      f" of the mesh ({shards})"
    )
  copies = min(engine.rows_per_prompt, engine.batch_size // shards)
  prompt_slots = engine.batch_size // copies // shards * shards
  buckets: dict[int, dict[Any, list[int]]] = {}
  for index, request in enumerate(requests):
    if request.max_new_tokens > engine.max_new_tokens:
      raise ValueError(
        f"max_new_tokens={request.max_new_tokens} of a request is more than"
        f" the engine's {engine.max_new_tokens}"
      )
    multiple = engine.length_multiple
    padded = -(-len(request.prompt) // multiple) * multiple
    groups = buckets.setdefault(padded, {})
    groups.setdefault(request.prompt, []).append(index)
  candidates = _candidates(requests, vocab_size)
  batches = []
  for padded, groups in sorted(buckets.items(), reverse=True):
    slots = [
      tuple(rows[at : at + copies])
      for rows in groups.values()
      for at in range(0, len(rows), copies)
    ]
    for at in range(0, len(slots), prompt_slots):
      chosen = tuple(slots[at : at + prompt_slots])
      batches.append(Batch(chosen, prompt_slots, copies, padded, candidates))
  return batches


def generate(
  config: model.ModelConfig,
  base: model.Tree,
  lora: model.Tree | None,
  tokenizer: tokenizer_lib.Tokenizer,
  requests: Sequence[Request],
  engine: Engine,
  mesh: Any = None,
  batches: Iterable[Batch] | None = None,
) -> Iterator[list[tuple[int, Sample]]]:
  """Generates the answers of `requests`, a list for each batch as it ends.

  Args:
    config: the model's shape.
    base: base weights, already on the mesh if there is one.
    lora: adapters, kept beside the base; None switches them off.
    tokenizer: the model's tokenizer; rows of the unembedding at or past its
      `vocab_size` are never drawn.
    requests: what to generate.
    engine: the shapes and the seed.
    mesh: of `partitioning.make_mesh`; rows are split over data and fsdp.
    batches: which batches of `plan(requests, ...)` to run; all by default.

  Yields:
    Pairs of a request's index and its sample.

  Raises:
    ValueError: a request does not fit the model or the engine.
  """
  longest = max((len(r.prompt) for r in requests), default=0)
  check_positions(config, longest, engine.max_new_tokens)
  if config.vocab_size < tokenizer.vocab_size:
    raise ValueError(
      f"the model has {config.vocab_size} embeddings and the tokenizer"
      f" {tokenizer.vocab_size} tokens: they do not belong together"
    )
  if batches is None:
    shards = partitioning.data_shards(mesh) if mesh is not None else 1
    batches = plan(
      requests, engine, vocab_size=tokenizer.vocab_size, shards=shards
    )
  lora_config = config.lora if lora is not None else None
  config = dataclasses.replace(config, lora=lora_config, remat="none")
  for batch in batches:
    context = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with context:
      tokens, ends = _run(
        (config, base, lora), tokenizer, requests, engine, mesh, batch
      )
    yield [
      (index, _finish(tokenizer, requests[index], tokens[row], ends[row]))
      for row, index in _rows(batch)
    ]


def check_positions(
  config: model.ModelConfig, prompt_tokens: int, new_tokens: int
) -> None:
  """Refuses lengths that the model has no positions for, with ValueError."""
  if prompt_tokens + new_tokens > config.max_positions:
    raise ValueError(
      f"{prompt_tokens} prompt tokens and max_new_tokens={new_tokens} pass the"
      f" model's {config.max_positions} positions: lower max_prompt_tokens or"
      " max_new_tokens"
    )


def _candidates(requests: Sequence[Request], vocab_size: int) -> int:
  """The static size of top-k ranking that serves all requests."""
  if any(r.top_k == 0 and r.top_p < 1 for r in requests):
    return vocab_size
  return min(max((r.top_k for r in requests), default=0), vocab_size)


def _rows(batch: Batch) -> Iterator[tuple[int, int]]:
  """(row, request index) of every row that is not idle."""
  for slot, indices in enumerate(batch.slots):
    for copy, index in enumerate(indices):
      yield slot * batch.rows_per_prompt + copy, index


def _arrays(batch: Batch, requests: Sequence[Request], filler: int):
  """Prompts [P, T] and the rows' parameters as NumPy arrays."""
  size = batch.prompt_slots * batch.rows_per_prompt
  prompts = np.full((batch.prompt_slots, batch.padded), filler, np.int32)
  # Idle rows: one token of prompt, no token to generate.
  rows = decoding.Rows(
    stream=np.zeros(size, np.uint32),
    sample_id=np.zeros(size, np.uint32),
    temperature=np.zeros(size, np.float32),
    top_k=np.zeros(size, np.int32),
    top_p=np.ones(size, np.float32),
    limit=np.zeros(size, np.int32),
    length=np.ones(size, np.int32),
  )
  for slot, indices in enumerate(batch.slots):
    prompt = requests[indices[0]].prompt
    prompts[slot, batch.padded - len(prompt) :] = prompt
    at = slot * batch.rows_per_prompt
    rows.length[at : at + batch.rows_per_prompt] = len(prompt)
  for row, index in _rows(batch):
    request = requests[index]
    rows.limit[row] = request.max_new_tokens
    for name in ("stream", "sample_id", "temperature", "top_k", "top_p"):
      getattr(rows, name)[row] = getattr(request, name)
  return prompts, rows


def _run(policy, tokenizer, requests, engine, mesh, batch):
  """Tokens [B, M] of a batch, and the number of tokens of each row, [B]."""
  config, base, lora = policy
  sharding = None if mesh is None else partitioning.batch_sharding(mesh)
  prompts, rows = jax.device_put(
    _arrays(batch, requests, tokenizer.eos_id), sharding
  )
  program = decoding.Program(
    config=config,
    padded=batch.padded,
    room=engine.max_new_tokens,
    eos_id=tokenizer.eos_id,
    vocab_size=tokenizer.vocab_size,
    candidates=batch.candidates,
  )
  seed = np.uint32(engine.seed)
  state = decoding.prefill(program, base, lora, prompts, rows, seed)
  ends: dict[int, int] = {}
  step = 0
  while True:
    tokens, count, done = jax.device_get(
      (state.tokens, state.count, state.done)
    )
    done = done.copy()
    for row, _ in _rows(batch):
      if row not in ends:
        end = _turn_end(tokenizer, tokens[row, : count[row]].tolist(), step)
        if end:
          ends[row], done[row] = end, True
    step = int(count.max())
    if done.all():
      return tokens, [ends.get(row, n) for row, n in enumerate(count.tolist())]
    state = dataclasses.replace(state, done=jax.device_put(done, sharding))
    until = np.int32(step + engine.chunk)
    state = decoding.decode(program, base, lora, state, rows, until)


def _turn_end(tokenizer, tokens: list[int], checked: int) -> int:
  """How many tokens it took to begin a new human turn; 0 if there is none.

  The first `checked` tokens are known to hold no turn. The text decides, so
  that every tokenisation is found.
  """
  # The turn ends in a colon: only a token with one can have completed it.
  if not any(_has_colon(tokenizer, token) for token in tokens[checked:]):
    return 0
  return _first_with_turn(tokenizer, tokens)


def _first_with_turn(tokenizer, tokens: list[int]) -> int:
  def holds(count: int) -> bool:
    return comparisons.HUMAN in tokenizer.decode(tokens[:count])

  if not holds(len(tokens)):
    return 0
  return bisect.bisect_left(range(len(tokens) + 1), True, key=holds)


@functools.lru_cache(maxsize=1 << 16)
def _has_colon(tokenizer, token: int) -> bool:
  return comparisons.HUMAN[-1] in tokenizer.decode([token])


def _finish(tokenizer, request: Request, tokens, end: int) -> Sample:
  """The sample that a row's first `end` tokens make."""
  ids = tokens[:end].tolist()
  ended = ids[-1] == tokenizer.eos_id
  text = tokenizer.decode(ids[:-1] if ended else ids)
  before, turn, _ = text.partition(comparisons.HUMAN)
  if turn:
    return Sample(tuple(ids), before, "turn")
  reason = "eos" if ended else "length"
  return Sample(tuple(ids), text, reason)
