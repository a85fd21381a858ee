"""Model flops of a training step, for MFU.

Matrix products alone count, a multiplication and an addition as two flops:
projections, adapters, attention between tokens that see each other, and the
unembedding of completion tokens. Padding, rematerialization and masked scores
do not count, so that wasted work cannot raise MFU.

The backward pass of a projection has two products, the gradients of its input
and of its kernel; that of a frozen kernel has the first alone, the first
block's too, though nothing needs it.
"""

import dataclasses
import functools
import math

import jax

from dpo_jax.model import gpt_neox, lora


@dataclasses.dataclass(frozen=True)
class Work:
  """Counts of a batch without padding, as in `batch.Counts`.

  Attributes:
    tokens: in the rows; a shared prompt counts once.
    completion_tokens: tokens that are predicted.
    visible: pairs of a query and a key that it sees.
  """

  tokens: float
  completion_tokens: float
  visible: float


def step(config: gpt_neox.ModelConfig, work: Work, *, reference: bool) -> float:
  """Model flops of one update, forward and backward.

  Args:
    config: the model; with `config.lora` the adapters are trained, otherwise
      all weights.
    work: the batch, over all micro-batches and devices.
    reference: whether the step computes the reference's log-probs.
  """
  lora = config.lora is not None
  total = forward(config, work, adapters=lora) + backward(config, work)
  return total + (forward(config, work, adapters=False) if reference else 0)


def forward(
  config: gpt_neox.ModelConfig, work: Work, *, adapters: bool
) -> float:
  """Model flops of the log-probs of a batch."""
  blocks = _kernels(config) + (_adapters(config) if adapters else 0)
  return (
    2 * blocks * work.tokens
    + 4 * config.layers * config.width * work.visible
    + 2 * config.width * config.vocab_size * work.completion_tokens
  )


def backward(config: gpt_neox.ModelConfig, work: Work) -> float:
  """Model flops of the gradients of the trained weights."""
  products = 1 if config.lora is not None else 2
  unembed = config.width * config.vocab_size
  return (
    2 * products * _kernels(config) * work.tokens
    + 2 * 2 * _adapters(config) * work.tokens
    + 2 * 4 * config.layers * config.width * work.visible
    + 2 * products * unembed * work.completion_tokens
  )


@functools.cache
def _kernels(config: gpt_neox.ModelConfig) -> int:
  """Multiplications per token in the kernels of all blocks."""
  base = jax.eval_shape(lambda: gpt_neox.init(config, jax.random.key(0)))
  parts = base["blocks"].values()
  return sum(math.prod(x["kernel"].shape) for x in parts if "kernel" in x)


@functools.cache
def _adapters(config: gpt_neox.ModelConfig) -> int:
  """Multiplications per token in the adapters of all blocks."""
  return lora.count(
    jax.eval_shape(lambda: gpt_neox.init_lora(config, jax.random.key(0)))
  )
