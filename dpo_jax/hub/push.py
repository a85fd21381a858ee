"""A run's models on the Hugging Face hub.

What is pushed follows from the run's directory alone, so that pushing can be
repeated at any time and sends only what is missing:

  branch main         export/, once the run is finished: the model, its
                      adapters merged, with the run's card, config and metrics;
                      the last adapters in adapter/, for PEFT
  branch step-000100  adapters/step-000100 of a LoRA run, or
                      models/step-000100 of one that trains all weights

What is pushed names no directory of this machine, see `portable`. hub.json
keeps what was pushed, by content: without it all is sent again. No token is
ever read here: huggingface_hub takes it from HF_TOKEN, or from its own store.

  python -m dpo_jax hub runs/dpo --repo=user/name --dry_run

writes what would be pushed to runs/dpo/push/, and sends nothing. Exit codes: 0
all is pushed, or written; 1 something was not, and the same command tries
again; 2 nothing can be pushed.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from dpo_jax.core import console, errors, redaction
from dpo_jax.hub import model_card
from dpo_jax.io import atomic, hashing, metrics, remote, strict_json

FILE = "hub.json"
MAIN = "main"
# Checkpoints of all weights that may wait to be pushed: each takes as much disk
# as the model.
_WAITING = 2
# How the path fields of config.json and manifest.json end.
_PATHS = ("path", "_cache", "tokenizer", "source")
# Within a text, an absolute path, or one from a home or a parent directory.
_LOCAL = re.compile(r"(?<![\w./:~-])(?:~\w*|\.\.)?/[^'\",()\[\]]*")

# The files of a branch by their names there: where they are, or what they hold.
Files = dict[str, pathlib.Path | str]


class NotPushed(errors.Stopped):
  """Training is done and its files are whole, but some are not on the hub."""


@dataclasses.dataclass(frozen=True)
class PushSettings:
  """Where a run's models go; explained in configs/common.py."""

  repo: str
  public: bool
  license: str
  checkpoints: bool
  dry_run: bool

  def __post_init__(self):
    if not remote.is_repository(self.repo):
      raise ValueError(f"push_to_hub={self.repo!r} must be user/name")
    if not re.fullmatch(r"[\w.-]*", self.license):
      raise ValueError(
        f"push_license={self.license!r} must be a name such as apache-2.0"
      )


def check(settings: PushSettings) -> None:
  """ValueError if nothing could be pushed for want of a token."""
  import huggingface_hub

  if not settings.dry_run and not huggingface_hub.get_token():
    raise ValueError(
      f"push_to_hub={settings.repo!r} needs a token that may write: put it into"
      " HF_TOKEN, or run `hf auth login`; push_dry_run=True needs none"
    )


def branches(
  directory: pathlib.Path, settings: PushSettings
) -> dict[str, Files]:
  """What a run's directory has to push, the checkpoints first."""
  config, manifest = (
    portable(strict_json.read_object(directory / name))
    for name in ("config.json", "manifest.json")
  )
  card = functools.partial(
    model_card.make,
    directory,
    config,
    manifest,
    repo=settings.repo,
    license=settings.license,
  )
  repo, _, revision = config["model"]["path"].partition("@")
  # As PEFT names a base on the hub; a local one it names null.
  base = {"base_model_name_or_path": None, "revision": None}
  if remote.is_repository(repo):
    base = {"base_model_name_or_path": repo, "revision": revision or None}
  found, last = {}, {}
  for folder in ("adapters", "models"):
    for _, name in remote.steps(str(directory / folder)):
      branch, files = pathlib.Path(name).name, _files(pathlib.Path(name))
      if adapter := files.get("adapter_config.json"):
        about = strict_json.read_object(adapter) | base
        files["adapter_config.json"] = _json(about)
        last = {f"adapter/{name}": file for name, file in files.items()}
      if settings.checkpoints:
        found[branch] = files | {"README.md": card(branch)[0]}
  if (directory / "finished.json").is_file():
    text, figure = card(MAIN)
    found[MAIN] = {
      **last,
      **_files(directory / "export"),
      "run/config.json": _json(config),
      "run/manifest.json": _json(manifest),
      f"run/{metrics.FILE}": directory / metrics.FILE,
      **({figure.name: figure} if figure else {}),
      "README.md": text,
    }
  return found


def portable(content: Any, name: str = "") -> Any:
  """Parsed JSON of a run, without the directories of this machine.

  Path fields become what `named` says, local paths in other texts base names.
  A command's own relative paths stay: they are of the code, or of the workdir.
  """
  if isinstance(content, dict):
    return {key: portable(value, key) for key, value in content.items()}
  if isinstance(content, list):
    return [portable(value, name) for value in content]
  if not isinstance(content, str):
    return content
  if name == "command":
    return shlex.join(map(portable, shlex.split(content)))
  if name.endswith(_PATHS):
    return named(content)
  return _LOCAL.sub(lambda found: pathlib.Path(found[0]).name, content)


def named(path: str) -> str:
  """A path by what others know it by: a hub id, an address, or a base name.

  The export of a run that was pushed is its commit there; of another run it
  is called by the run's name.
  """
  directory = pathlib.Path(path)
  on_hub = remote.is_repository(path.partition("@")[0])
  if "://" in path or (on_hub and not directory.exists()):
    return path
  if directory.name == "export":
    directory = directory.parent
    for repo, pushed in _pushed(directory).items():
      if MAIN in pushed:
        return f"{repo}@{pushed[MAIN]['commit']}"
  return directory.name


def _files(directory: pathlib.Path) -> Files:
  return {path.name: path for path in directory.iterdir() if path.is_file()}


def _json(content: dict[str, Any]) -> str:
  return json.dumps(content, indent=2) + "\n"


def _pushed(directory: pathlib.Path) -> dict[str, dict[str, dict[str, str]]]:
  """By repository and branch, the content that was pushed and its commit."""
  path = directory / FILE
  return strict_json.read_object(path) if path.is_file() else {}


def _push(
  settings: PushSettings, directory: pathlib.Path, branch: str, files: Files
) -> None:
  """Makes a branch hold the files and no others, and notes that."""
  import huggingface_hub

  repo, pushed = settings.repo, _pushed(directory)
  parts = [part for item in sorted(files.items()) for part in item]
  content = hashing.content_hash(
    *(x if isinstance(x, str) else hashing.file_hash(x) for x in parts)
  )
  noted = pushed.setdefault(repo, {})
  if noted.get(branch, {}).get("content") != content:
    api = huggingface_hub.HfApi()
    api.create_repo(repo, private=not settings.public, exist_ok=True)
    if branch != MAIN:
      api.create_branch(repo, branch=branch, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
      _stage(files, pathlib.Path(folder))
      made = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        revision=branch,
        delete_patterns="*",
        commit_message=f"{branch} of a dpo_jax run",
      )
    noted[branch] = {"content": content, "commit": made.oid}
    atomic.write_text(directory / FILE, _json(pushed))
    about = {"repo": repo, "branch": branch, "commit": made.oid}
    console.say(f"pushed {branch} to {repo}", "pushed", **about)
  # Weights that were kept for this alone.
  if (weights := directory / "models" / branch).is_dir():
    shutil.rmtree(weights)


def _stage(files: Files, directory: pathlib.Path) -> None:
  for name, content in files.items():
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
      path.write_text(content, encoding="utf-8")
    else:
      path.symlink_to(content.absolute())


class Publisher:
  """Pushes a run's models beside its training; a context manager.

  Each push is a process of its own, which leaving the context ends: a Future
  of huggingface_hub's that hangs would keep this one from ending. Only the
  first process of a run may push; the others ask `room` alone.
  """

  def __init__(self, settings: PushSettings, directory: pathlib.Path):
    self.settings, self.directory = settings, directory
    self._child: subprocess.Popen | None = None

  def __enter__(self) -> "Publisher":
    return self

  def __exit__(self, *exc_info) -> None:
    if self._child is not None:
      self._child.kill()
      self._child.wait()

  def room(self) -> bool:
    """Whether one more checkpoint of all weights may wait on the disk."""
    waiting = remote.steps(str(self.directory / "models"))
    return self.settings.checkpoints and len(waiting) < _WAITING

  def checkpoint(self) -> None:
    """Starts to push what is new, unless an earlier push still goes on."""
    busy = self._child is not None and self._child.poll() is None
    if self.settings.checkpoints and not self.settings.dry_run and not busy:
      self._start()

  def finish(self) -> None:
    """Pushes what is missing; NotPushed if a second try fails too."""
    if self._child is not None:
      self._child.wait()
    if self._start().wait() and self._start().wait():
      raise NotPushed(
        f"the run is finished, but not all of it is on the hub as"
        f" {self.settings.repo}; the same command, or python -m dpo_jax hub"
        f" {self.directory} --repo={self.settings.repo}, pushes what is missing"
      )

  def _start(self) -> subprocess.Popen:
    settings = self.settings
    log = console.mode() if console.mode() != "bar" else "plain"
    flags = [f"--repo={settings.repo}", f"--license={settings.license}"]
    flags += ["--public"] * settings.public + ["--dry_run"] * settings.dry_run
    flags += ["--no_checkpoints"] * (not settings.checkpoints)
    command = [sys.executable, "-m", "dpo_jax", "hub", str(self.directory)]
    self._child = subprocess.Popen(
      [*command, *flags, f"--log={log}"],
      stdin=subprocess.DEVNULL,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return self._child


def main(arguments: Sequence[str] | None = None) -> int:
  import huggingface_hub

  redaction.install()
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax hub",
    description="Pushes a training run's models to the Hugging Face hub; what"
    " is there already is not sent again.",
  )
  parser.add_argument("directory", type=pathlib.Path, help="of the run")
  parser.add_argument("--repo", required=True, help="user/name")
  parser.add_argument("--license", default="", help="such as apache-2.0")
  switch = functools.partial(parser.add_argument, action="store_true")
  switch("--public", help="for everybody")
  switch("--no_checkpoints", help="the branch main alone")
  switch("--dry_run", help="write to push/, send nothing")
  console.add_flag(parser)
  flags = parser.parse_args(arguments)
  directory, kept = flags.directory.absolute(), not flags.no_checkpoints
  try:
    settings = PushSettings(
      flags.repo, flags.public, flags.license, kept, flags.dry_run
    )
    run = (directory / "config.json").is_file()
    if not run or not (found := branches(directory, settings)):
      raise ValueError(
        f"{directory} has nothing to push: it holds no training run, or one"
        " that is not finished and has no adapters of checkpoints"
      )
    check(settings)
    if settings.dry_run:
      written = directory / "push"
      shutil.rmtree(written, ignore_errors=True)
      for branch, files in found.items():
        _stage(files, written / branch)
      text = f"{settings.repo}: {', '.join(found)} written to {written}"
      console.result(text, "dry_run", path=str(written))
      return 0
  except (ValueError, OSError) as error:
    console.error(str(error))
    return 2
  huggingface_hub.utils.disable_progress_bars()
  code = 0
  for branch, files in found.items():
    try:
      _push(settings, directory, branch, files)
    # Whatever the library, the network or the hub raises.
    except Exception as error:
      code = 1
      console.error(
        f"{branch} was not pushed to {settings.repo}: {type(error).__name__}:"
        f" {error}"
      )
  return code


if __name__ == "__main__":
  sys.exit(main())
