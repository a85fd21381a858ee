"""Pushing a run's models to a hub, over real HTTP, and loading them from it."""

import contextlib
import dataclasses
import json
import pathlib
import runpy
import shlex
import shutil

import huggingface_hub.constants
import jax
import numpy as np
import push_server
import pytest
import running

from dpo_jax.core import settings as settings_lib
from dpo_jax.data import tokenizer
from dpo_jax.hub import model_card
from dpo_jax.hub import push as push_lib
from dpo_jax.io import remote
from dpo_jax.model import gpt_neox, hf, hf_layout
from dpo_jax.sampling import response_files
from dpo_jax.training import config as config_lib
from dpo_jax.training import train

# Of httpx, to huggingface_hub, which sends weights as they are.
pytestmark = pytest.mark.filterwarnings(
  "ignore:Use 'content=<...>':DeprecationWarning"
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPO = "user/tiny"
STEPS = [f"step-{i:06d}" for i in (2, 4, 6, 7)]


@contextlib.contextmanager
def serving(home):
  """A hub that this process and its children know, with an empty cache."""
  with push_server.serve() as server, pytest.MonkeyPatch.context() as patch:
    environment = {
      "HF_ENDPOINT": server.address,
      "HF_HUB_OFFLINE": "0",
      "HF_HUB_DISABLE_XET": "1",
      "HF_HUB_DISABLE_TELEMETRY": "1",
      "HF_HOME": str(home),
      "HF_TOKEN": push_server.TOKEN,
    }
    for name, value in environment.items():
      patch.setenv(name, value)
    # The library read its environment when it was imported.
    files = "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
      "ENDPOINT": server.address,
      "HUGGINGFACE_CO_URL_TEMPLATE": server.address + files,
      "HF_HUB_OFFLINE": False,
      "HF_HUB_DISABLE_XET": True,
      "HF_HUB_CACHE": str(home / "hub"),
    }.items():
      patch.setattr(huggingface_hub.constants, name, value)
    yield server
    huggingface_hub.close_session()


@pytest.fixture
def server(tmp_path):
  with serving(tmp_path / "home") as server:
    yield server


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
  config = running.configs(files)(push_to_hub=REPO, export_adapters=True)
  with serving(files / "home") as server:
    server.broken = lambda method, path: True
    with pytest.raises(push_lib.NotPushed) as error:
      train.run(config, files / "dpo")
  return Whole(files, config, files / "dpo", str(error.value))


@pytest.fixture
def run(whole, tmp_path):
  """The same directory, to be changed; its base lies where it lay."""
  return pathlib.Path(shutil.copytree(whole.directory, tmp_path / "dpo"))


def settings(**changes):
  values = {"repo": REPO, "public": False, "license": "", "dry_run": False}
  return push_lib.PushSettings(**values | changes)


def pushed(run, branch, **changes):
  """What a branch gets: its card, and all its files."""
  files = push_lib.branches(run, settings(**changes))[branch]
  return files["README.md"], files


def test_models_and_adapters_are_pushed_and_load_by_revision(
  run, whole, server, caplog
):
  push_lib.push(settings(license="mit"), run)
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
  # No pushed file says where it was.
  for files in branches.values():
    for name, content in files.items():
      for place in (whole.files, run.parent, ROOT, pathlib.Path.home()):
        assert f"{place}/".encode() not in content, name
  for file in ("run/config.json", "run/manifest.json"):
    kept = (run / file.removeprefix("run/")).read_bytes()
    assert f"{whole.files}/".encode() in kept
    assert json.loads(main[file]).keys() == json.loads(kept).keys()
  # Again: nothing is sent. Another card: the cards alone change.
  push_lib.push(settings(license="mit"), run)
  assert len(server.commits) == 5
  sent = len(server.objects)
  main["of/an/older.run"] = b""
  push_lib.push(settings(), run)
  assert len(server.commits) == 10
  assert len(server.objects) == sent
  assert "of/an/older.run" not in branches["main"]
  branches["main"] |= {"planted.bin": b"pickled", "model.py": b"raise"}
  assert_loads(run, whole.files / "model")
  for path in run.parent.rglob("*"):
    if path.is_file():
      assert push_server.TOKEN.encode() not in path.read_bytes(), path
  assert push_server.TOKEN not in caplog.text


def assert_loads(run, base):
  """Reads everything back as a stranger would, by name and revision."""
  options = {
    "dtype": "float32",
    "remat": "none",
    "lora": None,
    "param_dtype": "float32",
  }

  def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)

  shape, weights = hf.load(base, **options)
  same(hf.load(REPO, **options)[1], hf.load(run / "export", **options)[1])
  step = STEPS[0]
  mine = hf.load_adapter(run / "adapters" / step, shape, weights)
  theirs = hf.load_adapter(f"{REPO}@{step}", shape, weights)
  assert mine[0] == theirs[0]
  same(mine[1], theirs[1])
  words = tokenizer.load(f"{REPO}@main")
  assert words.fingerprint == tokenizer.load(run / "export").fingerprint
  assert remote.steps(REPO) == [(int(x[5:]), f"{REPO}@{x}") for x in STEPS]
  assert response_files.weights(REPO) == response_files.weights(run / "export")
  for load in (hf.read_config, tokenizer.load):
    with pytest.raises(ValueError, match="step-000099"):
      load(f"{REPO}@step-000099")
  # Of all that the branch holds, nothing but what is read was fetched, and
  # nothing of its folders.
  found = list(remote.fetch(f"{REPO}@main").iterdir())
  assert not {"planted.bin", "model.py"} & {path.name for path in found}
  assert not any(path.is_dir() for path in found)


def test_a_dry_run_writes_all_and_sends_nothing(run, server):
  push_lib.push(settings(dry_run=True), run)
  assert server.repos == {}
  for branch, files in push_lib.branches(run, settings()).items():
    written = {
      str(path.relative_to(run / "push" / branch)): path.read_bytes()
      for path in (run / "push" / branch).rglob("*")
      if path.is_file()
    }
    assert written == {
      name: x.encode() if isinstance(x, str) else x.read_bytes()
      for name, x in files.items()
    }
  assert {path.name for path in (run / "push").iterdir()} == {*STEPS, "main"}


def test_what_fails_is_named_and_the_same_command_pushes_it(
  run, server, caplog
):
  server.broken = lambda method, path: "commit/step-000004" in path
  with pytest.raises(push_lib.NotPushed, match="step-000004 not pushed to"):
    push_lib.push(settings(), run)
  assert caplog.text.count("step-000004 was not pushed to user/tiny") == 1
  assert len(server.commits) == 4
  server.broken = lambda method, path: False
  push_lib.push(settings(), run)
  assert server.commits[-1] == (REPO, "step-000004")
  assert len(server.commits) == 5


def test_what_failed_while_training_is_pushed_by_the_same_command(
  run, whole, server
):
  """The run itself was made with a hub that answers nothing but errors."""
  assert "main not pushed to user/tiny; the same command" in whole.error
  assert (run / "finished.json").exists()
  before = (run / "metrics.jsonl").read_bytes()
  train.run(whole.config, run)
  assert set(server.repos[REPO]) == {*STEPS, "main"}
  assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_without_a_token_is_refused_before_it_begins(
  whole, tmp_path, monkeypatch
):
  monkeypatch.delenv("HF_TOKEN", raising=False)
  none = str(tmp_path / "none")
  monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", none)
  with pytest.raises(ValueError, match="needs a token that may write: put it"):
    train.run(whole.config, tmp_path / "run")
  push_lib.check(settings(dry_run=True))


# --- what is pushed

PLANTED = "/data/pe ople/jo"


@pytest.mark.parametrize(
  ("path", "known"),
  [
    ("user/base@v2", "user/base@v2"),
    ("gs://bucket/sft", "gs://bucket/sft"),
    ("gpt2", "gpt2"),
    (f"{PLANTED}/runs/sft/export", "sft"),
    ("~jo/my models/base", "base"),
    ("../../jo/sft/export/", "sft"),
    ("{workdir}/sft/export", "sft"),
    ("runs/base", "base"),
    (f"config.cache: '{PLANTED}/e' -> '~/jo/f'", "config.cache: 'e' -> 'f'"),
    (f"('{PLANTED}/c',)", "('c',)"),
  ],
)
def test_local_paths_become_base_names(tmp_path, monkeypatch, path, known):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs" / "base").mkdir(parents=True)
  words = "python", f"{PLANTED}/train.py", f"--config.path={path}"
  content = {"a": {"b": path}, "c": [path, 1], "command": shlex.join(words)}
  found = push_lib.portable(content)
  assert found["a"] == {"b": known}
  assert found["c"] == [known, 1]
  assert shlex.split(found["command"])[:2] == ["python", "train.py"]
  assert PLANTED not in found["command"]


def test_the_card_says_what_the_files_say(run, whole):
  card, files = pushed(run, "main", license="mit")
  assert model_card.FIGURE not in files
  front = card.split("---")[1]
  assert "license: mit\n" in front
  # A local base is no base_model of the hub's, and its path is not named.
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
  ("changes", "words"),
  [
    ({"repo": "name"}, "push_to_hub='name' must be user/name"),
    ({"repo": "../x"}, "push_to_hub"),
    ({"repo": "user/name@main"}, "push_to_hub"),
  ],
)
def test_wrong_push_settings_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    settings(**changes)


def test_the_scripts_flag_is_the_configs_field(whole, tmp_path):
  main = runpy.run_path(str(ROOT / "train.py"))["main"]
  values = settings_lib.to_dict(whole.config)
  with pytest.raises(ValueError, match="push_to_hub='no' must be user/name"):
    main(values, tmp_path / "run", "no")
  assert not (tmp_path / "run").exists()
