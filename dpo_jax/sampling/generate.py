"""A sampling run: responses of every policy to the test prompts.

Policies of one base are sampled together: their adapters are stacked, and one
program decodes all of them, at all temperatures. Other bases, and adapters that
are merged or of another shape, follow one after another.

Rows are appended as responses end, so that an interrupted run continues with
the missing ones. A finished file is in the order of prompts, temperatures and
sample ids and equals, byte for byte, that of an uninterrupted run.

With several processes each samples a share of the prompts on its own devices,
independent of the others (`response_files`). Or all of them serve every prompt
together, on one mesh, and the first one writes.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from dpo_jax.core import console, distributed, sharding
from dpo_jax.core import settings as settings_lib
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.io import records
from dpo_jax.model import gpt_neox, hf
from dpo_jax.model import lora as lora_lib
from dpo_jax.sampling import capacity, response_files, sampler, summary
from dpo_jax.sampling import jobs as jobs_lib


@dataclasses.dataclass(frozen=True)
class _Group:
  """Jobs that are sampled together with one set of weights.

  `lora` is a stack of adapters, `adapters` each job's index in it, -1 for none.
  """

  jobs: tuple[jobs_lib.Job, ...]
  adapters: tuple[int, ...]
  config: gpt_neox.ModelConfig
  base: Any
  lora: Any


def run(
  settings: jobs_lib.SamplingSettings, workdir: pathlib.Path
) -> list[pathlib.Path]:
  """Writes `workdir`/responses/<name>[-step-000050].jsonl for every policy.

  All inputs are checked before the first model is loaded. Complete files are
  not touched, others are completed.

  Args:
    settings: policies, prompts and sampling parameters.
    workdir: the run directory.

  Returns:
    The files, in the order of the policies and their steps.

  Raises:
    ValueError: an input is wrong, or a file holds responses of other weights,
      another tokenizer or other parameters.
  """
  if not distributed.is_main():
    console.mute()
  with distributed.raise_on_all("reading the policies and prompts"):
    mesh, jobs, tokenizer, prompts = _prepare(settings)
    origins = response_files.origins(settings, jobs)
  _agree(settings, origins, prompts)
  files = {}
  for job, origin in zip(jobs, origins, strict=True):
    path = workdir / "responses" / f"{job.stem}.jsonl"
    wanted, _ = jobs_lib.wanted(settings, job, prompts, -1)
    files[job] = response_files.File(path, origin, wanted)
  with contextlib.ExitStack() as stack:
    writes = distributed.is_main() or settings.mesh_over == "process"
    response_files.open_all(stack, list(files.values()), writes)
    left = [
      job for job in jobs if len(files[job].done) < len(files[job].wanted)
    ]
    for group in _groups(settings, left, mesh):
      _generate(settings, group, files, tokenizer, prompts, mesh)
    if not distributed.is_main():
      # The first process reads and removes what the others wrote.
      stack.close()
    distributed.barrier("all prompts are sampled")
    rows = []
    with distributed.raise_on_all("merging the response files"):
      if distributed.is_main():
        for file in files.values():
          rows += response_files.merge(file)
  if distributed.is_main():
    table = summary.summary(rows)
    console.result(
      "\n".join(summary.lines(table)),
      "responses",
      lines=[dataclasses.asdict(line) for line in table],
    )
  return [file.path for file in files.values()]


def _prepare(settings: jobs_lib.SamplingSettings):
  """The mesh, the jobs, the tokenizer and the prompts."""
  alone = settings.mesh_over == "process"
  mesh = sharding.make_mesh(
    **dataclasses.asdict(settings.mesh),
    devices=jax.local_devices() if alone else jax.devices(),
  )
  if not (alone or settings.batch_size or jax.process_count() == 1):
    raise ValueError(
      "batch_size=0 depends on the free memory of each process, but with"
      " mesh_over='all' all must decode the same rows: set batch_size"
    )
  capacity.shards_of(settings.batch_size, mesh)
  jobs = jobs_lib.jobs(settings)
  for path in {job.policy.path for job in jobs}:
    sampler.check_positions(
      hf.read_config(path), settings.max_prompt_tokens, settings.max_new_tokens
    )
  tokenizer = tokenizer_lib.load(settings.tokenizer)
  return mesh, jobs, tokenizer, jobs_lib.prompts(settings, tokenizer)


def _agree(settings, origins, prompts) -> None:
  """Checks that all processes have the same config, files and prompts."""
  distributed.assert_equal(
    "the config", json.dumps(settings_lib.to_dict(settings))
  )
  distributed.assert_equal("a model or tokenizer", json.dumps(origins))
  ids = [prompt.comparison.id for prompt in prompts]
  distributed.assert_equal("the prompts", json.dumps(ids))


def _groups(settings, jobs, mesh) -> Iterator[_Group]:
  """Jobs with their weights; a base is freed before the next one is read."""
  for path in dict.fromkeys(job.policy.path for job in jobs):
    config, base = hf.load(
      path,
      dtype=settings.dtype,
      remat="none",
      lora=None,
      param_dtype=settings.dtype,
      mesh=mesh,
    )
    own = [job for job in jobs if job.policy.path == path]
    yield from _stacks(settings, own, config, base, mesh)
    del base


def _stacks(settings, jobs, config, base, mesh) -> Iterator[_Group]:
  """The jobs of one base, adapters of one shape in one stack."""
  shapes: dict[Any, list[tuple[jobs_lib.Job, Any]]] = {}
  plain = [job for job in jobs if not job.adapter]
  for job in jobs:
    if not job.adapter:
      continue
    shape, lora = hf.load_adapter(job.adapter, config, base)
    lora = jax.device_put(lora, sharding.shardings(lora, mesh))
    if settings.merge_adapters:
      adapted = dataclasses.replace(config, lora=shape)
      merged = lora_lib.merge(adapted, base, lora)
      yield _Group((job,), (-1,), config, merged, None)
    else:
      shapes.setdefault(shape, []).append((job, lora))
  for shape, adapted in shapes.items():
    own = tuple(job for job, _ in adapted)
    stacked = lora_lib.stack(config, [lora for _, lora in adapted])
    places = (*range(len(own)), *(-1 for _ in plain))
    shaped = dataclasses.replace(config, lora=shape)
    yield _Group((*own, *plain), places, shaped, base, stacked)
    plain = []
  if plain:
    yield _Group(tuple(plain), (-1,) * len(plain), config, base, None)


def _generate(settings, group, files, tokenizer, prompts, mesh) -> None:
  """Samples what the group's files lack, appending rows as they end."""
  places, requests = [], []
  for job, adapter in zip(group.jobs, group.adapters, strict=True):
    _, own = jobs_lib.wanted(settings, job, prompts, adapter)
    places += [(files[job], index) for index in range(len(own))]
    requests += own
  left = [
    at for at, (file, index) in enumerate(places) if index not in file.done
  ]
  missing = left
  if settings.mesh_over == "process":
    missing = _share(places, left)
  started, tokens = time.perf_counter(), 0
  names = [job.stem for job in group.jobs]
  name = ", ".join(names) if len(names) < 4 else f"{len(names)} models"
  with console.Bar(
    len(places) - len(left) + len(missing),
    name,
    "response",
    len(places) - len(left),
  ) as bar:
    for ended in sampler.generate(
      group.config,
      group.base,
      group.lora,
      tokenizer,
      requests,
      settings.engine(),
      mesh,
      missing,
    ):
      tokens += sum(len(sample.tokens) for _, sample in ended)
      for file, rows in _by_file(places, ended).items():
        file.append(rows)
      rate = tokens / (time.perf_counter() - started)
      bar.update(len(ended), {"tokens/s": round(rate)})


def _share(places, left) -> list[int]:
  """This process's share of the requests that are left, by prompt."""
  ids = {at: places[at][0].wanted[places[at][1]].prompt_id for at in left}
  prompts = list(dict.fromkeys(ids.values()))
  mine = set(prompts[jax.process_index() :: jax.process_count()])
  return [at for at in left if ids[at] in mine]


def _by_file(places, ended) -> dict[response_files.File, dict]:
  """The rows of samples that ended together, by their index in each file."""
  found: dict[response_files.File, dict[int, records.Response]] = {}
  for at, sample in ended:
    file, index = places[at]
    row = jobs_lib.with_response(file.wanted[index], sample)
    found.setdefault(file, {})[index] = row
  return found
