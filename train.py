"""SFT or DPO; the same command resumes where it stopped.

python train.py --config=configs/dpo.py:pythia-2.8b --workdir=runs/dpo
"""

import pathlib
from typing import Any

from dpo_jax.cli import flags
from dpo_jax.core import distributed, settings
from dpo_jax.training import config as config_lib
from dpo_jax.training import train


def main(
  config: dict[str, Any], workdir: pathlib.Path, push_to_hub: str
) -> int:
  if push_to_hub:
    config["push_to_hub"] = push_to_hub
  built = settings.build(config_lib.TrainSettings, config)
  with distributed.initialized(built.heartbeat_s):
    train.run(built, workdir)
  return 0


if __name__ == "__main__":
  flags.run(
    main,
    example="configs/dpo.py",
    push_to_hub=("", "user/name on the hub; short for --config.push_to_hub"),
  )
