"""A run's models on the Hugging Face hub.

What is pushed follows from the run's directory alone, so that pushing can be
done again at any time and does only what is missing:

  branch main         export/, once the run is finished: the model, its
                      adapters merged, with the run's card, config and metrics;
                      the last adapters in adapter/, for PEFT
  branch step-000100  adapters/step-000100 of a LoRA run, or
                      models/step-000100 of one that trains all weights

Paths of this machine are cut from all that is pushed, see `portable`. hub.json
keeps what was pushed, by content, so that nothing is sent twice; a card whose
win rates came later is sent alone. No token is ever read here:
huggingface_hub takes it from HF_TOKEN, or from its own store.

  python -m dpo_jax.hub runs/dpo --repo=user/name --dry_run

writes what would be pushed to runs/dpo/push/, and sends nothing. Exit codes: 0
all is pushed, or written; 1 something was not, and the same command tries
again; 2 nothing can be pushed.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence

from dpo_jax.interface import console, redaction
from dpo_jax.publishing import portable, pushing, revisions
from dpo_jax.storage import atomic, strict_json

FILE = portable.PUSHED


def push(
  settings: revisions.PushSettings, directory: pathlib.Path, tries: int
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
    for revision in revisions.of(directory, settings):
      try:
        _push_one(api, settings, directory, revision)
      # Whatever the library, the network or the hub raises.
      except Exception as error:
        failed[revision.branch] = f"{type(error).__name__}: {error}"
    if not failed:
      break
  return failed


def _push_one(api, settings, directory, revision: revisions.Revision) -> None:
  """Makes a branch hold the revision, unless it does, and notes that."""
  path = directory / FILE
  done = strict_json.read_object(path) if path.exists() else {}
  pushed = done.setdefault(settings.repo, {})
  branch, digest = revision.branch, revision.digest()
  if pushed.get(branch, {}).get("content") != digest:
    if not pushed:
      private = not settings.public
      api.create_repo(settings.repo, private=private, exist_ok=True)
    if branch != revisions.MAIN:
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


def _commit(api, repo: str, revision: revisions.Revision) -> str:
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


def write(
  settings: revisions.PushSettings, directory: pathlib.Path
) -> list[str]:
  """Writes what would be pushed to push/BRANCH/; weights become hard links.

  Returns:
    A line for each branch and each file.
  """
  target = directory / "push"
  shutil.rmtree(target, ignore_errors=True)
  lines = []
  for revision in revisions.of(directory, settings):
    lines.append(f"{settings.repo}@{revision.branch}, {_mib(revision.size)}:")
    for name, content in sorted(revision.files.items()):
      path = target / revision.branch / name
      path.parent.mkdir(parents=True, exist_ok=True)
      if isinstance(content, bytes):
        path.write_bytes(content)
      else:
        os.link(content, path)
      lines.append(f"  {name}  {revisions.size(content):,} bytes")
  return lines


def _mib(size: int) -> str:
  return f"{size / 2**20:,.1f} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
  redaction.install()
  flags = _parser().parse_args(arguments)
  directory = flags.directory.absolute()
  try:
    settings = revisions.PushSettings(
      flags.repo,
      flags.public,
      flags.licence,
      not flags.no_checkpoints,
      flags.dry_run,
    )
    if not (directory / "config.json").is_file():
      raise ValueError(f"{directory} holds no training run")
    if not revisions.of(directory, settings):
      raise ValueError(
        f"{directory} has nothing to push: the run is not finished, and has no"
        " adapters of checkpoints"
      )
    pushing.check(settings)
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
    prog="python -m dpo_jax.hub",
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
