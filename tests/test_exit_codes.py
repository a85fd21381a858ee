"""The exit codes of docs/commands.md, and --log in every command.

Those of the scripts, and 129, 130 and 143, are tested where the scripts are.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import readers
import test_console

from dpo_jax import __main__
from dpo_jax.core import console
from dpo_jax.hub import push
from dpo_jax.io import checkpoint
from dpo_jax.report import report, verify
from dpo_jax.training import score

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "commands.md"
mode = test_console.mode

# Calls main with arguments, whatever form it has.
COMMANDS = {
  "report": report.main,
  "verify": verify.main,
  "checkpoint": checkpoint.main,
  "hub": push.main,
  "score": lambda arguments: score.main(),
}
REFUSED = {
  "report": ("nowhere",),
  "verify": ("nowhere",),
  "checkpoint": ("list", "nowhere"),
  "hub": ("nowhere", "--repo=a/b"),
  "score": ("--model=m", "--pairs=p", "--output=nowhere/x"),
}


def call(name, arguments, monkeypatch):
  monkeypatch.setattr(sys, "argv", [name, *arguments])
  return COMMANDS[name](list(arguments))


def rows(title):
  """The first cells of the table below a heading of the page."""
  text = PAGE.read_text("utf-8").partition(f"# {title}\n")[2]
  table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0]
  return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


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
  arguments = (*REFUSED[name], "--log=json")
  assert call(name, arguments, monkeypatch) == 2
  said = capsys.readouterr()
  assert said.out == ""
  (line,) = said.err.splitlines()
  assert json.loads(line)["event"] == "error"


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_flags_are_code_2(name, monkeypatch):
  with pytest.raises(SystemExit) as error:
    call(name, ["--nonsense=1"], monkeypatch)
  assert error.value.code == 2


@pytest.fixture
def results(tmp_path):
  """A directory of one result file that agrees with its rows."""
  (tmp_path / "eval_one.json").write_text(json.dumps(readers.EVAL))
  return str(tmp_path)


def test_a_result_is_code_0_and_json(mode, monkeypatch, capsys, results):
  assert call("verify", (results, "--log=json"), monkeypatch) == 0
  said = capsys.readouterr()
  lines = [json.loads(line) for line in said.out.splitlines()]
  assert {line["event"] for line in lines} == {"result"}


def test_a_check_that_fails_is_code_1(monkeypatch, capsys, shared):
  arguments = [str(shared / "seed_results")]
  assert call("verify", arguments, monkeypatch) == 1
  assert "3 of 12 files disagree" in capsys.readouterr().out


def test_an_unknown_command_is_code_2(monkeypatch, capsys):
  for name, code in (("nonsense", 2), ("--help", 0)):
    monkeypatch.setattr(sys, "argv", ["dpo-jax", name])
    with pytest.raises(SystemExit) as error:
      __main__.main()
    assert error.value.code == code
  assert "train, sample, judge" in capsys.readouterr().out


def test_a_command_by_its_name(monkeypatch, capsys, results):
  monkeypatch.setattr(sys, "argv", ["dpo-jax", "verify", results])
  # As a new process would import it.
  monkeypatch.delitem(sys.modules, "dpo_jax.report.verify")
  with pytest.raises(SystemExit) as error:
    __main__.main()
  assert error.value.code == 0
  assert "0 of 1 files disagree" in capsys.readouterr().out


def test_help_may_be_read_in_part():
  """As by `| head`: the reader is gone before the page is written."""
  root = pathlib.Path(__file__).parents[1]
  reader, writer = os.pipe()
  os.close(reader)
  try:
    child = subprocess.run(
      [sys.executable, root / "judge.py", "--help"],
      cwd=root,
      stdout=writer,
      stderr=subprocess.PIPE,
      text=True,
      timeout=120,
      check=False,
    )
  finally:
    os.close(writer)
  assert (child.returncode, child.stderr) == (0, "")
