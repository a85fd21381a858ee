"""Flags, --help and exit codes, those of docs/commands.md.

The exit codes of train, sample and judge are tested where these are, signals in
test_signals.
"""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
import readers
import test_configs
import test_console

from dpo_jax import __main__
from dpo_jax.cli import checkpoint, flags
from dpo_jax.cli import help as help_lib
from dpo_jax.core import console
from dpo_jax.report import report, verify
from dpo_jax.training import score

ROOT = test_console.ROOT
mode = test_console.mode


@pytest.mark.parametrize(
  ("name", "variant"),
  [
    (name, variant)
    for name, (_, variants) in test_configs.CONFIGS.items()
    for variant in variants
    if "pythia" not in variant or variant.startswith("pythia-14m")
  ],
)
def test_help_has_every_field_with_a_comment(name, variant):
  lines = help_lib.page(f"configs/{name}.py:{variant}").splitlines()
  names = [*help_lib.names(test_configs.get(name, variant))]
  fields = {one for one in names if f"{one}." not in "\n".join(names)}
  for line, below in zip(lines, [*lines[1:], ""]):
    if match := re.match(r"  --(\S+)=", line):
      assert below.startswith(" " * 6), f"{line} has no comment"
      fields.remove(match[1])
    elif match := re.match(r"  (\S+): like (\S+), but$", line):
      group = {one for one in names if one.startswith(f"{match[1]}.")}
      twins = {one.replace(match[1], match[2], 1) for one in group}
      assert twins <= {*names}
      fields -= group
  assert not fields


@pytest.mark.parametrize(
  ("config", "section", "line"),
  [
    # Names with another meaning in another group.
    ("demo", "init", "seed=0\n      Of the random weights."),
    ("demo", "sft", "seed=0\n      Of data order, LoRA's initialization"),
    ("demo", "paths", "world='{workdir}/world'\n      Directory of the pairs."),
    ("judge:openai", "controls", "aa=50\n      Prompts whose chosen text is"),
    ("models", "", "heads=32\n      Attention heads; each has width / heads"),
  ],
)
def test_a_comment_is_of_the_fields_own_group(config, section, line):
  section = f"config.{section}".removesuffix(".")
  assert f"--{section}.{line}" in help_lib.page(config, section)


def test_comments_above_lines_and_keys(tmp_path):
  file = tmp_path / "c.py"
  file.write_text(
    "from ml_collections import config_dict\n"
    "def part(name):\n"
    "  c = config_dict.ConfigDict()\n"
    "  # How strong.\n"
    "  c.beta = 0.1\n"
    "  # Two lines\n"
    "  # of it.\n"
    "  c.name = name\n"
    "  c.bare = None\n"
    "  return c\n"
    "def get_config():\n"
    "  c = config_dict.ConfigDict()\n"
    "  c.loss = part('x')\n"
    "  # The reason of this recipe alone.\n"
    "  c.loss.beta = 0.5\n"
    "  c.other = part('y')\n"
    "  c.paths = config_dict.ConfigDict(\n"
    "    {\n"
    "      # Directory.\n"
    "      'data': 'd',\n"
    "    }\n"
    "  )\n"
    "  return c\n"
  )
  assert help_lib.page(str(file)).splitlines() == [
    "  --config.loss.beta=0.5",
    "      How strong.",
    "  --config.loss.name='x'",
    "      Two lines of it.",
    "  --config.loss.bare=None",
    "  config.other: like config.loss, but",
    "    config.other.beta: 0.5 -> 0.1",
    "    config.other.name: 'x' -> 'y'",
    "  --config.paths.data='d'",
    "      Directory.",
  ]


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("configs/dop.py:pythia-14m", "no file 'configs/dop.py'; did you mean dpo"),
    ("smaple:paper", "no file 'smaple'; did you mean sample?"),
    ("my/zzzzzzzz.py", "no file 'my/zzzzzzzz.py'; .* has .*'demo'"),
  ],
)
def test_an_unknown_config_names_the_near_one(name, words):
  with pytest.raises(ValueError, match=words):
    help_lib.load(name)


def test_an_unknown_section_names_the_near_ones():
  with pytest.raises(ValueError, match=r"did you mean .*config\.sft\.loss"):
    help_lib.page("demo:tiny", "config.loss")


@pytest.mark.parametrize(
  ("flag", "near"),
  [
    ("--config.loss.bta=0.3", "config.loss.beta"),
    ("--config.beta=0.3", "config.loss.beta"),
    ("--noconfig.data.alow_leakage", "config.data.allow_leakage"),
    ("--config.loss.beta.x=0.3", "config.loss.beta"),
    ("--epochs=3", "config.epochs"),
    ("-loss.beta=0.3", "config.loss.beta"),
    ("--wrokdir=x", "workdir"),
  ],
)
def test_an_unknown_flag_names_the_near_one(flag, near):
  name = flag.lstrip("-").partition("=")[0]
  words = f"--{name}: no such flag or field; did you mean {near}?"
  with pytest.raises(ValueError, match=re.escape(words)):
    flags._config("configs/dpo.py", ["program", flag], ["workdir", "log"])


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


def test_fields_are_set_by_flags():
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


def test_help_of_a_script():
  done = test_console.python("judge.py", "-h")
  assert done.returncode == 0, done.stderr
  assert "--config.controls.aa=50\n      Prompts whose chosen" in done.stdout
  assert "refused because of flags" in done.stdout
  assert "--log: auto (bar on a terminal" in done.stdout
  assert "--[no]estimate: print calls" in done.stdout
  done = test_console.python("judge.py", "--help=controls")
  flagged = re.findall(r"^ *--(\S+)=", done.stdout, re.MULTILINE)
  assert flagged == [f"config.controls.{x}" for x in ("aa", "gold", "retests")]


def test_help_may_be_read_in_part():
  """As by `| head`: the pipe is closed before the page is written."""
  reader, writer = os.pipe()
  os.close(reader)
  command = [sys.executable, "judge.py", "--help"]
  child = subprocess.run(
    command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
  )
  os.close(writer)
  assert (child.returncode, child.stderr) == (-13, "")


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
    (
      ("--config=configs/judge.py", "--workdir=gs://bucket/run"),
      "neither locks nor renames",
    ),
  ],
)
def test_wrong_flags_exit_with_2(arguments, words, mode, monkeypatch, capfd):
  monkeypatch.setattr(sys, "argv", ["judge.py", *arguments])
  with pytest.raises(SystemExit) as error:
    flags.run(pytest.fail, "configs/judge.py", estimate=(False, ""))
  assert error.value.code == 2
  (line,) = capfd.readouterr().err.splitlines()
  assert words in line
  assert line.startswith("{" if "--log=json" in arguments else "error: ")


@pytest.mark.parametrize(
  ("error", "code", "words"),
  [
    (
      OSError(errno.ENOSPC, "No space left on device", "responses/x.jsonl"),
      1,
      "responses/x.jsonl: No space left .* bytes are free.*make room",
    ),
    (OSError(errno.EMFILE, "Too many open files"), 1, r"\(ulimit -n\)"),
    (OSError(errno.EACCES, "Permission denied", "x"), 1, "Permission .*'x'"),
    (KeyboardInterrupt(), 130, "stopped by SIGINT .*the same command again"),
  ],
)
def test_what_stops_any_command_has_no_traceback(
  error, code, words, mode, monkeypatch, capfd, tmp_path
):
  def main(config, workdir):
    raise error

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["x.py", "--config=configs/demo.py"])
  with pytest.raises(SystemExit) as found:
    flags.run(main, "configs/demo.py")
  assert found.value.code == code
  *_, line = capfd.readouterr().err.splitlines()
  assert re.match(f"error: .*{words}", line)


@pytest.mark.parametrize(
  "command", [("judge.py",), ("-m", "dpo_jax", "verify")]
)
def test_a_path_that_cannot_be_encoded_is_named(command, tmp_path):
  (tmp_path / "é").mkdir()
  path = f"{tmp_path}/é"
  if "judge.py" in command:
    path = f"--workdir={path}"
    command += ("--config=judge:oracle",)
  for utf8, words in (("1", "é.* no "), ("0", r"udcc3.*set PYTHONUTF8=1$")):
    done = subprocess.run(
      [sys.executable, *command, path],
      cwd=ROOT,
      env=os.environ
      | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8},
      capture_output=True,
    )
    *_, line = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert re.search(f"^error: .*{words}", line)


# --- commands without --config

COMMANDS = {
  "report": report.main,
  "verify": verify.main,
  "checkpoint": checkpoint.main,
  "score": lambda arguments: score.main(),
}
REFUSED = {
  "report": ("nowhere",),
  "verify": ("nowhere",),
  "checkpoint": ("list", "nowhere"),
  "score": ("--model=m", "--pairs=p", "--output=nowhere/x"),
}


def call(name, arguments, monkeypatch):
  monkeypatch.setattr(sys, "argv", [name, *arguments])
  return COMMANDS[name]([*arguments])


def rows(title):
  """First cells of the table below a heading of docs/commands.md."""
  text = (ROOT / "docs" / "commands.md").read_text("utf-8")
  table = re.search(
    r"(?:^\|.*\n)+", text.partition(f"# {title}\n")[2], re.MULTILINE
  )
  return [line.split("|")[1].strip() for line in table[0].splitlines()[2:]]


def test_the_page_lists_the_commands_codes_and_modes():
  names = [*__main__._SCRIPTS, *__main__._MODULES]
  assert [row.strip("`") for row in rows("Commands")] == names
  assert rows("Exit codes") == ["0", "1", "2", "129", "130", "143"]
  assert [row.strip("`") for row in rows("Output")] == [*console.MODES]


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_input_is_code_2_and_one_json_line(
  name, mode, monkeypatch, capsys, tmp_path
):
  monkeypatch.chdir(tmp_path)
  assert call(name, (*REFUSED[name], "--log=json"), monkeypatch) == 2
  said = capsys.readouterr()
  assert said.out == ""
  (line,) = said.err.splitlines()
  assert json.loads(line)["event"] == "error"
  with pytest.raises(SystemExit) as error:
    call(name, ["--nonsense=1"], monkeypatch)
  assert error.value.code == 2


@pytest.mark.parametrize(
  ("name", "place"),
  [
    ("report", (report, "write")),
    ("verify", (verify, "_reports")),
    ("checkpoint", (checkpoint, "_print")),
    ("score", (score, "run")),
  ],
)
def test_a_command_stopped_by_hand_has_no_traceback(
  name, place, mode, monkeypatch, capsys
):
  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(*place, stop)
  assert call(name, REFUSED[name], monkeypatch) == 130
  assert "stopped by SIGINT" in capsys.readouterr().err


@pytest.fixture
def results(tmp_path):
  """A directory with one result file that agrees with its rows."""
  (tmp_path / "eval_one.json").write_text(json.dumps(readers.EVAL))
  return str(tmp_path)


def test_a_result_is_code_0_and_json(mode, monkeypatch, capsys, results):
  assert call("verify", (results, "--log=json"), monkeypatch) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert {line["event"] for line in lines} == {"result"}


def test_a_check_that_fails_is_code_1(monkeypatch, capsys, shared):
  assert call("verify", [str(shared / "seed_results")], monkeypatch) == 1
  assert "3 of 12 files disagree" in capsys.readouterr().out


def test_a_command_by_its_name(monkeypatch, capsys, results):
  # As a new process would import it.
  monkeypatch.delitem(sys.modules, "dpo_jax.report.verify")
  for arguments, code in (
    (["verify", results], 0),
    (["--help"], 0),
    (["trian"], 2),
  ):
    monkeypatch.setattr(sys, "argv", ["dpo-jax", *arguments])
    with pytest.raises(SystemExit) as error:
      __main__.main()
    assert error.value.code == code
  said = capsys.readouterr()
  assert "0 of 1 files disagree" in said.out
  assert "Names: train, sample, judge, replicate" in said.out
  assert "Names: train, sample, judge, replicate" in said.err
