"""A run's models on the Hugging Face hub.

What is pushed follows from the run's directory alone, so that pushing can be
repeated at any time and sends only what is missing:

  branch main         export/, once the run is finished: the model, its
                      adapters merged, with the run's card, config and metrics;
                      the last adapters in adapter/, for PEFT
  branch step-000100  adapters/step-000100 of a LoRA run, or
                      models/step-000100 of one that trains all weights

What is pushed names no directory of this machine, see `portable`. hub.json
keeps what was pushed, by content, so that nothing is sent twice; a card whose
win rates came later is sent alone. No token is ever read here:
huggingface_hub takes it from HF_TOKEN, or from its own store. While a run
trains, a `Publisher` pushes in a process of its own.

  python -m dpo_jax hub runs/dpo --repo=user/name --dry_run

writes what would be pushed to runs/dpo/push/, and sends nothing. Exit codes: 0
all is pushed, or written; 1 something was not, and the same command tries
again; 2 nothing can be pushed.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from dpo_jax.core import console, errors, redaction
from dpo_jax.hub import model_card
from dpo_jax.io import atomic, metrics, remote, strict_json

FILE = "hub.json"
MAIN = "main"
# Checkpoints of all weights that may wait to be pushed: each takes as much disk
# as the model.
_WAITING = 2
# How the path fields of config.json and manifest.json end.
_PATHS = ("path", "_cache", "tokenizer", "source")
# Within a text, an absolute path, or one from a home or a parent directory.
_LOCAL = re.compile(r"(?<![\w./:~-])(?:~\w*|\.\.)?/[^'\",()\[\]]*")


class NotPushed(errors.Stopped):
  """Training is done and its files are whole, but some are not on the hub."""


@dataclasses.dataclass(frozen=True)
class PushSettings:
  """Where a run's models go.

  Attributes:
    repo: user/name; it is made if it does not exist.
    public: whether everybody sees a repository that is made.
    licence: of the weights, as the hub names it, such as "apache-2.0"; ""
      states none.
    checkpoints: whether each checkpoint becomes a branch.
    dry_run: only write what would be pushed; nothing is sent.
  """

  repo: str
  public: bool
  licence: str
  checkpoints: bool
  dry_run: bool

  def __post_init__(self):
    if not remote.is_repository(self.repo):
      raise ValueError(f"push_to_hub={self.repo!r} must be user/name")
    if not re.fullmatch(r"[\w.-]*", self.licence):
      raise ValueError(
        f"push_licence={self.licence!r} must be a name such as apache-2.0"
      )


def check(settings: PushSettings) -> None:
  """ValueError if nothing could be pushed for want of a token."""
  import huggingface_hub

  if not settings.dry_run and not huggingface_hub.get_token():
    raise ValueError(
      f"push_to_hub={settings.repo!r} needs a token that may write: put it into"
      " HF_TOKEN, or run `hf auth login`; push_dry_run=True needs none"
    )


@dataclasses.dataclass(frozen=True)
class Revision:
  """A branch and the files that make it up: their names there, and contents.

  `temporary` is a directory that is only kept until it is pushed.
  """

  branch: str
  files: dict[str, pathlib.Path | bytes]
  temporary: pathlib.Path | None

  @property
  def size(self) -> int:
    return sum(map(_size, self.files.values()))

  def digest(self) -> str:
    """SHA-256 of names and contents."""
    whole = hashlib.sha256()
    for name, content in sorted(self.files.items()):
      read = io.BytesIO(content) if isinstance(content, bytes) else None
      with read or content.open("rb") as file:
        one = hashlib.file_digest(file, "sha256").hexdigest()
      whole.update(f"{name}\0{one}\n".encode())
    return whole.hexdigest()


def revisions(
  directory: pathlib.Path, settings: PushSettings
) -> list[Revision]:
  """What a run's directory has to push, the checkpoints first.

  Raises:
    ValueError: a file of the run is not what it should be.
  """
  config, manifest = (
    portable(strict_json.read_object(directory / name))
    for name in ("config.json", "manifest.json")
  )
  run = model_card.Run(
    directory, config, manifest, settings.repo, settings.licence
  )
  found, last = [], {}
  for folder in ("adapters", "models"):
    for _, name in remote.steps(str(directory / folder)):
      path = pathlib.Path(name)
      own = _files(path)
      if folder == "adapters":
        adapter = path / "adapter_config.json"
        own[adapter.name] = _adapter(adapter, config["model"]["path"])
        last = {f"adapter/{name}": file for name, file in own.items()}
      own["README.md"] = model_card.of_checkpoint(run, path.name).encode()
      temporary = path if folder == "models" else None
      if settings.checkpoints:
        found.append(Revision(path.name, own, temporary))
  if (directory / "finished.json").is_file():
    text, figure = model_card.of_run(run)
    files = last | _files(directory / "export")
    files["run/config.json"] = _json(config)
    files["run/manifest.json"] = _json(manifest)
    files[f"run/{metrics.FILE}"] = directory / metrics.FILE
    if figure is not None:
      files[model_card.FIGURE] = figure
    files["README.md"] = text.encode()
    found.append(Revision(MAIN, files, None))
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
  if "://" in path or (model_card.on_hub(path) and not directory.exists()):
    return path
  if directory.name == "export":
    directory = directory.parent
    noted = directory / FILE
    pushed = strict_json.read_object(noted) if noted.is_file() else {}
    for repo, branches in pushed.items():
      if MAIN in branches:
        return f"{repo}@{branches[MAIN]['commit']}"
  return directory.name


def _adapter(source: pathlib.Path, base: str) -> bytes:
  """An adapter_config.json that names its base on the hub, or none."""
  repo, revision = (
    remote.split(base) if model_card.on_hub(base) else (None,) * 2
  )
  base_fields = {"base_model_name_or_path": repo, "revision": revision}
  return _json(strict_json.read_object(source) | base_fields)


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path | bytes]:
  return {file.name: file for file in directory.iterdir() if file.is_file()}


def _json(content: dict[str, Any]) -> bytes:
  return (json.dumps(content, indent=2) + "\n").encode()


def _size(content: pathlib.Path | bytes) -> int:
  """Bytes of a file, or of what becomes one."""
  if isinstance(content, bytes):
    return len(content)
  return content.stat().st_size


def push(
  settings: PushSettings, directory: pathlib.Path, tries: int
) -> dict[str, str]:
  """Pushes what is missing on the hub; see the module.

  Args:
    settings: where to.
    directory: of the run.
    tries: how often each branch is tried at most.

  Returns:
    The branches that could not be pushed, and why.
  """
  import huggingface_hub

  huggingface_hub.utils.disable_progress_bars()
  api = huggingface_hub.HfApi()
  failed: dict[str, str] = {}
  for _ in range(tries):
    failed = {}
    for revision in revisions(directory, settings):
      try:
        _push_one(api, settings, directory, revision)
      # Whatever the library, the network or the hub raises.
      except Exception as error:
        failed[revision.branch] = f"{type(error).__name__}: {error}"
    if not failed:
      break
  return failed


def _push_one(api, settings, directory, revision: Revision) -> None:
  """Makes a branch hold the revision, unless it does, and notes that."""
  path = directory / FILE
  done = strict_json.read_object(path) if path.exists() else {}
  pushed = done.setdefault(settings.repo, {})
  branch, digest = revision.branch, revision.digest()
  if pushed.get(branch, {}).get("content") != digest:
    if not pushed:
      private = not settings.public
      api.create_repo(settings.repo, private=private, exist_ok=True)
    if branch != MAIN:
      api.create_branch(settings.repo, branch=branch, exist_ok=True)
    commit = _commit(api, settings.repo, revision)
    pushed[branch] = {"content": digest, "commit": commit}
    atomic.write_text(path, json.dumps(done, indent=2) + "\n")
    console.say(
      f"pushed {branch} to {settings.repo} ({_mib(revision.size)})",
      "pushed",
      repo=settings.repo,
      branch=branch,
      commit=commit,
    )
  if revision.temporary is not None:
    shutil.rmtree(revision.temporary)


def _commit(api, repo: str, revision: Revision) -> str:
  """Makes a branch hold just the revision's files; the commit's id."""
  import huggingface_hub

  there = api.list_repo_files(repo, revision=revision.branch)
  gone = set(there) - revision.files.keys() - {".gitattributes"}
  operations = [
    huggingface_hub.CommitOperationAdd(
      name, content if isinstance(content, bytes) else str(content)
    )
    for name, content in sorted(revision.files.items())
  ]
  operations += [
    huggingface_hub.CommitOperationDelete(name) for name in sorted(gone)
  ]
  made = api.create_commit(
    repo,
    operations,
    commit_message=f"{revision.branch} of a dpo_jax run",
    revision=revision.branch,
  )
  return made.oid


def write(settings: PushSettings, directory: pathlib.Path) -> list[str]:
  """Writes what would be pushed to push/BRANCH/; weights become hard links.

  Returns:
    A line for each branch and each file.
  """
  target = directory / "push"
  shutil.rmtree(target, ignore_errors=True)
  lines = []
  for revision in revisions(directory, settings):
    lines.append(f"{settings.repo}@{revision.branch}, {_mib(revision.size)}:")
    for name, content in sorted(revision.files.items()):
      path = target / revision.branch / name
      path.parent.mkdir(parents=True, exist_ok=True)
      if isinstance(content, bytes):
        path.write_bytes(content)
      else:
        os.link(content, path)
      lines.append(f"  {name}  {_size(content):,} bytes")
  return lines


def _mib(size: int) -> str:
  return f"{size / 2**20:,.1f} MiB"


class Publisher:
  """Pushes a run's models beside its training; a context manager.

  Each push is a process of its own: whatever happens to it, training goes on,
  and leaving the context ends it at once. Only the first process of a run may
  push; the others ask `room` alone.
  """

  def __init__(self, settings: PushSettings, directory: pathlib.Path):
    self.settings, self.directory = settings, directory
    self._child: subprocess.Popen | None = None

  def __enter__(self) -> "Publisher":
    return self

  def __exit__(self, *exc_info) -> None:
    if self._child is not None and self._child.poll() is None:
      self._child.kill()
      self._child.wait()

  def room(self) -> bool:
    """Whether one more checkpoint of all weights may wait on the disk."""
    waiting = remote.steps(str(self.directory / "models"))
    return self.settings.checkpoints and len(waiting) < _WAITING

  def checkpoint(self) -> None:
    """There is something new to push; returns at once.

    While an earlier push goes on, this one is left to the next call.
    """
    busy = self._child is not None and self._child.poll() is None
    if self.settings.checkpoints and not self.settings.dry_run and not busy:
      self._start(tries=1)

  def finish(self) -> None:
    """Pushes what is missing, and what failed once more.

    Raises:
      NotPushed: something could not be pushed, twice.
    """
    if self._child is not None:
      self._child.wait()
    if self._start(tries=2).wait():
      raise NotPushed(
        f"the run is finished, but not all of it is on the hub as"
        f" {self.settings.repo}; the same command, or python -m dpo_jax hub"
        f" {self.directory} --repo={self.settings.repo}, pushes what is missing"
      )

  def _start(self, tries: int) -> subprocess.Popen:
    settings = self.settings
    flags = [f"--repo={settings.repo}", f"--licence={settings.licence}"]
    for name in ("public", "dry_run"):
      if getattr(settings, name):
        flags.append(f"--{name}")
    if not settings.checkpoints:
      flags.append("--no_checkpoints")
    log = console.mode() if console.mode() != "bar" else "plain"
    flags += [f"--tries={tries}", f"--log={log}"]
    root = str(pathlib.Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    self._child = subprocess.Popen(
      [sys.executable, "-m", "dpo_jax", "hub", str(self.directory), *flags],
      stdin=subprocess.DEVNULL,
      env=os.environ | {"PYTHONPATH": path},
    )
    return self._child


def main(arguments: Sequence[str] | None = None) -> int:
  redaction.install()
  flags = _parser().parse_args(arguments)
  directory = flags.directory.absolute()
  try:
    settings = PushSettings(
      flags.repo,
      flags.public,
      flags.licence,
      not flags.no_checkpoints,
      flags.dry_run,
    )
    if not (directory / "config.json").is_file():
      raise ValueError(f"{directory} holds no training run")
    if not revisions(directory, settings):
      raise ValueError(
        f"{directory} has nothing to push: the run is not finished, and has no"
        " adapters of checkpoints"
      )
    check(settings)
    if settings.dry_run:
      lines = write(settings, directory)
      text = "\n".join([*lines, f"written to {directory / 'push'}"])
      console.result(text, "dry_run", path=str(directory / "push"))
      return 0
    if flags.again:
      (directory / FILE).unlink(missing_ok=True)
  except (ValueError, OSError) as error:
    console.error(str(error))
    return 2
  failed = push(settings, directory, flags.tries)
  for branch, why in failed.items():
    console.error(f"{branch} was not pushed to {settings.repo}: {why}")
  return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax hub",
    description="Pushes a training run's models to the Hugging Face hub; what"
    " is there already is not sent again.",
  )
  parser.add_argument("directory", type=pathlib.Path, help="of the run")
  parser.add_argument("--repo", required=True, help="user/name")
  parser.add_argument("--public", action="store_true", help="for everybody")
  parser.add_argument("--licence", default="", help="such as apache-2.0")
  parser.add_argument(
    "--no_checkpoints", action="store_true", help="the branch main alone"
  )
  parser.add_argument(
    "--dry_run", action="store_true", help="write to push/, send nothing"
  )
  parser.add_argument(
    "--again",
    action="store_true",
    help="send all, whatever hub.json says was sent",
  )
  parser.add_argument("--tries", type=int, default=2, help="of each branch")
  console.add_flag(parser)
  return parser


if __name__ == "__main__":
  sys.exit(main())
