"""Learning-rate schedules and the optimizer chain, by torch's rules.

`optax.partition` gives the chain to the trainable subtree and `set_to_zero` to
the frozen one; gradients are clipped in the trainable branch, since the frozen
subtree has none.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.core import settings as settings_lib
from dpo_jax.core import sharding


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """See configs/common.py for what each field means."""

  name: Literal["adamw", "rmsprop"]
  learning_rate: float
  schedule: Literal["constant", "cosine"]
  warmup_steps: int
  weight_decay: float
  b1: float
  b2: float
  eps: float
  clip_norm: float

  def __post_init__(self):
    settings_lib.check(self, "optimizer.")
    if self.name == "rmsprop" and self.weight_decay:
      raise ValueError(
        f"optimizer.weight_decay={self.weight_decay} is for adamw; rmsprop"
        " takes none: set it to 0"
      )


def schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
  """Learning rate of the update that makes step i into i + 1.

  Linear from lr / warmup_steps up to lr at update `warmup_steps - 1`, so that
  the first update already moves; then constant, or a half cosine to zero at
  `steps`.
  """
  peak, warmup = settings.learning_rate, settings.warmup_steps
  rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  if settings.schedule == "constant":
    after = optax.constant_schedule(peak)
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
  rate = schedule(settings, steps)
  if settings.name == "adamw":
    rule = optax.adamw(
      rate,
      b1=settings.b1,
      b2=settings.b2,
      eps=settings.eps,
      weight_decay=settings.weight_decay,
      mask=_decayed,
    )
  else:
    # torch.optim.RMSprop adds eps outside the root.
    rule = optax.rmsprop(
      rate, decay=settings.b2, eps=settings.eps, eps_in_sqrt=False
    )
  train = optax.chain(optax.clip_by_global_norm(settings.clip_norm), rule)
  labels = dict.fromkeys(("base", "lora"), "freeze") | {trainable: "train"}
  return optax.partition(
    {"train": train, "freeze": optax.set_to_zero()}, labels
  )


def _decayed(tree: Any) -> Any:
  """Weight-decay mask: not biases and norms, as in Hugging Face's trainer."""

  def one(path, _):
    return not sharding.path_name(path).endswith(("bias", "scale"))

  return jax.tree.map_with_path(one, tree)
