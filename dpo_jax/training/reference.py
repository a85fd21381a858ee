"""The reference's log-probs, computed once and kept beside the run.

They depend on the items, the reference's weights and the precision they are
computed in, and on nothing else: one file serves any beta, loss, seed, layout
and epoch. With them a step runs the policy alone, and full fine-tuning needs no
second tree of weights.
"""

import functools
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from dpo_jax.core import sharding
from dpo_jax.data import batch as batch_lib
from dpo_jax.data import token_table
from dpo_jax.io import atomic, safetensors
from dpo_jax.model import gpt_neox
from dpo_jax.training import step

_FORMAT = "dpo_jax reference log-probs 1"


def token_logps(
  config: gpt_neox.ModelConfig,
  base: Any,
  lora: Any,
  packed: Iterable[tuple[batch_lib.Batch, batch_lib.Counts]],
  mesh: jax.sharding.Mesh,
) -> np.ndarray:
  """Log-probs of all response tokens in the items' order, float32, in nats.

  Args:
    config: the model.
    base: its weights, on the mesh.
    lora: its adapters, on the mesh; None leaves them off.
    packed: batches of one micro-batch that hold all pairs in order.
    mesh: where the batches are computed.
  """
  score = jax.jit(
    functools.partial(step.token_logps, config),
    out_shardings=sharding.replicated(mesh),
    compiler_options=step.COMPILER_OPTIONS,
  )
  found = []
  with jax.set_mesh(mesh):
    for batch, _ in packed:
      placed = sharding.put(batch, mesh, leading=1)
      micro = jax.tree.map(lambda x: x[0], placed)
      logps = jax.device_get(score(base, lora, micro))
      there = batch.sequence_ids[0] >= 0
      # A sequence is in one shard, its tokens in order.
      order = np.argsort(batch.sequence_ids[0][there], kind="stable")
      found.append(logps[there][order])
  return np.concatenate(found)


def spread(table: token_table.Table, logps: np.ndarray) -> np.ndarray:
  """Values of response tokens, in order, laid out as `table.tokens` are."""
  flat = np.zeros(len(table.tokens), np.float32)
  flat[_places(table)] = logps
  return flat


def save(
  path: pathlib.Path, logps: np.ndarray, made_of: dict[str, str]
) -> None:
  """Writes log-probs and what they were made of, whole or not at all.

  Args:
    path: a .safetensors file.
    logps: from `token_logps`.
    made_of: fingerprints that `load` compares.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic.replacing(path) as part:
    safetensors.write(
      part,
      {"logps": logps},
      [logps],
      made_of | {"kind": _FORMAT, "sha256": _hash(logps)},
    )


def load(
  path: pathlib.Path, table: token_table.Table, made_of: dict[str, str]
) -> np.ndarray:
  """Log-probs of all response tokens in the items' order, from `save`.

  Raises:
    ValueError: the file is broken, or was made of something else.
  """
  arrays, metadata = safetensors.read(path)
  mend = f"delete {path.name} to have it made again, or name another directory"
  if metadata.get("kind") != _FORMAT:
    raise ValueError(f"{path} holds no reference log-probs; {mend}")
  for name, value in made_of.items():
    if metadata.get(name) != value:
      raise ValueError(
        f"{path} was made with {name}={metadata.get(name)}, but it is now"
        f" {value}; {mend}"
      )
  if set(arrays) != {"logps"} or arrays["logps"].dtype != np.float32:
    raise ValueError(f"{path} is damaged; {mend}")
  logps = arrays["logps"]
  count = int(table.lengths[:, 1:].sum())
  if logps.shape != (count,) or metadata.get("sha256") != _hash(logps):
    raise ValueError(f"{path} is damaged; {mend}")
  return logps


def _places(table: token_table.Table) -> np.ndarray:
  """Where in `table.tokens` each response token lies, item after item."""
  starts, lengths = (
    x[:, 1:].reshape(-1) for x in (table.starts, table.lengths)
  )
  segment = np.repeat(np.arange(len(lengths)), lengths)
  before = np.cumsum(lengths) - lengths
  return starts[segment] + np.arange(len(segment)) - before[segment]


def _hash(values: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(values, "<f4")).hexdigest()
