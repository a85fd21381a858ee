"""Push a run's models to the Hugging Face hub.

What is pushed follows from the run's directory alone, so that a push can be
repeated at any time; the library sends only what differs:

  branch main         export/ of a finished run: the model, its adapters merged,
                      with the run's card, config and metrics
  branch step-000100  adapters/step-000100, see export_adapters

No pushed file names a directory of this machine, see `portable`. No token is
read here: huggingface_hub takes it from HF_TOKEN, or from its own store.
"""

import dataclasses
import json
import logging
import os
import pathlib
import re
import shlex
import shutil
import tempfile
from typing import Any

from dpo_jax.core import console, errors
from dpo_jax.hub import model_card
from dpo_jax.io import metrics, remote, rundir, strict_json

_log = logging.getLogger(__name__)

# Within a text, an absolute path, or one from a home, a parent or a working
# directory.
_LOCAL = re.compile(r"(?<![\w./:~-])(?:~\w*|\.\.|\{workdir\})?/[^'\",()\[\]]*")

# The files of a branch by their names there: their paths, or their texts.
Files = dict[str, pathlib.Path | str]


class NotPushed(errors.Stopped):
  """Training is done and its files are whole, but not all are on the hub."""


@dataclasses.dataclass(frozen=True)
class PushSettings:
  """The push_* fields of configs/common.py."""

  repo: str
  public: bool
  license: str
  dry_run: bool

  def __post_init__(self):
    if not remote.is_repository(self.repo):
      raise ValueError(f"push_to_hub={self.repo!r} must be user/name")


def check(settings: PushSettings) -> None:
  """Raises ValueError if there is no token to push with."""
  import huggingface_hub

  if not settings.dry_run and not huggingface_hub.get_token():
    raise ValueError(
      "push_to_hub needs a token that may write: put it into HF_TOKEN, or run"
      " `hf auth login`; push_dry_run=True needs none"
    )


def branches(
  directory: pathlib.Path, settings: PushSettings
) -> dict[str, Files]:
  """Files to push of a run's directory by branch, the checkpoints first."""
  config, manifest = (
    portable(strict_json.read_object(directory / name))
    for name in ("config.json", "manifest.json")
  )
  run = directory, config, manifest, settings
  found = {}
  for _, path in remote.steps(str(directory / "adapters")):
    branch, adapter = pathlib.Path(path).name, "adapter_config.json"
    about = portable(strict_json.read_object(f"{path}/{adapter}"))
    found[branch] = {
      **_files(pathlib.Path(path)),
      adapter: _json(about),
      "README.md": model_card.make(*run, branch)[0],
    }
  if (directory / rundir.FINISHED).is_file():
    text, figure = model_card.make(*run, "main")
    found["main"] = {
      **_files(directory / "export"),
      "run/config.json": _json(config),
      "run/manifest.json": _json(manifest),
      f"run/{metrics.FILE}": directory / metrics.FILE,
      **({figure.name: figure} if figure else {}),
      "README.md": text,
    }
  return found


def portable(content: Any, key: str = "") -> Any:
  """Parsed JSON of a run, with base names in place of local paths."""
  if isinstance(content, dict):
    return {name: portable(value, name) for name, value in content.items()}
  if isinstance(content, list):
    return [portable(value) for value in content]
  if not isinstance(content, str):
    return content
  if key == "command":
    return shlex.join(map(portable, shlex.split(content)))
  if os.path.exists(content):
    return _base_name(content)
  return _LOCAL.sub(lambda found: _base_name(found[0]), content)


def _base_name(path: str) -> str:
  """The name of a file or directory; of an export, the run's."""
  directory = pathlib.Path(path)
  return (directory.parent if directory.name == "export" else directory).name


def _files(directory: pathlib.Path) -> Files:
  return {path.name: path for path in directory.iterdir() if path.is_file()}


def _json(content: dict[str, Any]) -> str:
  return json.dumps(content, indent=2) + "\n"


def push(settings: PushSettings, directory: pathlib.Path) -> None:
  """Pushes all branches; raises NotPushed, naming those that failed."""
  import huggingface_hub.utils

  huggingface_hub.utils.disable_progress_bars()
  failed = []
  for branch, files in branches(directory, settings).items():
    try:
      if settings.dry_run:
        _stage(files, directory / "push" / branch)
      else:
        _push(settings, branch, files)
    # The library, the network and the hub have exceptions of their own.
    except Exception as error:
      failed.append(branch)
      _log.warning("%s was not pushed to %s: %r", branch, settings.repo, error)
  if failed:
    raise NotPushed(
      f"the run is finished, but {', '.join(failed)} not pushed to"
      f" {settings.repo}; the same command pushes what is missing"
    )


def _push(settings: PushSettings, branch: str, files: Files) -> None:
  """Makes a branch hold the files and no others."""
  import huggingface_hub

  repo, api = settings.repo, huggingface_hub.HfApi()
  api.create_repo(repo, private=not settings.public, exist_ok=True)
  if branch != "main":
    api.create_branch(repo, branch=branch, exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    _stage(files, pathlib.Path(folder))
    api.upload_folder(
      repo_id=repo,
      folder_path=folder,
      revision=branch,
      delete_patterns="*",
      commit_message=f"{branch} of a dpo_jax run",
    )
  console.say(f"pushed {branch} to {repo}", "pushed", repo=repo, branch=branch)


def _stage(files: Files, directory: pathlib.Path) -> None:
  shutil.rmtree(directory, ignore_errors=True)
  for name, content in files.items():
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
      path.write_text(content, encoding="utf-8")
    else:
      path.symlink_to(content.absolute())
