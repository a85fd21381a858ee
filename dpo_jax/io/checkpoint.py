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
  show = _show_verified if command == "verify" else _show_size
  return max([show(directory, step) for step in found])


def _show_verified(directory: pathlib.Path, step: int) -> int:
  found = step_files.problem(directory, step)
  console.result(f"step {step}: {found or 'whole'}", step=step)
  return 1 if found else 0


def _show_size(directory: pathlib.Path, step: int) -> int:
  size = step_files.size(directory, step)
  try:
    found = step_files.metrics(directory, step)
  except (OSError, ValueError, KeyError, TypeError) as error:
    said = f"step {step}: {size:,} bytes, not whole: {error}"
    console.result(said, step=step)
    return 1
  _say_size(f"step {step}", step, size, found)
  return 0


def _say_size(what: str, step: int, size: int, metrics) -> None:
  values = [f"{name} {value:.6g}" for name, value in metrics.items()]
  console.result(", ".join([f"{what}: {size:,} bytes", *values]), step=step)


def _remote(command: str, address: str, directory: pathlib.Path | None) -> int:
  bucket = bucket_lib.connect(address)
  there = bucket_lib.look(bucket, {})
  if not there.tables and not there.damaged:
    raise ValueError(
      f"{address} holds no checkpoints: name the checkpoint_bucket of a run"
    )
  for name, why in there.damaged.items():
    console.error(f"{name}: {why}")
  if directory is not None:
    return max(_fetch(bucket, there, directory), 1 if there.damaged else 0)
  code = 1 if there.damaged else 0
  for name, table in there.tables.items():
    done = "finished at " if name == bucket_lib.FINISHED else ""
    what = f"{done}step {table.step}"
    if command == "list":
      _say_size(what, table.step, table.bytes, table.metrics)
      continue
    try:
      bucket_lib.verify(bucket, table, table.files)
      console.result(f"{what}: whole", step=table.step)
    except bucket_lib.Damaged as error:
      console.result(f"{what}: {error}", step=table.step)
      code = 1
  return code


def _fetch(bucket, there: bucket_lib.Listing, directory: pathlib.Path) -> int:
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f"{directory} is not empty: name a new directory")
  final = there.tables.get(bucket_lib.FINISHED)
  code = 0
  for step, table in sorted(there.steps.items(), reverse=True):
    try:
      bucket_lib.bring(bucket, table, directory)
    except bucket_lib.Damaged as error:
      console.error(f"step {step}: {error}")
      code = 1
      continue
    try:
      if final and final.step == step:
        bucket_lib.bring(bucket, final, directory)
    except bucket_lib.Damaged as error:
      console.error(f"the final model: {error}")
      code = 1
    console.result(f"{directory} is as it was at step {step}", step=step)
    return code
  return 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
