"""Whole runs of a tiny model: results, resumption, references, refusals."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
import running
import tiny

from dpo_jax.cli import checkpoint
from dpo_jax.core import settings
from dpo_jax.data import dataset, tokenizer
from dpo_jax.io import locks, metrics, rundir
from dpo_jax.model import gpt_neox, hf
from dpo_jax.report import load
from dpo_jax.training import guards
from dpo_jax.training import train as train_lib

READ = {"dtype": "float32", "remat": "none", "lora": None}


def test_a_run_writes_each_step_once(whole):
  found = running.read(whole)
  train = [row for row in found if "loss" in row]
  assert [row["step"] for row in train] == list(range(1, running.STEPS + 1))
  held_out = [row for row in found if "eval_loss" in row]
  assert [row["step"] for row in held_out] == [0, 3, 6, 7]
  assert {row["eval_items"] for row in held_out} == {6}
  assert train[0].keys() == {
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/chosen_per_token",
    "logps/rejected_per_token",
    "row_fill",
  }
  assert train[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
  # Two rows of 128 tokens hold two pairs, which take 19 to 25 tokens each.
  assert 2 * 2 * 19 / (8 * 2 * 128) <= train[0]["row_fill"] <= 1
  assert held_out[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert held_out[0]["eval_rewards/accuracies"] == 0.5
  # Two updates of warm-up, then a half cosine over the other five.
  rates = [row["learning_rate"] for row in train]
  cosine = [np.cos(np.pi * i / 10) ** 2 for i in range(5)]
  assert rates == pytest.approx([0.005, 0.01, *(0.01 * c for c in cosine)])


def test_a_run_leaves_what_the_next_stages_read(whole, config):
  written = json.loads((whole / "config.json").read_text())
  assert written == json.loads(json.dumps(settings.to_dict(config())))
  finished = rundir.finished(whole)
  assert finished.step == running.STEPS
  names = {"metrics.jsonl", "export/model.safetensors", "export/config.json"}
  assert names < finished.files.keys()
  manifest = json.loads((whole / "manifest.json").read_text())
  assert manifest["steps"] == running.STEPS
  assert manifest["data"]["train"]["counts"]["kept"] == 30
  packing = manifest["data"]["packing"]
  assert packing["items of an epoch by source"] == [30]
  assert packing["steps of an epoch"] == running.STEPS
  assert packing["items left out of each epoch"] == 2
  assert manifest["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
  # A and B of four kernels, two layers, rank 2: inputs and outputs.
  trained = 2 * 2 * ((16 + 48) + (16 + 16) + (16 + 32) + (32 + 16))
  assert manifest["parameters"]["lora"] == trained
  assert manifest["parameters"]["trained"] == trained
  adapters = sorted(path.name for path in (whole / "adapters").iterdir())
  assert adapters == [f"step-{i:06d}" for i in (2, 4, 6, 7)]
  # Retention: two of the four checkpoints.
  kept = {path.name for path in (whole / "checkpoints").iterdir()}
  assert kept == {"6", "7"}
  assert not (whole / "lock").exists()


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_the_export_is_the_base_with_its_adapters(
  whole, config, run_files, tmp_path, kept
):
  name = "step-000007"
  if kept == "bfloat16":
    half = {"model.dtype": "bfloat16", "model.param_dtype": "bfloat16"}
    whole, name = tmp_path / "run", "step-000002"
    train_lib.run(config(**half, max_steps=2), whole)
    losses = [row["loss"] for row in running.read(whole) if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
  shape, base = hf.load(run_files / "model", param_dtype=kept, **READ)
  _, merged = hf.load(whole / "export", param_dtype=kept, **READ)
  lora, adapters = hf.load_adapter(whole / "adapters" / name, shape)
  # The kernels as they are stored, rounded once.
  digits = {"float32": 1e-6, "bfloat16": 2**-8}[kept]
  for target, adapter in adapters["blocks"].items():
    before, after = (
      np.asarray(tree["blocks"][target]["kernel"], np.float32)
      for tree in (base, merged)
    )
    delta = np.einsum("lir,lro->lio", adapter["lora_a"], adapter["lora_b"])
    delta = delta.reshape(before.shape) * lora.alpha / lora.rank
    np.testing.assert_allclose(after, before + delta, rtol=digits, atol=1e-6)
    assert np.abs(delta).max() > 1e-4
    bias = [np.asarray(t["blocks"][target]["bias"]) for t in (base, merged)]
    np.testing.assert_array_equal(*bias)
  tokenizer.load(whole / "export")


# --- all weights, and the reference


@pytest.fixture(scope="module")
def full(config, tmp_path_factory):
  """Settings of full fine-tuning, and the directory of a run."""
  changes = {"lora.rank": 0, "export_adapters": False, "max_steps": 4}
  changes |= {"optimizer.name": "rmsprop", "optimizer.weight_decay": 0.0}
  workdir = tmp_path_factory.mktemp("full") / "run"
  train_lib.run(config(**changes), workdir)
  return changes, workdir


def test_all_weights_resume_with_their_reference(
  config, full, run_files, tmp_path, monkeypatch
):
  changes, whole = full
  with monkeypatch.context() as patch:
    running.at_step(patch, 3, running.interrupt)
    with pytest.raises(KeyboardInterrupt):
      train_lib.run(config(**changes), tmp_path / "parts")
  train_lib.run(config(**changes), tmp_path / "parts")
  found = running.read(tmp_path / "parts")
  # Rewards are against the weights that the run began with: a reference taken
  # from the checkpoint would put them back to zero.
  assert found == running.read(whole)
  assert running.weights(tmp_path / "parts") == running.weights(whole)
  first, *_, last = [row for row in found if "loss" in row]
  assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert abs(last["rewards/chosen"]) > 1e-3
  trees = [
    hf.load(path, param_dtype="float32", **READ)[1]
    for path in (run_files / "model", whole / "export")
  ]
  for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-4


def assert_same_metrics(found, wanted):
  for a, b in zip(running.read(found), running.read(wanted), strict=True):
    for name in b:
      assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), name


def test_a_precomputed_reference_needs_no_second_tree(config, full, tmp_path):
  changes, whole = full
  made = config(**changes, precompute_reference=True)
  train_lib.run(made, tmp_path / "run")
  assert (tmp_path / "run" / "reference" / "train.safetensors").exists()
  assert_same_metrics(tmp_path / "run", whole)
  sizes = [
    json.loads((path / "manifest.json").read_text())["bytes_on_a_device"]
    for path in (tmp_path / "run", whole)
  ]
  assert sizes[0] < 0.7 * sizes[1]


def test_a_precomputed_reference_gives_the_same_run_and_is_never_stale(
  config, run_files, whole, tmp_path, monkeypatch
):
  monkeypatch.setenv("HOME", str(tmp_path))
  cache = {"precompute_reference": True, "reference_cache": "~/r"}
  train_lib.run(config(**cache), tmp_path / "run")
  kept = {path.name: path.stat() for path in (tmp_path / "r").iterdir()}
  assert kept.keys() == {"train.safetensors", "held_out.safetensors"}
  assert_same_metrics(tmp_path / "run", whole)
  # Another beta, order and layout read the same files.
  other = {"loss.beta": 0.1, "seed": 6, "data.layout": "packed"}
  train_lib.run(config(**cache, **other, max_steps=1), tmp_path / "other")
  for path in (tmp_path / "r").iterdir():
    assert path.stat().st_mtime_ns == kept[path.name].st_mtime_ns
  # Other weights do not: here one row of the embedding that no item reads.
  base = tiny.weights(running.SHAPE)
  kernel = base["embed"]["kernel"].at[-1].mul(2.0)
  words = tokenizer.load(run_files / "tokenizer")
  changed = base | {"embed": {"kernel": kernel}}
  hf.export(tmp_path / "model", running.SHAPE, changed, words)
  other = config(**cache, **{"model.path": str(tmp_path / "model")})
  with pytest.raises(ValueError, match=r"made with model=.*delete train\.safe"):
    train_lib.run(other, tmp_path / "run-of-other")


def test_a_run_learns_from_labels(config, run_files, tmp_path):
  for side in ("train", "test"):
    rows = [
      {
        "prompt": [{"role": "user", "content": f"{side} {i}"}],
        "completion": [{"role": "assistant", "content": word}],
        "label": i % 3 > 0,
      }
      for i, word in enumerate(running.WORDS)
    ]
    running.write(tmp_path / f"{side}.jsonl", rows)
  changes = {
    f"data.sources.files.{side}_path": str(tmp_path / f"{name}.jsonl")
    for side, name in (("train", "train"), ("eval", "test"))
  }
  changes |= {"data.sources.files.kind": "unpaired", "loss.kind": "kto"}
  made = config(**changes, microbatches=1, max_steps=2)
  train_lib.run(made, tmp_path / "run")
  first, *_ = (row for row in running.read(tmp_path / "run") if "loss" in row)
  assert first["loss"] == pytest.approx(0.5, abs=1e-6)
  assert first["kl"] == pytest.approx(0, abs=1e-6)
  assert "examples_per_second" in json.loads(
    (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1]
  )


def test_a_run_begins_from_an_adapter_and_has_it_as_its_reference(
  config, whole, tmp_path
):
  path = whole / "adapters" / f"step-{running.STEPS:06d}"
  changes = {"lora.path": str(path), "precompute_reference": True}
  train_lib.run(config(**changes, max_steps=2), tmp_path / "run")
  (found, *_), (*_, wanted) = (
    [row for row in running.read(run) if "eval_loss" in row]
    for run in (tmp_path / "run", whole)
  )
  # The policy is what the other run left, and so is the reference.
  for key in ("eval_logps/chosen", "eval_logps/rejected"):
    assert found[key] == pytest.approx(wanted[key], rel=1e-5)
  assert found["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
  # Not merged: its adapters are of the same base, and have moved.
  base = hf.load(config().model.path, param_dtype="float32", **READ)
  (_, before), (_, after) = (
    hf.load_adapter(directory, *base)
    for directory in (path, tmp_path / "run" / "adapters" / "step-000002")
  )
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
  assert 0 < max(jax.tree.leaves(moved)) < 0.05
  with pytest.raises(ValueError, match=r"lora.path=.*rank=2.*not .*rank=1"):
    train_lib.run(config(**changes, **{"lora.rank": 1}), tmp_path / "other")


def test_a_policy_that_is_not_its_reference_is_not_trained(
  config, tmp_path, monkeypatch
):
  original = gpt_neox.init_lora

  def moved(*arguments):
    return jax.tree.map(lambda leaf: leaf + 0.01, original(*arguments))

  monkeypatch.setattr(gpt_neox, "init_lora", moved)
  with pytest.raises(guards.TrainingError, match=r"loss is 0\.\d+, not 0.69"):
    train_lib.run(config(), tmp_path / "run")
  assert not list((tmp_path / "run" / "checkpoints").iterdir())
  assert not (tmp_path / "run" / "export").exists()


# --- what a directory was begun with


@pytest.fixture
def begun(whole, tmp_path):
  """A copy of the run, as it was before it was finished."""
  shutil.copytree(whole, tmp_path / "run")
  (tmp_path / "run" / "finished.json").unlink()
  return tmp_path / "run"


def test_a_finished_run_is_not_run_again(whole, begun, config, monkeypatch):
  monkeypatch.setattr(dataset, "prepare", pytest.fail)
  before = (whole / metrics.FILE).stat().st_mtime_ns
  assert train_lib.run(config(), whole) == whole / "export"
  late = {"loss.beta": 0.6, "allow_changes": ["loss"]}
  with pytest.raises(
    ValueError, match=r"(?s)is finished, .*config.loss.beta: 0.5 -> 0.6"
  ):
    train_lib.run(config(**late), whole)
  for text in ("", "{", "[]", "{}", '{"step": "7"}'):
    (begun / "finished.json").write_text(text)
    with pytest.raises(
      ValueError, match=r"finished\.json is damaged \(.*delete"
    ):
      train_lib.run(config(), begun)
  # What does not affect the model may be changed.
  train_lib.run(config(grace_s=7.0), whole)
  assert (whole / metrics.FILE).stat().st_mtime_ns == before


@pytest.mark.parametrize(
  ("name", "read"),
  [
    ("export/model.safetensors", "model"),
    ("export/config.json", "model"),
    ("adapters/step-000004/adapter_model.safetensors", "adapter"),
    ("metrics.jsonl", "report"),
  ],
)
def test_a_flipped_byte_of_a_finished_run_is_found(
  whole, tmp_path, capsys, name, read
):
  run = shutil.copytree(whole, tmp_path / "dpo")

  def check():
    if read == "report":
      load.run_metrics(run)
    else:
      loading = {"dtype": "float32", "remat": "none", "param_dtype": "float32"}
      shape, _ = hf.load(run / "export", lora=None, **loading)
    if read == "adapter":
      hf.load_adapter((run / name).parent, shape)
    return checkpoint.main(["verify", str(run)])

  assert check() == 0
  assert f"finished at step {running.STEPS}: whole" in capsys.readouterr().out
  data = bytearray((run / name).read_bytes())
  data[len(data) // 2] ^= 1
  (run / name).write_bytes(data)
  with pytest.raises(ValueError, match=f"dpo/{name} is not what its run wrote"):
    check()
  assert checkpoint.main(["verify", str(run)]) == 1
  assert "is not what its run wrote" in capsys.readouterr().out


def test_another_config_is_refused_by_every_key(whole, config):
  other = config(
    **{
      "loss.beta": 0.6,
      "optimizer.learning_rate": 0.02,
      "lora.rank": 4,
      "seed": 6,
      "data.sources.files.train_path": "elsewhere.jsonl",
    }
  )
  with pytest.raises(ValueError, match="begun with another config") as error:
    train_lib.run(other, whole)
  lines = str(error.value).splitlines()[1:-1]
  assert [line.strip().split(":")[0] for line in lines] == [
    "config.data.sources.files.train_path",
    "config.lora.rank",
    "config.loss.beta",
    "config.optimizer.learning_rate",
    "config.seed",
  ]
  assert "config.loss.beta: 0.5 -> 0.6" in str(error.value)
  assert "in --config.allow_changes" in str(error.value)


def test_other_files_under_the_same_names_are_refused(begun, tmp_path):
  files = running.make_files(tmp_path)
  config = running.configs(files)()
  # As if the run had begun with these files.
  (begun / "config.json").write_text(json.dumps(settings.to_dict(config)))
  words = tokenizer.load(files / "tokenizer")
  other, train = tiny.weights(running.SHAPE, 1), list(running.rows(30, 1))
  for name, make, changed in (
    ("train.jsonl", lambda p: running.write(p, train[::-1]), "train_data: "),
    (
      "test.jsonl",
      lambda p: running.write(p, running.rows(6, 3)),
      "held_out_data: ",
    ),
    # The same texts as other tokens.
    (
      "tokenizer",
      lambda p: tokenizer.train(running.WORDS, 300, p),
      "train_data: ",
    ),
    ("model", lambda p: hf.export(p, running.SHAPE, other, words), "base: "),
  ):
    path = files / name
    kept = path.rename(path.with_name("kept"))
    make(path)
    with pytest.raises(ValueError, match=f"(?s)other inputs.*{changed}"):
      train_lib.run(config, begun)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept.rename(path)
  before = running.read(begun)
  train_lib.run(config, begun)
  assert running.read(begun) == before


def test_a_second_trainer_is_refused(begun, config):
  before = running.read(begun)
  with (
    locks.Lock(begun / "lock"),
    pytest.raises(locks.Held, match=f"lock is held by pid {os.getpid()}"),
  ):
    train_lib.run(config(), begun)
  assert running.read(begun) == before
  (begun / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json: not JSON"):
    train_lib.run(config(), begun)


# --- refused before the model is read


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"batch_size": 32}, "30 items, fewer than batch_size=32"),
    ({"mesh.data": 3}, "mesh .* needs 3 devices, but there are 8"),
    (
      {"data.sources.files.eval_path": "{train}"},
      "30 held-out prompts .*allow_leakage",
    ),
    ({"data.sources.files.train_path": "no.jsonl"}, "no.jsonl"),
    ({"tokenizer": "./no"}, "no tokenizer at"),
    ({}, "is neither a directory nor a hub id"),
  ],
)
def test_wrong_input_is_refused_before_the_model_is_read(
  config, run_files, tmp_path, changes, words
):
  train = str(run_files / "train.jsonl")
  changes = {k: train if v == "{train}" else v for k, v in changes.items()}
  changes = {"model.path": str(tmp_path / "no")} | changes
  with pytest.raises(ValueError, match=words):
    train_lib.run(config(**changes), tmp_path / "run")
  # What was refused does not bind the directory.
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"batch_size": 5}, "batch_size=5 must be a multiple of microbatches=2"),
    ({"lora.rank": 0}, "export_adapters=True needs adapters"),
    ({"lora.targets": ["qkv"]}, "lora.targets"),
    ({"lora.path": "x"}, "lora.path='x'.* set precompute_reference to True"),
    (
      {"lora.path": "x", "lora.rank": 0, "export_adapters": False},
      "set lora.rank to the adapter's",
    ),
    (
      {"loss.kind": "simpo", "precompute_reference": True},
      "loss.kind='simpo', which has no reference",
    ),
    ({"loss.kind": "aot"}, "microbatches=2 .*set microbatches to 1"),
    (
      {
        "lora.rank": 0,
        "export_adapters": False,
        "model.param_dtype": "bfloat16",
      },
      "updates need float32 weights",
    ),
    ({"trackers.use": ["tensorbord"]}, r"use\[0\]='tensorbord' must be one of"),
  ],
)
def test_settings_that_make_no_sense_are_refused(config, changes, words):
  with pytest.raises(ValueError, match=words):
    config(**changes)


def test_a_model_that_does_not_fit_is_refused(config, tmp_path):
  small = dataclasses.replace(running.SHAPE, vocab_size=256)
  short = dataclasses.replace(running.SHAPE, max_positions=24)
  for shape, words in (
    (small, "has 320 tokens, but model .* only 256"),
    (short, "data.max_length=32 is more than the 24 positions"),
  ):
    path = tmp_path / f"model-{shape.vocab_size}"
    hf.export(path, shape, tiny.weights(shape))
    with pytest.raises(ValueError, match=words):
      train_lib.run(config(**{"model.path": str(path)}), tmp_path / "run")
