"""Lower bound of a training step's time, by arithmetic; no prediction.

  seconds = max(flops / peak,
                microbatches * read / memory bandwidth,
                microbatches * gathered / link bandwidth)

per device. `flops` are of every token position of the rows, padding included
and rematerialization not; `read` is the weights, once per micro-batch, and
`gathered` the shards of them on other devices. Computing, reading and gathering
overlap at best, hence the maximum.
"""

import dataclasses

import jax

from dpo_jax.core import hardware, sharding
from dpo_jax.model import flops, gpt_neox
from dpo_jax.plan import compile_training, mean_batch
from dpo_jax.training import config as config_lib


@dataclasses.dataclass(frozen=True)
class Bound:
  """The least work of a step on one device.

  Attributes:
    microbatches: of a step.
    fill: share of the token positions that hold a token.
    flops: of all token positions.
    useful: flops of those that hold a token.
    read: bytes of the weights, per micro-batch.
    gathered: bytes of them on other devices.
    dtype: of the products.
  """

  microbatches: int
  fill: float
  flops: float
  useful: float
  read: int
  gathered: int
  dtype: str

  def peak(self, chip: hardware.Chip) -> float:
    return chip.bf16_flops if self.dtype == "bfloat16" else chip.float32_flops

  def seconds(self, chip: hardware.Chip) -> tuple[float, float, float]:
    """Times of computing, reading and gathering; the bound is the longest."""
    return (
      self.flops / self.peak(chip),
      self.microbatches * self.read / chip.hbm_bandwidth,
      self.microbatches * self.gathered / chip.link_bandwidth,
    )

  def utilization(self, chip: hardware.Chip) -> float:
    """Upper bound of MFU."""
    return self.useful / self.peak(chip) / max(self.seconds(chip))


def of_step(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  rows: int,
) -> Bound:
  """Bound of a training step with `rows` rows per device and micro-batch."""
  batch = mean_batch.batch_of(config, mesh, rows, config.microbatches)
  mean = mean_batch.lengths(config)
  items = config.batch_size
  real = flops.Work(
    items * mean.tokens, items * mean.completion, items * mean.visible
  )
  scores = real.visible
  if config.model.attention == "dense":
    scores = batch.tokens.size * batch.tokens.shape[-1]
  padded = flops.Work(batch.tokens.size, batch.target.size, scores)
  objective = config.step_objective()
  reference = objective.has_reference and not config.precompute_reference
  read, own = _weights(config, shape, mesh)
  trees = 2 if config.keeps_reference else 1
  return Bound(
    microbatches=config.microbatches,
    fill=real.tokens / padded.tokens,
    flops=flops.step(shape, padded, reference=reference) / mesh.size,
    useful=flops.step(shape, real, reference=reference) / mesh.size,
    read=trees * read,
    gathered=trees * (read - own),
    dtype=config.model.dtype,
  )


def _weights(config, shape, mesh) -> tuple[int, int]:
  """Bytes of the base that a device multiplies by, and of its own shards.

  In the dtype of the weights or of the products, whichever is smaller. Few rows
  of the embedding are read.
  """
  kept = config.model.param_dtype
  if kept == "float32":
    kept = config.model.dtype
  key = jax.eval_shape(lambda: jax.random.key(0))
  base = jax.eval_shape(
    lambda key: compile_training.random_base(shape, key, kept), key
  )
  del base["embed"]
  unsharded = sharding.make_mesh(
    -1, 1, mesh.shape["tensor"], devices=list(mesh.devices.flat)
  )
  read, own = (
    compile_training.bytes_on_device(compile_training.sharded(base, on))
    for on in (unsharded, mesh)
  )
  return read, own
