"""One of two hosts: writes its shards of the batches of an input pipeline.

python tests/feeding.py CONFIG.json OUTPUT.npz INDEX PORT
"""

import json
import pathlib
import sys

import jax
import numpy as np

# Leaves of a batch that are compared.
NAMES = ("tokens", "source", "target", "sequence_ids", "dropout_ids")


def main(config, output, index, port):
  jax.distributed.initialize(
    f"localhost:{port}", 2, int(index), initialization_timeout=60
  )
  from dpo_jax.core import settings, sharding
  from dpo_jax.data import tokenizer
  from dpo_jax.training import config as config_lib
  from dpo_jax.training import input_pipeline

  values = json.loads(pathlib.Path(config).read_text("utf-8"))
  built = settings.build(config_lib.TrainSettings, values)
  pipeline = input_pipeline.make(
    built, tokenizer.load(built.tokenizer), sharding.make_mesh()
  )
  shards = {}
  for step, fed in enumerate(pipeline.train_batches(0)):
    shards[f"{step}/ids"] = np.asarray(fed.counts.ids)
    for name in NAMES:
      for shard in getattr(fed.batch, name).addressable_shards:
        rows = shard.index[1]
        shards[f"{step}/{name}/{rows.start or 0}"] = np.asarray(shard.data)
  np.savez(output, **shards)


if __name__ == "__main__":
  main(*sys.argv[1:])
