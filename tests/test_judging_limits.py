import asyncio
import collections
import dataclasses
import selectors
import time
import types

import judge_server
import pytest
from test_judging_client import ask, settings

from dpo_jax import judging
from dpo_jax.judging import limits


def limiter(most=8, rpm=0.0, tpm=0.0, max_wait_s=5.0) -> limits.Limiter:
  return limits.Limiter(
    most,
    requests_per_minute=rpm,
    tokens_per_minute=tpm,
    max_wait_s=max_wait_s,
  )


@pytest.fixture
def timed(monkeypatch):
  """Runs a coroutine by a clock that only waiting moves, exactly."""
  selector = selectors.DefaultSelector()
  now = [1.0]

  def select(timeout=None):
    now[0] += timeout or 0.0
    return found(0)

  def loop():
    made = asyncio.SelectorEventLoop(selector)
    made.time = lambda: now[0]
    return made

  found, selector.select = selector.select, select
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(limits, "time", clock)
  with asyncio.Runner(loop_factory=loop) as runner:
    yield lambda make: runner.run(make(clock.monotonic))


def test_the_window_opens_shuts_and_stays_within_its_bounds():
  async def go():
    used = limiter(16)
    seen = [used.window]
    for _ in range(12):
      used.release(await used.acquire(1), complaint=False, tokens=0)
      seen.append(used.window)
    assert seen == [4.0 + n for n in range(13)]
    # Two that left together complain: one halving. Later ones, one each.
    pair = [await used.acquire(1), await used.acquire(1)]
    used.release(pair[0], complaint=True, tokens=0)
    used.release(pair[1], complaint=True, tokens=0)
    assert used.window == 8.0
    for expected in (4.0, 2.0, 1.0, 1.0):
      used.release(await used.acquire(1), complaint=True, tokens=0)
      assert used.window == expected
    # From now on one more for each round of answers.
    for expected in (2.0, 2.5, 2.9):
      used.release(await used.acquire(1), complaint=False, tokens=0)
      assert used.window == pytest.approx(expected)
    for _ in range(500):
      used.release(await used.acquire(1), complaint=False, tokens=0)
    assert used.window == 16.0
    assert used.in_flight == 0

  asyncio.run(go())


def test_no_more_than_the_window_and_in_order():
  async def go():
    used = limiter(3)
    left, most = [], 0

    async def one(number):
      nonlocal most
      ticket = await used.acquire(1)
      left.append(number)
      most = max(most, used.in_flight)
      await asyncio.sleep(0.001)
      used.release(ticket, complaint=False, tokens=0)

    await asyncio.gather(*map(one, range(20)))
    assert left == list(range(20))
    assert most == 3

  asyncio.run(go())


def test_whoever_gives_up_waiting_takes_no_place():
  async def go():
    used = limiter(1)
    held = await used.acquire(1)
    waiting = asyncio.create_task(used.acquire(1))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    used.release(held, complaint=False, tokens=0)
    async with asyncio.timeout(1.0):
      await used.acquire(1)

  asyncio.run(go())


@pytest.mark.parametrize(
  ("caps", "tokens"), [({"rpm": 6000.0}, 1), ({"tpm": 600_000.0}, 100)]
)
def test_the_caps_space_requests_evenly(caps, tokens, timed):
  """A hundred requests a second, by either cap: a tenth takes 90 ms."""

  async def go(now):
    used = limiter(**caps)
    begin = now()
    for _ in range(10):
      used.release(await used.acquire(tokens), complaint=False, tokens=0)
    return now() - begin

  assert timed(go) == pytest.approx(0.09)


def test_tokens_that_were_counted_mend_the_pace(timed):
  async def go(now):
    used = limiter(tpm=60_000.0)  # a thousand a second
    begin = now()
    used.release(await used.acquire(10_000), complaint=False, tokens=100)
    await used.acquire(1)
    return now() - begin

  # At the estimate's pace it would have been ten seconds.
  assert timed(go) == pytest.approx(0.1)


def test_the_headers_of_the_server_are_kept_to(timed):
  async def go(now):
    used = limiter()
    tickets = [await used.acquire(10) for _ in range(3)]
    # When it took in the first, it would have taken three more.
    headers = {
      "x-ratelimit-remaining-requests": "3",
      "x-ratelimit-reset-requests": "200ms",
    }
    used.heard(tickets[0], headers)
    begin = now()
    used.release(tickets[0], complaint=False, tokens=0)
    flying = [await used.acquire(10)]
    assert now() == begin
    used.release(tickets[1], complaint=False, tokens=0)
    # The other two might be among the three: their answers are waited for.
    for ticket in (tickets[2], *flying):
      used.release(ticket, complaint=False, tokens=0)
    flying = [await used.acquire(10)]
    assert now() - begin == pytest.approx(0.2)
    late = {
      "x-ratelimit-remaining-tokens": "0",
      "x-ratelimit-reset-tokens": "1h0m1s",
    }
    used.heard(flying[0], late)
    used.release(flying[0], complaint=False, tokens=0)
    with pytest.raises(judging.Stop, match=r"wait for 360. s"):
      await used.acquire(10)

  timed(go)


@pytest.mark.parametrize(
  ("text", "seconds"),
  [
    ("7", 7.0),
    ("0.5", 0.5),
    ("6m0s", 360.0),
    ("1.5s", 1.5),
    ("120ms", 0.12),
    ("1h2m3s", 3723.0),
    ("", None),
    ("-1", None),
    ("nan", None),
    ("inf", None),
    ("soon", None),
    ("1s later", None),
    ("Wed, 21 Oct 2026 07:28:00 GMT", None),
  ],
)
def test_spans(text, seconds):
  assert limits.seconds(text) == (
    None if seconds is None else pytest.approx(seconds)
  )


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


def test_a_rate_limit_in_headers_is_met_without_a_complaint():
  """Five a period: the sixth request waits for the next one."""
  period_s, taken, started = 0.15, [], time.monotonic()

  def rule(request, number):
    now = time.monotonic() - started
    period = int(now / period_s)
    taken.append(period)
    left = 5 - taken.count(period)
    headers = (
      ("x-ratelimit-remaining-requests", str(max(0, left))),
      # A little longer, as clocks and sockets are not exact.
      (
        "x-ratelimit-reset-requests",
        f"{(period + 1) * period_s - now + 0.01:.4f}s",
      ),
    )
    answer = judge_server.prefer_longer(request, number)
    if left < 0:
      answer = judge_server.fails(429, "too many")
    return dataclasses.replace(answer, headers=headers)

  questions = [judging.Question("p", f" {n}", " no") for n in range(15)]
  with judge_server.Server(rule) as fake:
    replies = ask(settings(fake.url, max_retries=0), questions)
  # Only those that left before the first headers came can have been too many.
  assert sum(reply.choice == "missing" for reply in replies) == 0
  assert len(fake.requests) == 15


def test_answers_that_overtake_each_other_allow_no_more():
  async def go():
    used = limiter()
    tickets = [await used.acquire(10) for _ in range(4)]

    def headers(left):
      return {
        "x-ratelimit-remaining-requests": str(left),
        "x-ratelimit-reset-requests": "1h",
      }

    # Of six in all, the last to leave was the first that the server counted.
    used.heard(tickets[3], headers(5))
    used.release(tickets[3], complaint=False, tokens=0)
    for _ in range(2):
      await asyncio.wait_for(used.acquire(10), 1)
    # Three old ones and two new ones are in flight: no third.
    third = asyncio.create_task(used.acquire(10))
    done, _ = await asyncio.wait([third], timeout=0.05)
    assert not done
    for left, ticket in zip((4, 3, 2), tickets):
      used.heard(ticket, headers(left))
      used.release(ticket, complaint=False, tokens=0)
    done, _ = await asyncio.wait([third], timeout=0.05)
    assert not done
    third.cancel()

  asyncio.run(go())


def test_an_earlier_word_that_comes_later_allows_no_more():
  async def go():
    used = limiter()
    tickets = [await used.acquire(10) for _ in range(4)]
    # Of six in all the server counted four; its answers come the other way.
    for left, ticket in zip((2, 3, 4, 5), reversed(tickets)):
      headers = {
        "x-ratelimit-remaining-requests": str(left),
        "x-ratelimit-reset-requests": "1h",
      }
      used.heard(ticket, headers)
      used.release(ticket, complaint=False, tokens=0)
    last = [await asyncio.wait_for(used.acquire(10), 1) for _ in range(2)]
    for ticket in last:
      used.release(ticket, complaint=False, tokens=0)
    with pytest.raises(judging.Stop, match=r"wait for 3[56]\d\d s"):
      await used.acquire(10)

  asyncio.run(go())
