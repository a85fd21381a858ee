"""What a run's checkpoints are: python -m dpo_jax checkpoint verify|list DIR.

`list` prints each step with its size and evaluation. `verify` compares every
file with its step's manifest and fails if one differs. DIR is a run's
directory, or its checkpoints/. Exit codes: 0 all whole; 1 a step is not; 2
there is nothing to look at.
"""

import argparse
import pathlib
import sys

from dpo_jax.core import console
from dpo_jax.io import step_files


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax checkpoint",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("command", choices=("verify", "list"))
  parser.add_argument("directory", type=pathlib.Path)
  console.add_flag(parser)
  options = parser.parse_args(arguments)
  directory = options.directory
  if (directory / "checkpoints").is_dir():
    directory = directory / "checkpoints"
  found = step_files.steps(directory)
  if not found:
    console.error(f"{directory} holds no checkpoints")
    return 2
  show = _verify if options.command == "verify" else _list
  return max([show(directory, step) for step in found])


def _verify(directory: pathlib.Path, step: int) -> int:
  problem = step_files.problem(directory, step)
  console.result(f"step {step}: {problem or 'whole'}", step=step)
  return 1 if problem else 0


def _list(directory: pathlib.Path, step: int) -> int:
  size = f"step {step}: {step_files.size(directory, step):,} bytes"
  try:
    metrics = step_files.metrics(directory, step)
  except (OSError, ValueError, KeyError, TypeError) as error:
    console.result(f"{size}, not whole: {error}", step=step)
    return 1
  values = [f"{name} {value:.6g}" for name, value in metrics.items()]
  console.result(", ".join([size, *values]), step=step)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
