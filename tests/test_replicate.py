"""The pipeline in real processes: the synthetic world and real HH rows."""

import csv
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import comparing
import numpy as np
import planted
import pytest

from configs import demo
from dpo_jax import replicate as replicate_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def replicate(*flags):
  """Runs the command as a user would, from the source tree, with keys."""
  return planted.run(
    [sys.executable, "-m", "dpo_jax.replicate", *flags],
    cwd=ROOT,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    timeout=400,
  )


def rates(workdir):
  with (workdir / "report" / "win_rates.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def lines(path):
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_embedded_default_runs_whole_and_again_does_nothing(
  tmp_path, capsys
):
  workdir = tmp_path / "begun"
  flags = ("--config=configs/demo.py:tiny", f"--workdir={workdir}")
  # A setting of a stage that is not done may still be changed.
  config = demo.get_config("tiny").to_dict()
  wrong = config | {
    "vocabulary": config["vocabulary"] | {"texts": "nowhere.jsonl"}
  }
  with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
    replicate_lib.run(wrong, workdir)
  assert (workdir / "world" / "test.jsonl").is_file()
  done = replicate(*flags)
  assert done.returncode == 0, done.stderr
  table = rates(workdir)
  final = {(r["model"], r["temperature"]) for r in table if r["step"] == ""}
  assert final == {
    (model, temperature)
    for model in ("base", "sft", "dpo")
    for temperature in ("0.25", "0.5", "0.75", "1.0")
  }
  steps = {(r["step"], r["temperature"]) for r in table if r["step"]}
  assert steps == {(s, t) for s in ("2", "3") for t in ("0.7", "1.0")}
  assert all(r["n"] == "12" for r in table)
  first = [r for r in lines(workdir / "dpo" / "metrics.jsonl") if "loss" in r]
  assert abs(first[0]["loss"] - 0.6931471805599453) < 1e-6

  def stamps():
    return {
      path.relative_to(workdir): path.stat().st_mtime_ns
      for folder in ("world", "tokenizer", "init", "pretrain", "sft", "dpo")
      for path in (workdir / folder).rglob("*")
      if path.is_file() and path.name != "lock" and "push" not in path.parts
    }

  before = stamps()
  responses = (workdir / "responses" / "dpo.jsonl").read_bytes()
  # What may change though a stage is done: where the directory is, and where a
  # model is pushed to.
  workdir = workdir.rename(tmp_path / "moved")
  config["dpo"] |= {"push_to_hub": "user/x", "push_dry_run": True}
  replicate_lib.run(config, workdir)
  assert "0 questions asked" in capsys.readouterr().out
  assert stamps() == before
  assert (workdir / "responses" / "dpo.jsonl").read_bytes() == responses
  pushed = workdir / "dpo" / "push" / "main"
  card = (pushed / "README.md").read_text("utf-8")
  for row in table:
    if row["step"] == "":
      share, low, high = (
        f"{100 * float(row[name]):.1f}" for name in ("win_rate", "low", "high")
      )
      assert (
        f"| {row['model']} | {float(row['temperature']):g} | 12 | {share}"
        f" | &#91;{low}, {high}&#93; |"
      ) in card
  figure = workdir / "report" / "win_rate_temperature.png"
  assert (pushed / figure.name).read_bytes() == figure.read_bytes()
  assert "dpo_jax.replicate --config=configs/demo.py:tiny" in card
  config["dpo"]["loss"]["beta"] = 0.3
  with pytest.raises(ValueError, match=r"config.dpo.loss.beta: 0.2 -> 0.3"):
    replicate_lib.run(config, workdir)
  planted.search(workdir)


def test_real_rows_and_tokenizer_go_through_the_whole_line(shared, tmp_path):
  done = replicate(
    "--config=configs/hh.py:smoke",
    f"--workdir={tmp_path}",
    f"--config.paths.data={shared / 'data' / 'hh-rlhf'}",
    f"--config.paths.tokenizer={shared / 'tokenizer' / 'pythia'}",
    "--config.sft.data.max_train=0",
    # Enough for two steps of eight; unoptimised programs are slow.
    "--config.dpo.data.max_train=24",
    "--config.init.architecture.layers=2",
    "--config.init.architecture.width=32",
    "--config.init.architecture.mlp_width=64",
  )
  assert done.returncode == 0, done.stderr
  counts = json.loads((tmp_path / "sft" / "manifest.json").read_text())["data"]
  # Counted in the file by splitting each transcript at its last turn.
  train = counts["train"]["counts"]
  assert train["read"] == 1556
  assert train["quarantined: empty chosen response"] == 4
  assert train["quarantined: rejected does not share chosen's prompt"] == 1
  assert train["kept"] == 1551
  dpo = [r for r in lines(tmp_path / "dpo" / "metrics.jsonl") if "loss" in r]
  assert [row["step"] for row in dpo] == [1, 2]
  assert abs(dpo[0]["loss"] - 0.6931471805599453) < 1e-6
  # Six prompts, each response in both orders.
  verdicts = lines(tmp_path / "verdicts" / "sft.jsonl")
  assert len(verdicts) == 12
  for row in verdicts:
    more = row["response_chars"] - row["chosen_chars"]
    outcome = "model" if more > 0 else "chosen" if more < 0 else "tie"
    assert row["verdict"] == outcome
  score = {"model": 1.0, "tie": 0.5, "chosen": 0.0}
  wins = sum(score[row["verdict"]] for row in verdicts)
  (rate,) = (
    r for r in rates(tmp_path) if (r["model"], r["step"]) == ("sft", "")
  )
  # The table has six significant digits.
  assert abs(float(rate["win_rate"]) - wins / len(verdicts)) < 1e-5
  assert planted.search(tmp_path) > 30


STAGES = [
  field.name for field in dataclasses.fields(replicate_lib.ReplicateSettings)
][1:]


def killed(workdir, stage, delay_s):
  """Starts the command, kills it in a stage; returns whether it was alive."""
  command = [sys.executable, "-m", "dpo_jax.replicate", "--log=json"]
  with subprocess.Popen(
    [*command, "--config=configs/demo.py:tiny", f"--workdir={workdir}"],
    cwd=ROOT,
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
  ) as process:
    for line in process.stderr:
      if f'"stage": "{stage}"' in line:
        break
    killer = threading.Timer(delay_s, process.kill)
    killer.start()
    # To its end, so that the pipe does not fill.
    process.stderr.read()
    killer.cancel()
  assert process.returncode in (0, -signal.SIGKILL)
  return process.returncode != 0


@pytest.mark.slow
def test_twenty_kills_over_all_stages_change_nothing(tmp_path):
  def whole(name):
    workdir = tmp_path / name
    flags = ("--config=configs/demo.py:tiny", f"--workdir={workdir}")
    done = replicate(*flags)
    assert done.returncode == 0, done.stderr
    return comparing.collect(workdir)

  untouched = whole("untouched")
  delays = np.random.default_rng(0)
  kills = 0
  for number in itertools.count():
    # A working directory is gone through once, and another begun.
    for stage in STAGES:
      if kills == 20:
        break
      delay_s = delays.uniform(0, 2)
      kills += killed(tmp_path / f"killed{number}", stage, delay_s)
    after = whole(f"killed{number}")
    assert comparing.compare(untouched, after) == []
    if kills == 20:
      break
