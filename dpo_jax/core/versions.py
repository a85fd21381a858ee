"""Versions of this code and its dependencies, for manifests."""

import contextlib
import functools
import importlib.metadata
import pathlib
import platform
import subprocess

# Packages that can change the numbers of a run.
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
  """Versions of Python and packages; in a clone the commit too.

  The commit ends in "+changes" if tracked files differ from it.
  """
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  root = pathlib.Path(__file__).resolve().parents[2]
  describe = "describe --always --exclude=* --abbrev=40 --dirty=+changes"
  if (root / ".git").exists():
    with contextlib.suppress(OSError, subprocess.SubprocessError):
      found["commit"] = subprocess.check_output(
        ("git", "-C", str(root), *describe.split()),
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=10,
      ).strip()
  return found
