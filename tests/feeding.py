"""One host of several: writes the parts of a feed's batches that it holds.

python tests/feeding.py CONFIG.json OUTPUT.npz START PROCESSES INDEX PORT
"""

import json
import pathlib
import sys

import jax
import numpy as np


def main(config, output, start, processes, index, port):
  if int(processes) > 1:
    jax.distributed.initialize(
      f"localhost:{port}", int(processes), int(index), initialization_timeout=60
    )
  from dpo_jax.core import settings, sharding
  from dpo_jax.data import tokenizer
  from dpo_jax.training import config as config_lib
  from dpo_jax.training import input_pipeline

  values = json.loads(pathlib.Path(config).read_text("utf-8"))
  built = settings.build(config_lib.TrainSettings, values)
  made = input_pipeline.make(
    built, tokenizer.load(built.tokenizer), sharding.make_mesh()
  )
  parts = {}
  for step, fed in enumerate(made.training(int(start)), int(start)):
    parts[f"{step}/ids"] = np.asarray(fed.counts.ids)
    for name in ("tokens", "source", "target", "sequence_ids", "dropout_ids"):
      for shard in getattr(fed.batch, name).addressable_shards:
        rows = shard.index[1]
        parts[f"{step}/{name}/{rows.start or 0}"] = np.asarray(shard.data)
  state = json.dumps(made.schedule.state(made.steps))
  np.savez(output, state=np.asarray(state), **parts)


if __name__ == "__main__":
  main(*sys.argv[1:])
