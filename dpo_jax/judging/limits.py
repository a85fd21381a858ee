"""How many requests may be in flight, and when the next one may leave.

Three things hold a request back. The window, at first small, doubles with
every round of answers until the server first complains, is halved by each
complaint and grows by one a round after it (additive increase, multiplicative
decrease, as TCP does). The server's own words: a wait that it asked for holds
for everybody, and its x-ratelimit headers say how many more requests and
tokens it will take before they are reset. And the user's caps on requests and
tokens a minute, kept by spacing requests evenly, so that no minute holds more.
"""

import asyncio
import dataclasses
import math
import re
import time
from collections.abc import Mapping

from dpo_jax import judging

_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|h|m|s)")
_UNITS_S = {
  "h": 3600.0,
  "m": 60.0,
  "s": 1.0,
  "ms": 1e-3,
  "us": 1e-6,
  "µs": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class Ticket:
  """A request in flight: its number, and about how many tokens it takes."""

  number: int
  tokens: int
  pace_s: float
  round: int


@dataclasses.dataclass
class _Allowance:
  """How much more the server takes before `reset_at`, as far as it has said.

  Answers overtake each other. An answer to a request that left after the last
  word was heard is a later word; of others the least one holds. Whether the
  server had counted the requests that are in flight is not known: they are
  taken off `left` until their own answers say, and for good if these say
  nothing.

  Attributes:
    left: what the server said.
    reset_at: when that ends.
    since: requests that had left when it was heard.
  """

  left: float = math.inf
  reset_at: float = 0.0
  since: int = 0


class Limiter:
  """Lets requests leave, in order; one object for all requests to a server.

  Attributes:
    window: requests that may be in flight now, from 1 to `most`.
    in_flight: requests that are.
    open_at: the time (of `time.monotonic`) before which none may leave.
  """

  def __init__(
    self,
    most: int,
    *,
    requests_per_minute: float,
    tokens_per_minute: float,
    max_wait_s: float,
  ):
    """Caps of 0 are none; `max_wait_s` bounds a wait that the server asks."""
    self.most = most
    self.window = float(min(most, 4))
    self.in_flight = 0
    self.open_at = 0.0
    self._max_wait_s = max_wait_s
    self._slow_start = True
    self._rounds = 0
    self._request_s = 60 / requests_per_minute if requests_per_minute else 0.0
    self._token_s = 60 / tokens_per_minute if tokens_per_minute else 0.0
    self._next_at = 0.0
    self._sent = 0
    self._flying_tokens = 0
    # Requests in flight whose answers said how much is left.
    self._told: set[int] = set()
    self._allowed = {"requests": _Allowance(), "tokens": _Allowance()}
    self._gate = asyncio.Lock()
    self._freed = asyncio.Event()

  async def acquire(self, tokens: int) -> Ticket:
    """Returns when a request of about that many tokens may leave.

    Raises:
      judging.Stop: the server asks everybody to wait beyond `max_wait_s`.
    """
    async with self._gate:
      while True:
        if self.in_flight >= int(self.window):
          self._freed.clear()
          await self._freed.wait()
          continue
        if self.in_flight and self._full(tokens):
          # The next answer says whether there is room. After a reset one
          # request leaves alone, to find out how much.
          self._freed.clear()
          await self._freed.wait()
          continue
        wait_s = self._wait_s(tokens)
        if wait_s <= 0:
          break
        await asyncio.sleep(wait_s)
      self.in_flight += 1
      pace_s = self._pace_s(tokens)
      self._next_at = max(time.monotonic(), self._next_at) + pace_s
      self._flying_tokens += tokens
      self._sent += 1
      return Ticket(self._sent, tokens, pace_s, self._rounds)

  def release(self, ticket: Ticket, *, complaint: bool, tokens: int) -> None:
    """Ends a request.

    Args:
      ticket: what `acquire` gave.
      complaint: whether the server was too busy to answer it.
      tokens: as the server counted them, by which the pace is mended; 0 if it
        did not.
    """
    if tokens:
      self._next_at += self._pace_s(tokens) - ticket.pace_s
    if not complaint:
      grown = 1.0 if self._slow_start else 1.0 / self.window
      self.window = min(float(self.most), self.window + grown)
    elif ticket.round == self._rounds:
      # Requests that left before this halving will say nothing new.
      self._rounds += 1
      self.window = max(1.0, self.window / 2)
      self._slow_start = False
    self.in_flight -= 1
    self._flying_tokens -= ticket.tokens
    if ticket.number not in self._told:
      self._allowed["requests"].left -= 1
      self._allowed["tokens"].left -= ticket.tokens
    self._told.discard(ticket.number)
    self._freed.set()

  def pause(self, wait_s: float) -> None:
    """Nothing leaves for that long."""
    self.open_at = max(self.open_at, time.monotonic() + wait_s)

  def heard(self, ticket: Ticket, headers: Mapping[str, str]) -> None:
    """Takes in the x-ratelimit headers of the answer to `ticket`."""
    now = time.monotonic()
    for kind, old in self._allowed.items():
      left = headers.get(f"x-ratelimit-remaining-{kind}", "")
      reset_s = seconds(headers.get(f"x-ratelimit-reset-{kind}", ""))
      later = ticket.number > old.since or old.reset_at <= now
      if left.isdecimal() and reset_s is not None:
        self._told.add(ticket.number)
        if later or int(left) < old.left:
          word = _Allowance(int(left), now + reset_s, self._sent)
          self._allowed[kind] = word
      elif later:
        self._allowed[kind] = _Allowance()

  def _pace_s(self, tokens: int) -> float:
    return max(self._request_s, self._token_s * tokens)

  def _wait_s(self, tokens: int) -> float:
    now = time.monotonic()
    full = self._full(tokens)
    until = max(
      [self.open_at, *(self._allowed[kind].reset_at for kind in full)]
    )
    if until - now > self._max_wait_s:
      raise judging.Stop(
        f"the server asks everybody to wait for {until - now:.0f} s, more than"
        f" max_wait_s={self._max_wait_s:g}: run the same command again later"
      )
    return max(until, self._next_at) - now

  def _full(self, tokens: int) -> list[str]:
    """Of what the server takes no more, as far as its answers say."""
    wanted = {
      "requests": 1 + self.in_flight,
      "tokens": tokens + self._flying_tokens,
    }
    return [k for k, more in wanted.items() if more > self._allowed[k].left]


def seconds(text: str) -> float | None:
  """A span such as 6m0s, 120ms, 1.5s or 7 (seconds); None for anything else."""
  text = text.strip()
  try:
    plain = float(text)
  except ValueError:
    parts = _SPAN.findall(text)
    if not parts or "".join(n + u for n, u in parts) != text:
      return None
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
  return plain if 0 <= plain < float("inf") else None
