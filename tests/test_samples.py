"""Responses during training: the policy's own, and without effect on it."""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import signal

import jax
import pytest
import running

from dpo_jax.data import preferences, sources, tokenizer
from dpo_jax.io import metrics, records
from dpo_jax.model import hf
from dpo_jax.sampling import decode, jobs
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


@contextlib.contextmanager
def compiled():
  """The names of the programs that are compiled meanwhile, in order."""
  names = []

  def listen(event, seconds, **about):
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(about["fun_name"])

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def programs():
  """What the run of `sampled` compiled."""
  return []


@pytest.fixture(scope="module")
def sampled(config, programs, tmp_path_factory):
  """An uninterrupted run with samples."""
  workdir = tmp_path_factory.mktemp("sampled") / "run"
  with compiled() as names:
    train.run(
      config(**ASKED, **{"trackers.use": ["csv", "tensorboard"]}), workdir
    )
  programs += names
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


def generated(config, base, lora, run_files, wanted):
  """The rows with the answers of weights that were read from run_files."""
  words = tokenizer.load(run_files / "tokenizer")
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
    for row in wanted
  ]
  engine = sampler_lib.Engine(8, 64, 4096, 32, 0, "float32", 1.0, 5)
  made = {}
  for ended in sampler_lib.generate(
    config, base, lora, words, requests, engine
  ):
    made |= dict(ended)
  return [
    dataclasses.replace(
      row, response=made[at].text, token_count=len(made[at].tokens)
    )
    for at, row in enumerate(wanted)
  ]


def test_the_answers_are_the_policys(sampled, run_files):
  """With its adapters, unmerged, as they were at that step."""
  shape, base = hf.load(
    run_files / "model",
    dtype="float32",
    remat="none",
    lora=None,
    param_dtype="float32",
  )
  found = rows(sampled)
  for step in (0, 6, 7):
    own = [row for row in found if row.step == step]
    adapted, lora = shape, None
    if step:
      path = sampled / "adapters" / f"step-{step:06d}"
      adapter, lora = hf.load_adapter(path, shape, base)
      adapted = dataclasses.replace(shape, lora=adapter)
    assert generated(adapted, base, lora, run_files, own) == own


def test_training_is_what_it_is_without_them(sampled, programs, whole):
  def count(name):
    return sum(name in one for one in programs)

  # Decoding is compiled once for all four steps.
  assert count("advance") == 1
  assert count("train_step") == count("eval_step") == 1
  assert not (whole / eval_samples.FILE).exists()
  assert running.read(sampled) == running.read(whole)
  assert running.weights(sampled) == running.weights(whole)


def test_trackers_get_metrics_manifest_and_tables(sampled):
  wanted = metrics.read(sampled / metrics.FILE)
  with (sampled / "metrics.csv").open(newline="") as file:
    found = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
  assert found == [row["loss"] for row in wanted if "loss" in row]
  (events,) = (sampled / "tensorboard").iterdir()
  manifest = json.loads((sampled / "manifest.json").read_text())
  assert manifest["data"]["train"]["tokens"].encode() in events.read_bytes()
  for step in (0, 3, 6, 7):
    path = sampled / "tables" / f"samples-{step:06d}.csv"
    with path.open(newline="") as file:
      head, *lines = csv.reader(file)
    assert tuple(head) == eval_samples.COLUMNS
    own = [row for row in rows(sampled) if row.step == step]
    assert [line[:4] for line in lines] == [
      [row.prompt, row.response, row.chosen, str(row.token_count)]
      for row in own
    ]


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
  [
    # All rows of the step are there, and those of later ones are dropped.
    (12, 6, 9, True),
    (9, 6, 9, True),
    # One of three and a part of another: all three are made again.
    (7, 6, 6, False),
    (6, 6, 6, False),
    # A step without samples.
    (9, 4, 6, False),
    (0, 3, 0, False),
    # A run that starts at step 0 starts over.
    (9, 0, 0, False),
  ],
)
def test_what_a_run_that_goes_on_finds(
  sampled, tmp_path, left, start, kept, there
):
  lines = (sampled / eval_samples.FILE).read_bytes().splitlines(keepends=True)
  path = tmp_path / eval_samples.FILE
  path.write_bytes(b"".join(lines[:left]) + b"".join(lines[left:])[:40])
  prompts = [
    jobs.Prompt(preferences.Comparison(row.prompt_id, "", "", ""), (2,), 0)
    for row in rows(sampled)[:3]
  ]
  assert eval_samples.trim(path, tuple(prompts), start) is there
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


# --- refused


def test_lengths_that_the_model_does_not_have_are_refused(config, tmp_path):
  long = ASKED | {"samples.max_prompt_tokens": 59}
  with pytest.raises(ValueError, match="pass the model's 64 positions"):
    train.run(config(**long), tmp_path / "run")
  # Before anything is compiled or written.
  assert not (tmp_path / "run" / "config.json").exists()
  assert not (tmp_path / "run" / eval_samples.FILE).exists()


# --- what is shared


def pointers(tree):
  return [
    shard.data.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
  ]


def test_the_weights_are_those_of_the_step(config, tmp_path, monkeypatch):
  """The very buffers, on the training mesh, and no other of their shapes."""
  changes = ASKED | {"max_steps": 3}
  write = eval_samples.Sampler.write
  advance, prefill = decode.advance, decode.prefill
  trained, used, alive = [], [], []

  def kernels(tree):
    shapes = {leaf.shape for leaf in jax.tree.leaves(tree)}
    return sum(leaf.shape in shapes for leaf in jax.live_arrays())

  def writing(self, step, params, *arguments):
    trained.append(pointers(params["base"]))
    alive.append([kernels(params["base"])])
    done = write(self, step, params, *arguments)
    alive[-1].append(kernels(params["base"]))
    return done

  def reading(program, base, lora, *arguments):
    used.append(pointers(base) == trained[-1])
    return prefill(program, base, lora, *arguments)

  def advancing(program, slots, base, lora, *arguments):
    used.append(pointers(base) == trained[-1])
    state = advance(program, slots, base, lora, *arguments)
    jax.block_until_ready(state)
    alive[-1].append(kernels(base))
    return state

  monkeypatch.setattr(eval_samples.Sampler, "write", writing)
  monkeypatch.setattr(decode, "prefill", reading)
  monkeypatch.setattr(decode, "advance", advancing)
  train.run(config(**changes), tmp_path / "run")
  # Before the first step, and after the third, the last.
  assert len(trained) == 2
  assert used == [True] * 4
  for counts in alive:
    assert len(counts) == 3
    assert len(set(counts)) == 1
