"""Answers to a few held-out prompts as training goes on, into samples.jsonl.

The policy is sampled where it lies: on the mesh of the run, from the arrays
that the step trains, adapters beside the base. Nothing is copied, and the
step's program is not touched. Noise depends on prompt and seed alone, so that
the answers of two steps differ by what was learned between them.

The rows of one step are appended together. A run that goes on drops those
after the step it goes on from, as in metrics.jsonl: their weights are lost.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax

from dpo_jax.core import distributed, preemption, sharding
from dpo_jax.data import dataset
from dpo_jax.io import atomic, jsonl, records
from dpo_jax.sampling import jobs, sampler
from dpo_jax.training import config as config_lib
from dpo_jax.training import setup

FILE = "samples.jsonl"

COLUMNS = ("prompt", "answer", "chosen", "tokens", "ended", "mean log-prob")


@dataclasses.dataclass(frozen=True)
class Sampler:
  """What is asked, and where the answers go."""

  path: pathlib.Path
  config: config_lib.TrainSettings
  made: setup.Run
  prompts: tuple[jobs.Prompt, ...]

  def due(self, done: int) -> bool:
    """Whether answers are to be written after so many updates."""
    if not self.prompts:
      return False
    every = self.config.samples.every
    ends = (0, self.made.feed.steps)
    return done in ends or bool(every and done % every == 0)

  def catch_up(
    self, start: int, params: Any, writer: Any, watch: preemption.Watch
  ) -> None:
    """Makes the file what it was at step `start`, where a run begins.

    Drops what later steps left, and writes the answers of `start` if they are
    due and not there.

    Raises:
      ValueError: a row of the file is malformed.
      preemption.Interrupted: the run was asked to stop meanwhile.
      errors.Stopped: another process could not read the file.
    """
    if not self.prompts:
      return
    there = False
    with distributed.raise_on_all(f"reading {self.path.name}"):
      if distributed.is_main():
        there = self._trim(start)
    # The first process has the file, and decides.
    if distributed.all_gather(there)[0] or not self.due(start):
      return
    if not self.write(start, params, writer, watch):
      raise watch.interrupted(f"in the samples at step {start}")

  def _trim(self, start: int) -> bool:
    """Keeps the rows up to `start`; whether all of its own are there."""
    with jsonl.Store(self.path, records.Response) as store:
      rows = store.rows
    wanted = [prompt.comparison.id for prompt in self.prompts]
    own = [row.prompt_id for row in rows if row.step == start]
    # A run that starts at step 0 starts over.
    there = start > 0 and own == wanted
    last = start if there else start - 1
    kept = [row for row in rows if start and (row.step or 0) <= last]
    if len(kept) < len(rows):
      text = b"".join(map(records.encode, kept)).decode()
      atomic.write_text(self.path, text)
    return there

  def write(
    self, step: int, params: Any, writer: Any, watch: preemption.Watch
  ) -> bool:
    """Appends the policy's answers; False if the run is to stop before.

    All processes must call it; the first one writes.

    Args:
      step: updates that the policy has had.
      params: {"base", "lora"}, on the mesh of the run.
      writer: takes the table for the trackers.
      watch: is asked whether to stop.
    """
    rows = [self._question(prompt, step) for prompt in self.prompts]
    requests = [
      jobs.request(row, prompt, -1)
      for row, prompt in zip(rows, self.prompts, strict=True)
    ]
    made = self.made
    lora = params["lora"] if made.model.lora is not None else None
    # The host hands prompts over and fetches answers, all of them small.
    with jax.transfer_guard("allow"):
      for ended in sampler.generate(
        made.model,
        params["base"],
        lora,
        made.tokenizer,
        requests,
        self._engine(),
        made.mesh,
      ):
        for index, sample in ended:
          rows[index] = jobs.with_response(rows[index], sample)
        if watch.requested():
          return False
    if distributed.is_main():
      with jsonl.Store(self.path, records.Response) as store:
        store.append_many(rows)
    writer.table(step, "samples", COLUMNS, [_cells(row) for row in rows])
    return True

  def _question(self, prompt: jobs.Prompt, step: int) -> records.Response:
    how = self.config.samples
    return jobs.question(
      prompt,
      model=self.config.objective,
      step=step,
      temperature=how.temperature,
      top_k=how.top_k,
      top_p=how.top_p,
      max_new_tokens=how.max_new_tokens,
      seed=self.config.seed,
      sample_id=0,
    )

  def _engine(self) -> sampler.Engine:
    """All prompts at once: a slot each, in whole rows of the mesh."""
    shards = sharding.data_shards(self.made.mesh)
    return sampler.Engine(
      batch_size=-(-len(self.prompts) // shards) * shards,
      length_multiple=64,
      prefill_tokens=4096,
      chunk=jobs.CHUNK,
      span=0,
      cache=self.config.model.dtype,
      # Decides nothing where the rows are given.
      cache_gib=1.0,
      seed=self.config.seed,
    )


def make(
  config: config_lib.TrainSettings, made: setup.Run, path: pathlib.Path
) -> Sampler:
  """The sampler of a run, which may have no prompts to answer.

  Raises:
    ValueError: every prompt is left out, or the model has too few positions.
  """
  how = config.samples
  if not how.prompts:
    return Sampler(path, config, made, ())
  sampler.check_positions(made.model, how.max_prompt_tokens, how.max_new_tokens)
  loaded = dataset.load(config.data, "eval", config.data.max_eval)
  # One of each source in turn.
  turns = itertools.zip_longest(*(one.rows for one in loaded.values()))
  rows = [row for turn in turns for row in turn if row is not None]
  first = list({row.id: row for row in rows}.values())[: how.prompts]
  where = f"held-out rows of {', '.join(config.data.use)}"
  prompts = jobs.encoded(first, made.tokenizer, how.max_prompt_tokens, where)
  return Sampler(path, config, made, tuple(prompts))


def _cells(row: records.Response) -> tuple:
  return (
    row.prompt,
    row.response,
    row.chosen,
    row.token_count,
    row.finish_reason,
    row.mean_logp,
  )
