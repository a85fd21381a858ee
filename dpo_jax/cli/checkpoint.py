"""A run's checkpoints: python -m dpo_jax checkpoint COMMAND PLACE [DIR].

PLACE is a run's directory, its checkpoints/, or an address that a run had as
checkpoint_bucket. `list` prints each step with its size. `verify` compares
every file with its hash and fails if one differs. `fetch` makes DIR what the
run's directory was at the newest whole step of an address, with the final model
if the run is finished. Nothing is written to a bucket. Exit codes: 0 all whole;
1 a step is not; 2 there is nothing, or it cannot be read.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from dpo_jax.cli import flags
from dpo_jax.core import console
from dpo_jax.io import bucket as bucket_lib
from dpo_jax.io import rundir, step_files


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax checkpoint",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("command", choices=("list", "verify", "fetch"))
  parser.add_argument("place")
  parser.add_argument("directory", type=pathlib.Path, nargs="?")
  console.add_flag(parser)
  options = parser.parse_args(arguments)
  command, place, directory = options.command, options.place, options.directory
  remote = "://" in place
  if (command == "fetch") != (directory is not None) or (
    directory is not None and not remote
  ):
    parser.error("fetch takes an address and DIR, all else one place")

  def call():
    with bucket_lib.reaching(place) if remote else contextlib.nullcontext():
      if directory is not None:
        return _fetch(place, directory)
      find = _in_bucket if remote else _on_disk
      return _print(find(place, command == "verify"), command == "verify")

  return flags.checked(call)


def _print(found: Iterator[Any], verify: bool) -> int:
  """Prints each (name, manifest or None, problem or ""); 1 if one has any."""
  code = 0
  for name, manifest, problem in found:
    said, step = problem or "whole", manifest and manifest.step
    code |= bool(problem)
    if manifest and not verify:
      said = f"{manifest.bytes:,} bytes"
    console.result(f"{name}: {said}", step=step)
  return code


def _on_disk(place: str, verify: bool) -> Iterator[Any]:
  directory = pathlib.Path(place)
  if (directory / "checkpoints").is_dir():
    directory = directory / "checkpoints"
  if not (steps := step_files.steps(directory)):
    raise ValueError(f"{directory} holds no checkpoints")
  for step in steps:
    manifest, problem = None, ""
    try:
      manifest = step_files.manifest(directory, step)
    except ValueError as error:
      problem = str(error)
    if verify:
      problem = step_files.problem(directory, step)
    yield f"step {step}", manifest, problem
  if manifest := rundir.finished(directory.parent):
    problem = ""
    if verify:
      try:
        rundir.refuse_damaged(directory.parent)
      except ValueError as error:
        problem = str(error)
    yield f"finished at step {manifest.step}", manifest, problem


def _in_bucket(address: str, verify: bool) -> Iterator[Any]:
  bucket = bucket_lib.connect(address)
  there = _look(bucket, address)
  for name, why in there.damaged.items():
    yield name, None, why
  for name, manifest in there.manifests.items():
    problem = ""
    if verify:
      try:
        bucket_lib.verify(bucket, manifest, manifest.files)
      except bucket_lib.Damaged as error:
        problem = str(error)
    done = "finished at " if name == bucket_lib.FINISHED else ""
    yield f"{done}step {manifest.step}", manifest, problem


def _look(bucket, address: str) -> bucket_lib.Listing:
  there = bucket_lib.look(bucket)
  if not there.manifests and not there.damaged:
    raise ValueError(
      f"{address} holds no checkpoints: name the checkpoint_bucket of a run"
    )
  return there


def _fetch(address: str, directory: pathlib.Path) -> int:
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f"{directory} is not empty: name a new directory")
  bucket = bucket_lib.connect(address)
  there = _look(bucket, address)
  step = bucket_lib.fetch(bucket, there, directory)
  for name, why in there.damaged.items():
    console.error(f"{name}: {why}")
  if step is not None:
    console.result(f"{directory} is as it was at step {step}", step=step)
  return 1 if there.damaged else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
