"""A run in a bucket: python -m dpo_jax mirror COMMAND gs://... [DIR].

`list` prints each step with its size and evaluation, and whether the run is
finished. `verify` compares every part with its hash and fails if one differs.
`fetch` makes DIR what the run's directory was at the newest whole step, with
the final model if it is finished. Nothing is written to the bucket. Exit codes:
0 done; 1 a step is damaged; 2 there is nothing, or it cannot be read.
"""

import argparse
import pathlib
import sys

from dpo_jax.core import console
from dpo_jax.io.mirror import contents, objects, tables


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax mirror",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("command", choices=("list", "verify", "fetch"))
  parser.add_argument("address", help="the run's checkpoint_bucket")
  parser.add_argument("directory", type=pathlib.Path, nargs="?")
  console.add_flag(parser)
  options = parser.parse_args(arguments)
  if (options.command == "fetch") != (options.directory is not None):
    parser.error("fetch needs DIR, and nothing else takes it")
  try:
    store = objects.Store(options.address)
    there = tables.read(store, store.names())
    steps, finished = there.steps, there.finished
    if not steps:
      console.error(
        f"{options.address} holds no steps, or must not be listed: name the"
        " checkpoint_bucket of a run"
      )
      return 2
    if options.command == "fetch":
      return _fetch(store, steps, finished, options.directory)
    found = [(f"step {step}", table) for step, table in sorted(steps.items())]
    if finished:
      found.append((f"finished at step {finished.step}", finished))
    show = _verify if options.command == "verify" else _list
    codes = [show(store, what, table) for what, table in found]
    return max([*codes, 1 if there.broken else 0])
  except (ValueError, objects.Failed) as error:
    console.error(str(error))
    return 2


def _list(store: objects.Store, what: str, table: contents.Contents) -> int:
  del store
  values = [f"{name} {value:.6g}" for name, value in table.metrics.items()]
  console.result(", ".join([f"{what}: {table.bytes:,} bytes", *values]))
  return 0


def _verify(store: objects.Store, what: str, table: contents.Contents) -> int:
  try:
    contents.verify(store, table)
  except contents.Damaged as error:
    console.result(f"{what}: {error}")
    return 1
  console.result(f"{what}: whole")
  return 0


def _fetch(store, steps, finished, directory: pathlib.Path) -> int:
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f"{directory} is not empty: name a new directory")
  code = 0
  for step, table in sorted(steps.items(), reverse=True):
    try:
      tables.bring(store, table, directory)
      if finished and finished.step == step:
        tables.bring_finished(store, finished, directory)
    except contents.Damaged as error:
      console.error(f"step {step}: {error}")
      code = 1
    if (directory / "checkpoints" / str(step)).is_dir():
      console.result(f"{directory} is as it was at step {step}", step=step)
      return code
  return 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
