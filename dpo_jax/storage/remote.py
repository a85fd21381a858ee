"""Models by name: a directory, user/name@revision on the hub, or gs://...

What is fetched is weights in safetensors, JSON, and a tokenizer's word lists,
never code and never a pickle, and only the repository's top folder. Everything
that is read afterwards is a local file, held to the same checks as any other.
"""

import contextlib
import difflib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from dpo_jax.storage import buckets

# user/name, or a name of the hub's own such as "gpt2"; and a revision of it: a
# branch, a tag or a commit.
_ID = re.compile(r"(\w[\w.-]*(?:/[\w.-]+)?)(?:@(\w[\w./-]*))?")
_WORDS = ("*.json", "merges.txt", "vocab.txt")
_WEIGHTS = "*.safetensors"
# A repository of a user.
_USER = re.compile(r"\w[\w.-]*/[\w.-]{1,96}")
_STEP = re.compile(r"step-(\d+)")


def split(name: str) -> tuple[str, str | None]:
  """A hub id and its revision: "user/name@step-000100"; None without one.

  Raises:
    ValueError: it is no hub id.
  """
  found = _ID.fullmatch(name)
  if not found:
    raise ValueError(
      f"{name!r} is neither a directory nor a hub id (user/name or"
      " user/name@revision)"
    )
  return found[1], found[2]


def is_repository(name: str) -> bool:
  """Whether a name is user/name, without a revision."""
  return bool(_USER.fullmatch(name))


def refuse_missing(name: str) -> None:
  """Refuses user/name that was more likely meant as a path.

  Raises:
    ValueError: it is not there, but the directory is that it would be in; the
      hub is not asked. With a revision it is an id in any case.
  """
  path = pathlib.Path(name)
  if "/" not in name or "@" in name or not path.parent.is_dir():
    return
  there = sorted(child.name for child in path.parent.iterdir())
  near = difflib.get_close_matches(path.name, there, n=1)
  hint = f"did you mean {str(path.parent / near[0])!r}?" if near else ""
  held = f"{path.parent} holds {', '.join(there[:5]) or 'nothing'}"
  raise ValueError(
    f"{name!r} does not exist: {hint or held}; if it is a model or dataset of"
    f" the hub, name its revision: {name}@main"
  )


def fetch(path: str | os.PathLike, *, weights: bool = True) -> pathlib.Path:
  """A local directory as it is; what a hub id or gs:// names, fetched.

  Args:
    path: the directory, the id or the address.
    weights: whether they are wanted, or configs and the tokenizer alone.

  Raises:
    ValueError: it is neither, or was not fetched.
  """
  name = os.fspath(path)
  # The empty path would be the working directory.
  if name and pathlib.Path(name).is_dir():
    return pathlib.Path(name)
  wanted = [*_WORDS, *([_WEIGHTS] if weights else [])]
  if buckets.is_address(name):
    return buckets.fetch(name, wanted)
  repo, revision = split(name)
  refuse_missing(name)
  import huggingface_hub

  with _reachable(name):
    directory = huggingface_hub.snapshot_download(
      repo,
      revision=revision,
      allow_patterns=wanted,
      ignore_patterns=["*/*"],
    )
  return pathlib.Path(directory)


def steps(path: str) -> list[tuple[int, str]]:
  """The step-NNNNNN in a directory or of a hub id's branches, ascending.

  Returns:
    Steps, each with the name that `fetch` takes; [] if there are none, or the
    path is neither.

  Raises:
    ValueError: the hub was not reached.
  """
  found: list[tuple[int, str]] = []
  if pathlib.Path(path).is_dir():
    for child in pathlib.Path(path).iterdir():
      match = _STEP.fullmatch(child.name)
      if match and child.is_dir():
        found.append((int(match[1]), str(child)))
    return sorted(found)
  if buckets.is_address(path):
    for name in buckets.folders(path):
      if match := _STEP.fullmatch(name):
        found.append((int(match[1]), f"{path.rstrip('/')}/{name}"))
    return sorted(found)
  if not is_repository(path):
    return []
  import huggingface_hub

  with _reachable(path):
    refs: Any = huggingface_hub.HfApi().list_repo_refs(path)
  for branch in refs.branches:
    if match := _STEP.fullmatch(branch.name):
      found.append((int(match[1]), f"{path}@{branch.name}"))
  return sorted(found)


@contextlib.contextmanager
def _reachable(name: str) -> Iterator[None]:
  """Turns the hub's many errors into one that says what to do."""
  try:
    yield
  # The client's, the network's, the disk's: no list of them would be whole.
  except Exception as error:
    raise ValueError(
      f"{name!r} is not a local directory, and was not fetched from the hub"
      f" ({type(error).__name__}); check the name, the revision, the network"
      " and HF_HUB_OFFLINE, and HF_TOKEN if it is private"
    ) from error
