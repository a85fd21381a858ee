"""Prices of tokens, and a spending cap that holds with calls in flight.

A call reserves an upper bound of its cost before it is sent: a token is at
least a byte, so a page of n bytes has at most n tokens.
"""

import dataclasses
from collections.abc import Iterable, Mapping

# Allowance for the tokens that a chat format adds around a message.
_FORMAT_TOKENS = 64


class Exhausted(Exception):
  """The bound of a call does not fit into what is left of the budget."""


@dataclasses.dataclass(frozen=True)
class Price:
  """US dollars per million tokens."""

  prompt: float
  completion: float

  def of(self, prompt_tokens: int, completion_tokens: int) -> float:
    return (
      prompt_tokens * self.prompt + completion_tokens * self.completion
    ) / 1e6


def read_prices(lines: Iterable[str], factor: float = 1.0) -> dict[str, Price]:
  """Prices by model from lines "MODEL PROMPT COMPLETION", else ValueError."""
  prices: dict[str, Price] = {}
  for line in lines:
    try:
      name, prompt, completion = line.split()
      price = Price(factor * float(prompt), factor * float(completion))
      if not (0 <= price.prompt < 1e9 and 0 <= price.completion < 1e9):
        raise ValueError
    except ValueError:
      raise ValueError(
        f"prices: {line!r} must be MODEL and two prices in dollars per million"
        ' tokens, prompt and completion, such as "my-model 0.15 0.6"'
      ) from None
    if name in prices:
      raise ValueError(f"prices: {name!r} has more than one entry")
    prices[name] = price
  return prices


@dataclasses.dataclass
class Budget:
  """Dollars spent in all runs, reserved by calls in flight, and their cap.

  `cap` 0 is no cap; `calls` counts this run's.
  """

  price: Price | None
  cap: float
  cost: float = 0.0
  calls: int = 0
  reserved: float = 0.0

  def bound(self, page: str, max_tokens: int) -> float:
    """Upper bound on the cost of a call, dollars."""
    most = (len(page.encode()) + _FORMAT_TOKENS, max_tokens)
    return self.price.of(*most) if self.price else 0.0

  def cost_of(self, usage: Mapping[str, int], bound: float) -> float:
    """Dollars for the server's token counts; `bound` without counts."""
    known = self.price and any(usage.values())
    return self.price.of(**usage) if known else bound

  def reserve(self, bound: float) -> None:
    """Reserves the bound of a call; raises `Exhausted` if it does not fit."""
    if self.cap and self.cost + self.reserved + bound > self.cap:
      raise Exhausted
    self.reserved += bound

  def settle(self, bound: float, cost: float, calls: int = 1) -> None:
    """Replaces a reservation by the cost of its `calls`, 1 or 0."""
    self.reserved -= bound
    self.calls += calls
    self.cost += cost
