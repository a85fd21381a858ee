"""Local copies of models and data of the Hugging Face hub and of gs://.

A model is named by a directory, user/name@revision on the hub, or an address
gs://bucket/path. What is fetched of it is weights in safetensors, JSON, and a
tokenizer's word lists, never code and never a pickle, and only the repository's
top folder. Everything that is read afterwards is a local file, held to the same
checks as any other.

An object of a bucket is copied into ~/.cache/dpo_jax/buckets, and again only
when the bucket describes it otherwise: by another size, generation or time.
"""

import contextlib
import difflib
import fnmatch
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dpo_jax.io import atomic, strict_json

_SCHEME = "gs://"
# user/name, or a name of the hub's own such as "gpt2"; and a revision of it: a
# branch, a tag or a commit.
_ID = re.compile(r"(\w[\w.-]*(?:/[\w.-]+)?)(?:@(\w[\w./-]*))?")
_WORDS = ("*.json", "merges.txt", "vocab.txt")
_WEIGHTS = "*.safetensors"
# A repository of a user.
_USER = re.compile(r"\w[\w.-]*/[\w.-]{1,96}")
_STEP = re.compile(r"step-(\d+)")
_MEND_HUB = (
  "it is no local directory, so check the name, the revision, the network and"
  " HF_HUB_OFFLINE, and HF_TOKEN if it is private"
)
_MEND_BUCKET = (
  "it needs the extra gcs (pip install 'dpo-jax[gcs]') and credentials of"
  " Google Cloud, or copy it to this machine: gcloud storage cp -r"
)


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
  if is_address(name):
    return fetch_objects(name, wanted)
  repo, revision = split(name)
  refuse_missing(name)
  import huggingface_hub

  with _reachable(name, _MEND_HUB):
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
  if is_address(path):
    with _reachable(path, _MEND_BUCKET):
      _, objects = _objects(path)
    for name in {name.split("/")[0] for name in objects if "/" in name}:
      if match := _STEP.fullmatch(name):
        found.append((int(match[1]), f"{path.rstrip('/')}/{name}"))
    return sorted(found)
  if not is_repository(path):
    return []
  import huggingface_hub

  with _reachable(path, _MEND_HUB):
    refs: Any = huggingface_hub.HfApi().list_repo_refs(path)
  for branch in refs.branches:
    if match := _STEP.fullmatch(branch.name):
      found.append((int(match[1]), f"{path}@{branch.name}"))
  return sorted(found)


def is_address(name: str) -> bool:
  """Whether a name is gs://bucket/path."""
  return name.startswith(_SCHEME)


def refuse_address(what: str, name: str) -> None:
  """Refuses an address where something is to be written.

  A run's directory needs locks, renames and appends.

  Raises:
    ValueError: `name`, the value of `what`, has a scheme.
  """
  if "://" in name:
    raise ValueError(
      f"{what}={name!r}: an object store has neither locks nor renames, which"
      " keep these files whole. Name a directory of this machine, or of a file"
      " system that its hosts share, and copy from it: gcloud storage rsync -r"
      " DIR gs://..."
    )


def fetch_objects(
  address: str, patterns: Sequence[str], *, deep: bool = False
) -> pathlib.Path:
  """A local copy of an object, or of those of a folder that are wanted.

  Args:
    address: gs://bucket/path of one object or of a folder.
    patterns: which names of a folder are wanted, such as "*.json".
    deep: whether those of its folders are, too.

  Returns:
    The copy; a folder's holds what the folder holds now, and nothing else.

  Raises:
    ValueError: there is no such thing, or it was not copied.
  """
  digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
  copies = pathlib.Path.home() / ".cache" / "dpo_jax" / "buckets" / digest
  with _reachable(address, _MEND_BUCKET):
    system, objects = _objects(address)
    single = address.rstrip("/").rpartition("/")[2] if "" in objects else ""
    if single:
      objects = {single: objects[""]}
    else:
      objects = {
        name: about
        for name, about in objects.items()
        if (deep or "/" not in name)
        and any(fnmatch.fnmatch(name.split("/")[-1], x) for x in patterns)
      }
    if not objects:
      raise FileNotFoundError(f"no object like {', '.join(patterns)}")
    _copy(system, objects, copies)
  # Hidden files are copies that other processes are making.
  for left in copies.rglob("[!.]*"):
    if left.is_file() and str(left.relative_to(copies)) not in objects:
      left.unlink()
  return copies / single


def _objects(address: str) -> tuple[Any, dict[str, dict[str, Any]]]:
  """The file system of an address, and what it says of each object below.

  Objects are named relative to the address; one that is there itself is "".
  """
  import fsspec

  # It logs a traceback for each request that fails.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  system, path = fsspec.url_to_fs(address.rstrip("/"), use_listings_cache=False)
  found = system.find(path, detail=True)
  return system, {
    name.removeprefix(path).removeprefix("/"): about
    for name, about in found.items()
  }


def _copy(
  system: Any, objects: dict[str, dict[str, Any]], copies: pathlib.Path
) -> None:
  """Copies what is described otherwise than when it was copied."""
  noted = copies.with_name(f"{copies.name}.json")
  known = strict_json.read_object(noted) if noted.is_file() else {}
  for name, about in objects.items():
    # An object may be called anything.
    parts = pathlib.PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
      raise ValueError(f"the object {name!r} would leave the folder")
    target = copies / name
    if known.get(name) == repr(about) and target.is_file():
      continue
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(target) as staged:
      system.get_file(about["name"], str(staged))
      if (size := staged.stat().st_size) != about["size"]:
        raise OSError(f"{name} has {about['size']} bytes, but {size} came")
    known[name] = repr(about)
    atomic.write_text(noted, json.dumps(known))


@contextlib.contextmanager
def _reachable(name: str, mend: str) -> Iterator[None]:
  """Turns the errors of many libraries into one that says what to do."""
  try:
    yield
  # The client's, the network's, the disk's: no list of them would be whole.
  except Exception as error:
    raise ValueError(
      f"{name!r} was not fetched ({type(error).__name__}: {error}); {mend}"
    ) from error
