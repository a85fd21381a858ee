"""SFT or DPO: python train.py --config=configs/dpo.py:pythia-2.8b."""

import pathlib
from typing import Any

from dpo_jax import cli, processes, recipe, settings, training


def main(config: dict[str, Any], workdir: pathlib.Path) -> int:
  with processes.joined():
    training.run(settings.build(recipe.TrainSettings, config), workdir)
  return 0


if __name__ == "__main__":
  cli.run(main, example="configs/dpo.py")
