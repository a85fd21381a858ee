"""Responses during training: the policy's own, and without effect on it."""

import dataclasses
import itertools
import os
import signal

import jax
import pytest
import running

from dpo_jax.data import sources, tokenizer
from dpo_jax.io import records
from dpo_jax.model import hf
from dpo_jax.sampling import decode
from dpo_jax.sampling import sampler as sampler_lib
from dpo_jax.training import eval_samples, train

# Three prompts of six, at steps 0, 3, 6 and, the last, 7.
ASKED = {
  "samples.prompts": 3,
  "samples.every": 3,
  "samples.temperature": 0.7,
  "samples.max_new_tokens": 6,
  "samples.max_prompt_tokens": 16,
}


@pytest.fixture(scope="module")
def programs():
  """The names of the programs that the run of `sampled` compiled."""
  return []


@pytest.fixture(scope="module")
def sampled(config, programs, tmp_path_factory):
  """An uninterrupted run with samples."""

  def listen(event, seconds, **about):
    if event == "/jax/core/compile/backend_compile_duration":
      programs.append(about["fun_name"])

  workdir = tmp_path_factory.mktemp("sampled") / "run"
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    train.run(config(**ASKED), workdir)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  return workdir


def rows(workdir):
  return records.read(workdir / eval_samples.FILE, records.Response)


def test_the_first_prompts_are_answered_at_every_interval(sampled, run_files):
  loaded = sources.read_file(str(run_files / "test.jsonl")).rows[:3]
  found = rows(sampled)
  assert [(row.step, row.prompt_id) for row in found] == [
    (step, one.id) for step in (0, 3, 6, 7) for one in loaded
  ]
  words = tokenizer.load(run_files / "tokenizer")
  for row, one in zip(found, loaded * 4, strict=True):
    assert (row.prompt, row.chosen) == (one.prompt, one.chosen)
    assert (row.model, row.temperature, row.seed) == ("dpo", 0.7, 5)
    assert 1 <= row.token_count <= 6
    assert row.cut_prompt_tokens == len(words.encode(one.prompt)) - 16
  # Noise is the same at all steps: what differs was learned.
  logps = [[r.mean_logp for r in found if r.step == s] for s in (0, 3, 6, 7)]
  assert all(a != b for a, b in itertools.pairwise(logps))


def test_the_responses_are_the_policys(sampled, run_files):
  """With its adapters, unmerged, as they were at that step."""
  shape, base = hf.load(
    run_files / "model",
    dtype="float32",
    remat="none",
    lora=None,
    param_dtype="float32",
  )
  words = tokenizer.load(run_files / "tokenizer")
  engine = sampler_lib.Engine(8, 64, 4096, 32, 0, "float32", 1.0, 5)
  for step in (0, 7):
    own = [row for row in rows(sampled) if row.step == step]
    adapted, lora = shape, None
    if step:
      path = sampled / "adapters" / f"step-{step:06d}"
      adapter, lora = hf.load_adapter(path, shape, base)
      adapted = dataclasses.replace(shape, lora=adapter)
    requests = [
      sampler_lib.Request(
        tuple(words.encode(row.prompt)[-16:]),
        sampler_lib.stream(row.prompt_id),
        0,
        0.7,
        0,
        1.0,
        6,
      )
      for row in own
    ]
    found = dict(
      itertools.chain.from_iterable(
        sampler_lib.generate(adapted, base, lora, words, requests, engine)
      )
    )
    for index, row in enumerate(own):
      sample = found[index]
      assert (row.response, row.token_count) == (
        sample.text,
        len(sample.tokens),
      )


def test_training_is_what_it_is_without_them(sampled, programs, whole):
  def count(name):
    return sum(name in one for one in programs)

  # Decoding is compiled once for all four steps.
  assert count("advance") == 1
  assert count("train_step") == count("eval_step") == 1
  assert not (whole / eval_samples.FILE).exists()
  assert running.read(sampled) == running.read(whole)
  assert running.weights(sampled) == running.weights(whole)


# --- going on


@pytest.fixture
def asked(monkeypatch):
  """One entry for each time that the policy is sampled."""
  calls = []
  generate = sampler_lib.generate

  def counting(*arguments):
    calls.append(1)
    return generate(*arguments)

  monkeypatch.setattr(sampler_lib, "generate", counting)
  return calls


def test_going_on_gives_the_same_file(
  sampled, config, tmp_path, monkeypatch, asked
):
  """From the checkpoint of step 4."""
  whole = (sampled / eval_samples.FILE).read_bytes()
  lines = whole.splitlines(keepends=True)
  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    running.at_step(patch, 5, running.interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.run(config(**ASKED), workdir)
  path = workdir / eval_samples.FILE
  assert path.read_bytes() == b"".join(lines[:6])
  # As a kill after step 6 leaves it, while its rows were appended.
  path.write_bytes(b"".join(lines[:7]) + lines[7][:40])
  asked.clear()
  train.run(config(**ASKED), workdir)
  assert path.read_bytes() == whole
  # Only those of steps 6 and 7 are sampled again.
  assert len(asked) == 2


@pytest.mark.parametrize(
  ("left", "start", "kept", "there"),
  # All rows of step 6 are there; some are; it has none; all is started over.
  [(12, 6, 9, True), (7, 6, 6, False), (9, 4, 6, False), (9, 0, 0, False)],
)
def test_what_a_run_that_goes_on_finds(
  sampled, tmp_path, left, start, kept, there
):
  lines = (sampled / eval_samples.FILE).read_bytes().splitlines(keepends=True)
  path = tmp_path / eval_samples.FILE
  path.write_bytes(b"".join(lines[:left]) + b"".join(lines[left:])[:40])
  found = eval_samples.Sampler(path, tuple(rows(sampled)[:3]), 3, iter)
  assert found._trim(start) is there
  assert path.read_bytes() == b"".join(lines[:kept])


@pytest.mark.slow
def test_stopped_between_two_answers(sampled, config, tmp_path, monkeypatch):
  """A request to stop during samples loses neither a row nor the step."""
  changes = config(**ASKED)
  workdir = tmp_path / "run"
  generate = sampler_lib.generate
  seen = []

  def stopping(*arguments):
    for ended in generate(*arguments):
      seen.append(1)
      if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
      yield ended

  with monkeypatch.context() as patch:
    patch.setattr(sampler_lib, "generate", stopping)
    with pytest.raises(Exception, match="after step 3, which is saved"):
      train.run(changes, workdir)
  assert {row.step for row in rows(workdir)} == {0}
  train.run(changes, workdir)
  assert (workdir / eval_samples.FILE).read_bytes() == (
    sampled / eval_samples.FILE
  ).read_bytes()


def test_lengths_that_the_model_does_not_have_are_refused(config, tmp_path):
  long = ASKED | {"samples.max_prompt_tokens": 59}
  with pytest.raises(ValueError, match="pass the model's 64 positions"):
    train.run(config(**long), tmp_path / "run")
  # Before anything is compiled or written.
  assert not (tmp_path / "run" / "config.json").exists()
  assert not (tmp_path / "run" / eval_samples.FILE).exists()


def test_the_weights_are_those_of_the_step(config, tmp_path, monkeypatch):
  """The very buffers of the training mesh."""

  def pointers(tree):
    return [
      shard.data.unsafe_buffer_pointer()
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
    ]

  write, prefill, advance = (
    eval_samples.Sampler.write,
    decode.prefill,
    decode.advance,
  )
  trained, used = [], []

  def writing(self, step, params, watch):
    trained.append(pointers(params["base"]))
    return write(self, step, params, watch)

  def reading(program, base, *arguments):
    used.append(pointers(base) == trained[-1])
    return prefill(program, base, *arguments)

  def advancing(program, slots, base, *arguments):
    used.append(pointers(base) == trained[-1])
    return advance(program, slots, base, *arguments)

  monkeypatch.setattr(eval_samples.Sampler, "write", writing)
  monkeypatch.setattr(decode, "prefill", reading)
  monkeypatch.setattr(decode, "advance", advancing)
  train.run(config(**ASKED, max_steps=3), tmp_path / "run")
  # Before the first step, and after the third, the last.
  assert len(trained) == 2
  assert used == [True] * 4
