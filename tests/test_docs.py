"""What the guides say is so: commands, paths, flags, fields, and their code."""

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
from dpo_jax.core import redaction, settings
from dpo_jax.judging import runner
from dpo_jax.sampling import jobs
from dpo_jax.training import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
GUIDES = [
  ROOT / f"docs/add_a_{name}.md" for name in ("dataset", "loss", "model")
]
# What each program makes of its config.
SETTINGS = {
  "train": config_lib.TrainSettings,
  "sample": jobs.SamplingSettings,
  "judge": runner.JudgeSettings,
  "dpo_jax.replicate": replicate.ReplicateSettings,
  "dpo_jax.plan.plan": config_lib.TrainSettings,
  "dpo_jax.training.inspect_data": config_lib.TrainSettings,
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?<![`\w/.-])python3? (?:-m )?([\w./]+)([^\n&;|]*)")


def blocks(page, language):
  found = FENCE.findall(page.read_text("utf-8"))
  return [body for name, body in found if name == language]


def programs(page):
  """(module, its arguments) of all commands that run Python."""
  text = FENCE.sub(
    lambda match: match[2] if match[1] == "bash" else "",
    page.read_text("utf-8").replace("\\\n", " "),
  )
  for name, line in COMMAND.findall(text):
    if line.count('"') % 2:  # the end of a command within quotes
      line = line.rpartition('"')[0]
    arguments = shlex.split(line, comments=True)
    if name == "dpo_jax":
      name = entry._MODULES[arguments.pop(0)]
    yield name.removesuffix(".py").replace("/", "."), arguments


class _Parsed(BaseException):
  """Carries the flags of a program that has come to read its arguments."""


@functools.cache
def known_flags(module):
  """The names of a program's flags; None of a program that is not ours."""
  spec = importlib.util.find_spec(module)
  assert spec, f"no program {module}"
  path = pathlib.Path(spec.origin)
  package = module.partition(".")[0]
  if path.parent != ROOT and not path.is_relative_to(ROOT / package):
    return None
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "flags.run":
      return {*("config", "workdir", "log"), *(k.arg for k in node.keywords)}

  def stop(parser, *unused):
    raise _Parsed({flag.lstrip("-") for flag in parser._option_string_actions})

  with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    # It is imported already, by other tests.
    warnings.simplefilter("ignore", RuntimeWarning)
    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    patch.setattr(redaction, "install", lambda: None)
    patch.setattr(sys, "argv", [module])
    with pytest.raises(_Parsed) as found:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
  return found.value.args[0]


@pytest.fixture(params=PAGES, ids=[path.stem for path in PAGES])
def page(request):
  return request.param


def test_commands_name_programs_flags_and_fields_that_exist(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  for module, arguments in programs(page):
    known = known_flags(module)
    for argument in arguments if known else ():
      name = re.match(r"--([\w-]+)(=|$)", argument)
      assert not name or name[1] in known, f"{module} {argument}"
    config = [a for a in arguments if a.startswith("--config")]
    # One config and one loss exist only once a guide was followed.
    followed = "experiments/" in " ".join(config) or "slic" in str(config)
    if not config or followed:
      continue
    # Where ml_collections looks for the fields that are given.
    argv = ["program", *(a.replace("SIZE", "2.8b") for a in config)]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    built = config_flags.DEFINE_config_file("config", flag_values=values)
    with warnings.catch_warnings():
      # ml_collections loads files by an old name.
      warnings.simplefilter("ignore", DeprecationWarning)
      values(argv)
    settings.build(SETTINGS[module], built.value.to_dict())


def test_paths_exist(page):
  """`dpo_jax/plan/plan.py`, tests/test_losses.py, [links](data.md), ..."""
  text = page.read_text("utf-8")
  folders = "dpo_jax|configs|docs|tests|benchmarks|notebooks|.ci"
  paths = re.findall(rf"(?<=[`\s])((?:{folders})/[\w./-]*[\w/])(?=[`\s])", text)
  for path in paths:
    # A block may be a new file.
    assert f"# {path}\n" in text or (ROOT / path).exists(), path
  for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", FENCE.sub("", text)):
    assert (page.parent / link).exists(), link


def test_blocks_parse_and_their_configs_build(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  for body in blocks(page, "bash"):
    subprocess.run(["bash", "-n"], input=body, text=True, check=True)
  for body in blocks(page, "python"):
    code = compile(body, str(page), "exec")
    if "def get_config(" in body:
      names = {}
      exec(code, names)
      config = names["get_config"]().to_dict()
      program = "sample" if "policies" in config else "train"
      settings.build(SETTINGS[program], config)


def test_every_promise_of_reliability_has_a_test_that_exists():
  text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
  faults = re.findall(r"^\| (?!fault |bound |-).*", text, re.MULTILINE)
  assert len(faults) > 30
  for fault in faults:
    proofs = re.findall(r"`(test_\w+\.py)::(test_\w+)`", fault)
    assert proofs, fault
    for file, name in proofs:
      source = (ROOT / "tests" / file).read_text("utf-8")
      assert f"\ndef {name}(" in source, f"{file}::{name}"


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
  """A copy of the tree, changed as the three guides say."""
  tree = tmp_path_factory.mktemp("extended")
  ignore = shutil.ignore_patterns("__pycache__")
  for name in ("dpo_jax", "configs", "tests", "benchmarks"):
    shutil.copytree(ROOT / name, tree / name, ignore=ignore)
  for name in ("pyproject.toml", "train.py"):
    shutil.copy(ROOT / name, tree)
  for guide in GUIDES:
    for body in blocks(guide, "python"):
      path = tree / re.match(r"# (\S+\.py)\n", body)[1]
      assert not path.exists()
      path.parent.mkdir(exist_ok=True)
      path.write_text(body.partition("\n")[2], "utf-8")
    for body in blocks(guide, "diff"):
      subprocess.run(
        ["git", "apply", "-"], input=body, text=True, cwd=tree, check=True
      )
    for body in blocks(guide, "bash"):
      if body.startswith("sed "):
        subprocess.run(["bash", "-c", body], cwd=tree, check=True)
  return tree


def run(tree, *arguments):
  command = [sys.executable, *arguments]
  done = subprocess.run(
    command, cwd=tree, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


def new_tests():
  """Files of tests that the guides add."""
  for guide in GUIDES:
    for body in blocks(guide, "python"):
      yield from re.findall(r"\A# (tests/\S+)\n", body)


def test_the_guides_code_passes_the_guides_tests(extended):
  chosen = [*new_tests(), "tests/test_layering.py"]
  assert len(chosen) == 4
  text = run(extended, "-m", "pytest", "-q", "-n", "0", *chosen)
  assert " passed" in text


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
def test_the_guides_loss_trains_and_breaks_nothing(extended, tmp_path, shared):
  (command,) = (
    [a for a in arguments if not a.startswith("--workdir")]
    for module, arguments in programs(ROOT / "docs" / "add_a_loss.md")
    if module == "dpo_jax.replicate"
  )
  command += [f"--workdir={tmp_path / 'r'}"]
  run(extended, "-m", "dpo_jax.replicate", *command)
  assert (tmp_path / "r" / "report" / "report.md").exists()
  (extended.parent / "shared").symlink_to(shared)
  names = ("losses", "model", "configs", "sources_forms", "golden")
  files = [f"tests/test_{name}.py" for name in names]
  run(extended, "-m", "pytest", "-q", "-n", "0", *files)


def test_claims_about_peers_are_looked_up(tmp_path):
  found = peers.rows()
  assert len(found) > 60
  for row in found:
    assert row["kind"] in ("text", "absent")
    assert row["what"]
    re.compile(row["what"] if row["kind"] == "absent" else "")
  (tmp_path / "trl").mkdir()
  (tmp_path / "trl" / "a.py").write_text("loss = 1\n")
  assert peers.holds(tmp_path, "trl/a.py", "loss = 1")
  assert not peers.holds(tmp_path, "trl/a.py", "loss = 2")
  assert not peers.holds(tmp_path, "trl/b.py", "loss")
  assert peers.lacks(tmp_path, "trl", "neox|gpt")
  assert not peers.lacks(tmp_path, "trl", "LOSS")
  assert not peers.lacks(tmp_path, "nothing", "loss")
