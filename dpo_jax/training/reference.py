"""The reference's log-probs, precomputed once and kept in a file.

They depend on the items, the reference's weights and the precision, and on
nothing else: one file serves any beta, loss, seed, layout and epoch. With them
a step runs the policy alone, and full fine-tuning needs no second tree of
weights.
"""

import dataclasses
import functools
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from dpo_jax.core import console, distributed, sharding
from dpo_jax.data import dataset, loader, packing, token_table
from dpo_jax.io import atomic, safetensors
from dpo_jax.model import gpt_neox
from dpo_jax.training import input_pipeline, step

_FORMAT = "dpo_jax reference log-probs 1"


def precompute(
  pipeline: input_pipeline.InputPipeline,
  directory: pathlib.Path,
  model: gpt_neox.ModelConfig,
  weights: tuple[Any, Any],
  weights_hash: str,
  param_dtype: str,
) -> input_pipeline.InputPipeline:
  """The pipeline with the reference's log-probs, read or computed.

  Args:
    pipeline: of the run.
    directory: of the files train.safetensors and held_out.safetensors.
    model: the reference's config.
    weights: the base and its adapters or None, on the mesh.
    weights_hash: of both, before quantization.
    param_dtype: what they are stored in.

  Raises:
    ValueError: a file is damaged, or of other items, weights or precision.
  """
  found = {}
  for side in ("train", "held_out"):
    items: dataset.Side = getattr(pipeline.items, side)
    path = directory.expanduser() / f"{side}.safetensors"
    fingerprints = {
      "data": items.report["tokens"],
      "model": weights_hash,
      "shape": repr(model.shape()),
      "dtype": f"{model.dtype} of {param_dtype}",
    }
    # All hosts take the same branch.
    if distributed.all_gather(path.exists()).all():
      logps = load(path, items.table, fingerprints)
    else:
      logps = token_logps(
        model,
        *weights,
        items.table,
        pipeline.held_out,
        pipeline.eval_batch_size,
        pipeline.mesh,
        name=f"reference of {side}",
      )
      if distributed.is_main():
        save(path, logps, fingerprints)
    found[f"{side}_reference"] = spread(items.table, logps)
  return dataclasses.replace(pipeline, **found)


def token_logps(
  config: gpt_neox.ModelConfig,
  base: Any,
  lora: Any,
  table: token_table.Table,
  layout: packing.Packing,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  name: str = "log-probs",
) -> np.ndarray:
  """Log-probs of all response tokens in the items' order, float32, in nats.

  Args:
    config: the model.
    base: its weights, on the mesh.
    lora: its adapters, on the mesh; None turns them off.
    table: the items.
    layout: their packing; its shapes are replaced.
    batch_size: items of a batch.
    mesh: where the batches are computed.
    name: of the progress bar.
  """
  how = input_pipeline.in_order(layout, table, batch_size)
  packed = loader.in_order(table, how, batch_size=batch_size)
  total = -(-len(table) // batch_size)
  score = jax.jit(
    functools.partial(step.token_logps, config),
    out_shardings=sharding.replicated(mesh),
    compiler_options=step.COMPILER_OPTIONS,
  )
  found = []
  with jax.set_mesh(mesh):
    for batch, _ in console.track(packed, total, name, "batch"):
      placed = sharding.put(batch, mesh, leading=1)
      micro = jax.tree.map(lambda x: x[0], placed)
      logps = jax.device_get(score(base, lora, micro))
      real = batch.sequence_ids[0] >= 0
      # A sequence is in one shard, its tokens in order.
      order = np.argsort(batch.sequence_ids[0][real], kind="stable")
      found.append(logps[real][order])
  return np.concatenate(found)


def spread(table: token_table.Table, logps: np.ndarray) -> np.ndarray:
  """Values of response tokens in order, at their indices in `table.tokens`."""
  starts, lengths = (
    x[:, 1:].reshape(-1) for x in (table.starts, table.lengths)
  )
  segment = np.repeat(np.arange(len(lengths)), lengths)
  before = np.cumsum(lengths) - lengths
  indices = starts[segment] + np.arange(len(segment)) - before[segment]
  flat = np.zeros(len(table.tokens), np.float32)
  flat[indices] = logps
  return flat


def save(
  path: pathlib.Path, logps: np.ndarray, fingerprints: dict[str, str]
) -> None:
  """Writes log-probs with the fingerprints of their inputs, atomically.

  Args:
    path: a .safetensors file.
    logps: from `token_logps`.
    fingerprints: of items, weights and precision, that `load` compares.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  metadata = fingerprints | {"kind": _FORMAT, "sha256": _hash(logps)}
  with atomic.replacing(path) as part:
    safetensors.write(part, {"logps": logps}, [logps], metadata)


def load(
  path: pathlib.Path, table: token_table.Table, fingerprints: dict[str, str]
) -> np.ndarray:
  """Log-probs of all response tokens in the items' order, from `save`.

  Raises:
    ValueError: the file is damaged, or of other inputs.
  """
  arrays, metadata = safetensors.read(path)
  fix = f"delete {path.name} to have it computed again, or name another"
  fix += " directory"
  if metadata.get("kind") != _FORMAT:
    raise ValueError(f"{path} holds no reference log-probs; {fix}")
  for name, value in fingerprints.items():
    if metadata.get(name) != value:
      raise ValueError(
        f"{path} was made with {name}={metadata.get(name)}, but it is now"
        f" {value}; {fix}"
      )
  logps = arrays.get("logps", np.zeros(0))
  count = int(table.lengths[:, 1:].sum())
  if (
    len(arrays) != 1
    or (logps.shape, logps.dtype) != ((count,), np.float32)
    or metadata.get("sha256") != _hash(logps)
  ):
    raise ValueError(f"{path} is damaged; {fix}")
  return logps


def _hash(values: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(values, "<f4")).hexdigest()
