"""What a run has to push to the hub: its branches, and the files of each.

It follows from the run's directory alone, see `hub`.
"""

import dataclasses
import hashlib
import pathlib
import re

from dpo_jax import metrics
from dpo_jax.publishing import model_card, portable
from dpo_jax.storage import remote, strict_json

MAIN = "main"


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
    return sum(map(size, self.files.values()))

  def digest(self) -> str:
    """SHA-256 of names and contents."""
    whole = hashlib.sha256()
    for name, content in sorted(self.files.items()):
      if isinstance(content, bytes):
        one = hashlib.sha256(content)
      else:
        with content.open("rb") as file:
          one = hashlib.file_digest(file, "sha256")
      whole.update(f"{name}\0{one.hexdigest()}\n".encode())
    return whole.hexdigest()


def of(directory: pathlib.Path, settings: PushSettings) -> list[Revision]:
  """What a run's directory has to push, the checkpoints first.

  Raises:
    ValueError: a file of the run is not what it should be.
  """
  repo, licence = settings.repo, settings.licence
  base = strict_json.read_object(directory / "config.json")["model"]["path"]
  found, last = [], {}
  for folder in ("adapters", "models"):
    for _, name in remote.steps(str(directory / folder)):
      path = pathlib.Path(name)
      own: dict[str, pathlib.Path | bytes] = {
        file.name: file for file in path.iterdir() if file.is_file()
      }
      if folder == "adapters":
        config = path / "adapter_config.json"
        own[config.name] = portable.adapter(config, base)
      card = model_card.of_checkpoint(directory, path.name, repo, licence)
      temporary = path if folder == "models" else None
      files = own | {"README.md": card.encode()}
      if settings.checkpoints:
        found.append(Revision(path.name, files, temporary))
      if folder == "adapters":
        last = {f"adapter/{name}": file for name, file in own.items()}
  if (directory / "finished.json").is_file():
    export = directory / "export"
    files = {file.name: file for file in export.iterdir() if file.is_file()}
    for name in ("config.json", "manifest.json"):
      files[f"run/{name}"] = portable.file(directory / name)
    files[f"run/{metrics.FILE}"] = directory / metrics.FILE
    card, figure = model_card.of_run(directory, repo, licence)
    if figure is not None:
      files[model_card.FIGURE] = figure
    files["README.md"] = card.encode()
    found.append(Revision(MAIN, last | files, None))
  return found


def size(content: pathlib.Path | bytes) -> int:
  """Bytes of a file, or of what becomes one."""
  if isinstance(content, bytes):
    return len(content)
  return content.stat().st_size
