"""Answers of models to test prompts, into WORKDIR/responses/.

  python sample.py --config=configs/sample.py:paper --workdir=runs/paper

The same command goes on after an interruption: answers that are there are
kept. Started on several hosts, each answers its share of the prompts.
"""

import pathlib
from typing import Any

from dpo_jax.answering import answers, grid
from dpo_jax.interface import cli, console, settings
from dpo_jax.running import processes


def main(config: dict[str, Any], workdir: pathlib.Path) -> int:
  with processes.joined():
    built = settings.build(grid.AnswerSettings, config)
    paths = answers.run(built, workdir)
  if processes.first():
    for path in paths:
      console.result(str(path), path=str(path))
  return 0


if __name__ == "__main__":
  cli.run(main, example="configs/sample.py")
