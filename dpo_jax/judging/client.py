"""A judge behind any OpenAI-compatible server.

The judge is the only place that retries: a server in trouble, after a wait; a
reply that cannot be read, once. What would fail for every request (a bad key, a
redirect) ends the run; anything else is a missing verdict with its cause.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import functools
import itertools
import json
import math
import os
import random
import re
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

from dpo_jax import judging
from dpo_jax.core import redaction
from dpo_jax.core import settings as settings_lib
from dpo_jax.judging import budget, prompts, verdicts

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ServerSettings:
  """Where and how to ask; every field is explained in configs/judge.py."""

  base_url: str
  api_key_env: str
  model: str
  temperature: float
  max_tokens: int
  max_tokens_name: Literal["max_tokens", "max_completion_tokens"]
  template: str
  output: verdicts.Output
  ties: bool
  top_logprobs: int
  mode: Literal["live", "batch"]
  timeout_s: float
  max_retries: int
  retry_wait_s: float
  max_wait_s: float
  requests_per_minute: float
  tokens_per_minute: float
  budget_usd: float
  prices: tuple[str, ...]
  batch_price: float
  batch_size: int
  batch_poll_s: float
  expected_reply_tokens: int
  expected_reply_s: float

  def __post_init__(self):
    url = urllib.parse.urlsplit(self.base_url)
    # The values are not shown: they may hold the key itself.
    if url.scheme not in ("http", "https") or url.username is not None:
      raise ValueError(
        "base_url must start with http:// or https:// and hold no user or key"
        " before an '@': api_key_env names the variable with the key"
      )
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}|", self.api_key_env):
      raise ValueError(
        "api_key_env must be the name of an environment variable, in capitals,"
        " digits and '_', not a key; '' is for a server that wants none"
      )
    if not self.model:
      raise ValueError("model='' must name the judging model")
    settings_lib.check(self)
    if self.budget_usd and self.price is None:
      raise ValueError(
        f"budget_usd={self.budget_usd:g} cannot be kept: the price of"
        f" {self.model!r} is not in prices; add it, or set budget_usd=0"
      )

  @property
  def price(self) -> budget.Price | None:
    """Price of this model's tokens in this mode; None if unknown."""
    factor = self.batch_price if self.mode == "batch" else 1.0
    return budget.read_prices(self.prices, factor).get(self.model)

  @property
  def parameters(self) -> str:
    """All of these that a reply depends on, but for model and template."""
    names = ("temperature", "max_tokens", "output", "ties", "top_logprobs")
    return json.dumps({name: getattr(self, name) for name in names})

  def read_key(self) -> str:
    """The key from the environment; ValueError if there is none."""
    if not self.api_key_env:
      return ""
    key = os.environ.get(self.api_key_env, "").strip()
    if not (key and key.isascii() and key.isprintable()):
      raise ValueError(
        f"the environment variable {self.api_key_env} is not set, or holds no"
        " key: export the server's key in it, or set api_key_env='' for a"
        " server that wants none"
      )
    return key


@dataclasses.dataclass(eq=False)
class Failure(judging.Stop):
  """A request without a reply, perhaps `billed`; `fatal` if any would fail."""

  cause: str
  again: bool = False
  wait_s: float | None = None
  billed: bool = False
  fatal: bool = False


class Limits:
  """Requests in flight, fewer after complaints, and evenly spaced in time."""

  def __init__(self, settings: ServerSettings, most: int):
    self.most, self.window, self.in_flight = most, float(most), 0
    rates = (settings.requests_per_minute, settings.tokens_per_minute)
    self._request_s, self._token_s = (60 / x if x else 0.0 for x in rates)
    self._max_wait_s = settings.max_wait_s
    self.next_at = 0.0
    self._halvings = 0
    self._turn = asyncio.Lock()
    self._freed = asyncio.Event()

  @contextlib.asynccontextmanager
  async def slot(self, tokens: int) -> AsyncIterator[None]:
    """A place among the requests in flight, for about that many tokens."""
    async with self._turn:
      while self.in_flight >= int(self.window):
        self._freed.clear()
        await self._freed.wait()
      while (wait_s := self.next_at - time.monotonic()) > 0:
        await asyncio.sleep(wait_s)
      pace_s = max(self._request_s, self._token_s * tokens)
      self.next_at = max(self.next_at, time.monotonic()) + pace_s
      self.in_flight += 1
    halvings = self._halvings
    try:
      yield
      self.window = min(self.most, self.window + 1 / self.window)
    except Failure as failure:
      # Requests that left before the last halving say nothing new.
      if failure.again and halvings == self._halvings:
        self.window = max(1.0, self.window / 2)
        self._halvings += 1
      raise
    finally:
      self.in_flight -= 1
      self._freed.set()

  def pause(self, wait_s: float) -> None:
    """Holds all requests back; judging.Stop if for more than `max_wait_s`."""
    if wait_s > self._max_wait_s:
      raise judging.Stop(
        f"the server asks for a wait of {wait_s:.0f} s, more than"
        f" max_wait_s={self._max_wait_s:g}: run the same command again later"
      )
    self.next_at = max(self.next_at, time.monotonic() + wait_s)


class Client:
  """Questions to one server; an async context manager while it is asked."""

  def __init__(self, settings: ServerSettings, concurrency: int):
    self.settings = settings
    self.template = prompts.load(
      settings.template, output=settings.output, ties=settings.ties
    )
    self.limits = Limits(settings, concurrency)
    self.budget = budget.Budget(settings.price, settings.budget_usd)
    identity = (settings.model, settings.parameters, self.template.hash)
    self.judge = judging.Judge(*identity, self.ask)
    self._key = ""

  async def __aenter__(self) -> "Client":
    import openai  # lazily: only a judge over HTTP needs it

    self._key = self.settings.read_key()
    # Retries inside the SDK would be invisible to the budget, and a redirect
    # could take key and texts to another host.
    self.sdk = openai.AsyncOpenAI(
      api_key=self._key or "none",
      base_url=self.settings.base_url,
      timeout=self.settings.timeout_s,
      max_retries=0,
      http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
    )
    return self

  async def __aexit__(self, *exc_info) -> None:
    await self.sdk.close()

  async def ask(self, question: judging.Question) -> judging.Reply:
    """The reply to a question; raises judging.Stop or budget.Spent."""
    reply = judging.NOTHING
    for number in range(2):
      page = prompts.fill(self.template, question, number)
      try:
        completion = await self.retry(functools.partial(self._complete, page))
      except budget.Spent:
        if not number:
          raise
        break
      except Failure as failure:
        if failure.fatal:
          raise
        return dataclasses.replace(reply, error=failure.cause)
      reply = self.read(completion, reply)
      if reply.choice != "missing":
        break
    return reply

  def body(self, page: str) -> dict[str, Any]:
    settings = self.settings
    body: dict[str, Any] = {
      "model": settings.model,
      "messages": [{"role": "user", "content": page}],
      "temperature": settings.temperature,
      settings.max_tokens_name: settings.max_tokens,
    }
    if settings.output == "json_schema":
      schema = prompts.schema(ties=settings.ties)
      named = {"name": "verdict", "strict": True, "schema": schema}
      body["response_format"] = {"type": "json_schema", "json_schema": named}
    if settings.top_logprobs:
      body |= {"logprobs": True, "top_logprobs": settings.top_logprobs}
    return body

  def read(
    self, completion: Any, before: judging.Reply = judging.NOTHING
  ) -> judging.Reply:
    """The reply without the key, with the tokens of an unreadable `before`."""
    reply = verdicts.read_completion(
      completion, output=self.settings.output, ties=self.settings.ties
    )
    return dataclasses.replace(
      reply,
      text=self.clean(reply.text),
      model=self.clean(reply.model),
      fingerprint=self.clean(reply.fingerprint),
      prompt_tokens=reply.prompt_tokens + before.prompt_tokens,
      completion_tokens=reply.completion_tokens + before.completion_tokens,
    )

  def clean(self, text: str) -> str:
    """Text from outside without this key or another of the environment."""
    if self._key:
      text = text.replace(self._key, "[key]")
    return redaction.clean(text)

  async def retry(self, call: Callable[[], Awaitable[T]]) -> T:
    """The result of a call within all retries and waits, else `Failure`."""
    settings, waited = self.settings, 0.0
    for attempt in itertools.count():
      try:
        return await call()
      except Failure as error:
        failure = error
      if not failure.again or attempt == settings.max_retries:
        raise failure
      if failure.wait_s is None:
        # Without jitter, all that failed together would return together.
        wait = settings.retry_wait_s * 2**attempt * random.uniform(0.5, 1.0)
      else:
        wait = failure.wait_s
        self.limits.pause(wait)
      waited += wait
      if waited > settings.max_wait_s:
        raise Failure(
          f"{failure}; a wait of {wait:.0f} s would pass"
          f" max_wait_s={settings.max_wait_s:g}"
        )
      await asyncio.sleep(wait)
    raise AssertionError

  async def _complete(self, page: str) -> Any:
    """The completion of one request, reserved before it leaves."""
    bound = self.budget.bound(page, self.settings.max_tokens)
    tokens = len(page) // 4 + self.settings.expected_reply_tokens
    create = self.sdk.chat.completions.with_raw_response.create
    self.budget.reserve(bound)
    cost, calls = 0.0, 0
    try:
      async with self.limits.slot(tokens):
        cost, calls = bound, 1
        raw = await self.send(create(**self.body(page)))
        completion = verdicts.parse(raw.content)
        if completion is None:
          cause = "the reply is not a chat completion"
          raise Failure(cause, again=True, billed=True)
      cost = self.budget.cost_of(verdicts.usage(completion), bound)
      return completion
    except Failure as failure:
      cost = bound if failure.billed else 0.0
      raise
    finally:
      self.budget.settle(bound, cost, calls)

  async def send(self, call: Awaitable[T]) -> T:
    """The result of one call of the SDK; raises Failure for its errors."""
    import httpx2
    import openai

    timeout_s = self.settings.timeout_s
    try:
      # The SDK's timeout is for every read; this one also ends a slow drip.
      async with asyncio.timeout(timeout_s):
        return await call
    except openai.APIStatusError as error:
      body = {"message": error.message} | verdicts.as_dict(error.body)
      failure = self.failure(error.status_code, body, error.response.headers)
    except (openai.APITimeoutError, TimeoutError):
      cause = f"no reply within {timeout_s:g} s"
      failure = Failure(cause, again=True, billed=True)
    except openai.APIConnectionError as error:
      origin = error.__cause__ or error
      cause = f"connection failed: {origin or type(origin).__name__}"
      sent = not isinstance(origin, httpx2.ConnectError)
      failure = Failure(self.clean(cause), again=True, billed=sent)
    except (openai.OpenAIError, ValueError) as error:
      cause = self.clean(f"unreadable reply: {error}")
      failure = Failure(cause, again=True, billed=True)
    # Raised here, the server's message is not part of any traceback.
    raise failure

  def failure(
    self, status: Any, error: dict[str, Any], headers: Mapping[str, str] = {}
  ) -> Failure:
    """What an error, as the API words it, means; status None is of a batch."""
    status = status if type(status) is int else 0
    text = f"HTTP {status}: " if status else ""
    text += str(error.get("message") or error.get("code"))
    cause = " ".join(self.clean(text).split())[:300]
    mend = ""
    if status in (401, 403):
      mend = f"check the key in {self.settings.api_key_env or 'api_key_env'}"
    elif "insufficient_quota" in (error.get("code"), error.get("type")):
      mend = "the account's quota is spent; add credit and run again"
    elif status == 404:
      mend = f"check base_url and model={self.settings.model!r}"
    elif 300 <= status < 400:
      location = self.clean(headers.get("location", ""))
      mend = f"it redirects to {location:.200}: set base_url to the API itself"
    if mend:
      return Failure(f"{cause} ({mend})", fatal=True)
    again = status in (0, 408, 409, 429) or status >= 500
    return Failure(cause, again=again, wait_s=_retry_after(headers))


def _retry_after(headers: Mapping[str, str]) -> float | None:
  """Seconds that the server asks to wait; None if it names no time."""
  for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
    with contextlib.suppress(ValueError):
      wait = unit_s * float(headers.get(name, ""))
      return wait if 0 <= wait < math.inf else None
  with contextlib.suppress(TypeError, ValueError):
    date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    return max(0.0, date.timestamp() - time.time())
  return None
