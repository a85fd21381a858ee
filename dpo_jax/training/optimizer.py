"""Learning-rate schedules and the optimizer chain.

`optax.partition` gives the chain to the trainable subtree and `set_to_zero` to
the frozen one; gradients are clipped in the trainable branch, since the frozen
subtree has none.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from dpo_jax.core import settings as settings_lib
from dpo_jax.core import sharding


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """See configs/common.py for what each field means."""

  name: Literal["adamw", "rmsprop", "lion", "adafactor", "muon"]
  learning_rate: float
  schedule: Literal["constant", "linear", "cosine"]
  warmup_steps: int
  warmup_ratio: float
  weight_decay: float
  b1: float
  b2: float
  eps: float
  clip_norm: float

  def __post_init__(self):
    settings_lib.check(self, "optimizer.")
    if self.name in ("rmsprop", "adafactor") and self.weight_decay:
      raise ValueError(
        f"optimizer.weight_decay={self.weight_decay} with {self.name}, which"
        " takes none: set it to 0"
      )
    if self.warmup_steps and self.warmup_ratio:
      raise ValueError(
        f"optimizer.warmup_steps={self.warmup_steps} and"
        f" warmup_ratio={self.warmup_ratio}: set one of them to 0"
      )


def schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
  """Learning rate of the update that makes step i into i + 1.

  Linear from lr / W up to lr at update W - 1, the last of W updates of warm-up,
  so that the first update already moves; then constant, or a line or a half
  cosine to zero at `steps`.
  """
  peak = settings.learning_rate
  warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * steps)
  rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  if settings.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif settings.schedule == "linear":
    after = optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))
  else:
    after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
  return optax.join_schedules([rise, after], [warmup]) if warmup else after


def rates(settings: OptimizerSettings, steps: int) -> np.ndarray:
  """Learning rate of every update of the run, float32 [steps]."""
  return np.asarray(jax.vmap(schedule(settings, steps))(jnp.arange(steps)))


def make(
  settings: OptimizerSettings, steps: int, trainable: str
) -> optax.GradientTransformation:
  """The transformation of {"base": ..., "lora": ...} trees.

  Args:
    settings: of the optimizer.
    steps: updates of the whole run, for the schedule.
    trainable: "base" or "lora"; the other is frozen.
  """
  rule = _rule(settings, schedule(settings, steps))
  train = optax.chain(optax.clip_by_global_norm(settings.clip_norm), rule)
  labels = dict.fromkeys(("base", "lora"), "freeze") | {trainable: "train"}
  return optax.partition(
    {"train": train, "freeze": optax.set_to_zero()}, labels
  )


def _rule(
  settings: OptimizerSettings, rate: optax.Schedule
) -> optax.GradientTransformation:
  """The optimizer of clipped gradients; all but lion are torch's too."""
  if settings.name == "rmsprop":
    # torch.optim.RMSprop adds eps outside the root.
    return optax.rmsprop(
      rate, decay=settings.b2, eps=settings.eps, eps_in_sqrt=False
    )
  if settings.name == "adafactor":
    # In a stack of layers moments are each kernel's own; the scale and the clip
    # of an update are the stack's.
    return optax.adafactor(rate)
  decay = settings.weight_decay
  if settings.name == "lion":
    return optax.lion(
      rate, b1=settings.b1, b2=settings.b2, weight_decay=decay, mask=_decayed
    )
  adamw = optax.adamw(
    rate,
    b1=settings.b1,
    b2=settings.b2,
    eps=settings.eps,
    weight_decay=decay,
    mask=_decayed,
  )
  if settings.name == "adamw":
    return adamw
  # Updates as large as AdamW's: Liu et al., Muon is Scalable for LLM Training,
  # 2025 (arXiv 2502.16982), Section 2.2.
  muon = contrib.muon(
    rate,
    beta=settings.b1,
    weight_decay=decay,
    muon_weight_dimension_numbers=_matrices,
    consistent_rms=0.2,
  )

  def labels(tree):
    def one(path, _):
      return "adamw" if _matrix(sharding.path_name(path)) is None else "muon"

    return jax.tree.map_with_path(one, tree)

  return optax.partition({"muon": muon, "adamw": adamw}, labels)


def _matrices(tree: Any) -> Any:
  """Muon's dimension numbers: each layer's kernel or adapter is a matrix."""
  return jax.tree.map_with_path(
    lambda path, _: _matrix(sharding.path_name(path)), tree
  )


# Input and output axes of stacked weights, whose axis 0 is the layer. The rest,
# embeddings too, has AdamW, as is usual with Muon.
_MATRICES = {
  "query_key_value/kernel": ((1,), (2, 3, 4)),
  "dense/kernel": ((1, 2), (3,)),
  "dense_h_to_4h/kernel": ((1,), (2,)),
  "dense_4h_to_h/kernel": ((1,), (2,)),
  "lora_a": ((1,), (2,)),
  "lora_b": ((1,), (2,)),
}


def _matrix(name: str) -> contrib.MuonDimensionNumbers | None:
  for end, axes in _MATRICES.items():
    if f"/{name}".endswith(f"/{end}"):
      return contrib.MuonDimensionNumbers(*axes)
  return None


def _decayed(tree: Any) -> Any:
  """Weight-decay mask: not biases and norms, as in Hugging Face's trainer."""

  def one(path, _):
    return not sharding.path_name(path).endswith(("bias", "scale"))

  return jax.tree.map_with_path(one, tree)
