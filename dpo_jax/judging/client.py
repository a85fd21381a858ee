"""Client of a judge behind an OpenAI-compatible server.

Retries server errors with backoff, and an unreadable reply once. An error that
every request would meet (a bad key, a redirect) ends the run; any other is a
missing verdict with its cause.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import functools
import ipaddress
import json
import math
import os
import random
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

from dpo_jax import judging
from dpo_jax.core import redaction
from dpo_jax.core import settings as settings_lib
from dpo_jax.judging import budget, prompts, verdicts

T = TypeVar("T")

# The Batch API's, as a factor of the live price.
_BATCH_PRICE = 0.5
# Failures in a row, over all questions, that end a run.
_DEAD = 20
# The first request is alone this long: what fails for all is sent once.
_ALONE_S = 1.0

# What to set if a server's message refuses a parameter of every request.
_REMEDIES = {
  r"\btemperature\b": "omit=temperature",
  r"\bmax_(?:completion_)?tokens\b": "omit=max_tokens, or server."
  "max_tokens_name=max_completion_tokens or max_tokens",
  r"\b(?:response_format|json_schema)\b": "output=text",
  r"\b(?:top_)?logprobs\b": "top_logprobs=0",
  r"^model$|\b(?:unknown|invalid) model\b"
  r"|\bmodel\b.{0,99}\bnot (?:exist|found|available)\b": "model to one that the"
  " server has",
}
_TOO_LONG = re.compile(r"context.(?:length|window)|input tokens|too long", re.I)
# As OpenAI, Azure, OpenRouter and DashScope name what their filters refuse.
_FILTERED = re.compile(
  r"content_filter|content_policy|ResponsibleAIPolicy|flagged_input"
  r"|data_inspection"
)


@dataclasses.dataclass(frozen=True)
class ServerSettings:
  """Server, sampling, limits and prices; fields as in configs/judge.py."""

  base_url: str
  api_key_env: str
  allow_http: bool
  model: str
  temperature: float
  max_tokens: int
  max_tokens_name: Literal["max_tokens", "max_completion_tokens"]
  omit: tuple[Literal["temperature", "max_tokens"], ...]
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
  budget_usd: float
  prices: tuple[str, ...]
  batch_poll_s: float

  def __post_init__(self):
    url = urllib.parse.urlsplit(self.base_url)
    # Without the value, which may contain the key itself.
    if url.scheme not in ("http", "https") or url.username is not None:
      raise ValueError(
        "base_url must start with http:// or https:// and have no user or key"
        " before an '@': api_key_env names the variable of the key"
      )
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}|", self.api_key_env):
      raise ValueError(
        "api_key_env must be the name of an environment variable, in capitals,"
        " digits and '_', not a key; '' for a server without keys"
      )
    host = url.hostname or ""
    encrypted = url.scheme == "https" or not self.api_key_env
    if not (encrypted or self.allow_http or _loopback(host)):
      raise ValueError(
        f"base_url would send the key of {self.api_key_env} unencrypted to"
        f" {host!r}: use https://, or set api_key_env='' or allow_http=True"
      )
    if not self.model:
      raise ValueError("model='' must name the judge's model")
    settings_lib.check(self)
    if self.budget_usd and self.price is None:
      raise ValueError(
        f"budget_usd={self.budget_usd:g} cannot be kept: the price of"
        f" {self.model!r} is not in prices; add it, or set budget_usd=0"
      )
    if self.budget_usd and "max_tokens" in self.omit:
      raise ValueError(
        f"budget_usd={self.budget_usd:g} cannot be kept with max_tokens in"
        " omit, where a reply has any cost: set budget_usd=0, or omit less"
      )

  @property
  def price(self) -> budget.Price | None:
    """Price of this model's tokens in this mode; None if unknown."""
    factor = _BATCH_PRICE if self.mode == "batch" else 1.0
    return budget.read_prices(self.prices, factor).get(self.model)

  @property
  def parameters(self) -> str:
    """The sampling settings that a reply depends on, as JSON."""
    names = ("temperature", "max_tokens", "output", "ties", "top_logprobs")
    return json.dumps(
      {name: getattr(self, name) for name in names if name not in self.omit}
    )

  def read_key(self) -> str:
    """The key from the environment; ValueError if there is none."""
    if not self.api_key_env:
      return ""
    key = os.environ.get(self.api_key_env, "").strip()
    if not re.fullmatch("[!-~]+", key) or re.search("[\"'`]", key):
      raise ValueError(
        f"the environment variable {self.api_key_env} is not set, or is no key"
        " (it has quotes, spaces or other such characters): export the"
        " server's key as it, or set api_key_env='' for a server without keys"
      )
    return key


def _loopback(host: str) -> bool:
  with contextlib.suppress(ValueError):
    return ipaddress.ip_address(host).is_loopback
  return host == "localhost" or host.endswith(".localhost")


@dataclasses.dataclass(eq=False)
class Failure(judging.Stop):
  """A request without a completion.

  `billed` if the server may have charged for it, `fatal` if every other request
  would fail too, `refused` by a content filter, `alone` if it shows nothing of
  other requests, `silent` until the time-out. `wait_s` is that of Retry-After.
  """

  cause: str
  retryable: bool = False
  wait_s: float | None = None
  billed: bool = False
  fatal: bool = False
  refused: bool = False
  alone: bool = False
  silent: bool = False


class Pacer:
  """Spaces requests evenly under the rate cap; `pause` delays all of them."""

  def __init__(self, requests_per_minute: float):
    self._request_s = 60 / requests_per_minute if requests_per_minute else 0.0
    self._next_at = 0.0

  async def wait(self) -> None:
    """Returns when a request may be sent."""
    while (wait_s := self._next_at - time.monotonic()) > 0:
      await asyncio.sleep(wait_s)
    self.pause(self._request_s)

  def pause(self, wait_s: float) -> None:
    self._next_at = max(self._next_at, time.monotonic() + wait_s)


class Client:
  """A judge on one server; an async context manager around requests.

  `concurrency` is the number of requests in flight.
  """

  def __init__(self, settings: ServerSettings, concurrency: int = 1):
    self.settings, self.concurrency = settings, concurrency
    self.template = prompts.load(
      settings.template, output=settings.output, ties=settings.ties
    )
    self.pacer = Pacer(settings.requests_per_minute)
    self.budget = budget.Budget(settings.price, settings.budget_usd)
    identity = (settings.model, settings.parameters, self.template.hash)
    self.judge = judging.Judge(*identity, self.ask)
    self._key = ""
    self._failures = 0
    self._fatal: Failure | None = None
    self._asked, self._first_over = False, asyncio.Event()

  async def __aenter__(self) -> "Client":
    import openai

    self._key = self.settings.read_key()
    base_url, _, query = self.settings.base_url.partition("?")
    query = dict(urllib.parse.parse_qsl(query))

    async def authorize(request):
      # Azure's form; other servers take a bearer token.
      if "api-version" in query:
        del request.headers["authorization"]
        request.headers["api-key"] = self._key

    # The budget would not see the SDK's own retries, and a redirect could send
    # key and texts to another host.
    self.sdk = openai.AsyncOpenAI(
      api_key=self._key or "none",
      base_url=base_url,
      default_query=query,
      timeout=self.settings.timeout_s,
      max_retries=0,
      http_client=openai.DefaultAsyncHttpxClient(
        follow_redirects=False, event_hooks={"request": [authorize]}
      ),
    )
    return self

  async def __aexit__(self, *exc_info) -> None:
    await self.sdk.close()

  async def ask(self, question: judging.Question) -> judging.Reply:
    """The reply, or a second one; raises judging.Stop or budget.Exhausted."""
    reply = judging.NOTHING
    for number in range(2):
      page = prompts.fill(self.template, question, number)
      try:
        completion = await self.retry(functools.partial(self._complete, page))
      except budget.Exhausted:
        if not number:
          raise
        break
      except Failure as failure:
        if failure.fatal:
          raise
        return failed(reply, failure)
      reply = self.read(completion, reply)
      if reply.choice != "missing":
        break
    return reply

  def body(self, page: str) -> dict[str, Any]:
    """The request of a page, as the chat completions API takes it."""
    settings = self.settings
    body: dict[str, Any] = {
      "model": settings.model,
      "messages": [{"role": "user", "content": page}],
    }
    if "temperature" not in settings.omit:
      body["temperature"] = settings.temperature
    if "max_tokens" not in settings.omit:
      body[settings.max_tokens_name] = settings.max_tokens
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
    """The parsed reply without keys; adds the tokens of reply `before`."""
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
    """The text with this key, and others of the environment, replaced."""
    if self._key:
      text = text.replace(self._key, "[key]")
    return redaction.clean(text)

  async def retry(self, call: Callable[[], Awaitable[T]]) -> T:
    """The result of a call, with backoff; raises the last `Failure`."""
    settings, failures, waited = self.settings, 0, 0.0
    while True:
      try:
        result = await call()
        self._failures = 0
        return result
      except Failure as error:
        failure = error
      self._count(failure)
      if not failure.retryable or failures == settings.max_retries:
        raise failure
      wait = failure.wait_s
      if wait is None:
        # Jitter: requests that failed together do not return together.
        wait = settings.retry_wait_s * 2**failures * random.uniform(0.5, 1.0)
      elif wait > settings.max_wait_s:
        raise judging.Stop(
          f"the server asks for a wait of {wait:.0f} s, more than max_wait_s="
          f"{settings.max_wait_s:g}: run the same command again later"
        )
      else:
        self.pacer.pause(wait)
      failures, waited = failures + 1, waited + wait
      if waited > settings.max_wait_s:
        raise Failure(
          f"{failure}; a wait of {wait:.0f} s would pass"
          f" max_wait_s={settings.max_wait_s:g}"
        )
      await asyncio.sleep(wait)

  def _count(self, failure: Failure) -> None:
    """Raises judging.Stop if the server seems to be dead."""
    self._failures = 0 if failure.alone else self._failures + 1
    most = _DEAD
    if failure.silent:
      # All in flight, but more than one question with its retries.
      most = min(most, max(self.concurrency, self.settings.max_retries + 2))
    if self._failures >= most:
      raise judging.Stop(
        f"{self._failures} requests in a row brought no reply from"
        f" {self.settings.base_url}, the last: {failure}; start the server, or"
        " correct base_url or timeout_s, and run the same command again"
      )

  async def _turn(self) -> None:
    """Returns when a request may be sent; raises what ended the run."""
    if self._asked:
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ALONE_S):
          await self._first_over.wait()
    self._asked = True
    await self.pacer.wait()
    if self._fatal:
      raise self._fatal

  async def _complete(self, page: str) -> Any:
    """The completion of one request, its cost reserved before it is sent."""
    bound = self.budget.bound(page, self.settings.max_tokens)
    create = self.sdk.chat.completions.with_raw_response.create
    self.budget.reserve(bound)
    cost, calls = 0.0, 0
    try:
      await self._turn()
      cost, calls = bound, 1
      raw = await self.send(create(**self.body(page)))
      completion = verdicts.parse(raw.content)
      if completion is None:
        cause = "the reply is not a chat completion"
        raise Failure(cause, retryable=True, billed=True)
      if error := verdicts.error(completion):
        raise self.failure(error.get("code"), error)
      cost = self.budget.cost_of(verdicts.usage(completion), bound)
      return completion
    except Failure as failure:
      cost = bound if failure.billed else 0.0
      self._fatal = failure if failure.fatal else self._fatal
      raise
    finally:
      self._first_over.set()
      self.budget.settle(bound, cost, calls)

  async def send(self, call: Awaitable[T]) -> T:
    """The result of one SDK call; its errors are raised as `Failure`."""
    import httpx2
    import openai

    timeout_s = self.settings.timeout_s
    try:
      # The SDK's timeout is per read; this one is for the whole request.
      async with asyncio.timeout(timeout_s):
        return await call
    except openai.APIStatusError as error:
      said = {"message": str(error.body or error.message)}
      body = said | verdicts.as_dict(error.body)
      failure = self.failure(error.status_code, body, error.response.headers)
    except (openai.APITimeoutError, TimeoutError):
      cause = f"no reply within {timeout_s:g} s"
      failure = Failure(cause, retryable=True, billed=True, silent=True)
    except openai.APIConnectionError as error:
      origin = error.__cause__ or error
      cause = f"connection failed: {origin or type(origin).__name__}"
      sent = not isinstance(origin, httpx2.ConnectError)
      failure = Failure(self.clean(cause), retryable=True, billed=sent)
    except (openai.OpenAIError, ValueError) as error:
      cause = self.clean(f"unreadable reply: {error}")
      failure = Failure(cause, retryable=True, billed=True)
    # Raised outside the handlers, so that no traceback chains the server's
    # message, which may repeat the key.
    raise failure

  def failure(
    self, status: Any, error: dict[str, Any], headers: Mapping[str, str] = {}
  ) -> Failure:
    """The failure of an API error object; `status` is None in a batch."""
    status = status if type(status) is int else 0
    text = f"HTTP {status}: " if status else ""
    text += str(error.get("message") or error.get("code"))
    cause = " ".join(self.clean(text).split())[:2000]
    kinds = str(
      [error.get(x) for x in ("code", "type", "innererror", "metadata")]
    )
    if _FILTERED.search(kinds):
      return Failure(cause, refused=True, alone=True)
    # Of one question, whatever parameter the message names.
    alone = bool(_TOO_LONG.search(text))
    hint = ""
    if status in (0, 400, 422) and not alone:
      hint = _remedy(str(error.get("param") or ""), text)
    elif status in (401, 403):
      hint = f"check the key in {self.settings.api_key_env or 'api_key_env'}"
    elif "insufficient_quota" in (error.get("code"), error.get("type")):
      hint = "the account's quota is exhausted; add credit and run again"
    elif status == 404:
      hint = f"check base_url and model={self.settings.model!r}"
    elif 300 <= status < 400:
      location = self.clean(headers.get("location", ""))
      hint = f"it redirects to {location:.200}: set base_url to the API itself"
    if hint:
      return Failure(f"{cause} ({hint})", fatal=True)
    wait_s = _retry_after(headers)
    return Failure(
      cause,
      retryable=status in (0, 408, 409, 429) or status >= 500,
      wait_s=wait_s,
      # A server that asks for patience is alive.
      alone=alone or status == 429 or wait_s is not None,
    )


def _remedy(param: str, text: str) -> str:
  """What to set if a server refuses a parameter of every request, or ""."""
  # Without the request that some servers repeat.
  where = param or re.split("[\"']input[\"']", text)[0]
  found = [x for form, x in _REMEDIES.items() if re.search(form, where, re.I)]
  return f"set server.{found[0]}" if found else ""


def failed(reply: judging.Reply, failure: Failure) -> judging.Reply:
  """The reply for a question whose request failed."""
  if failure.refused:
    return dataclasses.replace(reply, choice="refusal", text=failure.cause)
  return dataclasses.replace(reply, error=failure.cause)


def _retry_after(headers: Mapping[str, str]) -> float | None:
  """Seconds of a Retry-After header; None without a valid one."""
  for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
    with contextlib.suppress(ValueError):
      wait = unit_s * float(headers.get(name, ""))
      # Decades are a time since 1970.
      wait -= time.time() if wait > 1e9 else 0.0
      if 0 <= wait < math.inf:
        return wait
  with contextlib.suppress(TypeError, ValueError):
    date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    return max(0.0, date.timestamp() - time.time())
  return None
