"""What judging costs: prices, an estimate beforehand, and a cap that holds.

A call is paid for after it was made, so the cap can only hold if every call
reserves the most that it could cost before it leaves. That bound is safe, not
close: a token is at least one byte, so a page of n bytes has at most n tokens.
When the call has ended its reservation becomes what the server counted.
"""

import asyncio
import dataclasses
from collections.abc import Iterable, Mapping

from dpo_jax import judging
from dpo_jax.io import records
from dpo_jax.winrates import intervals

# What a chat format may put around a message; its words are not ours.
_FORMAT_TOKENS = 64
# English text, byte-pair encoded. For the estimate alone: no cap rests on it.
_BYTES_PER_TOKEN = 4.0


class Spent(judging.Stop):
  """The budget does not allow for another call."""


@dataclasses.dataclass(frozen=True)
class Price:
  """US dollars for a million tokens."""

  prompt: float
  completion: float

  def of(self, prompt_tokens: int, completion_tokens: int) -> float:
    return (
      prompt_tokens * self.prompt + completion_tokens * self.completion
    ) / 1e6


def read_prices(lines: Iterable[str]) -> dict[str, Price]:
  """Prices by model from lines "MODEL PROMPT COMPLETION".

  Raises:
    ValueError: a line is not of that form, or names a model again.
  """
  prices: dict[str, Price] = {}
  for line in lines:
    try:
      name, *numbers = line.split()
      price = Price(*map(float, numbers))
      if not (0 <= price.prompt < 1e9 and 0 <= price.completion < 1e9):
        raise ValueError
    except (TypeError, ValueError):
      raise ValueError(
        f"prices: {line!r} must be MODEL and two prices in dollars for a"
        ' million tokens, prompt and completion, such as "my-model 0.15 0.6"'
      ) from None
    if name in prices:
      raise ValueError(f"prices: {name!r} stands more than once")
    prices[name] = price
  return prices


def spent(
  rows: Iterable[records.Verdict], prices: Mapping[str, Price], factor: float
) -> float | None:
  """Dollars that the rows' tokens cost; None if a judge's price is unknown."""
  total = 0.0
  for row in rows:
    if row.prompt_tokens or row.completion_tokens:
      if row.judge not in prices:
        return None
      price = prices[row.judge]
      total += factor * price.of(row.prompt_tokens, row.completion_tokens)
  return total


@dataclasses.dataclass
class Budget:
  """Counts calls and dollars of one run, and keeps to a cap.

  Attributes:
    price: of the judging model; None if unknown, and then there is no cap.
    cap: dollars that may be spent in all, 0 for no cap.
    before: dollars spent by earlier runs.
    cost: dollars spent by this run, calls of unknown usage at their bound.
    reserved: dollars that calls in flight may still cost.
    closed: whether a call was refused for want of budget.
  """

  price: Price | None
  cap: float
  before: float = 0.0
  calls: int = 0
  cost: float = 0.0
  reserved: float = 0.0
  closed: bool = False

  def __post_init__(self):
    self._held = 0
    self._settled = asyncio.Event()

  @property
  def total(self) -> float:
    return self.before + self.cost

  def bound(self, prompt_bytes: int, max_tokens: int) -> float:
    """The most that a call can cost, dollars."""
    if self.price is None:
      return 0.0
    return self.price.of(prompt_bytes + _FORMAT_TOKENS, max_tokens)

  def take(self, bound: float) -> bool:
    """Reserves the bound at once, if it fits."""
    if self.closed:
      return False
    if self.cap and self.total + self.reserved + bound > self.cap:
      return False
    self.hold(bound)
    return True

  def hold(self, bound: float) -> None:
    """Reserves the bound for a call that was made by an earlier run."""
    self.reserved += bound
    self._held += 1

  async def reserve(self, bound: float) -> None:
    """Reserves the bound, waiting for calls in flight to cost less than theirs.

    Raises:
      Spent: the bound would not fit if nothing were in flight. No later call
        is let through either.
    """
    while not self.take(bound):
      if self.closed or not self._held:
        self.close()
        raise Spent(self.reason)
      self._settled.clear()
      await self._settled.wait()

  def close(self) -> None:
    """Lets no further call through."""
    self.closed = True
    self._settled.set()

  def settle(
    self, bound: float, prompt_tokens: int, completion_tokens: int
  ) -> None:
    """Turns a reservation into the cost of the tokens that were counted."""
    self.give_back(bound)
    self.calls += 1
    if self.price is not None:
      self.cost += self.price.of(prompt_tokens, completion_tokens)

  def settle_unknown(self, bound: float) -> None:
    """Ends a call that may have been billed though no tokens were told."""
    self.give_back(bound)
    self.calls += 1
    self.cost += bound

  def settle_error(self, bound: float) -> None:
    """Ends a call that the server refused, for which nobody pays."""
    self.give_back(bound)
    self.calls += 1

  def give_back(self, bound: float) -> None:
    """Ends a reservation; on its own, that of a call that was not made."""
    self._held -= 1
    self.reserved = self.reserved - bound if self._held else 0.0
    self._settled.set()

  @property
  def reason(self) -> str:
    return (
      f"budget_usd={self.cap:g} is reached: {self.total:.4f} dollars are spent"
      " and the next call might pass it; give a higher budget_usd to go on"
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a run will take if all goes well, and what it can show.

  Dollars are None without a price. `prompts` have a response to be judged.
  """

  calls: int
  prompt_tokens: int
  completion_tokens: int
  minutes: float
  dollars: float | None
  before: float
  cap: float
  prompts: int

  def __str__(self) -> str:
    difference = intervals.detectable_difference(self.prompts)
    if difference is None:
      return self._cost()
    return (
      f"{self._cost()}\nwith {self.prompts:,} prompts, differences of"
      f" {100 * difference:.1f} points between two models are told apart (95%"
      " interval, 80% power; smaller ones where their scores agree)"
    )

  def _cost(self) -> str:
    text = (
      f"about to ask {self.calls:,} questions: some {self.prompt_tokens:,} +"
      f" {self.completion_tokens:,} tokens, {self.minutes:.1f} minutes"
    )
    if self.dollars is None:
      return f"{text}; the price is unknown"
    text += f", {self.dollars:.4f} dollars"
    if self.before:
      text += f" after {self.before:.4f} of earlier runs"
    if self.cap:
      text += f", of a budget of {self.cap:g}"
      if self.before + self.dollars > self.cap:
        text += ", which will not do for all of them"
    return text


def estimate(
  budget: Budget,
  page_bytes: list[int],
  *,
  prompts: int,
  reply_tokens: int,
  reply_s: float,
  concurrency: int,
  requests_per_minute: float,
  tokens_per_minute: float,
) -> Estimate:
  """The estimate for pages of these sizes, from replies of the stated kind."""
  calls = len(page_bytes)
  prompt_tokens = round(sum(page_bytes) / _BYTES_PER_TOKEN)
  completion_tokens = calls * reply_tokens
  minutes = [calls * reply_s / max(1, min(concurrency, calls)) / 60]
  if requests_per_minute:
    minutes.append(calls / requests_per_minute)
  if tokens_per_minute:
    minutes.append((prompt_tokens + completion_tokens) / tokens_per_minute)
  dollars = None
  if budget.price is not None:
    dollars = budget.price.of(prompt_tokens, completion_tokens)
  return Estimate(
    calls=calls,
    prompt_tokens=prompt_tokens,
    completion_tokens=completion_tokens,
    minutes=max(minutes),
    dollars=dollars,
    before=budget.before,
    cap=budget.cap,
    prompts=prompts,
  )
