"""Pushing a run's models to a hub, over real HTTP, and loading them from it."""

import dataclasses
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import push_server
import pytest
import running

from dpo_jax.core import settings as recipe_settings
from dpo_jax.data import sources, tokenizer
from dpo_jax.hub import model_card
from dpo_jax.hub import push as push_lib
from dpo_jax.io import remote
from dpo_jax.model import gpt_neox, hf, hf_layout
from dpo_jax.training import config as config_lib
from dpo_jax.training import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPO = "user/tiny"
STEPS = [f"step-{i:06d}" for i in (2, 4, 6, 7)]


@dataclasses.dataclass(frozen=True)
class Whole:
  """A finished run: its files, its directory, and how its pushes failed."""

  files: pathlib.Path
  config: config_lib.TrainSettings
  directory: pathlib.Path
  error: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A LoRA run with adapters of steps 2, 4, 6 and 7, whose hub is broken."""
  files = running.make_files(tmp_path_factory.mktemp("files"))
  # No adapters are asked for, but those that are to be pushed.
  changes = {"push_to_hub": REPO, "export_adapters": False}
  config = running.configs(files)(**changes)
  with push_server.serve() as server, pytest.MonkeyPatch.context() as patch:
    hubbed(patch, server, files / "home")
    server.broken = lambda method, path: True
    with pytest.raises(push_lib.NotPushed) as error:
      train.run(config, files / "dpo")
  return Whole(files, config, files / "dpo", str(error.value))


@pytest.fixture
def run(whole, tmp_path):
  """The same directory, to be changed; its base lies where it lay."""
  return pathlib.Path(shutil.copytree(whole.directory, tmp_path / "dpo"))


def hubbed(monkeypatch, server, home):
  """This process's children know the server; it itself stays offline."""
  for name, value in environment(server, home).items():
    monkeypatch.setenv(name, value)


def environment(server, home):
  """Of a process that knows this hub alone; no other cache, no Xet."""
  return os.environ | {
    "HF_ENDPOINT": server.address,
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HOME": str(home),
    "HF_TOKEN": push_server.TOKEN,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
  }


def child(server, home, *command):
  done = subprocess.run(
    [sys.executable, *map(str, command)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=environment(server, home),
  )
  assert push_server.TOKEN not in done.stdout + done.stderr
  return done


def push(server, workdir, *flags):
  command = ("-m", "dpo_jax", "hub", workdir, f"--repo={REPO}", *flags)
  return child(server, workdir.parent / "home", *command)


def settings(**changes):
  values = {"repo": REPO, "public": False, "license": "", "dry_run": False}
  values["checkpoints"] = True
  return push_lib.PushSettings(**values | changes)


def pushed(run, branch, **changes):
  """What a branch gets: its card, and all its files."""
  files = push_lib.branches(run, settings(**changes))[branch]
  return files["README.md"], files


# Reads everything back as a stranger would, by name and revision.
LOADED = """
import json, pathlib, sys
import jax, numpy as np
from dpo_jax.model import hf
from dpo_jax.data import tokenizer
from dpo_jax.sampling import response_files
from dpo_jax.sampling import jobs
from dpo_jax.io import remote
from dpo_jax.model import hf_layout
base, run, repo = sys.argv[1:]
options = dict(dtype="float32", remat="none", lora=None, param_dtype="float32")
same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
shape, weights = hf.load(base, **options)
same(hf.load(repo, **options)[1], hf.load(run + "/export", **options)[1])
for step in ("step-000002",):
  mine = hf.load_adapter(run + "/adapters/" + step, shape, weights)
  theirs = hf.load_adapter(repo + "@" + step, shape, weights)
  assert mine[0] == theirs[0]
  same(mine[1], theirs[1])
words = tokenizer.load(repo + "@main")
assert words.fingerprint == tokenizer.load(run + "/export").fingerprint
assert remote.steps(repo)[:2] == [
  (2, repo + "@step-000002"), (4, repo + "@step-000004")]
assert response_files.weights(repo) == response_files.weights(run + "/export")
for load in (hf.read_config, tokenizer.load):
  try:
    load(repo + "@step-000099")
  except ValueError as error:
    assert "step-000099" in str(error), error
  else:
    raise AssertionError("loaded")
# Of all that the branch holds, nothing but what is read was fetched.
found = {p.name for p in remote.fetch(repo + "@main").iterdir()}
assert "planted.bin" not in found and "model.py" not in found, found
# And nothing of its folders.
assert not any(path.is_dir() for path in remote.fetch(repo).iterdir())
"""


def test_models_and_adapters_are_pushed_and_load_by_revision(run, whole):
  with push_server.serve() as server:
    done = push(server, run, "--license=mit")
    assert done.returncode == 0, done.stderr
    assert server.private == {REPO}
    assert server.commits == [(REPO, branch) for branch in [*STEPS, "main"]]
    branches = server.repos[REPO]
    for step in STEPS:
      assert branches[step].keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
      }
      file = run / "adapters" / step / "adapter_model.safetensors"
      assert branches[step]["adapter_model.safetensors"] == file.read_bytes()
    main = branches["main"]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
      assert main[name] == (run / "export" / name).read_bytes()
    assert main["run/metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    # What was pushed says nowhere where it lay.
    for files in branches.values():
      for name, content in files.items():
        for place in (whole.files, run.parent, ROOT, pathlib.Path.home()):
          assert f"{place}/".encode() not in content, name
    for file in ("run/config.json", "run/manifest.json"):
      kept = (run / file.removeprefix("run/")).read_bytes()
      assert f"{whole.files}/".encode() in kept
      assert json.loads(main[file]).keys() == json.loads(kept).keys()
    assert (
      main["adapter/adapter_model.safetensors"]
      == (branches[STEPS[-1]]["adapter_model.safetensors"])
    )
    # Again: nothing is sent. Another card: the cards alone change.
    assert push(server, run, "--license=mit").returncode == 0
    assert len(server.commits) == 5
    sent = len(server.objects)
    main["of/an/older.run"] = b""
    assert push(server, run).returncode == 0
    assert len(server.commits) == 10
    assert len(server.objects) == sent
    assert "of/an/older.run" not in branches["main"]

    branches["main"] |= {
      "planted.bin": b"pickled",
      "model.py": b"raise SystemExit(9)",
    }
    done = child(
      server,
      run.parent / "other",
      "-c",
      LOADED,
      whole.files / "model",
      run,
      REPO,
    )
    assert done.returncode == 0, done.stderr
  for path in run.parent.rglob("*"):
    if path.is_file():
      assert push_server.TOKEN.encode() not in path.read_bytes(), path


def test_a_dry_run_writes_all_and_sends_nothing(run):
  with push_server.serve() as server:
    server.broken = lambda method, path: True
    done = push(server, run, "--dry_run")
    assert server.repos == {}
  assert done.returncode == 0, done.stderr
  names = ", ".join([*STEPS, "main"])
  assert f"{REPO}: {names} written to {run / 'push'}\n" in done.stdout
  for branch in (*STEPS, "main"):
    written = {
      str(path.relative_to(run / "push" / branch)): path.read_bytes()
      for path in (run / "push" / branch).rglob("*")
      if path.is_file()
    }
    _, wanted = pushed(run, branch)
    assert written == {
      name: x.encode() if isinstance(x, str) else x.read_bytes()
      for name, x in wanted.items()
    }
  assert not (run / "hub.json").exists()


def test_what_fails_is_named_and_the_same_command_pushes_it(run):
  with push_server.serve() as server:
    tried = []

    def broken(method, path):
      if "commit/step-000004" in path:
        tried.append(path)
        return True
      return False

    server.broken = broken
    done = push(server, run)
    assert done.returncode == 1
    assert len(tried) == 1
    assert done.stderr.count("step-000004 was not pushed to user/tiny") == 1
    pushed = json.loads((run / "hub.json").read_text())[REPO]
    assert pushed.keys() == {*STEPS, "main"} - {"step-000004"}
    server.broken = lambda method, path: False
    assert push(server, run).returncode == 0
    assert server.commits[-1] == (REPO, "step-000004")
    assert len(server.commits) == 5
    # The repository was deleted there.
    server.repos.clear()
    (run / "hub.json").unlink()
    assert push(server, run).returncode == 0
    assert server.repos[REPO].keys() == {*STEPS, "main"}


def test_what_failed_while_training_is_pushed_by_the_same_command(
  run, whole, monkeypatch
):
  """The run itself was made with a hub that answers nothing but errors."""
  config, error = whole.config, whole.error
  assert "pushes what is missing" in error
  assert (run / "finished.json").exists()
  assert not (run / "hub.json").exists()
  before = (run / "metrics.jsonl").read_bytes()
  with push_server.serve() as server:
    hubbed(monkeypatch, server, run.parent / "home")
    train.run(config, run)
    assert set(server.repos[REPO]) == {*STEPS, "main"}
  assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_all_weights_are_kept_until_they_are_pushed(
  tmp_path, monkeypatch, capfd
):
  files = running.make_files(tmp_path)
  changes = {
    "lora.rank": 0,
    "export_adapters": False,
    "push_to_hub": REPO,
    "checkpoint_every": 1,
    "max_steps": 3,
  }
  config = running.configs(files)(**changes)
  with push_server.serve() as server:
    hubbed(monkeypatch, server, tmp_path / "home")
    server.broken = lambda method, path: True
    with pytest.raises(push_lib.NotPushed):
      train.run(config, tmp_path / "dpo")
    # Two may wait; the third is said to be left out.
    waiting = [n for n, _ in remote.steps(str(tmp_path / "dpo" / "models"))]
    assert waiting == [1, 2]
    assert "step-000003 is not kept for the hub" in capfd.readouterr().err
    server.broken = lambda method, path: False
    train.run(config, tmp_path / "dpo")
    branches = server.repos[REPO]
    assert branches.keys() == {"step-000001", "step-000002", "main"}
    weights = {branch["model.safetensors"] for branch in branches.values()}
    assert len(weights) == 3
  assert not any((tmp_path / "dpo" / "models").iterdir())


def test_leaving_ends_a_push_that_hangs(run, monkeypatch):
  with push_server.serve() as server:
    hubbed(monkeypatch, server, run.parent / "home")
    asked = server.hang()
    with push_lib.Publisher(settings(), run) as publisher:
      publisher.checkpoint()
      assert asked.wait(60)
    assert publisher._child.poll() is not None
    server.go_on()
  assert not (run / "hub.json").exists()


def test_a_run_without_a_token_is_refused_before_it_begins(
  tmp_path, monkeypatch
):
  monkeypatch.delenv("HF_TOKEN", raising=False)
  monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      "import sys\n"
      "from dpo_jax.hub import push\n"
      # A second process that takes the accelerator would stop the first.
      "assert 'jax' not in sys.modules\n"
      "push.check(push.PushSettings('a/b', False, '', True, True))\n"
      "push.check(push.PushSettings('a/b', False, '', True, False))",
    ],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert "needs a token that may write: put it into HF_TOKEN" in done.stderr
  assert "line 5" in done.stderr


# --- what is pushed

PLANTED = "/data/pe ople/jo"


@pytest.mark.parametrize(
  ("path", "known", "repo", "revision"),
  [
    ("user/base@v2", "user/base@v2", "user/base", "v2"),
    ("gs://bucket/sft", "gs://bucket/sft", None, None),
    ("gpt2", "gpt2", None, None),
    (f"{PLANTED}/runs/sft/export", "sft", None, None),
    ("~jo/my models/base", "base", None, None),
    ("../../jo/sft/export/", "sft", None, None),
    ("{run}/export", "user/sft@abc", "user/sft", "abc"),
  ],
)
def test_no_directory_of_the_machine_is_named(run, path, known, repo, revision):
  """Paths of all forms in every file that tells where things were."""
  path = path.format(run=run)
  noted = {"a/b": {STEPS[0]: {}}, "user/sft": {"main": {"commit": "abc"}}}
  (run / "hub.json").write_text(json.dumps(noted))
  config = json.loads((run / "config.json").read_text())
  config["tokenizer"] = config["model"]["path"] = path
  config["reference_cache"] = f"{PLANTED}/it's here"
  source = config["data"]["sources"]["files"]
  source["train_path"], source["eval_path"] = path, f"{PLANTED}/a,b/test.jsonl"
  (run / "config.json").write_text(json.dumps(config))
  manifest = json.loads((run / "manifest.json").read_text())
  manifest["base"]["source"] = path
  manifest["starts"][0] |= {
    "command": f"python {shlex.quote(PLANTED)}/train.py --config=configs/x.py:y"
    f" '--workdir={PLANTED}/run' --config.data.use=\"('{PLANTED}/c',)\" ~/jo/d",
    "changed": [f"config.compilation_cache: '{PLANTED}/e' -> '~/jo/f'"],
  }
  (run / "manifest.json").write_text(json.dumps(manifest))
  for branch in (*STEPS, "main"):
    for name, content in pushed(run, branch)[1].items():
      if isinstance(content, str):
        assert not re.search(r"pe ople|jo\b|here/", content), name
  card, files = pushed(run, "main")
  assert f"# DPO of {known}\n" in card
  assert ("base_model" in card) == ("datasets" in card) == bool(repo)
  told = json.loads(files["run/config.json"])
  assert told["tokenizer"] == told["model"]["path"] == known
  assert told["reference_cache"] == "it's here"
  source = told["data"]["sources"]["files"]
  assert (source["train_path"], source["eval_path"]) == (known, "test.jsonl")
  told = json.loads(files["run/manifest.json"])
  assert told["base"]["source"] == known
  start = told["starts"][0]
  assert shlex.split(start["command"]) == [
    "python",
    "train.py",
    "--config=configs/x.py:y",
    "--workdir=run",
    "--config.data.use=('c',)",
    "d",
  ]
  assert start["changed"] == ["config.compilation_cache: 'e' -> 'f'"]
  adapter = json.loads(files["adapter/adapter_config.json"])
  assert adapter["base_model_name_or_path"] == repo
  assert adapter["revision"] == revision


def test_the_card_says_what_the_files_say(run, whole):
  card, files = pushed(run, "main", license="mit")
  assert model_card.FIGURE not in files
  front = card.split("---")[1]
  assert "license: mit\n" in front
  # A local base is no base_model of the hub's, and its place is not told.
  assert "base_model" not in front
  assert str(whole.files) not in card
  manifest = json.loads((run / "manifest.json").read_text())
  last = running.read(run)[-1]
  for words in (
    "# DPO of ",
    '"beta": 0.5',
    '"rank": 2,\n    "alpha": 4.0,\n    "dropout": 0.2',
    f"{manifest['parameters']['trained']:,} of",
    "| train | files | 30 |",
    manifest["data"]["train"]["tokens"],
    "No win rate was measured",
    "## Limitations",
    "## License\n\nmit. ",
    "python ",
    f"| eval&#95;loss | {last['eval_loss']:.4g} |",
  ):
    assert words in card, words
  assert "license" not in pushed(run, "main")[0].split("---")[1]
  step, _ = pushed(run, "step-000002")
  assert f'"{REPO}", revision="step-000002"' in step


def test_the_card_has_the_reports_intervals(run):
  report = run.parent / "report"
  report.mkdir()
  rate = {
    "model": "dpo",
    "step": None,
    "temperature": 0.75,
    "n": 12,
    "win_rate": 0.625,
    "low": 0.5,
    "high": 0.75,
  }
  numbers = {
    "settings": {"confidence": 0.95},
    "health": {"judge": "oracle", "prompts": 12},
    "rates": [rate, rate | {"step": 4, "win_rate": 0.1}],
    "flags": [],
  }
  (report / "numbers.json").write_text(json.dumps(numbers))
  (report / model_card.FIGURE).write_bytes(b"png")
  card, files = pushed(run, "main")
  assert files[model_card.FIGURE] == report / model_card.FIGURE
  assert "| dpo | 0.75 | 12 | 62.5 | &#91;50.0, 75.0&#93; |" in card
  assert "10.0" not in card.split("## Win rates")[1].split("##")[0]
  assert "one judge's (oracle), on 12 prompts" in card


# --- names


def test_an_adapter_on_a_revision_names_it_as_peft_does():
  lora = gpt_neox.LoraConfig(2, 4.0, 0.0, ("dense",))
  for name, base, revision in (
    ("user/name@step-000100", "user/name", "step-000100"),
    ("user/name", "user/name", None),
    (str(ROOT), str(ROOT), None),
  ):
    found = json.loads(hf_layout.adapter_config_json(lora, name))
    assert found["base_model_name_or_path"] == base
    assert found["revision"] == revision


@pytest.mark.parametrize(
  "name", ["user/name@", "a/b/c", "../x", "user/name@-x", "", "user/na me"]
)
def test_names_that_are_no_ids_are_refused(name):
  with pytest.raises(ValueError, match="neither a directory nor a hub id"):
    hf.read_config(name)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"repo": "name"}, "push_to_hub='name' must be user/name"),
    ({"repo": "../x"}, "push_to_hub"),
    ({"repo": "user/name@main"}, "push_to_hub"),
    ({"license": "my license"}, "push_license"),
  ],
)
def test_wrong_push_settings_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    settings(**changes)


def test_the_scripts_flag_is_the_configs_field(whole, tmp_path):
  main = runpy.run_path(str(ROOT / "train.py"))["main"]
  values = recipe_settings.to_dict(whole.config)
  with pytest.raises(ValueError, match="push_to_hub='no' must be user/name"):
    main(values, tmp_path / "run", "no")
  assert not (tmp_path / "run").exists()


def test_a_path_that_is_not_there_is_not_asked_for(tmp_path, monkeypatch):
  """The mend names the nearest; with a revision it is the hub's."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs" / "sft-demo").mkdir(parents=True)
  monkeypatch.setattr("huggingface_hub.snapshot_download", None)
  for read in (
    remote.fetch,
    tokenizer.load,
    sources.read_file,
  ):
    with pytest.raises(
      ValueError, match="did you mean 'runs/sft-demo'"
    ) as found:
      read("runs/sft-demos")
    assert "runs/sft-demos@main" in str(found.value)
  with pytest.raises(ValueError, match="runs holds sft-demo;"):
    remote.fetch("runs/other")
  # Asked for: what stands in the library's place cannot be called.
  for name in ("runs/sft@main", "nobody/sft"):
    with pytest.raises(ValueError, match="was not fetched"):
      remote.fetch(name)


def test_an_id_with_its_revision():
  assert remote.split("user/name@step-000100") == ("user/name", "step-000100")
  assert remote.split("gpt2") == ("gpt2", None)
  assert remote.split("a/b@refs/pr/1") == ("a/b", "refs/pr/1")
