"""Lower bound of a training step's time, by arithmetic. No prediction.

  seconds = max(flops / peak,
                microbatches * read / memory bandwidth,
                microbatches * gathered / link bandwidth)

All of one device. `flops` are those of every token position of the rows,
padding included and recomputation not; `read` is the weights, once for each
micro-batch; `gathered` is the part of them that other devices hold, which is
sent once for each micro-batch. Computing, reading and sending overlap at best:
hence the maximum. Real steps take longer, but a split into micro-batches or
devices that wastes most of the peak is seen.
"""

import dataclasses

import jax

from dpo_jax.core import hardware, sharding
from dpo_jax.model import flops, gpt_neox
from dpo_jax.plan import compile_training, mean_batch
from dpo_jax.training import config as config_lib


@dataclasses.dataclass(frozen=True)
class Bound:
  """What a step does at least, on one device.

  Attributes:
    microbatches: of a step.
    fill: share of the token positions that hold a token.
    flops: of all token positions.
    useful: flops of those that hold a token.
    read: bytes of the weights, a micro-batch.
    gathered: those of them that other devices hold.
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
    """Computing, reading and gathering; the bound is the longest."""
    return (
      self.flops / self.peak(chip),
      self.microbatches * self.read / chip.hbm_bandwidth,
      self.microbatches * self.gathered / chip.link_bandwidth,
    )

  def utilization(self, chip: hardware.Chip) -> float:
    """Share of the peak that is useful at best."""
    return self.useful / self.peak(chip) / max(self.seconds(chip))


def of_step(
  config: config_lib.TrainSettings,
  shape: gpt_neox.ModelConfig,
  mesh: jax.sharding.Mesh,
  rows: int,
) -> Bound:
  """The bound of a training step with `rows` rows a device and micro-batch."""
  batch = mean_batch.batch_of(config, mesh, rows, config.microbatches)
  mean = mean_batch.lengths(config)
  items = config.batch_size
  real = flops.Work(
    items * mean.tokens, items * mean.completion, items * mean.visible
  )
  scores = real.visible
  if config.model.attention == "dense":
    scores = batch.tokens.size * batch.tokens.shape[-1]
  laid_out = flops.Work(batch.tokens.size, batch.target.size, scores)
  reference = config.objective == "dpo" and not config.precompute_reference
  read, own = _weights(config, shape, mesh)
  trees = 2 if config.keeps_reference else 1
  return Bound(
    microbatches=config.microbatches,
    fill=real.tokens / laid_out.tokens,
    flops=flops.step(shape, laid_out, reference=reference) / mesh.size,
    useful=flops.step(shape, real, reference=reference) / mesh.size,
    read=trees * read,
    gathered=trees * (read - own),
    dtype=config.model.dtype,
  )


def _weights(config, shape, mesh) -> tuple[int, int]:
  """Bytes of the base that a device multiplies by, and that it holds itself.

  Weights are read as they are kept or as they are multiplied, whichever is
  less. Few rows of the embedding are read.
  """
  kept = config.model.param_dtype
  if kept == "float32":
    kept = config.model.dtype
  key = jax.eval_shape(lambda: jax.random.key(0))
  base = jax.eval_shape(
    lambda key: compile_training.random_base(shape, key, kept), key
  )
  del base["embed"]
  whole = sharding.make_mesh(
    -1, 1, mesh.shape["tensor"], devices=list(mesh.devices.flat)
  )
  read, own = (
    compile_training.bytes_on_device(compile_training.laid(base, on))
    for on in (whole, mesh)
  )
  return read, own
