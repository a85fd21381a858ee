"""What is shown, in every mode, and what --help and wrong flags say."""

import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import pytest
import test_configs
import tqdm

from dpo_jax.cli import flags
from dpo_jax.cli import help as help_lib
from dpo_jax.core import console

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def mode():
  """Sets a mode for one test."""
  handlers = list(logging.getLogger().handlers)
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


def speak(clock=None):
  console.say("two devices", "devices", count=2)
  with console.Bar(4, "dpo run", "step", done=1) as bar:
    for loss in (0.5, 0.25, 0.125):
      if clock:
        clock()
      bar.update(1, {"loss": loss, "tokens/s": 12345.6})
  console.result("runs/x/export", path="runs/x/export")


def test_json_lines_are_objects_whatever_speaks(mode, capsys):
  mode("json")
  speak()
  logging.getLogger("dpo_jax.somewhere").warning("careful: %d", 3)
  console.error("it broke")
  try:
    raise ValueError("boom")
  except ValueError:
    sys.excepthook(*sys.exc_info())
  said = capsys.readouterr()
  out = [json.loads(line) for line in said.out.splitlines()]
  err = [json.loads(line) for line in said.err.splitlines()]
  assert out == [
    {"event": "result", "path": "runs/x/export", "text": "runs/x/export"}
  ]
  events = [line["event"] for line in err]
  assert events == ["devices", "progress", "log", "error", "error"]
  assert err[0] == {"event": "devices", "count": 2, "text": "two devices"}
  progress = err[1]
  assert (progress["done"], progress["total"], progress["eta_s"]) == (4, 4, 0)
  assert (progress["loss"], progress["tokens/s"]) == (0.125, 12345.6)
  assert err[2]["text"] == "careful: 3"
  assert err[2]["level"] == "warning"
  assert err[4]["text"] == "ValueError: boom"
  assert "Traceback" in err[4]["traceback"]


def test_plain_lines_have_a_rate_and_what_is_left(mode, capsys, monkeypatch):
  mode("plain")
  now = [100.0]
  monkeypatch.setattr(tqdm.std, "time", lambda: now[0])

  def clock():
    now[0] += 6.0

  speak(clock)
  # A line at 12 s, when 10 have passed, and one at the end: one step in 6 s.
  assert capsys.readouterr().err.splitlines() == [
    "two devices",
    "dpo run:  75% 3/4 [00:12<00:06,  6.00s/step, loss 0.25, tokens/s 12,346]",
    "dpo run: 100% 4/4 [00:18<00:00,  6.00s/step, loss 0.125, tokens/s 12,346]",
  ]


def test_a_bar_shows_the_values(mode, capsys):
  mode("bar")
  speak()
  said = capsys.readouterr().err
  assert "4/4" in said
  assert "tokens/s 12,346" in said
  assert "two devices" in said


def test_quiet_leaves_results_and_errors(mode, capsys):
  mode("quiet")
  speak()
  console.error("it broke")
  said = capsys.readouterr()
  assert said.out == "runs/x/export\n"
  assert said.err == "error: it broke\n"


# Everything that a process may say, each with a word of its own.
SPEAKERS = """
import logging, sys, warnings
logging.basicConfig(level=logging.INFO)
from absl import logging as absl_logging
from dpo_jax.core import console
console.set_mode(sys.argv[1])
# Gives its loggers a handler, and lets them propagate.
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
  # What a terminal would show: "\r" begins a line anew.
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


def test_a_message_is_shown_once_where_no_mode_is_chosen():
  """As in a notebook, whatever handler it has given the root."""
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


def test_an_unknown_mode_is_refused():
  with pytest.raises(ValueError, match="log='loud' must be one of"):
    console.set_mode("loud")


# --- help and flags


@pytest.mark.parametrize(
  ("name", "variant"),
  [
    (name, variant)
    for name, (_, variants) in test_configs.CONFIGS.items()
    for variant in variants
    if "pythia" not in variant or variant.startswith("pythia-14m")
  ],
)
def test_every_field_of_every_config_has_a_comment(name, variant):
  found = help_lib.fields(f"configs/{name}.py:{variant}")
  assert [field.name for field in found if not field.comment] == []
  # None is left out: names of leaves are those that lead to no group.
  names = list(help_lib.names(test_configs.get(name, variant)))
  leaves = {
    name for name in names if not any(n.startswith(f"{name}.") for n in names)
  }
  assert {field.name for field in found} == leaves


@pytest.mark.parametrize(
  ("config", "field", "comment"),
  [
    # Names that have another meaning in another group.
    ("demo", "init.seed", "Of the random weights."),
    ("demo", "sft.seed", "Decides data order, LoRA's initial values and"),
    ("demo", "paths.tokenizer", "Directory of the tokenizer."),
    ("demo", "sft.tokenizer", "Directory with tokenizer.json, or the id"),
    ("hh", "paths.tokenizer", "Directory with tokenizer.json, or the id"),
    ("dpo", "mesh.data", "Devices along each axis; -1, once, takes what"),
    ("sample:seed", "policies.dpo.adapter", "A PEFT adapter directory for"),
    ("models", "heads", "Of attention; they share the width."),
  ],
)
def test_a_comment_is_of_the_fields_own_group(config, field, comment):
  found = {one.name: one for one in help_lib.fields(config)}
  assert found[f"config.{field}"].comment.startswith(comment)


def test_comments_are_found_above_lines_and_keys(tmp_path):
  file = tmp_path / "c.py"
  file.write_text(
    "from ml_collections import config_dict\n"
    "def part():\n"
    "  c = config_dict.ConfigDict()\n"
    "  # How strong.\n"
    "  c.beta = 0.1\n"
    "  # Two lines\n"
    "  # of it.\n"
    "  c.name = 'x'\n"
    "  c.bare = None\n"
    "  return c\n"
    "def get_config(variant=''):\n"
    "  c = config_dict.ConfigDict()\n"
    "  c.loss = part()\n"
    "  # Only this recipe's reason.\n"
    "  c.loss.beta = 0.5\n"
    "  c.paths = config_dict.ConfigDict(\n"
    "    {\n"
    "      # Where it lies.\n"
    "      'data': 'd',\n"
    "    }\n"
    "  )\n"
    "  return c\n"
  )
  found = help_lib.fields(str(file))
  assert [(f.name, f.value, f.comment) for f in found] == [
    ("config.loss.beta", 0.5, "How strong."),
    ("config.loss.name", "x", "Two lines of it."),
    ("config.loss.bare", None, ""),
    ("config.paths.data", "d", "Where it lies."),
  ]
  assert help_lib.page(found).splitlines()[:3] == [
    "  --config.loss.beta=0.5",
    "      How strong.",
    "  --config.loss.name='x'",
  ]


@pytest.mark.parametrize(
  ("name", "words"),
  [
    (
      "configs/dop.py:pythia-14m",
      r"no file 'configs/dop.py'.*configs/dpo\.py\?",
    ),
    ("smaple:paper", r"no file 'smaple'.*configs/sample\.py\?"),
    (
      "my/zzzzzzzz.py",
      r"no file 'my/zzzzzzzz.py'; there are \[.*'demo'",
    ),
  ],
)
def test_a_config_that_is_not_there_names_the_near_one(name, words):
  with pytest.raises(ValueError, match=words):
    help_lib.load(name)


def test_a_repeated_group_is_shown_once_with_what_differs():
  shown = help_lib.page(help_lib.fields("configs/dpo.py")).splitlines()
  at = shown.index("  config.data.sources.tfds: like config.data.sources.hh")
  assert shown[at + 1 : at + 5] == [
    "  --config.data.sources.tfds.kind='tfds'",
    "  --config.data.sources.tfds.train_path='data'",
    "  --config.data.sources.tfds.eval_path='data'",
    "  config.data.sources.shp: like config.data.sources.hh",
  ]
  meaning = "      As train_split, of the held-out side."
  assert shown.count(meaning) == 1


@pytest.mark.parametrize(
  ("flag", "near"),
  [
    ("--config.loss.bta=0.3", "config.loss.beta"),
    ("--config.beta=0.3", "config.loss.beta"),
    ("--config.lss.beta=0.3", "config.loss.beta"),
    ("--noconfig.data.alow_leakage", "config.data.allow_leakage"),
    (
      "--config.data.sources.hh.train_pth=x",
      "config.data.sources.hh.train_path",
    ),
    ("--config.loss.beta.x=0.3", "config.loss.beta"),
    ("--epochs=3", "config.epochs"),
    ("-loss.beta=0.3", "config.loss.beta"),
    ("--beta", "config.loss.beta"),
    ("--wrokdir=x", "workdir"),
  ],
)
def test_an_unknown_flag_names_the_near_one(flag, near):
  with pytest.raises(ValueError, match="no such flag or field") as error:
    flags._config("configs/dpo.py", ["program", flag], ["workdir", "log"])
  name = flag.lstrip("-").partition("=")[0]
  assert str(error.value).startswith(f"--{name}: ")
  assert f"did you mean {near}?" in str(error.value)


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--config.loss.beta=x", r"--config\.loss\.beta=x: could not convert"),
    ("--config.epochs=1.5", r"--config\.epochs=1\.5: invalid literal"),
    ("--config.loss.beta", r"Missing value for flag --config\.loss\.beta"),
    ("loss", r"unexpected arguments: \['loss'\]"),
  ],
)
def test_a_wrong_value_is_named(flag, words):
  with pytest.raises(ValueError, match=words):
    flags._config("configs/dpo.py", ["program", flag], [])


def test_known_fields_are_changed():
  values = flags._config(
    "dpo:pythia-14m",
    [
      *("program", "--config.loss.beta=1", "--config.optimizer.b1", "-0.5"),
      *("--noconfig.data.allow_leakage", "--config.data.use=('hh','shp')"),
      *("--config.lora.targets=dense", "--config.lora.targets=query_key_value"),
      "--config.samples={'prompts': 3}",
    ],
    [],
  )
  assert values["loss"]["beta"] == 1.0
  assert values["optimizer"]["b1"] == -0.5
  assert values["data"]["allow_leakage"] is False
  assert values["data"]["use"] == ("hh", "shp")
  assert values["lora"]["targets"] == ("dense", "query_key_value")
  assert values["samples"] == {"prompts": 3}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_script_shows_its_fields_and_codes(flag):
  done = python("judge.py", flag)
  assert done.returncode == 0, done.stderr
  assert "--config.controls.aa=50\n      Prompts whose chosen" in done.stdout
  assert "refused because of flags" in done.stdout
  assert "--log: auto (bar on a terminal" in done.stdout
  assert "--[no]estimate: print calls" in done.stdout


@pytest.mark.parametrize("section", ["controls", "config.controls"])
def test_help_of_a_section_shows_its_fields_alone(section):
  done = python("judge.py", f"--help={section}")
  assert done.returncode == 0, done.stderr
  flagged = re.findall(r"^ *--(\S+)=", done.stdout, re.MULTILINE)
  assert flagged == [
    "config.controls.aa",
    "config.controls.gold",
    "config.controls.retests",
  ]


def test_help_of_a_section_that_is_none_names_near_ones():
  done = python("judge.py", "--help=loss", "--config=demo:tiny")
  assert (done.returncode, done.stdout) == (2, "")
  assert re.search(r"did you mean .*config\.sft\.loss", done.stderr)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (("--log=json", "--estimate=x"), "Non-boolean argument"),
    (
      ("--config=configs/judge.py", "--config.controls.a=1", "--log=json"),
      "did you mean config.controls.aa?",
    ),
    (("--log=loud",), "log='loud' must be one of"),
    ((), "--config is missing"),
  ],
)
def test_wrong_flags_of_a_command_exit_with_2(arguments, words):
  done = python("judge.py", *arguments)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert words in line
  assert line.startswith("{" if "--log=json" in arguments else "error: ")
