"""Whole runs of a tiny model: resuming, refusing, guarding.

Nearly all runs of this file share their shapes, so that few programs are
compiled.
"""

import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import running
import safetensors.numpy
import tiny

from dpo_jax.core import settings
from dpo_jax.data import dataset, sources, tokenizer
from dpo_jax.io import locks, metrics
from dpo_jax.model import gpt_neox, hf
from dpo_jax.training import checks
from dpo_jax.training import train as train_lib


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return running.make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def config(files):
  return running.configs(files)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """An uninterrupted run."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  train_lib.run(config(), workdir)
  return workdir


def test_a_run_writes_each_step_once(whole, config):
  found = running.read(whole)
  train = [row["step"] for row in found if "loss" in row]
  held_out = [row["step"] for row in found if "eval_loss" in row]
  assert train == list(range(1, running.STEPS + 1))
  assert held_out == [0, 3, 6, 7]
  assert {row["eval_items"] for row in found if "eval_loss" in row} == {6}
  first = next(row for row in found if "loss" in row)
  assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert first.keys() == {
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
    "row_fill",
  }
  # Two rows of 128 tokens hold two pairs, which take 19 to 25 tokens each.
  assert 2 * 2 * 19 / (8 * 2 * 128) <= first["row_fill"] <= 1
  assert found[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert found[0]["eval_rewards/accuracies"] == 0.5
  # Two updates of warm-up, then a half cosine over the other five.
  rates = [row["learning_rate"] for row in found if "loss" in row]
  cosine = [np.cos(np.pi * i / 10) ** 2 for i in range(5)]
  assert rates == pytest.approx([0.005, 0.01, *(0.01 * c for c in cosine)])


def test_a_run_leaves_what_the_next_stages_read(whole, config):
  assert json.loads((whole / "config.json").read_text()) == json.loads(
    json.dumps(settings.to_dict(config()))
  )
  assert json.loads((whole / "finished.json").read_text()) == {
    "step": running.STEPS
  }
  manifest = json.loads((whole / "manifest.json").read_text())
  assert manifest["steps"] == running.STEPS
  assert manifest["data"]["train"]["counts"]["kept"] == 30
  assert manifest["data"]["packing"]["items of an epoch by source"] == [30]
  assert manifest["data"]["packing"]["steps of an epoch"] == running.STEPS
  assert manifest["data"]["packing"]["items left out of each epoch"] == 2
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


def test_the_export_is_the_base_with_its_adapters(whole, files):
  options = {"dtype": "float32", "remat": "none", "param_dtype": "float32"}
  shape, base = hf.load(files / "model", lora=None, **options)
  _, merged = hf.load(whole / "export", lora=None, **options)
  lora, adapters = hf.load_adapter(whole / "adapters" / "step-000007", shape)
  for target, adapter in adapters["blocks"].items():
    before = np.asarray(base["blocks"][target]["kernel"])
    delta = np.einsum("lir,lro->lio", adapter["lora_a"], adapter["lora_b"])
    delta = delta.reshape(before.shape) * lora.alpha / lora.rank
    after = np.asarray(merged["blocks"][target]["kernel"])
    np.testing.assert_allclose(after, before + delta, rtol=1e-6, atol=1e-6)
    assert np.abs(delta).max() > 1e-3
    bias = [np.asarray(t["blocks"][target]["bias"]) for t in (base, merged)]
    np.testing.assert_array_equal(*bias)
  tokenizer.load(whole / "export")


def test_a_finished_run_is_not_run_again(whole, config, monkeypatch):
  monkeypatch.setattr(dataset, "prepare", pytest.fail)
  before = (whole / metrics.FILE).stat().st_mtime_ns
  assert train_lib.run(config(), whole) == whole / "export"
  assert (whole / metrics.FILE).stat().st_mtime_ns == before


# --- interruptions


def test_all_weights_resume_with_their_reference(
  config, files, tmp_path, monkeypatch
):
  changes = config(
    **{
      "lora.rank": 0,
      "export_adapters": False,
      "optimizer.name": "rmsprop",
      "optimizer.weight_decay": 0.0,
      "max_steps": 4,
    }
  )
  train_lib.run(changes, tmp_path / "whole")
  with monkeypatch.context() as patch:
    running.at_step(patch, 3, running.interrupt)
    with pytest.raises(KeyboardInterrupt):
      train_lib.run(changes, tmp_path / "parts")
  train_lib.run(changes, tmp_path / "parts")
  found = running.read(tmp_path / "parts")
  # Rewards are against the weights that the run began with: a reference taken
  # from the checkpoint would put them back to zero.
  assert found == running.read(tmp_path / "whole")
  assert running.weights(tmp_path / "parts") == running.weights(
    tmp_path / "whole"
  )
  (first, *_, last) = [row for row in found if "loss" in row]
  assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
  assert abs(last["rewards/chosen"]) > 1e-3
  options = {"dtype": "float32", "remat": "none", "param_dtype": "float32"}
  _, before = hf.load(files / "model", lora=None, **options)
  _, after = hf.load(tmp_path / "whole" / "export", lora=None, **options)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-4


# --- what a directory was begun with


def test_a_change_that_comes_too_late_is_refused(whole, config):
  before = running.weights(whole)
  late = {"loss.beta": 0.6, "allow_changes": ["loss"]}
  with pytest.raises(
    ValueError, match=r"(?s)is finished, .*config.loss.beta: 0.5 -> 0.6"
  ):
    train_lib.run(config(**late), whole)
  # What changes nothing of the model may be another.
  train_lib.run(config(grace_s=7.0), whole)
  assert running.weights(whole) == before


def test_another_config_is_refused_by_every_key(whole, config):
  before = running.weights(whole)
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
  assert running.weights(whole) == before


@pytest.fixture
def begun(whole, tmp_path):
  """A copy of the run, as it was before its last words."""
  shutil.copytree(whole, tmp_path / "run")
  (tmp_path / "run" / "finished.json").unlink()
  return tmp_path / "run"


def test_other_files_under_the_same_names_are_refused(begun, config, files):
  def swap(name, make):
    path = files / name
    kept = path.with_name("kept")
    path.rename(kept)
    try:
      make(path)
      with pytest.raises(ValueError, match="made with other inputs") as e:
        train_lib.run(config(), begun)
    finally:
      shutil.rmtree(path) if path.is_dir() else path.unlink()
      kept.rename(path)
    return str(e.value)

  train = list(running.rows(30, 1))
  assert "train_data: " in swap(
    "train.jsonl", lambda path: running.write(path, train[::-1])
  )
  assert "held_out_data: " in swap(
    "test.jsonl", lambda path: running.write(path, running.rows(6, 3))
  )
  # The same texts as other tokens.
  assert "train_data: " in swap(
    "tokenizer", lambda path: tokenizer.train(running.WORDS, 300, path)
  )
  words = tokenizer.load(files / "tokenizer")
  assert "base: " in swap(
    "model",
    lambda path: hf.export(
      path, running.SHAPE, tiny.weights(running.SHAPE, 1), words
    ),
  )
  before = running.read(begun)
  train_lib.run(config(), begun)
  assert running.read(begun) == before


def test_a_config_json_that_is_none_is_refused(begun, config):
  (begun / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json: not JSON"):
    train_lib.run(config(), begun)


def test_settings_that_were_refused_do_not_bind_the_directory(
  config, files, tmp_path
):
  workdir = tmp_path / "run"
  for change, words in (
    ({"data.sources.files.train_path": str(files / "no.jsonl")}, "no.jsonl"),
    ({"tokenizer": str(files / "no")}, "no tokenizer at"),
    ({"model.path": str(files / "no")}, "is neither a directory nor a hub id"),
  ):
    with pytest.raises(ValueError, match=words):
      train_lib.run(config(**change), workdir)
  assert not (workdir / "config.json").exists()


def test_a_second_trainer_is_refused(begun, config):
  before = running.read(begun)
  with (
    locks.Lock(begun / "lock"),
    pytest.raises(locks.Held, match=f"lock is held by pid {os.getpid()}"),
  ):
    train_lib.run(config(), begun)
  assert running.read(begun) == before


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
    (
      {"data.filters.single_turn": True, "data.max_train": 3},
      "fewer than batch_size=4",
    ),
  ],
)
def test_wrong_input_is_refused_before_the_model_is_read(
  config, files, tmp_path, changes, words
):
  train = str(files / "train.jsonl")
  changes = {k: train if v == "{train}" else v for k, v in changes.items()}
  nowhere = {"model.path": str(tmp_path / "no-model")}
  with pytest.raises(ValueError, match=words):
    train_lib.run(config(**changes, **nowhere), tmp_path / "run")


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"batch_size": 5}, "batch_size=5 must be a multiple of microbatches=2"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"epochs": 0}, "epochs=0"),
    ({"seed": 2**32}, r"seed=4294967296 must be in \[0, 2\*\*32\)"),
    ({"eval_every": -1}, "eval_every=-1"),
    ({"lora.rank": 0}, "export_adapters=True needs adapters"),
    ({"lora.rank": -1}, "lora.rank=-1 must not be negative"),
    ({"lora.dropout": 1.0}, "lora.dropout=1.0"),
    ({"lora.targets": ["qkv"]}, "lora.targets"),
    (
      {
        "lora.rank": 0,
        "export_adapters": False,
        "model.param_dtype": "bfloat16",
      },
      "updates need float32 weights",
    ),
    ({"model.dtype": "float16"}, "config.model.dtype='float16'"),
    ({"objective": "ppo"}, "config.objective='ppo'"),
  ],
)
def test_settings_that_make_no_sense_are_refused(config, changes, words):
  with pytest.raises(ValueError, match=words):
    config(**changes)


def test_a_model_that_does_not_fit_is_refused(config, files, tmp_path):
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


# --- guards


def test_a_warm_up_that_never_ends_is_said(config, tmp_path, caplog):
  long = {"optimizer.warmup_steps": 5, "max_steps": 2, "eval_every": 0}
  train_lib.run(config(**long), tmp_path / "run")
  said = "warmup_steps=5 is more than the run's 2 updates: .* 0.004 and .* 0.01"
  assert re.search(said, caplog.text)


def test_a_loss_that_is_not_finite_stops_before_the_update(
  config, files, tmp_path
):
  # One pair holds a word whose embedding overflows in a layer norm.
  words = tokenizer.load(files / "tokenizer")
  (token,) = words.encode("Z")
  base = tiny.weights(running.SHAPE)
  embed = {"kernel": base["embed"]["kernel"].at[token].set(3e38)}
  hf.export(tmp_path / "model", running.SHAPE, base | {"embed": embed}, words)
  train = list(running.rows(30, 1))
  # The order of data depends on the seed alone: this is a pair of step 6.
  at = np.random.default_rng((5, 0)).permutation(30)[5 * 4 + 1]
  train[at]["rejected"] = train[at]["rejected"][:-1] + "Z"
  running.write(tmp_path / "train.jsonl", train)
  broken = config(
    **{
      "model.path": str(tmp_path / "model"),
      "data.sources.files.train_path": str(tmp_path / "train.jsonl"),
    }
  )
  workdir = tmp_path / "run"
  loaded = sources.read_file(str(tmp_path / "train.jsonl"))
  # Running it again stops at the same place and loses nothing.
  for _ in range(2):
    with pytest.raises(checks.TrainingError, match="step 6: loss is nan") as e:
      train_lib.run(broken, workdir)
    assert loaded.rows[at].id in str(e.value)
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"2", "4"}
    found = running.read(workdir)
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["loss"] == "nan"
    assert np.isfinite(found[-2]["loss"])
  assert not (workdir / "export").exists()
  assert not (workdir / "finished.json").exists()
  for content in running.weights(workdir).values():
    for leaf in safetensors.numpy.load(content).values():
      assert np.isfinite(leaf).all()


@pytest.mark.parametrize("kept", [False, True])
def test_a_policy_that_is_not_its_reference_is_not_trained(
  config, tmp_path, monkeypatch, kept
):
  original = gpt_neox.init_lora

  def moved(*arguments):
    lora = original(*arguments)
    return jax.tree.map(lambda leaf: leaf + 0.01, lora)

  monkeypatch.setattr(gpt_neox, "init_lora", moved)
  with pytest.raises(checks.TrainingError, match=r"step 0 is 0\.\d+, not 0.69"):
    train_lib.run(config(precompute_reference=kept), tmp_path / "run")
  assert not list((tmp_path / "run" / "checkpoints").iterdir())
  assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(
  ("platform", "precision", "off", "passes"),
  [
    ("cpu", None, 5e-7, True),
    ("cpu", None, 5e-5, False),
    # Factors of float32 products are rounded only if jax is told to.
    ("tpu", None, 5e-5, False),
    ("gpu", "float32", 5e-5, False),
    ("gpu", "tensorfloat32", 5e-5, True),
    ("gpu", "tensorfloat32", 0.02, False),
  ],
)
def test_how_near_the_first_loss_must_be(
  config, monkeypatch, platform, precision, off, passes
):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  with jax.default_matmul_precision(precision):
    if passes:
      checks.start(config(), np.log(2) + off)
      return
    with pytest.raises(checks.TrainingError, match="policy and reference"):
      checks.start(config(), np.log(2) + off)


def test_a_kept_reference_gives_the_same_run(config, whole, tmp_path):
  cache = {"precompute_reference": True, "reference_cache": str(tmp_path / "r")}
  train_lib.run(config(**cache), tmp_path / "run")
  kept = {path.name: path.stat() for path in (tmp_path / "r").iterdir()}
  assert kept.keys() == {"train.safetensors", "held_out.safetensors"}
  assert_same_metrics(tmp_path / "run", whole)
  # Another beta, order and layout read what is there.
  other = {"loss.beta": 0.1, "seed": 6, "data.layout": "packed"}
  train_lib.run(config(**cache, **other, max_steps=1), tmp_path / "other")
  for path in (tmp_path / "r").iterdir():
    assert path.stat().st_mtime_ns == kept[path.name].st_mtime_ns
  # Another precision and other pairs do not.
  half = config(**cache, **{"model.dtype": "bfloat16"})
  with pytest.raises(ValueError, match=r"made with dtype=.*delete train\.safe"):
    train_lib.run(half, tmp_path / "half")
  fewer = config(**cache, **{"data.max_train": 29})
  with pytest.raises(ValueError, match=r"made with data=.*delete train\.safe"):
    train_lib.run(fewer, tmp_path / "fewer")


def test_a_kept_reference_of_other_weights_is_refused(
  config, files, tmp_path, monkeypatch
):
  monkeypatch.setenv("HOME", str(tmp_path))
  cache = {
    "precompute_reference": True,
    "reference_cache": "~/r",
    "max_steps": 1,
  }
  train_lib.run(config(**cache), tmp_path / "run")
  assert (tmp_path / "r" / "train.safetensors").exists()
  base = tiny.weights(running.SHAPE)
  # One row that no item reads: the weights are others all the same.
  kernel = base["embed"]["kernel"].at[-1].mul(2.0)
  words = tokenizer.load(files / "tokenizer")
  other = base | {"embed": {"kernel": kernel}}
  hf.export(tmp_path / "other", running.SHAPE, other, words)
  stale = config(**cache, **{"model.path": str(tmp_path / "other")})
  with pytest.raises(ValueError, match="made with model="):
    train_lib.run(stale, tmp_path / "stale")


def test_a_kept_reference_needs_no_second_tree(config, tmp_path):
  full = {"lora.rank": 0, "export_adapters": False, "max_steps": 2}
  train_lib.run(config(**full), tmp_path / "plain")
  train_lib.run(config(**full, precompute_reference=True), tmp_path / "run")
  assert (tmp_path / "run" / "reference" / "train.safetensors").exists()
  assert_same_metrics(tmp_path / "run", tmp_path / "plain")


def assert_same_metrics(found, wanted):
  for a, b in zip(running.read(found), running.read(wanted), strict=True):
    for name in b.keys() - running.SPEED:
      assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_bfloat16(config, files, tmp_path, kept):
  half = {"model.dtype": "bfloat16", "model.param_dtype": kept}
  half = config(**half, max_steps=2)
  workdir = tmp_path / "run"
  train_lib.run(half, workdir)
  losses = [row["loss"] for row in running.read(workdir) if "loss" in row]
  assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
  assert np.isfinite(losses).all()
  # Adapters stay float32.
  file = workdir / "adapters/step-000002/adapter_model.safetensors"
  leaves = list(safetensors.numpy.load(file.read_bytes()).values())
  assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
  assert {np.abs(leaf).max() > 1e-4 for leaf in leaves} == {True}
  # What is exported is of the kernels as they were kept, rounded once.
  options = {"dtype": "float32", "remat": "none", "lora": None}
  shape, base = hf.load(files / "model", param_dtype=kept, **options)
  lora, adapters = hf.load_adapter(file.parent, shape)
  _, merged = hf.load(workdir / "export", param_dtype=kept, **options)
  base, merged = (
    np.asarray(tree["blocks"]["dense"]["kernel"], np.float32)
    for tree in (base, merged)
  )
  adapter = adapters["blocks"]["dense"]
  delta = np.einsum("lir,lro->lio", adapter["lora_a"], adapter["lora_b"])
  wanted = base + delta.reshape(base.shape) * lora.alpha / lora.rank
  digits = {"float32": 1e-6, "bfloat16": 2**-8}[kept]
  np.testing.assert_allclose(merged, wanted, rtol=digits, atol=1e-6)
