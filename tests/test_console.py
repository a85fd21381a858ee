"""Console output in every mode."""

import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tqdm

from dpo_jax.core import console

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def mode():
  """Sets a mode for one test."""
  handlers = [*logging.getLogger().handlers]
  hook, factory = sys.excepthook, logging.getLogRecordFactory()
  yield console.set_mode
  console.set_mode("auto")
  logging.captureWarnings(False)
  sys.excepthook = hook
  logging.setLogRecordFactory(factory)
  logging.getLogger().handlers[:] = handlers


def python(*arguments):
  """Runs Python in the root of the repository."""
  return subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )


def speak(clock=lambda: None):
  console.say("two devices", "devices", count=2)
  with console.Bar(4, "dpo run", "step", done=1) as bar:
    for loss in (0.5, 0.25, 0.125):
      clock()
      bar.update(1, {"loss": loss, "tokens/s": 12345.6})
  console.result("runs/x/export", path="runs/x/export")


def test_json_lines_are_objects(mode, capsys):
  mode("json")
  speak()
  logging.getLogger("dpo_jax.somewhere").warning("careful: %d", 3)
  console.error("it broke")
  try:
    raise ValueError("boom")
  except ValueError:
    sys.excepthook(*sys.exc_info())
  said = capsys.readouterr()
  assert [json.loads(line) for line in said.out.splitlines()] == [
    {"event": "result", "path": "runs/x/export", "text": "runs/x/export"}
  ]
  err = [json.loads(line) for line in said.err.splitlines()]
  events = [line["event"] for line in err]
  assert events == ["devices", "progress", "log", "error", "error"]
  assert err[0] == {"event": "devices", "count": 2, "text": "two devices"}
  progress = err[1]
  assert (progress["done"], progress["total"], progress["eta_s"]) == (4, 4, 0)
  assert (progress["loss"], progress["tokens/s"]) == (0.125, 12345.6)
  assert (err[2]["level"], err[2]["text"]) == ("warning", "careful: 3")
  assert err[4]["text"] == "ValueError: boom"
  assert "Traceback" in err[4]["traceback"]


def test_plain_progress_has_rate_and_remaining_time(mode, capsys, monkeypatch):
  mode("plain")
  now = [100.0]
  monkeypatch.setattr(tqdm.std, "time", lambda: now[0])

  def clock():
    now[0] += 6.0

  speak(clock)
  # One line after 12 s, the first update past 10 s, and one at the end.
  assert capsys.readouterr().err.splitlines() == [
    "two devices",
    "dpo run:  75% 3/4 [00:12<00:06,  6.00s/step, loss 0.25, tokens/s 12,346]",
    "dpo run: 100% 4/4 [00:18<00:00,  6.00s/step, loss 0.125, tokens/s 12,346]",
  ]


def test_a_bar_shows_the_values(mode, capsys):
  mode("bar")
  speak()
  said = capsys.readouterr().err
  for words in ("4/4", "tokens/s 12,346", "two devices"):
    assert words in said


# Every way to emit a message, each with a word of its own.
SPEAKERS = """
import logging, sys, warnings
logging.basicConfig(level=logging.INFO)
from absl import logging as absl_logging
from dpo_jax.core import console
console.set_mode(sys.argv[1])
# Adds a handler to its logger, which propagates.
from huggingface_hub.utils import logging as hub_logging
# As transformers does, which takes longer to import.
alone = logging.getLogger("alone")
alone.addHandler(logging.StreamHandler())
alone.propagate = False
with console.Bar(9, "run", "step") as bar:
  bar.update(1, {"loss": 0.5})
  console.say("apple")
  logging.getLogger("dpo_jax.training").warning("banana %d", 1)
  logging.getLogger("somebody.else").warning("cherry")
  absl_logging.warning("damson")
  hub_logging.get_logger("huggingface_hub.file").warning("kiwi")
  logging.getLogger("alone.part").warning("lemon")
  warnings.warn("elder", stacklevel=1)
  console.error("fig")
  console.result("grape")
  bar.update(8, {"loss": 0.25})
console.mute()
console.say("hazel")
with console.Bar(9, "iris", "step") as bar:
  bar.update(9)
console.error("jasmine")
"""
FRUITS = re.findall(r"(?:say|warn\w*|error|result)\(\"(\w+)", SPEAKERS)


@pytest.mark.parametrize("name", console.MODES)
def test_each_message_is_shown_once(name):
  done = python("-W", "default", "-c", SPEAKERS, name)
  assert done.returncode == 0, done.stderr
  # As on a terminal: "\r" starts the line again.
  said = re.split("[\r\n]+", done.stdout + done.stderr)
  hidden = {"hazel", "iris"} | ({"apple"} if name == "quiet" else set())
  for word in (*FRUITS, "iris"):
    lines = [line for line in said if word in line]
    assert len(lines) == (word not in hidden), (word, lines)
    for line in lines:
      # A bar that was not cleared would be on the same line.
      assert "step" not in line
      if name == "json":
        assert word in json.loads(line)["text"]
  assert ("9/9" in done.stderr) == (name != "quiet")
  assert done.stdout.count("\n") == 1


def test_a_message_is_shown_once_without_a_mode():
  """As in a notebook, with any handler of the root."""
  code = (
    "import logging; logging.basicConfig(level=0)\n"
    "from dpo_jax.core import console\n"
    "console.say('apple')\n"
    "logging.getLogger('dpo_jax.training').warning('banana')\n"
  )
  assert python("-c", code).stderr.splitlines() == [
    "apple",
    "WARNING:dpo_jax.training:banana",
  ]
