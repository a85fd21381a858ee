"""Files of responses: made, interrupted, continued, and refused."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import running
import scripted
import tiny

from configs import data as data_config
from configs import sample as sample_config
from dpo_jax.core import errors, settings
from dpo_jax.data import sources, tokenizer
from dpo_jax.io import records
from dpo_jax.model import gpt_neox, hf
from dpo_jax.sampling import decode, response_files, sampler
from dpo_jax.sampling import generate as generate_lib
from dpo_jax.sampling import jobs as jobs_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
LORA = gpt_neox.LoraConfig(2, 4.0, 0.0, ("query_key_value", "dense"))


@dataclasses.dataclass(frozen=True)
class World:
  """Where the files of the tests lie, and the values of a config on them."""

  root: pathlib.Path
  values: dict
  rows: tuple

  def build(self, **changes):
    return settings.build(jobs_lib.SamplingSettings, self.values | changes)

  def policy(self, name="sft", temperatures=(0.0, 1.0), **changes):
    values = sample_config.policy(
      name, str(self.root / "model"), temperatures
    ).to_dict()
    return values | changes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  root = tmp_path_factory.mktemp("world")
  tok = scripted.small_tokenizer(root / "tokenizer")
  config, base = scripted.noisy(tok.vocab_size + 8)
  hf.export(root / "model", config, base, tok)
  adapted = dataclasses.replace(config, lora=LORA)
  for step in (100, 20):
    lora = tiny.adapters(adapted, seed=step)
    directory = root / "adapters" / f"step-{step:06d}"
    directory.parent.mkdir(exist_ok=True)
    hf.export_adapter(directory, adapted, lora, "model", base)
  lines = [
    {
      "prompt": f"\n\nHuman: {text}\n\nAssistant:",
      "chosen": c,
      "rejected": " ?",
    }
    for text, c in (
      ("Hi!", " Hello."),
      ("Can you name a bird?", " A heron."),
      ("Which river is the longest?", " The Nile."),
      ("Bye!", " Fare\u2028well."),
      ("Name a bird!", " Heron."),
      ("Hi Nile!", " Hi!"),
    )
  ]
  # A pair that comes twice, and one whose prompt would be control to a model.
  lines.append(lines[0])
  lines.append(lines[1] | {"prompt": "\n\nHuman: <|endoftext|>\n\nAssistant:"})
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (root / "test.jsonl").write_text(text)
  rows = sources.read_file(str(root / "test.jsonl")).rows[:6]
  values = sample_config.sampling().to_dict() | {
    "policies": {},
    "tokenizer": str(root / "tokenizer"),
    "max_new_tokens": 12,
    "max_prompt_tokens": 32,
    "batch_size": 8,
    "length_multiple": 16,
    "dtype": "float32",
  }
  path = str(root / "test.jsonl")
  values["data"]["source"] = data_config.pairs(path, path).to_dict()
  world = World(root, values, rows)
  return dataclasses.replace(
    world, values=values | {"policies": {"sft": world.policy()}}
  )


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
  """The file of a run that nothing interrupts."""
  workdir = tmp_path_factory.mktemp("whole")
  (path,) = generate_lib.run(world.build(), workdir)
  assert path == workdir / "responses" / "sft.jsonl"
  return path


def test_an_adapters_hash_is_not_of_where_its_base_was(world, tmp_path):
  adapter = world.root / "adapters" / "step-000020"
  moved = shutil.copytree(adapter, tmp_path / "moved")
  config = json.loads((moved / "adapter_config.json").read_text())
  found = response_files.weights(str(adapter))
  for changes, same in (
    ({"base_model_name_or_path": "/elsewhere/model"}, True),
    ({"lora_alpha": 1 + config["lora_alpha"]}, False),
  ):
    text = json.dumps(config | changes)
    (moved / "adapter_config.json").write_text(text)
    assert (response_files.weights(str(moved)) == found) == same


def test_writes_a_row_for_every_prompt_and_temperature(world, whole):
  rows = records.read(whole, records.Response)
  assert [(r.prompt_id, r.temperature) for r in rows] == [
    (c.id, t) for c in world.rows for t in (0.0, 1.0)
  ]
  texts = {row.id: row for row in world.rows}
  for row in rows:
    assert row.prompt == texts[row.prompt_id].prompt
    assert row.chosen == texts[row.prompt_id].chosen
    assert 1 <= row.token_count <= 12
    assert row.finish_reason != "length" or row.token_count == 12
    same = (row.model, row.step, row.seed, row.sample_id, row.max_new_tokens)
    assert same == ("sft", None, 0, 0, 12)
  assert len({row.response for row in rows}) > 6


def test_a_finished_file_is_left_alone(world, whole, monkeypatch):
  before = whole.stat().st_mtime_ns
  monkeypatch.setattr(hf, "load", lambda *_, **__: pytest.fail("loaded"))
  generate_lib.run(world.build(), whole.parent.parent)
  assert whole.stat().st_mtime_ns == before


CHILD = """
import json, os, pathlib, signal, sys
from dpo_jax.io import records
from dpo_jax.sampling import generate
from dpo_jax.sampling import jobs
from dpo_jax.core import settings
from dpo_jax.io import jsonl

append, calls = jsonl.Store.append_many, []

def dies_in_its_second_append(store, rows):
  calls.append(1)
  if len(calls) < 2:
    return append(store, rows)
  rows = list(rows)
  append(store, rows[:1])
  os.write(store._fd, records.encode(rows[1])[:-9])
  os.kill(os.getpid(), signal.SIGKILL)

jsonl.Store.append_many = dies_in_its_second_append
values = json.loads(sys.argv[1])
generate.run(
  settings.build(jobs.SamplingSettings, values), pathlib.Path(sys.argv[2])
)
"""


def test_going_on_after_sigkill_gives_the_same_file(
  world, whole, tmp_path, monkeypatch
):
  child = subprocess.run(
    [sys.executable, "-c", CHILD, json.dumps(world.values), str(tmp_path)],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert child.returncode == -signal.SIGKILL, child.stderr
  path = tmp_path / "responses" / "sft.jsonl"
  left = path.read_bytes()
  # Those that ended first, one more row, and a part of another.
  committed = left.count(b"\n")
  assert 1 < committed < 12
  assert not left.endswith(b"\n")
  entered = []
  insert = decode.insert

  def counting(program, state, prefix, source, *args):
    entered.extend(place for place in source.tolist() if place >= 0)
    return insert(program, state, prefix, source, *args)

  monkeypatch.setattr(decode, "insert", counting)
  generate_lib.run(world.build(), tmp_path)
  assert path.read_bytes() == whole.read_bytes()
  # No response that was there is generated again.
  assert len(entered) == 12 - committed


def test_a_signal_ends_sampling_and_whole_rows_are_kept(world, whole, tmp_path):
  file = tmp_path / "config.py"
  file.write_text(running.CONFIG)
  file.with_suffix(".json").write_text(json.dumps(world.values))
  where = "dpo_jax.io.jsonl:Store.append_many"
  done = subprocess.run(
    [
      *(sys.executable, "tests/signalled.py", "sample.py", where, "2"),
      *("SIGTERM", "0", f"--config={file}", f"--workdir={tmp_path}"),
    ],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 143, done.stderr
  assert done.stderr.endswith(
    "error: stopped by SIGTERM with every whole row kept; run the same command"
    " again to resume\n"
  )
  path = tmp_path / "responses" / "sft.jsonl"
  assert 0 < len(records.read(path, records.Response)) < 12
  generate_lib.run(world.build(), tmp_path)
  assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
  ("over", "devices", "begun", "sampled"),
  [
    # Each responses three of the six prompts, with as many devices as here: the
    # same shapes, so the same roundings.
    ("process", "8", False, " 6/6 ["),
    # Two responses are there, and a part of one: the first has five to give.
    pytest.param("process", "8", True, " 7/7 [", marks=pytest.mark.slow),
    # Both response all of them, with half of these devices each.
    pytest.param("all", "4", True, " 12/12 [", marks=pytest.mark.slow),
  ],
)
def test_two_processes_write_what_one_writes(
  world, whole, tmp_path, over, devices, begun, sampled
):
  directory = tmp_path / "run" / "responses"
  if begun:
    directory.mkdir(parents=True)
    origin = whole.with_suffix(".json").read_bytes()
    (directory / "sft.json").write_bytes(origin)
    lines = whole.read_bytes().splitlines(keepends=True)
    (directory / "sft.jsonl").write_bytes(lines[0])
    (directory / "sft@1.part").write_bytes(lines[11] + lines[10][:30])
  (tmp_path / "config.py").write_text(running.CONFIG)
  values = world.values | {"mesh_over": over}
  (tmp_path / "config.json").write_text(json.dumps(values))
  with socket.socket() as one:
    one.bind(("localhost", 0))
    port = one.getsockname()[1]
  children = [
    subprocess.Popen(
      [
        *(sys.executable, "sample.py", f"--config={tmp_path / 'config.py'}"),
        f"--workdir={tmp_path / 'run'}",
      ],
      cwd=ROOT,
      env=os.environ
      | {
        "JAX_NUM_CPU_DEVICES": devices,
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  said = [child.communicate(timeout=300) for child in children]
  assert [child.returncode for child in children] == [0, 0], said
  assert (directory / "sft.jsonl").read_bytes() == whole.read_bytes()
  names = {path.name for path in directory.iterdir()}
  assert names == {"sft.jsonl", "sft.json"}
  # One speaks for both.
  assert sampled in said[0][1]
  assert str(directory / "sft.jsonl") in said[0][0]
  for text in ("responses", "sft.jsonl"):
    assert text not in said[1][0] + said[1][1]


def test_rows_of_processes_that_were_killed_are_merged(
  world, whole, tmp_path, monkeypatch
):
  path = tmp_path / "responses" / "sft.jsonl"
  path.parent.mkdir()
  path.with_suffix(".json").write_bytes(whole.with_suffix(".json").read_bytes())
  lines = whole.read_bytes().splitlines(keepends=True)
  path.write_bytes(lines[1] + lines[0])
  parts = [path.with_name(f"sft@{number}.part") for number in (1, 12)]
  # One row that the file has already, and one that was cut.
  parts[0].write_bytes(b"".join(lines[1:5]) + lines[5][:30])
  parts[1].write_bytes(lines[8])
  # Of another policy, whose name begins alike.
  other = path.with_name("sft.1@1.part")
  other.write_bytes(b"")
  asked = []
  generate = sampler.generate

  def counting(*arguments):
    asked.extend(arguments[-1])
    return generate(*arguments)

  monkeypatch.setattr(sampler, "generate", counting)
  generate_lib.run(world.build(), tmp_path)
  assert asked == [5, 6, 7, 9, 10, 11]
  assert path.read_bytes() == whole.read_bytes()
  assert set(path.parent.iterdir()) == {path, path.with_suffix(".json"), other}


def test_rows_of_other_weights_are_refused_where_another_process_wrote_them(
  world, whole, tmp_path
):
  """Even where the first process had no response yet."""
  path = tmp_path / "responses" / "sft.jsonl"
  path.parent.mkdir()
  origin = json.loads(whole.with_suffix(".json").read_text())
  path.with_suffix(".json").write_text(json.dumps(origin | {"model": "x"}))
  part = path.with_name("sft@1.part")
  part.write_bytes(whole.read_bytes())
  with pytest.raises(ValueError, match=r"sft\.model: 'x' -> "):
    generate_lib.run(world.build(), tmp_path)
  assert part.read_bytes() == whole.read_bytes()


def test_an_incomplete_file_is_not_merged(whole, tmp_path):
  rows = records.read(whole, records.Response)
  path, part = tmp_path / "sft.jsonl", tmp_path / "sft@1.part"
  part.write_bytes(records.encode(rows[1]))
  file = response_files.File(path, {}, rows, dict(enumerate(rows[3:], 3)))
  with pytest.raises(errors.Stopped, match="lacks 2 responses"):
    response_files.merge(file)
  assert list(tmp_path.iterdir()) == [part]


def test_steps_of_a_run_are_policies_of_their_own(world, whole, tmp_path):
  policy = world.policy("dpo", (0.0,), steps_of=str(world.root / "adapters"))
  one = world.policy(
    "last", (0.0,), adapter=str(world.root / "adapters" / "step-000100")
  )
  beside = generate_lib.run(
    world.build(policies={"steps": policy, "one": one}), tmp_path / "beside"
  )
  assert [path.name for path in beside] == [
    "dpo-step-000020.jsonl",
    "dpo-step-000100.jsonl",
    "last.jsonl",
  ]
  rows = [records.read(path, records.Response) for path in beside]
  assert [{(r.model, r.step) for r in file} for file in rows] == [
    {("dpo", 20)},
    {("dpo", 100)},
    {("last", None)},
  ]
  texts = [[row.response for row in file] for file in rows]
  base = [
    row.response
    for row in records.read(whole, records.Response)
    if row.temperature == 0
  ]
  assert texts[0] != texts[1]
  assert texts[1] == texts[2] != base
  merged = generate_lib.run(
    world.build(policies={"steps": policy, "one": one}, merge_adapters=True),
    tmp_path / "merged",
  )
  for path, own in zip(merged, rows, strict=True):
    for row, other in zip(records.read(path, records.Response), own):
      # The sum of base and adapter is rounded at another place.
      assert row.mean_logp == pytest.approx(other.mean_logp, abs=1e-4)
      assert dataclasses.replace(row, mean_logp=other.mean_logp) == other


def test_best_of_n_is_a_few_lines(world, tmp_path):
  """N different responses to each prompt, with ids of their own."""
  values = sample_config.get_config("best-of-n").to_dict()
  (policy,) = values["policies"].values()
  assert (policy["temperatures"], values["samples_per_prompt"]) == ((1.0,), 16)
  policy |= {"path": str(world.root / "model")}
  names = ("tokenizer", "data", "dtype", "batch_size", "length_multiple")
  values |= {name: world.values[name] for name in names}
  values |= {"samples_per_prompt": 5, "max_new_tokens": 12}
  values |= {"max_prompt_tokens": 32}
  built = settings.build(jobs_lib.SamplingSettings, values)
  (path,) = generate_lib.run(built, tmp_path)
  rows = records.read(path, records.Response)
  assert [(row.prompt_id, row.sample_id) for row in rows] == [
    (one.id, sample_id) for one in world.rows for sample_id in range(5)
  ]
  assert len({row.unit for row in rows}) == 30
  for one in world.rows:
    texts = [row.response for row in rows if row.prompt_id == one.id]
    assert len(set(texts)) == 5
  # Fewer are the first of them: nothing depends on how many there are.
  fewer = settings.build(
    jobs_lib.SamplingSettings, values | {"samples_per_prompt": 2}
  )
  (path,) = generate_lib.run(fewer, tmp_path / "fewer")
  assert records.read(path, records.Response) == [
    row for row in rows if row.sample_id < 2
  ]


def test_empty_responses_and_turns_are_kept(world, tmp_path):
  tok = scripted.small_tokenizer(tmp_path / "tokenizer")
  (colon,) = tok.encode(":")
  config, base = scripted.scripted(tok, [[colon, tok.eos_id]])
  hf.export(tmp_path / "model", config, base, tok)
  policies = {
    "sft": world.policy(temperatures=(0.0,), path=str(tmp_path / "model"))
  }
  (path,) = generate_lib.run(world.build(policies=policies), tmp_path)
  rows = records.read(path, records.Response)
  assert [(r.response, r.token_count, r.finish_reason) for r in rows] == [
    ("", 1, "eos")
  ] * 6


def test_prompts_that_are_too_long_keep_their_end(world, tmp_path, caplog):
  policies = {"sft": world.policy(temperatures=(0.0,))}
  changes = {"policies": policies, "max_new_tokens": 12}
  cut, whole = (
    generate_lib.run(
      world.build(**changes, max_prompt_tokens=limit), tmp_path / str(limit)
    )[0]
    for limit in (12, 32)
  )
  cut, whole = (records.read(p, records.Response) for p in (cut, whole))
  assert [row.prompt for row in cut] == [row.prompt for row in whole]
  tok = tokenizer.load(world.root / "tokenizer")
  config, base = scripted.noisy(tok.vocab_size + 8)
  for row in cut:
    end = tuple(tok.encode(row.prompt)[-12:])
    request = sampler.Request(end, 0, 0, 0.0, 0, 1.0, 12)
    engine = sampler.Engine(1, 16, 16, 16, 0, "float32", 0.1, 0)
    ((_, sample),) = next(
      sampler.generate(config, base, None, tok, [request], engine)
    )
    assert row.response == sample.text
  assert any(a.response != b.response for a, b in zip(cut, whole))
  assert "prompts cut to their last 12 tokens" in caplog.text
  assert "1 prompts repeating an earlier pair" in caplog.text
  assert "1 prompts left out for a special token" in caplog.text


# Refusals.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seed": 1}, "was written with seed=0, not 1"),
    ({"top_k": 3}, "was written with top_k=0, not 3"),
    ({"max_new_tokens": 9}, "was written with max_new_tokens=12, not 9"),
    ({"max_prompt_tokens": 31}, r"sft\.max_prompt_tokens: 32 -> 31"),
    ({"dtype": "bfloat16"}, r"sft\.dtype: 'float32' -> 'bfloat16'"),
    ({"limit": 2}, "which these settings do not ask for"),
  ],
)
def test_refuses_to_mix_settings_in_one_file(world, whole, changes, message):
  before = whole.read_bytes()
  if "limit" in changes:
    changes = {"data": world.values["data"] | changes}
  with pytest.raises(ValueError, match=message):
    generate_lib.run(world.build(**changes), whole.parent.parent)
  assert whole.read_bytes() == before


def test_weights_whose_log_probs_overflow_are_named(world, tmp_path):
  words = tokenizer.load(world.values["tokenizer"])
  config, base = scripted.noisy(words.vocab_size + 8)
  base["unembed"]["kernel"] = base["unembed"]["kernel"] * 1e38
  hf.export(tmp_path / "huge", config, base)
  policies = {"sft": world.policy(path=str(tmp_path / "huge"))}
  with pytest.raises(ValueError, match=r"'sft' .* prompt \w+ is nan: .*large"):
    generate_lib.run(world.build(policies=policies), tmp_path)


def test_refuses_to_go_on_with_other_weights(world, whole):
  adapter = str(world.root / "adapters" / "step-000020")
  policies = {"sft": world.policy(adapter=adapter)}
  with pytest.raises(ValueError, match=r"sft\.adapter: '' -> "):
    generate_lib.run(world.build(policies=policies), whole.parent.parent)
  manifest = whole.with_suffix(".json")
  text = manifest.read_text()
  manifest.unlink()
  try:
    with pytest.raises(ValueError, match="says what they come from"):
      generate_lib.run(world.build(), whole.parent.parent)
  finally:
    manifest.write_text(text)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"temperatures": (-1.0,)}, "'sft': temperatures=-1.0 must be finite"),
    ({"temperatures": (float("nan"),)}, r"s\[0\]=nan must be finite"),
    ({"temperatures": ()}, "has no temperatures"),
    ({"temperatures": (1.0, 1.0)}, "repeats a temperature"),
    ({"name": "../../x"}, "names a file"),
    ({"name": ""}, "names a file"),
    ({"adapter": "a", "steps_of": "b"}, "both adapter and steps_of"),
    ({"steps_of": "nowhere"}, "holds no directory like step-000050"),
    ({"path": "./nowhere"}, "nowhere"),
  ],
)
def test_refuses_policies(world, tmp_path, changes, message):
  policies = {"sft": world.policy() | changes}
  with pytest.raises(ValueError, match=message):
    generate_lib.run(world.build(policies=policies), tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"policies": {}}, "policies is empty"),
    ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
    ({"cache": "int4"}, "must be one of"),
    ({"batch_size": 12}, "batch_size=12 must be a multiple"),
    ({"max_prompt_tokens": 250}, "lower max_prompt_tokens or max_new_tokens"),
    ({"tokenizer": "./nowhere"}, "no tokenizer at './nowhere'"),
  ],
)
def test_refuses_settings(world, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    generate_lib.run(world.build(**changes), tmp_path)
  assert not list(tmp_path.iterdir())


def test_refuses_two_policies_of_one_file(world, tmp_path):
  policies = {"one": world.policy(), "two": world.policy()}
  with pytest.raises(ValueError, match=r"would write \['sft'\]"):
    generate_lib.run(world.build(policies=policies), tmp_path)


@pytest.mark.parametrize(
  ("variant", "steps", "files", "rows"),
  [
    # Of a prompt: base, SFT and DPO at four temperatures each, and a
    # checkpoint at two.
    ("paper", 17, 3 + 17, 3 * 4 + 17 * 2),
    ("dpo-replication", 9, 3 + 9, 3 * 4 + 9 * 2),
    ("best-of-n", 0, 1, 16),
  ],
)
def test_configs_ask_for_the_papers_experiments(
  world, tmp_path, monkeypatch, variant, steps, files, rows
):
  """How many files there are, and how many responses to three prompts."""
  for step in range(steps):
    name = f"runs/dpo/adapters/step-{300 * (step + 1):06d}"
    (tmp_path / name).mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  values = sample_config.get_config(variant).to_dict()
  built = settings.build(jobs_lib.SamplingSettings, values)
  prompts = [jobs_lib.Prompt(row, (2, 3), 0) for row in world.rows[:3]]
  jobs = jobs_lib.jobs(built)
  assert len(jobs) == files
  asked = [jobs_lib.wanted(built, job, prompts, -1)[1] for job in jobs]
  assert sum(map(len, asked)) == 3 * rows
  grids = {(job.policy.name, job.step): job.policy.temperatures for job in jobs}
  if variant != "best-of-n":
    for name in ("base", "sft", "dpo"):
      assert grids[name, None] == (0.25, 0.5, 0.75, 1.0)
    assert grids["dpo", 300 * steps] == (0.7, 1.0)
  # Every response of a file is one of its own.
  for own in asked:
    keys = {(one.stream, one.sample_id, one.temperature) for one in own}
    assert len(keys) == len(own)


def test_the_script_samples_on_real_prompts(world, shared, tmp_path):
  """sample.py itself, in its own process, on rows of harmless-base."""
  flags = {
    "policies": repr({"base": world.policy("base", (0.5,))}),
    "data.source.eval_path": shared / "data" / "hh-rlhf",
    "data.source.subsets": "('harmless-base',)",
    "data.limit": 3,
    "tokenizer": world.root / "tokenizer",
    "dtype": "float32",
    "batch_size": 8,
    "max_new_tokens": 4,
    "max_prompt_tokens": 64,
  }
  done = subprocess.run(
    [
      sys.executable,
      "sample.py",
      "--config=configs/sample.py:paper",
      f"--workdir={tmp_path}",
      *(f"--config.{name}={value}" for name, value in flags.items()),
    ],
    cwd=ROOT,
    env=os.environ,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  rows = records.read(tmp_path / "responses" / "base.jsonl", records.Response)
  assert len(rows) == 3
  assert all(row.prompt.endswith("\n\nAssistant:") for row in rows)
  assert {row.subset for row in rows} == {"harmless-base"}
  assert "tokens/s" in done.stderr
