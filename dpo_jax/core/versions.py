"""What made a file: versions of the code and of what it stands on."""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess

# Whose versions can change a number of a run.
_PACKAGES = (
  "dpo-jax",
  "flax",
  "grain",
  "jax",
  "jaxlib",
  "numpy",
  "optax",
  "orbax-checkpoint",
  "safetensors",
  "tokenizers",
  "transformers",
)


@functools.cache
def versions() -> dict[str, str]:
  """Versions by package, with Python's, and the commit of this code if known.

  The commit ends in "+changes" where files differ from it.
  """
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  commit = _git("rev-parse", "HEAD")
  if commit:
    changes = _git("status", "--porcelain", "--untracked-files=no")
    found["commit"] = commit + ("+changes" if changes else "")
  return found


def _git(*arguments: str) -> str:
  """What git says of the directory of this package; "" where there is none."""
  root = pathlib.Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return ""
  try:
    done = subprocess.run(
      ("git", "-C", str(root), *arguments),
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return ""
  return done.stdout.strip()
