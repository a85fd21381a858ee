"""What the guides say is so: commands, files, flags, fields, and their code."""

import argparse
import ast
import functools
import importlib.util
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings

import pytest
from absl import flags
from ml_collections import config_flags

from benchmarks import peers
from dpo_jax import __main__ as entry
from dpo_jax import replicate
from dpo_jax.cli import help as help_lib
from dpo_jax.core import redaction, settings
from dpo_jax.judging import runner
from dpo_jax.sampling import jobs
from dpo_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
# What each program makes of its config.
SETTINGS = {
  "train.py": config_lib.TrainSettings,
  "sample.py": jobs.SamplingSettings,
  "judge.py": runner.JudgeSettings,
  "dpo_jax.replicate": replicate.ReplicateSettings,
  "dpo_jax plan": config_lib.TrainSettings,
  "dpo_jax inspect_data": config_lib.TrainSettings,
}
# Values that exist once a guide was followed; `extended` follows them.
OWN = {"experiments/mine.py", "apo_zero"}
# Flags of every program that takes a config.
COMMON = {"config", "workdir", "log", "help"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
  """The code blocks of a page; indented ones count as bash."""
  text = page.read_text("utf-8")
  found = [body for name, body in FENCE.findall(text) if name == language]
  if language == "bash":
    plain = FENCE.sub("", text)
    indented = re.findall(
      r"(?:^ {4}\S.*\n(?: {4,}.*\n)*)+", plain, re.MULTILINE
    )
    found += [re.sub(r"^ {4}", "", one, flags=re.MULTILINE) for one in indented]
  return found


def commands(page):
  """The words of each command; `&&` and `;` part two."""
  for body in blocks(page, "bash"):
    for line in body.replace("\\\n", " ").splitlines():
      lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
      lexer.whitespace_split = True
      words = []
      for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
          if words:
            yield words
          words = []
        else:
          words.append(word)


def programs(page):
  """(program, its arguments) of all that runs Python, here or by ssh."""
  for words in commands(page):
    for word in words:
      inner = word.removeprefix("--command=")
      if inner != word:
        words = [*words, *shlex.split(inner)]
    at = next(
      (i for i, w in enumerate(words) if re.fullmatch(r"python3?", w)), None
    )
    if at is None or at + 1 == len(words):
      continue
    if words[at + 1] == "-c":
      ast.parse(words[at + 2])
    elif words[at + 1 : at + 3] == ["-m", "dpo_jax"]:
      yield f"dpo_jax {words[at + 3]}", words[at + 4 :]
    elif words[at + 1] == "-m":
      yield words[at + 2], words[at + 3 :]
    else:
      yield words[at + 1], words[at + 2 :]


def module_of(program):
  """The module of a command such as "dpo_jax plan", or the program itself."""
  name = program.removeprefix("dpo_jax ")
  return program if name == program else entry._MODULES.get(name, program)


def source_of(program):
  """The file of a module or script; None for a library's."""
  program = module_of(program)
  if program.endswith(".py"):
    return ROOT / program
  if program.split(".")[0] not in ("dpo_jax", "benchmarks", "configs"):
    return None
  path = ROOT / program.replace(".", "/")
  return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


class _Parsed(BaseException):
  """Carries the flags of a program that has come to read its arguments."""


@functools.cache
def known_flags(program):
  """The names of a program's flags, as it would read them."""
  path = source_of(program)
  tree = ast.parse(path.read_text("utf-8"))
  calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
  for node in calls:
    if ast.unparse(node.func) == "flags.run":
      return COMMON | {keyword.arg for keyword in node.keywords}

  def stop(parser, *unused):
    raise _Parsed({flag.lstrip("-") for flag in parser._option_string_actions})

  with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    # It is imported already, by other tests.
    warnings.simplefilter("ignore", RuntimeWarning)
    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    patch.setattr(redaction, "install", lambda: None)
    patch.setattr(sys, "argv", [program])
    with pytest.raises(_Parsed) as found:
      runpy.run_module(module_of(program), run_name="__main__", alter_sys=True)
  return found.value.args[0]


@pytest.fixture(params=PAGES, ids=NAMES)
def page(request):
  return request.param


def test_commands_name_programs_and_flags_that_exist(page):
  for program, arguments in programs(page):
    path = source_of(program)
    if path is None:
      assert importlib.util.find_spec(program.split(".")[0]), program
    else:
      assert path.is_file(), f"{page.name}: {program}"
      known = known_flags(program)
      for argument in arguments:
        name = re.match(r"--([\w-]+)(?:=|$)", argument)
        assert (
          not name or name[1].removeprefix("no") in known or (name[1] in known)
        ), f"{page.name}: {program} {argument}"
    for argument in arguments:
      if re.match(
        r"(tests|benchmarks|configs|docs|notebooks)/\S+\.\w+$", argument
      ):
        new = f"# {argument}\n" in page.read_text("utf-8")
        assert new or (ROOT / argument).exists(), f"{page.name}: {argument}"


def test_configs_are_built_with_the_flags_that_are_given(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  for program, arguments in programs(page):
    given = [a for a in arguments if a.startswith("--config")]
    if program not in SETTINGS or not given:
      continue
    if any(argument.partition("=")[2] in OWN for argument in given):
      continue
    # A placeholder of the reader's stands for a Pythia of one size.
    given = [a.replace("SIZE", "2.8b") for a in given]
    # Where ml_collections looks for the fields that are given.
    monkeypatch.setattr(sys, "argv", ["program", *given])
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    fields = set(help_lib.names(help_lib.load(given[0][9:])))
    for argument in given[1:]:
      field = argument[2:].partition("=")[0]
      assert field in fields, f"{page.name}: {argument}"
    with warnings.catch_warnings():
      # ml_collections loads files by an old name.
      warnings.simplefilter("ignore", DeprecationWarning)
      values(["program", *given])
    settings.build(SETTINGS[program], config.value.to_dict())


def test_paths_in_prose_exist(page):
  """`dpo_jax/plan/plan.py`, `docs/tpu.md`, [links](data.md) and the like."""
  text = page.read_text("utf-8")
  prose = FENCE.sub("", text)
  named = re.findall(
    r"`((?:dpo_jax|configs|docs|tests|benchmarks|notebooks|\.ci)/[\w./-]+)`",
    prose,
  )
  # Evidence about other packages stands in tables of their own files.
  for path in named:
    assert f"# {path}\n" in text or (ROOT / path).exists(), (
      f"{page.name}: {path}"
    )
  for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", prose):
    assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_python_and_shell_blocks_parse(page):
  for body in blocks(page, "python"):
    ast.parse(body)
  for body in blocks(page, "bash"):
    done = subprocess.run(["bash", "-n"], input=body, text=True, check=False)
    assert done.returncode == 0, f"{page.name}: {body}"


def test_configs_in_python_blocks_build(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  for body in blocks(page, "python"):
    if "def get_config(" not in body:
      continue
    names = {}
    exec(compile(body, str(page), "exec"), names)
    config = names["get_config"]().to_dict()
    kind = (
      jobs.SamplingSettings
      if "policies" in config
      else config_lib.TrainSettings
    )
    settings.build(kind, config)


def test_a_wrong_command_would_be_found(tmp_path, monkeypatch):
  """The checks above on a page that is wrong in every way."""
  for line, check in (
    ("python trian.py", test_commands_name_programs_and_flags_that_exist),
    (
      "python -m dpo_jax plan --topolgy=v5e:2x4 --config=configs/dpo.py",
      test_commands_name_programs_and_flags_that_exist,
    ),
    (
      "ssh host --command='python -m dpo_jax nothing'",
      test_commands_name_programs_and_flags_that_exist,
    ),
  ):
    wrong = tmp_path / "wrong.md"
    wrong.write_text(f"```bash\n{line}\n```\n")
    with pytest.raises(AssertionError):
      check(wrong)
  for line in ("--config.loss.bata=1", "--config.loss.kind=log"):
    wrong.write_text(
      f"```bash\npython train.py --config=configs/dpo.py {line}\n```\n"
    )
    with pytest.raises((AssertionError, ValueError)):
      test_configs_are_built_with_the_flags_that_are_given(wrong, monkeypatch)
  wrong.write_text("See `dpo_jax/nothing.py`.\n")
  with pytest.raises(AssertionError):
    test_paths_in_prose_exist(wrong)


GUIDES = ("add_a_dataset", "add_a_loss", "add_a_model")


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
  """A copy of the tree, changed as the three guides say."""
  tree = tmp_path_factory.mktemp("extended")
  for name in ("dpo_jax", "configs", "tests", "benchmarks"):
    shutil.copytree(
      ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__")
    )
  for name in ("pyproject.toml", "train.py"):
    shutil.copy(ROOT / name, tree)
  for guide in GUIDES:
    page = ROOT / "docs" / f"{guide}.md"
    for body in blocks(page, "python"):
      path = re.match(r"# (\S+\.py)\n", body)[1]
      assert not (tree / path).exists(), f"{guide}: {path} is there already"
      (tree / path).parent.mkdir(exist_ok=True)
      (tree / path).write_text(body.partition("\n")[2], "utf-8")
    for body in blocks(page, "diff"):
      done = subprocess.run(
        ["git", "apply", "-"],
        input=body,
        text=True,
        cwd=tree,
        capture_output=True,
        check=False,
      )
      assert done.returncode == 0, f"{guide}: {done.stderr}"
    for body in blocks(page, "bash"):
      if body.startswith("sed "):
        subprocess.run(["bash", "-c", body], cwd=tree, check=True)
  return tree


def run(tree, *arguments):
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=tree,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


def new_tests():
  for guide in GUIDES:
    for body in blocks(ROOT / "docs" / f"{guide}.md", "python"):
      if body.startswith("# tests/"):
        yield body[2:].partition("\n")[0]


def test_the_guides_code_passes_the_guides_tests(extended):
  chosen = [*new_tests(), "tests/test_layering.py"]
  assert len(chosen) == 4
  text = run(extended, "-m", "pytest", "-q", "-n", "0", *chosen)
  assert " passed" in text
  assert "failed" not in text


def test_the_guides_code_is_in_house_style(extended):
  files = ("dpo_jax", "configs", *new_tests())
  run(extended, "-m", "ruff", "check", "-q", *files)
  run(extended, "-m", "ruff", "format", "-q", "--check", *files)


def test_the_guides_config_builds(extended):
  code = """if True:
    from dpo_jax.cli import help
    from dpo_jax.core import settings
    from dpo_jax.training import config
    mine = help.load("experiments/mine.py").to_dict()
    built = settings.build(config.TrainSettings, mine)
    print(built.data.use, built.data.sources["mine"].held_out)
  """
  assert run(extended, "-c", code).split() == ["('mine',)", "0.05"]


@pytest.mark.slow
def test_the_guides_loss_trains(extended, tmp_path):
  (command,) = (
    arguments
    for program, arguments in programs(ROOT / "docs" / "add_a_loss.md")
    if program == "dpo_jax.replicate"
  )
  command = [a for a in command if not a.startswith("--workdir")]
  run(
    extended, "-m", "dpo_jax.replicate", *command, f"--workdir={tmp_path / 'r'}"
  )
  assert (tmp_path / "r" / "report" / "report.md").exists()


@pytest.mark.slow
def test_the_extended_tree_passes_the_tests_of_what_it_touched(
  extended, shared
):
  (extended.parent / "shared").symlink_to(shared)
  chosen = ("losses", "model", "configs", "sources_forms", "golden")
  run(
    extended,
    *("-m", "pytest", "-q", "-n", "0"),
    *(f"tests/test_{name}.py" for name in chosen),
  )


def test_claims_about_peers_can_be_checked():
  found = peers.rows()
  assert len(found) > 60
  packages = {"trl", "tunix", "easydel", "maxtext", "levanter"}
  for row in found:
    assert row["kind"] in ("text", "absent")
    assert row["path"].split("/")[0] in packages
    assert row["what"]
    if row["kind"] == "absent":
      re.compile(row["what"])


def test_evidence_is_looked_up(tmp_path):
  (tmp_path / "trl").mkdir()
  (tmp_path / "trl" / "a.py").write_text("loss = 1\n")
  assert peers.holds(tmp_path, "trl/a.py", "loss = 1")
  assert not peers.holds(tmp_path, "trl/a.py", "loss = 2")
  assert not peers.holds(tmp_path, "trl/b.py", "loss")
  assert peers.lacks(tmp_path, "trl", "neox|gpt")
  assert not peers.lacks(tmp_path, "trl", "LOSS")
  assert not peers.lacks(tmp_path, "nothing", "loss")
