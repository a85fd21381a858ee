"""A run's checkpoints: python -m dpo_jax checkpoint COMMAND PLACE [DIR].

PLACE is a run's directory, its checkpoints/, or an address that a run had as
checkpoint_bucket. `list` prints each step with its size and evaluation.
`verify` compares every file with its hash and fails if one differs. `fetch`
makes DIR what the run's directory was at the newest whole step of an address,
with the final model if the run is finished. Nothing is written to a bucket.
Exit codes: 0 all whole; 1 a step is not; 2 there is nothing, or it cannot be
read.
"""

import argparse
import pathlib
import sys

from dpo_jax.core import console
from dpo_jax.io import bucket as bucket_lib
from dpo_jax.io import step_files


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
  fetch = options.command == "fetch"
  remote = "://" in options.place
  if fetch != (options.directory is not None) or (fetch and not remote):
    parser.error("fetch takes an address and DIR, all else one place")
  try:
    if remote:
      with bucket_lib.reaching(options.place):
        return _remote(options.command, options.place, options.directory)
    return _local(options.command, pathlib.Path(options.place))
  except ValueError as error:
    console.error(str(error))
    return 2


def _local(command: str, directory: pathlib.Path) -> int:
  if (directory / "checkpoints").is_dir():
    directory = directory / "checkpoints"
  found = step_files.steps(directory)
  if not found:
    raise ValueError(f"{directory} holds no checkpoints")
  code = 0
  for step in found:
    if command == "verify":
      said = step_files.problem(directory, step)
      code |= bool(said)
    else:
      try:
        said = _size(directory, step)
      except (OSError, ValueError) as error:
        said, code = f"not whole: {error}", 1
    console.result(f"step {step}: {said or 'whole'}", step=step)
  return code


def _size(directory: pathlib.Path, step: int) -> str:
  files = step_files.hashes(directory, step)
  size = sum((directory / str(step) / name).stat().st_size for name in files)
  return _summary(size, step_files.metrics(directory, step))


def _summary(size: int, metrics: dict[str, float]) -> str:
  values = [f"{name} {value:.6g}" for name, value in metrics.items()]
  return ", ".join([f"{size:,} bytes", *values])


def _remote(command: str, address: str, directory: pathlib.Path | None) -> int:
  bucket = bucket_lib.connect(address)
  there = bucket_lib.look(bucket, {})
  if not there.tables and not there.damaged:
    raise ValueError(
      f"{address} holds no checkpoints: name the checkpoint_bucket of a run"
    )
  for name, why in there.damaged.items():
    console.error(f"{name}: {why}")
  code = 1 if there.damaged else 0
  if directory is not None:
    return max(code, _fetch(bucket, there, directory))
  for name, table in there.tables.items():
    said = _summary(table.bytes, table.metrics)
    if command == "verify":
      try:
        bucket_lib.verify(bucket, table, table.files)
        said = "whole"
      except bucket_lib.Damaged as error:
        said, code = str(error), 1
    done = "finished at " if name == bucket_lib.FINISHED else ""
    console.result(f"{done}step {table.step}: {said}", step=table.step)
  return code


def _fetch(bucket, there: bucket_lib.Listing, directory: pathlib.Path) -> int:
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f"{directory} is not empty: name a new directory")
  final = there.tables.get(bucket_lib.FINISHED)
  code = 0
  for step, table in sorted(there.steps.items(), reverse=True):
    found = False
    try:
      bucket_lib.bring(bucket, table, directory)
      found = True
      if final and final.step == step:
        bucket_lib.bring(bucket, final, directory)
    except bucket_lib.Damaged as error:
      console.error(f"step {step}: {error}")
      code = 1
    if found:
      console.result(f"{directory} is as it was at step {step}", step=step)
      return code
  return 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
