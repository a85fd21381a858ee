"""A tiny run: its model, tokenizer, pairs and config, and what it left."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import tiny

from configs import common
from configs import data as data_config
from dpo_jax.core import settings
from dpo_jax.data import tokenizer
from dpo_jax.io import metrics
from dpo_jax.model import hf
from dpo_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPE = dataclasses.replace(tiny.CONFIG, vocab_size=320)
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STEPS = 7
# Of a row of metrics, what depends on the clock.
SPEED = {
  "tokens_per_second",
  "pairs_per_second",
  "examples_per_second",
  "data_wait_seconds",
}


def rows(count, seed):
  """Pairs whose prompts are 18 or 19 tokens and whose answers are at most 3."""
  rng = np.random.default_rng(seed)
  for i in range(count):
    words = " ".join(rng.choice(WORDS, 8))
    prompt = f"\n\nHuman: {words} {seed} {i:02d}\n\nAssistant:"
    chosen, rejected = rng.choice(WORDS, 2, replace=False)
    yield {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


def write(path, values):
  path.write_text("".join(json.dumps(row) + "\n" for row in values), "utf-8")


def make_files(directory):
  """Fills a directory with tokenizer, model and data."""
  train, held_out = list(rows(30, 1)), list(rows(6, 2))
  texts = [text for row in train + held_out for text in row.values()]
  words = tokenizer.train(texts * 3, 320, directory / "tokenizer")
  hf.export(directory / "model", SHAPE, tiny.weights(SHAPE), words)
  write(directory / "train.jsonl", train)
  write(directory / "test.jsonl", held_out)
  return directory


def at_step(monkeypatch, step, act):
  """Calls `act` just when a training step's metrics are written."""
  original = metrics.Writer.write

  def write(self, row):
    original(self, row)
    if row["step"] == step and "loss" in row:
      act()

  monkeypatch.setattr(metrics.Writer, "write", write)


def interrupt():
  """Ctrl-C without a handler."""
  raise KeyboardInterrupt


def terminate():
  signal.raise_signal(signal.SIGTERM)


def changed(values, changes):
  """`values` with {"a.b": 1} set; a name that is not there is an error."""
  values = json.loads(json.dumps(values))
  for path, value in changes.items():
    *parents, last = path.split(".")
    inner = values
    for parent in parents:
      inner = inner[parent]
    assert last in inner, path
    inner[last] = value
  return values


def configs(files):
  """configs(files)(**{"loss.beta": 1.0}) -> settings of a LoRA DPO run."""
  values = changed(
    common.training().to_dict(),
    {
      "objective": "dpo",
      "seed": 5,
      "tokenizer": str(files / "tokenizer"),
      "model.path": str(files / "model"),
      "model.dtype": "float32",
      "model.remat": "none",
      "lora.rank": 2,
      "lora.alpha": 4.0,
      "lora.dropout": 0.2,
      "data.use": ["files"],
      "data.sources": {
        "files": data_config.pairs(
          str(files / "train.jsonl"), str(files / "test.jsonl")
        ).to_dict()
      },
      "data.token_cache": "",
      "data.max_eval": 0,
      "data.allow_leakage": False,
      "data.max_length": 32,
      "data.max_prompt_length": 28,
      "data.layout": "shared",
      "data.row_length": 128,
      "loss.beta": 0.5,
      "optimizer.name": "adamw",
      "optimizer.learning_rate": 0.01,
      "optimizer.schedule": "cosine",
      "optimizer.warmup_steps": 2,
      "optimizer.weight_decay": 0.01,
      "optimizer.clip_norm": 1.0,
      "batch_size": 4,
      "microbatches": 2,
      "eval_every": 3,
      "eval_batch_size": 4,
      "checkpoint_every": 2,
      "export_adapters": True,
    },
  )

  def build(**changes):
    return settings.build(config_lib.TrainSettings, changed(values, changes))

  return build


CONFIG = """
import json, pathlib
from ml_collections import config_dict

def get_config():
  text = pathlib.Path(__file__).with_suffix(".json").read_text()
  return config_dict.ConfigDict(json.loads(text))
"""


class Child:
  """`python train.py` in a process of its own; a context manager.

  It is killed at the end if it still lives.
  """

  def __init__(
    self, directory, config, workdir, command=("train.py",), **environ
  ):
    """Starts it; `directory` takes its config and what it prints."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "config.py"
    file.write_text(CONFIG)
    values = json.dumps(settings.to_dict(config))
    file.with_suffix(".json").write_text(values)
    self._printed = (directory / "printed").open("w+b")
    self.process = subprocess.Popen(
      [
        sys.executable,
        *command,
        f"--config={file}",
        f"--workdir={workdir}",
      ],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
      stdout=self._printed,
      stderr=subprocess.STDOUT,
    )

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    if self.process.poll() is None:
      self.process.kill()
    self.process.wait()
    self._printed.close()

  def printed(self):
    self._printed.seek(0)
    return self._printed.read().decode()

  def until(self, condition, timeout_s=180):
    """Waits until something can be seen; fails if the child ends before."""
    end = time.monotonic() + timeout_s
    while not condition():
      if self.process.poll() is not None:
        raise AssertionError(f"ended too early:\n{self.printed()}")
      if time.monotonic() > end:
        raise AssertionError(f"not seen in {timeout_s} s:\n{self.printed()}")
      # Between two looks; what is waited for is seen, not slept for.
      time.sleep(0.001)

  def end(self, timeout_s=180):
    """Its exit code."""
    return self.process.wait(timeout_s)


def reached(workdir, step):
  """Whether the metrics of a step are written."""
  try:
    rows = metrics.read(workdir / metrics.FILE)
  except (FileNotFoundError, ValueError):
    return False
  return any(row["step"] >= step and "loss" in row for row in rows)


def read(workdir):
  """The run's metrics without the speed, which differs from run to run."""
  return [
    {key: value for key, value in row.items() if key not in SPEED}
    for row in metrics.read(workdir / metrics.FILE)
  ]


def weights(workdir):
  """The bytes of every exported weight, by path."""
  files = workdir.rglob("*.safetensors")
  return {str(file.relative_to(workdir)): file.read_bytes() for file in files}
