"""Useful flops of a step: what the maths needs, whatever computes it.

A multiplication and an addition count as two. Only matrix products count:
projections, adapters, attention between tokens that see each other, and the
unembedding where a token is predicted. Padding, recomputation (remat) and
masked-out scores are work that a program may do but nobody asked for; they do
not count, so a share of the peak made with these numbers cannot be raised by
wasting more.

A projection's backward pass has two products, the gradient of its input and
that of its kernel. A frozen kernel has only the first, so a step with LoRA
takes two thirds of a full one. (In the first block even that one is not needed;
it is counted, since blocks are alike.)
"""

import dataclasses

from dpo_jax.model import gpt_neox


@dataclasses.dataclass(frozen=True)
class Work:
  """What a batch holds, padding left out; `batch.Counts` has all three.

  Attributes:
    tokens: tokens in the rows, a shared prompt counted once.
    completion_tokens: tokens that are predicted.
    visible: pairs of a query and a key that it sees; see `packing.visible`.
  """

  tokens: float
  completion_tokens: float
  visible: float


def step(config: gpt_neox.ModelConfig, work: Work, *, reference: bool) -> float:
  """Useful flops of one update, forward and backward.

  Args:
    config: the model; with `config.lora` the adapters are trained, without it
      all weights.
    work: the batch, over all micro-batches and devices.
    reference: whether the step runs a reference too, as DPO does unless its
      log-probs are kept.
  """
  lora = config.lora is not None
  total = forward(config, work, adapters=lora) + backward(config, work)
  return total + (forward(config, work, adapters=False) if reference else 0)


def forward(
  config: gpt_neox.ModelConfig, work: Work, *, adapters: bool
) -> float:
  """Useful flops of log-probs of a batch; also those of an evaluation."""
  blocks = _kernels(config) + (_adapters(config) if adapters else 0)
  return (
    2 * blocks * work.tokens
    + 4 * config.layers * config.width * work.visible
    + 2 * config.width * config.vocab_size * work.completion_tokens
  )


def backward(config: gpt_neox.ModelConfig, work: Work) -> float:
  """Useful flops of the gradients of what is trained."""
  # The gradients of a kernel's input, and of the kernel if it is trained.
  share = 1 if config.lora is not None else 2
  unembed = config.width * config.vocab_size
  return (
    2 * share * _kernels(config) * work.tokens
    + 2 * 2 * _adapters(config) * work.tokens
    + 2 * 4 * config.layers * config.width * work.visible
    + 2 * share * unembed * work.completion_tokens
  )


def _kernels(config: gpt_neox.ModelConfig) -> int:
  """Multiplications of a token in the kernels of all blocks."""
  one = 4 * config.width**2 + 2 * config.width * config.mlp_width
  return config.layers * one


def _adapters(config: gpt_neox.ModelConfig) -> int:
  """Multiplications of a token in the adapters of all blocks."""
  if config.lora is None:
    return 0
  width, mlp = config.width, config.mlp_width
  sizes = {
    "query_key_value": width + 3 * width,
    "dense": width + width,
    "dense_h_to_4h": width + mlp,
    "dense_4h_to_h": mlp + width,
  }
  one = sum(sizes[name] for name in config.lora.targets)
  return config.layers * config.lora.rank * one
