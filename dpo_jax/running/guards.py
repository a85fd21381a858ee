"""Which updates are made: decided on the device, before they are.

An update whose loss or gradient norm is not finite, or whose loss is a spike,
leaves weights, optimizer and the guard's own losses as they were. The host
reads the decision with the step's metrics, one step late, and stops the run or
lets it go on, as its config says: the device never waits.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

# What the step's metrics tell the host of the decision.
_TOLD = "guard/"
# The least distance from the median that counts, as a share of the median:
# losses that are all but equal have no spread to measure a spike by.
_LEAST_SPREAD = 0.01


@dataclasses.dataclass(frozen=True)
class GuardSettings:
  """See configs/common.py for what each field means."""

  not_finite: Literal["stop", "skip"]
  spike: Literal["off", "stop", "skip"]
  spike_factor: float
  spike_window: int
  max_skipped: int

  def __post_init__(self):
    if not 0 < self.spike_factor < math.inf:
      raise ValueError(
        f"guards.spike_factor={self.spike_factor} must be positive and finite"
      )
    if self.spike_window < 2:
      raise ValueError(
        f"guards.spike_window={self.spike_window} must be at least 2"
      )
    if self.max_skipped < 0:
      raise ValueError(
        f"guards.max_skipped={self.max_skipped} must not be negative"
      )


# Stops at what is not finite, and looks at nothing else.
PLAIN = GuardSettings("stop", "off", 10.0, 2, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuardState:
  """What the guard knows of earlier steps; a part of the training state.

  Attributes:
    losses: of the last updates that were made, in a ring, float32 [window].
    made: updates that were made, int32 [].
    skipped: updates that were not, int32 [].
  """

  losses: jax.Array
  made: jax.Array
  skipped: jax.Array


def init(settings: GuardSettings) -> GuardState:
  """The state of step 0.

  The losses are kept whatever the policy, which may change on the way.
  """
  zero = jnp.zeros((), jnp.int32)
  losses = jnp.zeros(settings.spike_window, jnp.float32)
  return GuardState(losses, zero, zero)


def decide(
  settings: GuardSettings,
  state: GuardState,
  loss: jax.Array,
  grad_norm: jax.Array,
) -> tuple[jax.Array, GuardState, dict[str, jax.Array]]:
  """Whether to make an update of this loss and gradient norm.

  A spike is a loss above m + spike_factor * max(d, 0.01 |m|), where m is the
  median of the losses of the last `spike_window` updates that were made, and d
  the median of their distances from m. Until there were as many, none is.

  Args:
    settings: the policies.
    state: before this step.
    loss: float32 [].
    grad_norm: float32 [].

  Returns:
    The decision, bool []; the state after it; and metrics for `told`.
  """
  limit = jnp.float32(jnp.inf)
  if settings.spike != "off":
    middle = jnp.median(state.losses)
    spread = jnp.median(jnp.abs(state.losses - middle))
    spread = jnp.maximum(spread, _LEAST_SPREAD * jnp.abs(middle))
    full = state.made >= settings.spike_window
    limit = jnp.where(full, middle + settings.spike_factor * spread, limit)
  make = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= limit)
  place = state.made % len(state.losses)
  losses = jnp.where(make, state.losses.at[place].set(loss), state.losses)
  after = GuardState(
    losses,
    state.made + make.astype(jnp.int32),
    state.skipped + (~make).astype(jnp.int32),
  )
  told = {"made": make, "skipped": after.skipped, "limit": limit}
  return make, after, {_TOLD + key: value for key, value in told.items()}


def told(metrics: dict[str, Any]) -> dict[str, Any]:
  """Takes the decision out of a step's metrics.

  Returns:
    "made", whether the update was; "skipped", how many so far were not; and
    "limit", the loss above which one is a spike.
  """
  return {
    key.removeprefix(_TOLD): metrics.pop(key)
    for key in list(metrics)
    if key.startswith(_TOLD)
  }
