"""Every policy's answers to the test prompts, one JSONL file a policy.

What an answer depends on is known before it is generated, so a run that was
interrupted makes the same batches again and runs those that lack a row. A
finished file stands in the order of prompts, temperatures and sample ids and
equals, byte for byte, the file of a run that nothing interrupted.
"""

import dataclasses
import logging
import pathlib
import re
import time
from typing import Any, Literal

import jax
import tqdm

from dpo_jax import (
  answer_files,
  comparisons,
  hf,
  model,
  partitioning,
  records,
  sampling,
  sources,
)
from dpo_jax import lora as lora_lib
from dpo_jax import tokenizer as tokenizer_lib

_log = logging.getLogger(__name__)

# Steps between two looks at the text for a human turn; no setting, because it
# changes neither memory nor any answer.
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model to sample from.

  Attributes:
    name: what its rows and its file are called, such as "dpo".
    path: a model directory in Hugging Face form, or a hub id.
    adapter: a PEFT directory; "" for none.
    steps_of: a directory of PEFT directories step-000050, ...: each becomes a
      policy of that step; "" for none.
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
    if not self.temperatures:
      raise ValueError(f"policy {self.name!r} has no temperatures")
    if len(set(self.temperatures)) != len(self.temperatures):
      raise ValueError(
        f"policy {self.name!r} repeats a temperature: {self.temperatures}"
      )


@dataclasses.dataclass(frozen=True)
class PromptSettings:
  """Where prompts and their chosen answers come from."""

  source: sources.SourceSettings
  filters: sources.FilterSettings
  limit: int


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
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
  merge_adapters: bool
  dtype: Literal["float32", "bfloat16"]
  mesh: partitioning.MeshSettings

  def __post_init__(self):
    if not self.policies:
      raise ValueError("policies is empty: name at least one model")
    for policy in self.policies.values():
      for temperature in policy.temperatures:
        sampling.check(temperature, self.top_k, self.top_p, self.max_new_tokens)
    for name in ("max_prompt_tokens", "samples_per_prompt"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    for policy in self.policies.values():
      _engine(self, policy)


@dataclasses.dataclass(frozen=True)
class _Job:
  """One file to write: one policy at one step."""

  policy: Policy
  step: int | None
  adapter: str

  @property
  def stem(self) -> str:
    step = "" if self.step is None else f"-step-{self.step:06d}"
    return self.policy.name + step


@dataclasses.dataclass(frozen=True)
class _Prompt:
  comparison: comparisons.Comparison
  tokens: tuple[int, ...]


def run(settings: AnswerSettings, workdir: pathlib.Path) -> list[pathlib.Path]:
  """Writes `workdir`/responses/<name>[-step-000050].jsonl for every policy.

  Everything is checked before the first model is loaded. Files that are
  complete are left alone, others are completed.

  Args:
    settings: what to sample from, on what, and how.
    workdir: where to write.

  Returns:
    The files, in the order of the policies and their steps.

  Raises:
    ValueError: an input is wrong, or a file holds answers of other weights,
      another tokenizer or other parameters than these.
  """
  if jax.process_count() > 1:
    raise ValueError("sampling runs in one process; start it on one host")
  sizes = dataclasses.asdict(settings.mesh)
  mesh = partitioning.make_mesh(**sizes)
  shards = partitioning.data_shards(mesh)
  if settings.batch_size % shards:
    raise ValueError(
      f"batch_size={settings.batch_size} must be a multiple of the data shards"
      f" of the mesh ({shards})"
    )
  jobs = _jobs(settings)
  for path in {job.policy.path for job in jobs}:
    sampling.check_positions(
      hf.read_config(path), settings.max_prompt_tokens, settings.max_new_tokens
    )
  tokenizer = tokenizer_lib.load(settings.tokenizer)
  prompts = _prompts(settings, tokenizer)
  models = _Models(settings, mesh)
  directory = workdir / "responses"
  return [
    _answer(settings, job, prompts, tokenizer, models, directory)
    for job in jobs
  ]


def _engine(settings: AnswerSettings, policy: Policy) -> sampling.Engine:
  return sampling.Engine(
    batch_size=settings.batch_size,
    rows_per_prompt=len(policy.temperatures) * settings.samples_per_prompt,
    length_multiple=settings.length_multiple,
    max_new_tokens=settings.max_new_tokens,
    chunk=_CHUNK,
    seed=settings.seed,
  )


def _jobs(settings: AnswerSettings) -> list[_Job]:
  jobs = []
  for policy in settings.policies.values():
    if policy.steps_of:
      jobs += [
        _Job(policy, step, path) for step, path in _steps(policy.steps_of)
      ]
    else:
      jobs.append(_Job(policy, None, policy.adapter))
  stems = [job.stem for job in jobs]
  twice = sorted({stem for stem in stems if stems.count(stem) > 1})
  if twice:
    raise ValueError(f"several policies would write {twice}: rename them")
  return jobs


def _steps(directory: str) -> list[tuple[int, str]]:
  """The steps of a directory's step-NNNNNN subdirectories, ascending."""
  found = []
  if pathlib.Path(directory).is_dir():
    for path in pathlib.Path(directory).iterdir():
      match = re.fullmatch(r"step-(\d+)", path.name)
      if match and path.is_dir():
        found.append((int(match[1]), str(path)))
  if not found:
    raise ValueError(
      f"steps_of={directory!r} holds no directory like step-000050: train with"
      " export_adapters, or leave this policy out"
    )
  return sorted(found)


def _prompts(
  settings: AnswerSettings, tokenizer: tokenizer_lib.Tokenizer
) -> list[_Prompt]:
  """Prompts in file order, each id once; long ones keep their end."""
  source = settings.data.source
  loaded = sources.load(
    source, "eval", settings.data.filters, settings.data.limit
  )
  rows = list({row.id: row for row in loaded.rows}.values())
  kept = [row for row in rows if not tokenizer.special_in(row.prompt)]
  if not kept:
    raise ValueError(
      f"{source.eval_path or source.train_path}: every prompt holds a special"
      " token of the tokenizer"
    )
  encoded = tokenizer.encode_all([row.prompt for row in kept])
  longest = settings.max_prompt_tokens
  notes = {
    "repeating an earlier pair": len(loaded.rows) - len(rows),
    "left out for a special token in the prompt": len(rows) - len(kept),
    f"cut to their last {longest} tokens": sum(
      len(tokens) > longest for tokens in encoded
    ),
  }
  for reason, count in notes.items():
    if count:
      _log.warning("%d prompts %s", count, reason)
  return [
    _Prompt(row, tuple(tokens[-longest:]))
    for row, tokens in zip(kept, encoded, strict=True)
  ]


class _Models:
  """Loads models when they are needed and keeps the last base."""

  def __init__(self, settings: AnswerSettings, mesh: Any):
    self.mesh = mesh
    self._dtype = settings.dtype
    self._merge = settings.merge_adapters
    self._path = ""
    self._loaded: Any = None

  def get(self, job: _Job) -> tuple[model.ModelConfig, Any, Any]:
    """(config, base, lora) of a job; lora is None without an adapter."""
    if self._path != job.policy.path:
      # Frees the old base before the next one is read.
      self._loaded = None
      self._loaded = hf.load(
        job.policy.path,
        dtype=self._dtype,
        remat="none",
        lora=None,
        param_dtype=self._dtype,
        mesh=self.mesh,
      )
      self._path = job.policy.path
    config, base = self._loaded
    if not job.adapter:
      return config, base, None
    lora_config, lora = hf.load_adapter(job.adapter, config, base)
    lora = jax.device_put(lora, partitioning.shardings(lora, self.mesh))
    adapted = dataclasses.replace(config, lora=lora_config)
    if self._merge:
      return config, lora_lib.merge(adapted, base, lora), None
    return adapted, base, lora


def _answer(settings, job, prompts, tokenizer, models, directory):
  """Completes one policy's file and returns its path."""
  path = directory / f"{job.stem}.jsonl"
  wanted, requests = _wanted(settings, job, prompts)
  with records.Store(path, records.Response) as store:
    answer_files.claim(path, _origin(settings, job), bool(store.rows))
    done = answer_files.match(path, store.rows, wanted)
    if len(done) < len(wanted):
      _generate(settings, job, tokenizer, models, requests, wanted, done, store)
    ordered = [done[index] for index in range(len(wanted))]
    text = b"".join(map(records.encode, ordered)).decode()
    if path.read_bytes() != text.encode():
      records.write_atomic(path, text)
  return path


def _wanted(settings, job, prompts):
  """Every row of the file, in order, still without its text; its request."""
  wanted, requests = [], []
  for prompt in prompts:
    stream = sampling.stream(prompt.comparison.id)
    for temperature in job.policy.temperatures:
      for sample_id in range(settings.samples_per_prompt):
        requests.append(
          sampling.Request(
            prompt=prompt.tokens,
            stream=stream,
            sample_id=sample_id,
            temperature=temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
          )
        )
        wanted.append(
          records.Response(
            prompt_id=prompt.comparison.id,
            prompt=prompt.comparison.prompt,
            response="",
            chosen=prompt.comparison.chosen,
            model=job.policy.name,
            step=job.step,
            temperature=temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            sample_id=sample_id,
            token_count=0,
            finish_reason="length",
          )
        )
  return wanted, requests


def _generate(
  settings, job, tokenizer, models, requests, wanted, done, store
) -> None:
  """Runs the batches that lack a row; adds their rows to `done`."""
  config, base, lora = models.get(job)
  engine = _engine(settings, job.policy)
  batches = sampling.plan(
    requests,
    engine,
    vocab_size=tokenizer.vocab_size,
    shards=partitioning.data_shards(models.mesh),
  )
  # The plan is of all requests, whatever is done: a batch that is run again
  # is the same batch, so its numbers are the same to the last bit.
  batches = [b for b in batches if any(i not in done for i in b.requests)]
  started, tokens = time.perf_counter(), 0
  with tqdm.tqdm(
    total=len(wanted), initial=len(done), desc=job.stem, unit="answer"
  ) as bar:
    for samples in sampling.generate(
      config, base, lora, tokenizer, requests, engine, models.mesh, batches
    ):
      tokens += sum(len(sample.tokens) for _, sample in samples)
      fresh = {
        index: dataclasses.replace(
          wanted[index],
          response=sample.text,
          token_count=len(sample.tokens),
          finish_reason=sample.finish_reason,
        )
        for index, sample in samples
        if index not in done
      }
      store.append_many(fresh.values())
      done |= fresh
      rate = tokens / (time.perf_counter() - started)
      bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
      bar.update(len(fresh))


def _origin(settings: AnswerSettings, job: _Job) -> dict[str, Any]:
  """What rows depend on and do not say themselves."""
  return {
    "model": answer_files.weights(job.policy.path),
    "adapter": answer_files.weights(job.adapter) if job.adapter else "",
    "tokenizer": answer_files.tokenizer(settings.tokenizer),
    "max_prompt_tokens": settings.max_prompt_tokens,
    "dtype": settings.dtype,
    "merge_adapters": settings.merge_adapters and bool(job.adapter),
  }
