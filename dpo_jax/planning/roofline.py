"""Times that a compiled program cannot beat, from what it does. No measurement.

Every instruction runs at the peak rate of what bounds it, products or memory,
and the host is never waited for. What is sent goes over all links of a device
at their peak rate. `best` and `worst` say how much of it is hidden behind the
computation: what the compiler began early, or nothing.
"""

import dataclasses

from dpo_jax import hardware
from dpo_jax.planning import hlo

# Share of the peaks that a plan counts on, where it names one time. A guess to
# rent by: tuned programs of this kind reach 0.4 to 0.6 on TPUs and GPUs.
EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class Estimate:
  """One run of a program, in seconds.

  Attributes:
    compute: each instruction at the peak rate of what bounds it.
    links: all sent bytes at the peak rate of a device's links.
    hidden: the part of `links` that the compiler began before other work.
  """

  compute: float
  links: float
  hidden: float

  @property
  def best(self) -> float:
    """What was begun early costs nothing unless it takes longer."""
    return max(self.compute, self.hidden) + self.links - self.hidden

  @property
  def worst(self) -> float:
    """The links wait for the computation, and it for them."""
    return self.compute + self.links

  @property
  def planned(self) -> float:
    """The worst at `EFFICIENCY` of the peaks."""
    return self.worst / EFFICIENCY


def estimate(cost: hlo.Cost, chip: hardware.Chip) -> Estimate:
  return Estimate(
    compute=cost.seconds(
      chip.bf16_flops, chip.float32_flops, chip.hbm_bandwidth
    ),
    links=cost.sent / chip.link_bandwidth,
    hidden=cost.sent_meanwhile / chip.link_bandwidth,
  )
