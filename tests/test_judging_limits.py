import asyncio
import collections
import dataclasses
import time

import judge_server
import pytest
from test_judging_client import ask, settings

from dpo_jax import judging
from dpo_jax.judging import client


def limits(most=8, **changes) -> client.Limits:
  return client.Limits(settings("http://127.0.0.1:9/v1", **changes), most)


async def end(used, again=None):
  """One request: answered, or failed with these hopes of a retry."""
  try:
    async with used.slot(1):
      if again is not None:
        raise client.Failure("no", again=again)
  except client.Failure:
    pass


def test_the_window_is_halved_by_a_round_of_complaints_and_grows_slowly():
  async def go():
    used = limits(16)
    # Two that are in flight together say the same.
    with pytest.raises(client.Failure):
      async with used.slot(1), used.slot(1):
        raise client.Failure("busy", again=True)
    assert used.window == 8.0
    for expected in (4.0, 2.0, 1.0, 1.0):
      await end(used, again=True)
      assert used.window == expected
    await end(used, again=False)  # what is refused for good is no complaint
    assert used.window == 1.0
    for expected in (2.0, 2.5, 2.9):
      await end(used)
      assert used.window == pytest.approx(expected)
    for _ in range(500):
      await end(used)
    assert (used.window, used.in_flight) == (16.0, 0)

  asyncio.run(go())


def test_no_more_than_the_window_and_in_order():
  async def go():
    used = limits(3)
    left, most = [], 0

    async def one(number):
      nonlocal most
      async with used.slot(1):
        left.append(number)
        most = max(most, used.in_flight)
        await asyncio.sleep(0.001)

    waiting = [asyncio.ensure_future(one(number)) for number in range(20)]
    await asyncio.sleep(0)
    waiting[7].cancel()  # whoever gives up takes no place
    await asyncio.gather(*waiting, return_exceptions=True)
    assert left == [n for n in range(20) if n != 7]
    assert (most, used.in_flight) == (3, 0)

  asyncio.run(go())


@pytest.mark.parametrize(
  ("caps", "tokens"),
  [
    ({"requests_per_minute": 6000.0}, 1),
    ({"tokens_per_minute": 600_000.0}, 100),
  ],
)
def test_the_caps_space_requests_evenly(caps, tokens):
  """A hundred requests a second, by either cap: ten of them take 90 ms."""

  async def go():
    used, begin = limits(**caps), time.monotonic()
    for _ in range(10):
      async with used.slot(tokens):
        pass
    return time.monotonic() - begin

  assert asyncio.run(go()) >= 0.09


def test_a_server_that_is_overrun_gets_fewer_at_a_time():
  """It complains whenever more than three are with it."""
  in_flight = []

  def rule(request, number):
    in_flight.append(fake.in_flight)
    if fake.in_flight > 3:
      return judge_server.fails(429, "busy")
    answer = judge_server.prefer_longer(request, number)
    return dataclasses.replace(answer, hold_s=0.005)

  questions = [judging.Question("p", f" {n}", " no") for n in range(100)]
  with judge_server.Server(rule) as fake:
    used = settings(fake.url, max_retries=50, max_wait_s=60.0)
    replies = ask(used, questions)
  assert {reply.choice for reply in replies} <= {"first", "second"}
  late = collections.Counter(n > 3 for n in in_flight[len(in_flight) // 2 :])
  # Of the second half of the requests few are turned away: at three in
  # flight one more is tried a round, and is answered by a halving.
  assert late[True] < 0.35 * late.total()
