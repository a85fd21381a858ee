"""Responses of models to test prompts, into WORKDIR/responses/.

  python sample.py --config=configs/sample.py:paper --workdir=runs/paper

The same command continues after an interruption; rows on disk are kept. Started
on several hosts, each samples its share of the prompts.
"""

import pathlib
from typing import Any

from dpo_jax.cli import flags
from dpo_jax.core import console, distributed, preemption, settings
from dpo_jax.sampling import generate, jobs


def main(config: dict[str, Any], workdir: pathlib.Path) -> int:
  with distributed.initialized(), preemption.interruptible():
    built = settings.build(jobs.SamplingSettings, config)
    paths = generate.run(built, workdir)
  if distributed.is_main():
    for path in paths:
      console.result(str(path), path=str(path))
  return 0


if __name__ == "__main__":
  flags.run(main, example="configs/sample.py")
