"""What a run's files say, without where on somebody's machine things lay.

A run's config, manifest and command name the directories of the machine that
it ran on, and with them often its user. What leaves the machine says the hub's
name where there is one, and otherwise the end of a path, which tells the reader
what was meant.
"""

import json
import os
import pathlib
import re
from typing import Any

from dpo_jax.storage import remote, strict_json

# Of a run whose model is on the hub: see `hub`.
PUSHED = "hub.json"
_PARTS = 2
# Whose folders lie there.
_HOMES = ("home", "Users")
# An absolute path, one that climbs, or one of a home, within a text; not the
# middle of a relative path, of an address or of a word.
_PATH = re.compile(
  r"(?<![\w./:~-])(?:/|~\w*/|(?:\.\./)+)[^\s'\"`,;:()\[\]{}<>|]*"
)
_HOME = re.compile(rf"/(?:(?:{'|'.join(_HOMES)})/[^/\s'\"]+|root)/")


def is_id(path: str) -> bool:
  """Whether a path is a hub id, and not one of files on some machine."""
  name = path.partition("@")[0]
  local = name.startswith((".", "/", "~")) or pathlib.Path(name).exists()
  return name.count("/") == 1 and not local


def hub_name(path: str) -> tuple[str, str | None] | None:
  """What the hub calls the model at a path, and its revision; None if unknown.

  Known are ids, and the export of a run that was itself pushed, by the commit
  that its hub.json keeps.
  """
  if is_id(path):
    return remote.split(path)
  directory = pathlib.Path(path)
  noted = directory.parent / PUSHED
  if directory.name != "export" or not noted.is_file():
    return None
  for repo, branches in strict_json.read_object(noted).items():
    if "main" in branches:
      return repo, branches["main"]["commit"]
  return None


def path(name: str) -> str:
  """The end of a local path, without a home; a relative one as it is.

  A home itself is "". Hub ids and addresses stay what they are.
  """
  if not name.startswith(("/", "~", "../")) and name != "..":
    return name
  if name.startswith("~"):
    return "/".join(pathlib.Path(name).parts[1:][-_PARTS:])
  parts = pathlib.Path(os.path.abspath(name)).parts[1:]
  home = pathlib.Path.home().parts[1:]
  if home and parts[: len(home)] == home:
    parts = parts[len(home) :]
  elif parts[:1] in [(folder,) for folder in _HOMES]:
    parts = parts[2:]
  elif parts[:1] == ("root",):
    parts = parts[1:]
  return "/".join(parts[-_PARTS:])


def text(value: str) -> str:
  """A text, such as a command, whose local paths are cut as `path` does."""
  # A path may hold spaces, which within a text end it: homes go first.
  value = value.replace(f"{pathlib.Path.home()}/", "")
  value = _HOME.sub("", value)
  return _PATH.sub(lambda found: path(found[0]), value)


def values(content: Any) -> Any:
  """Parsed JSON, its keys too, whose local paths are cut."""
  if isinstance(content, str):
    # A whole path may hold spaces, and what else ends one within a text.
    whole = content.startswith(("/", "~", "../"))
    return path(content) if whole else text(content)
  if isinstance(content, dict):
    return {text(key): values(item) for key, item in content.items()}
  if isinstance(content, list):
    return [values(item) for item in content]
  return content


def file(source: pathlib.Path) -> bytes:
  """A JSON file with its local paths cut.

  Raises:
    ValueError: it is no JSON object.
  """
  content = values(strict_json.read_object(source))
  return (json.dumps(content, indent=2) + "\n").encode()


def adapter(source: pathlib.Path, base: str) -> bytes:
  """An adapter_config.json that names its base as the hub does, or not at all.

  Args:
    source: the file.
    base: path of the base, as the run's config has it.
  """
  repo, revision = hub_name(base) or (None, None)
  named = {"base_model_name_or_path": repo, "revision": revision}
  content = strict_json.read_object(source) | named
  return (json.dumps(content, indent=2) + "\n").encode()
