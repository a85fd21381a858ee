"""Responses to a few held-out prompts during training, into samples.jsonl.

The policy is sampled on the mesh of the run from the arrays that the step
trains, without a copy. Noise depends on prompt and seed alone, so that the
responses of two steps differ by what was learned between them.

The rows of one step are appended together. A resumed run drops those after its
checkpoint, as in metrics.jsonl.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dpo_jax.core import distributed, preemption, sharding
from dpo_jax.data import dataset
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.io import atomic, jsonl, records
from dpo_jax.model import gpt_neox
from dpo_jax.sampling import jobs, sampler
from dpo_jax.training import config as config_lib

FILE = "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Samples the policy of a run; never with `rows` ().

  Attributes:
    path: of the file.
    rows: a row a prompt, without step and response.
    every: updates between samplings; 0: only at the first step and the last.
    generate: the rows' samples under params, as from `sampler.generate`.
  """

  path: pathlib.Path
  rows: tuple[records.Response, ...]
  every: int
  generate: Callable[[Any], Iterator[list[tuple[int, sampler.Sample]]]]

  def catch_up(
    self, start: int, due: bool, params: Any, watch: preemption.Watch
  ) -> None:
    """Prepares the file where a run starts or resumes at step `start`.

    Drops the rows of later steps, and samples at `start` if that is `due` and
    its rows are not complete.

    Raises:
      ValueError: a row of the file is malformed.
      preemption.Interrupted: a signal came meanwhile.
      errors.Stopped: another process could not read the file.
    """
    complete = False
    with distributed.raise_on_all(f"reading {self.path.name}"):
      if distributed.is_main():
        complete = self._trim(start)
    # The first process has the file, and decides.
    if distributed.all_gather(complete)[0] or not due:
      return
    if not self.write(start, params, watch):
      raise watch.interrupted(f"in the samples at step {start}")

  def write(self, step: int, params: Any, watch: preemption.Watch) -> bool:
    """Appends the policy's responses; False if a signal came before.

    All processes must call it; the first one writes.
    """
    rows = [dataclasses.replace(row, step=step) for row in self.rows]
    # Prompts and responses cross between host and device; they are small.
    with jax.transfer_guard("allow"):
      for ended in self.generate(params):
        for index, sample in ended:
          rows[index] = jobs.with_response(rows[index], sample)
        if watch.requested():
          return False
    if distributed.is_main():
      with jsonl.Store(self.path, records.Response) as store:
        store.append_many(rows)
    return True

  def _trim(self, start: int) -> bool:
    """Drops rows after step `start`; whether its own are complete."""
    with jsonl.Store(self.path, records.Response) as store:
      found = store.rows
    wanted = [row.prompt_id for row in self.rows]
    own = [row.prompt_id for row in found if row.step == start]
    # A run that starts at step 0 starts over.
    complete = start > 0 and own == wanted
    last = start if complete else start - 1
    kept = [row for row in found if start and (row.step or 0) <= last]
    if len(kept) < len(found):
      text = b"".join(map(records.encode, kept)).decode()
      atomic.write_text(self.path, text)
    return complete


def make(
  config: config_lib.TrainSettings,
  model: gpt_neox.ModelConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path,
) -> Sampler:
  """The sampler of a run, with its prompts.

  Raises:
    ValueError: every prompt is left out, or the model has too few positions.
  """
  how = config.samples
  prompts: list[jobs.Prompt] = []
  if how.prompts:
    sampler.check_positions(model, how.max_prompt_tokens, how.max_new_tokens)
    loaded = dataset.load(config.data, "eval", config.data.max_eval)
    # One of each source in turn.
    turns = itertools.zip_longest(*(one.rows for one in loaded.values()))
    pairs = [pair for turn in turns for pair in turn if pair is not None]
    first = list({pair.id: pair for pair in pairs}.values())[: how.prompts]
    where = f"held-out rows of {', '.join(config.data.use)}"
    prompts = jobs.encoded(first, tokenizer, how.max_prompt_tokens, where)
  rows = [
    jobs.question(
      prompt,
      model=config.objective,
      step=None,
      temperature=how.temperature,
      top_k=0,
      top_p=1.0,
      max_new_tokens=how.max_new_tokens,
      seed=config.seed,
      sample_id=0,
    )
    for prompt in prompts
  ]
  shards = sharding.data_shards(mesh)
  # A slot for each prompt, rounded up to the mesh's data shards.
  engine = sampler.Engine(
    batch_size=-(-max(len(rows), 1) // shards) * shards,
    length_multiple=64,
    prefill_tokens=4096,
    chunk=jobs.CHUNK,
    span=0,
    cache=config.model.dtype,
    # Without effect where the batch size is given.
    cache_gib=1.0,
    seed=config.seed,
  )

  def generate(params):
    requests = [
      jobs.request(row, prompt, -1)
      for row, prompt in zip(rows, prompts, strict=True)
    ]
    lora = params["lora"] if model.lora is not None else None
    return sampler.generate(
      model, params["base"], lora, tokenizer, requests, engine, mesh
    )

  return Sampler(workdir / FILE, tuple(rows), how.every, generate)
