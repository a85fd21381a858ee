"""Sampling jobs: policies, prompts, temperatures, samples; their requests."""

import dataclasses
import logging
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from dpo_jax.core import settings as settings_lib
from dpo_jax.core import sharding
from dpo_jax.data import preferences, sources
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.io import records, remote
from dpo_jax.sampling import sampler

_log = logging.getLogger(__name__)

# Most decoding steps between two looks at which rows have ended. Not a setting:
# it changes neither memory nor any response.
CHUNK = 32


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model to sample from.

  Attributes:
    name: of its rows and its file, such as "dpo".
    path: a model directory in Hugging Face form, or a hub id (user/name, or
      user/name@revision).
    adapter: a PEFT directory or hub id; "" for none.
    steps_of: a directory of PEFT directories step-000050, ..., or a hub id with
      such branches: each becomes a policy of that step; "" for none.
    temperatures: 0 is greedy.
  """

  name: str
  path: str
  adapter: str
  steps_of: str
  temperatures: tuple[float, ...]

  def __post_init__(self):
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
      raise ValueError(
        f"policy name {self.name!r} must be 1 to 64 letters, digits, '.', '_'"
        " or '-', and begin with a letter or digit: it names a file"
      )
    if self.adapter and self.steps_of:
      raise ValueError(
        f"policy {self.name!r} has both adapter and steps_of: make it two"
      )
    settings_lib.check(self, f"policy {self.name!r}: ")
    if not self.temperatures:
      raise ValueError(f"policy {self.name!r} has no temperatures")
    if len(set(self.temperatures)) != len(self.temperatures):
      raise ValueError(
        f"policy {self.name!r} repeats a temperature: {self.temperatures}"
      )


@dataclasses.dataclass(frozen=True)
class PromptSettings:
  """Source of the prompts and their chosen responses."""

  source: sources.SourceSettings
  filters: sources.FilterSettings
  limit: int


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """A sampling run; every field is explained in configs/sample.py."""

  policies: dict[str, Policy]
  data: PromptSettings
  tokenizer: str
  top_k: int
  top_p: float
  max_new_tokens: int
  max_prompt_tokens: int
  samples_per_prompt: int
  seed: int
  batch_size: int
  length_multiple: int
  prefill_tokens: int
  span: int
  cache: Literal["model", "float32", "bfloat16", "int8"]
  cache_gib: float
  merge_adapters: bool
  dtype: Literal["float32", "bfloat16"]
  mesh: sharding.MeshSettings
  mesh_over: Literal["process", "all"]

  def __post_init__(self):
    if not self.policies:
      raise ValueError("policies is empty: name at least one model")
    settings_lib.check(self)

  def engine(self) -> sampler.Engine:
    """Shapes and seed for the sampler."""
    return sampler.Engine(
      batch_size=self.batch_size,
      length_multiple=self.length_multiple,
      prefill_tokens=self.prefill_tokens,
      chunk=CHUNK,
      span=self.span,
      cache=self.dtype if self.cache == "model" else self.cache,
      cache_gib=self.cache_gib,
      seed=self.seed,
    )


@dataclasses.dataclass(frozen=True)
class Job:
  """One response file: a policy at one step."""

  policy: Policy
  step: int | None
  adapter: str

  @property
  def stem(self) -> str:
    step = "" if self.step is None else f"-step-{self.step:06d}"
    return self.policy.name + step


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt with its chosen response; tokens without the first `cut`."""

  comparison: preferences.Comparison
  tokens: tuple[int, ...]
  cut: int


def jobs(settings: SamplingSettings) -> list[Job]:
  """The files to write, policy by policy, ascending by step.

  Raises:
    ValueError: two of them are one file, or there is no checkpoint.
  """
  found = []
  for policy in settings.policies.values():
    if policy.steps_of:
      found += [
        Job(policy, step, path) for step, path in _steps(policy.steps_of)
      ]
    else:
      found.append(Job(policy, None, policy.adapter))
  stems = [job.stem for job in found]
  twice = sorted({stem for stem in stems if stems.count(stem) > 1})
  if twice:
    raise ValueError(f"several policies would write {twice}: rename them")
  return found


def _steps(directory: str) -> list[tuple[int, str]]:
  """The steps of a directory, or of a hub id's branches, ascending."""
  found = remote.steps(directory)
  if not found:
    raise ValueError(
      f"steps_of={directory!r} holds no directory like step-000050: train with"
      " export_adapters, or leave this policy out"
    )
  return found


def prompts(
  settings: SamplingSettings, tokenizer: tokenizer_lib.Tokenizer
) -> list[Prompt]:
  """Prompts in file order, each id once; long ones keep their end."""
  source = settings.data.source
  if source.kind == "unpaired":
    raise ValueError(
      "data.source.kind='unpaired' has no chosen responses to compare with:"
      " name a source of pairs"
    )
  loaded = sources.load(
    source, "eval", settings.data.filters, settings.data.limit
  )
  where = source.eval_path or source.train_path
  return encoded(loaded.rows, tokenizer, settings.max_prompt_tokens, where)


def encoded(
  pairs: Sequence[preferences.Comparison],
  tokenizer: tokenizer_lib.Tokenizer,
  longest: int,
  where: str,
) -> list[Prompt]:
  """The prompts of pairs, each id once; logs how many are left out or cut.

  Args:
    pairs: in order.
    tokenizer: the model's; a prompt with one of its special tokens is left out.
    longest: tokens that a prompt keeps, its last ones.
    where: source of the pairs, for messages.

  Raises:
    ValueError: nothing is left.
  """
  rows = list({row.id: row for row in pairs}.values())
  kept = [row for row in rows if not tokenizer.special_in(row.prompt)]
  if not kept:
    raise ValueError(
      f"{where}: every prompt holds a special token of the tokenizer"
    )
  encoded = tokenizer.encode_all([row.prompt for row in kept])
  notes = {
    "repeating an earlier pair": len(pairs) - len(rows),
    "left out for a special token in the prompt": len(rows) - len(kept),
    f"cut to their last {longest} tokens": sum(
      len(tokens) > longest for tokens in encoded
    ),
  }
  for reason, count in notes.items():
    if count:
      _log.warning("%d prompts %s", count, reason)
  return [
    Prompt(row, tuple(tokens[-longest:]), max(len(tokens) - longest, 0))
    for row, tokens in zip(kept, encoded, strict=True)
  ]


def wanted(
  settings: SamplingSettings, job: Job, prompts: list[Prompt], adapter: int
) -> tuple[list[records.Response], list[sampler.Request]]:
  """All rows of the file in order, without responses, and their requests."""
  rows, requests = [], []
  for prompt in prompts:
    for temperature in job.policy.temperatures:
      for sample_id in range(settings.samples_per_prompt):
        row = question(
          prompt,
          model=job.policy.name,
          step=job.step,
          temperature=temperature,
          top_k=settings.top_k,
          top_p=settings.top_p,
          max_new_tokens=settings.max_new_tokens,
          seed=settings.seed,
          sample_id=sample_id,
        )
        rows.append(row)
        requests.append(request(row, prompt, adapter))
  return rows, requests


def question(prompt: Prompt, **fields: Any) -> records.Response:
  """A row without its response; `fields` are those from `model` on."""
  return records.Response(
    prompt_id=prompt.comparison.id,
    prompt=prompt.comparison.prompt,
    response="",
    chosen=prompt.comparison.chosen,
    token_count=0,
    finish_reason="length",
    mean_logp=None,
    cut_prompt_tokens=prompt.cut,
    subset=prompt.comparison.subset,
    **fields,
  )


def request(
  row: records.Response, prompt: Prompt, adapter: int
) -> sampler.Request:
  """The sampler's request for a row; `adapter` as in `Request`."""
  return sampler.Request(
    prompt=prompt.tokens,
    stream=sampler.stream(row.prompt_id),
    sample_id=row.sample_id,
    temperature=row.temperature,
    top_k=row.top_k,
    top_p=row.top_p,
    max_new_tokens=row.max_new_tokens,
    adapter=adapter,
  )


def with_response(
  row: records.Response, sample: sampler.Sample
) -> records.Response:
  """The row with its response.

  Raises:
    ValueError: the model's log-probs are not finite, as its weights are too
      large.
  """
  if not math.isfinite(sample.mean_logp):
    raise ValueError(
      f"model {row.model!r} at step {row.step}: the log-prob of its response to"
      f" prompt {row.prompt_id} is {sample.mean_logp}: its weights are too"
      " large for the dtype"
    )
  return dataclasses.replace(
    row,
    response=sample.text,
    token_count=len(sample.tokens),
    finish_reason=sample.finish_reason,
    mean_logp=sample.mean_logp,
  )
