"""Local copies of models and data from the Hugging Face hub and from gs://.

A model is named by a directory, user/name@revision on the hub, or an address
gs://bucket/path. Only safetensors, JSON and word lists of the top folder are
fetched, never code and never a pickle. Readers get a local path, and check its
files as any others.

Objects of a bucket are copied to ~/.cache/dpo_jax/buckets, and again only when
their size, generation or time differs.
"""

import difflib
import fnmatch
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from dpo_jax.io import atomic, bucket, strict_json

# user/name, or a name of the hub's own such as "gpt2"; and its revision: a
# branch, a tag or a commit.
_ID = re.compile(r"(\w[\w.-]*(?:/[\w.-]+)?)(?:@(\w[\w./-]*))?")
_WORDS = ("*.json", "merges.txt", "vocab.txt")
_WEIGHTS = "*.safetensors"
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
  """Refuses a user/name that is more likely a mistyped path.

  Raises:
    ValueError: it does not exist, but its parent directory does. With a
      revision it is a hub id in any case.
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
  """A local directory as it is, or a copy of a hub id or gs:// address.

  Args:
    path: the directory, the id or the address.
    weights: whether safetensors are fetched besides configs and tokenizer.

  Raises:
    ValueError: it is none of these, or was not fetched.
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

  try:
    directory = huggingface_hub.snapshot_download(
      repo,
      revision=revision,
      allow_patterns=wanted,
      ignore_patterns=["*/*"],
    )
  except Exception as error:
    raise _not_fetched(name, error) from error
  return pathlib.Path(directory)


def _not_fetched(name: str, error: Exception) -> ValueError:
  return ValueError(
    f"{name!r} was not fetched ({type(error).__name__}: {error}); it is no"
    " local directory, so check the name, the revision, the network and"
    " HF_HUB_OFFLINE, and HF_TOKEN if it is private"
  )


def steps(path: str) -> list[tuple[int, str]]:
  """Step folders step-NNNNNN of a directory, address or hub id, ascending.

  Returns:
    Steps, each with the name that `fetch` takes; on the hub they are branches.

  Raises:
    ValueError: the bucket or the hub cannot be read.
  """
  if pathlib.Path(path).is_dir():
    names, prefix = [x.name for x in pathlib.Path(path).iterdir()], f"{path}/"
  elif is_address(path):
    with bucket.reaching(path):
      objects = bucket.connect(path).find("")
    names = {name.split("/")[0] for name in objects if "/" in name}
    prefix = f"{path.rstrip('/')}/"
  elif is_repository(path):
    import huggingface_hub

    try:
      refs: Any = huggingface_hub.HfApi().list_repo_refs(path)
    except Exception as error:
      raise _not_fetched(path, error) from error
    names, prefix = [branch.name for branch in refs.branches], f"{path}@"
  else:
    return []
  found = filter(None, map(_STEP.fullmatch, names))
  return sorted((int(match[1]), prefix + match[0]) for match in found)


def is_address(name: str) -> bool:
  """Whether a name is gs://bucket/path."""
  return name.startswith("gs://")


def refuse_address(what: str, name: str) -> None:
  """Raises ValueError if `what`, a directory to write to, is an address."""
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
  """A local copy of an object, or of the objects of a folder.

  Args:
    address: gs://bucket/path of an object or of a folder.
    patterns: names to copy of a folder, such as "*.json".
    deep: whether to copy those of its folders, too.

  Returns:
    The copy; that of a folder holds what the folder holds now.

  Raises:
    ValueError: there is nothing to copy, or it was not copied.
  """
  digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
  copies = pathlib.Path.home() / ".cache" / "dpo_jax" / "buckets" / digest
  with bucket.reaching(address):
    system = bucket.connect(address)
    objects = system.find("", detail=True)
    single = address.rstrip("/").rpartition("/")[2] if "" in objects else ""
    if not single:
      objects = {
        name: about
        for name, about in objects.items()
        if (deep or "/" not in name)
        and any(fnmatch.fnmatch(name.split("/")[-1], x) for x in patterns)
      }
    if not objects:
      raise FileNotFoundError(f"no object like {', '.join(patterns)}")
    objects = {name or single: (name, about) for name, about in objects.items()}
    _copy(system, objects, copies)
  # Hidden files are copies that other processes are making.
  for left in copies.rglob("[!.]*"):
    if left.is_file() and str(left.relative_to(copies)) not in objects:
      left.unlink()
  return copies / single


def _copy(system: Any, objects: dict[str, Any], copies: pathlib.Path) -> None:
  """Copies objects whose description changed since they were copied."""
  note = copies.with_name(f"{copies.name}.json")
  known = strict_json.read_object(note) if note.is_file() else {}
  for target, (name, about) in objects.items():
    # An object may be called anything.
    parts = pathlib.PurePosixPath(target)
    if parts.is_absolute() or ".." in parts.parts or "\0" in target:
      raise ValueError(f"the object {target!r} would leave the folder")
    path = copies / target
    if known.get(target) == repr(about) and path.is_file():
      continue
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as staged:
      system.get_file(name, str(staged))
      if (size := staged.stat().st_size) != about["size"]:
        raise OSError(f"{target} has {about['size']} bytes, but {size} came")
    known[target] = repr(about)
    atomic.write_text(note, json.dumps(known))
