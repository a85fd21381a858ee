"""SFT or DPO; the same command goes on where it was stopped.

python train.py --config=configs/dpo.py:pythia-2.8b --workdir=runs/dpo
"""

import pathlib
from typing import Any

from dpo_jax import training
from dpo_jax.interface import cli, settings
from dpo_jax.running import processes, recipe


def main(
  config: dict[str, Any], workdir: pathlib.Path, push_to_hub: str
) -> int:
  if push_to_hub:
    config["push_to_hub"] = push_to_hub
  built = settings.build(recipe.TrainSettings, config)
  with processes.joined(built.heartbeat_s):
    training.run(built, workdir)
  return 0


if __name__ == "__main__":
  cli.run(
    main,
    example="configs/dpo.py",
    push_to_hub=("", "user/name on the hub; short for --config.push_to_hub"),
  )
