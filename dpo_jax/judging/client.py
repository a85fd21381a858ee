"""A judge behind any OpenAI-compatible server.

The judge is the only place that retries. Its failures are of three kinds: the
whole run is of no use (a bad key, a spent quota, an unknown model) and stops;
the server is in trouble and is asked again after a wait; or the reply cannot
be read and is asked for once more. What is left after that is a missing
verdict with its cause, never a tie and never a loss.

The SDK makes the client, its headers and the calls of batch mode. A question's
one request goes straight through the SDK's HTTP client: checking every field of
request and reply against its types, and building the options of a call, took
more time than all the rest of it. `verdicts` reads what is needed by hand.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar

from dpo_jax import judging
from dpo_jax.core import redaction
from dpo_jax.core import settings as settings_lib
from dpo_jax.judging import budget, limits, prompts, transport, verdicts

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
    if not self.base_url.startswith(("http://", "https://")):
      raise ValueError(
        f"base_url={self.base_url!r} must start with http:// or https://"
      )
    if urllib.parse.urlsplit(self.base_url).username is not None:
      raise ValueError(
        "base_url holds a user or key before its '@': leave it out, and name"
        " the environment variable with the key in api_key_env"
      )
    # Not shown: whoever gives the key itself should not find it in a log.
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}|", self.api_key_env):
      raise ValueError(
        "api_key_env must be the name of an environment variable, in capitals,"
        " digits and '_', not a key; '' is for a server that wants none"
      )
    if not self.model:
      raise ValueError("model='' must name the judging model")
    settings_lib.check(self)
    prices = budget.read_prices(self.prices)
    if self.budget_usd and self.model not in prices:
      raise ValueError(
        f"budget_usd={self.budget_usd:g} cannot be kept: the price of"
        f" {self.model!r} is not in prices; add it, or set budget_usd=0"
      )

  @property
  def price(self) -> budget.Price | None:
    """Of a token of this model in this mode; None if it is not known."""
    price = budget.read_prices(self.prices).get(self.model)
    if price is None:
      return None
    factor = self.batch_price if self.mode == "batch" else 1.0
    return budget.Price(factor * price.prompt, factor * price.completion)

  @property
  def parameters(self) -> str:
    """All of these that a reply depends on, but for model and template."""
    names = ("temperature", "max_tokens", "output", "ties", "top_logprobs")
    return json.dumps({name: getattr(self, name) for name in names})

  def load_template(self) -> prompts.Template:
    """ValueError if there is none of that name, or it cannot be used."""
    return prompts.load(self.template, output=self.output, ties=self.ties)

  def read_key(self) -> str:
    """The key from the environment; ValueError without it if it is no key."""
    variable = self.api_key_env
    if not variable:
      return ""
    key = os.environ.get(variable, "").strip()
    if not key:
      raise ValueError(
        f"the environment variable {variable} is not set: export the server's"
        " key in it, or set api_key_env='' for a server that wants none"
      )
    if not (key.isascii() and key.isprintable()):
      raise ValueError(
        f"the environment variable {variable} holds characters that cannot be"
        " part of a key"
      )
    return key


@contextlib.asynccontextmanager
async def connect(
  settings: ServerSettings, concurrency: int
) -> AsyncIterator["Client"]:
  """A client of the server, for as long as the context lasts.

  Args:
    settings: where and how.
    concurrency: most requests in flight at a time.

  Raises:
    ValueError: the key's environment variable is unset or holds no key, or
      the template cannot be used.
    ImportError: the openai package is not installed.
  """
  try:
    import openai  # lazily: only a judge over HTTP needs it
  except ImportError as error:
    raise ImportError(
      "judging over HTTP needs the openai package: pip install 'openai>=3'"
    ) from error
  template = settings.load_template()
  key = settings.read_key()
  http = openai.DefaultAsyncHttpxClient(
    transport=transport.spread(concurrency), timeout=settings.timeout_s
  )
  # Without an explicit address the SDK would take one from the environment.
  async with openai.AsyncOpenAI(
    api_key=key or "none",
    base_url=settings.base_url,
    timeout=settings.timeout_s,
    max_retries=0,
    http_client=http,
  ) as sdk:
    limiter = limits.Limiter(
      concurrency,
      requests_per_minute=settings.requests_per_minute,
      tokens_per_minute=settings.tokens_per_minute,
      max_wait_s=settings.max_wait_s,
    )
    purse = budget.Budget(settings.price, settings.budget_usd)
    yield Client(settings, template, sdk, http, key, limiter, purse)


def judge(
  settings: ServerSettings,
  template: prompts.Template,
  ask: Callable[[judging.Question], Awaitable[judging.Reply]],
) -> judging.Judge:
  """The judge behind a server, by all that its answers depend on."""
  return judging.Judge(
    name=settings.model,
    parameters=settings.parameters,
    template_hash=template.hash,
    ask=ask,
  )


class Client:
  """Requests to one server, whose calls to wait hold for all questions."""

  def __init__(
    self,
    settings: ServerSettings,
    template: prompts.Template,
    sdk: Any,
    http: Any,
    key: str,
    limiter: limits.Limiter,
    purse: budget.Budget,
  ):
    self.settings = settings
    self.template = template
    self.sdk = sdk
    self.limiter = limiter
    self.budget = purse
    self._key = key
    self._http = http
    self._url = f"{str(sdk.base_url).rstrip('/')}/chat/completions"
    # Some values are marks of headers that are left out.
    self._headers = {
      name: value
      for name, value in (sdk.default_headers | sdk.auth_headers).items()
      if isinstance(value, str)
    }
    self.judge = judge(settings, template, self.ask)

  async def ask(self, question: judging.Question) -> judging.Reply:
    """The reply to a question, after one more ask if it cannot be read.

    Raises:
      judging.Stop: asking on is of no use.
      budget.Spent: the budget does not allow for the call.
    """
    reply = None
    for number in range(2):
      page = prompts.fill(self.template, question, number)
      try:
        completion = await self.persist(functools.partial(self._once, page))
      except budget.Spent:
        if reply is None:
          raise
        break
      except transport.Failure as failure:
        before = reply or judging.Reply("missing", "", "", "")
        return dataclasses.replace(before, error=str(failure))
      reply = self.read(completion, reply)
      if reply.choice != "missing":
        break
    assert reply is not None
    return reply

  def body(self, page: str) -> dict[str, Any]:
    """The body of a request."""
    settings = self.settings
    body: dict[str, Any] = {
      "model": settings.model,
      "messages": [{"role": "user", "content": page}],
      "temperature": settings.temperature,
      settings.max_tokens_name: settings.max_tokens,
    }
    if settings.output == "json_schema":
      schema = {
        "name": "verdict",
        "strict": True,
        "schema": prompts.schema(ties=settings.ties),
      }
      body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if settings.top_logprobs:
      body["logprobs"] = True
      body["top_logprobs"] = settings.top_logprobs
    return body

  def bound(self, page: str) -> float:
    """The most that asking with this page can cost, dollars."""
    return self.budget.bound(len(page.encode()), self.settings.max_tokens)

  def read(
    self, completion: Any, before: judging.Reply | None = None
  ) -> judging.Reply:
    """The reply of a completion, without the key, even if a server echoes it.

    The tokens of a reply `before`, which could not be read, are added.
    """
    settings = self.settings
    reply = verdicts.read_completion(
      completion, output=settings.output, ties=settings.ties
    )
    spent = (
      (before.prompt_tokens, before.completion_tokens) if before else (0, 0)
    )
    return dataclasses.replace(
      reply,
      text=self.clean(reply.text),
      model=self.clean(reply.model),
      fingerprint=self.clean(reply.fingerprint),
      prompt_tokens=reply.prompt_tokens + spent[0],
      completion_tokens=reply.completion_tokens + spent[1],
    )

  def clean(self, text: str) -> str:
    """Text from outside without this key or another of the environment."""
    if self._key:
      text = text.replace(self._key, "[key]")
    return redaction.clean(text)

  async def persist(self, call: Callable[[], Awaitable[T]]) -> T:
    """What the call gives, after as many retries and waits as are allowed.

    Raises:
      Failure: the last one, once no more are allowed.
    """
    settings = self.settings
    waited = 0.0
    failure = None
    for attempt in range(settings.max_retries + 1):
      try:
        return await call()
      except transport.Failure as error:
        failure = error
      if not failure.again or attempt == settings.max_retries:
        break
      wait = failure.wait_s
      if wait is None:
        # Without jitter, all that failed together would return together.
        wait = settings.retry_wait_s * 2**attempt * random.uniform(0.5, 1.0)
      waited += wait
      # A single wait that is too long is everybody's: the limiter stops them.
      alone = failure.wait_s is None or wait <= settings.max_wait_s
      if alone and waited > settings.max_wait_s:
        raise transport.Failure(
          f"{failure}; a wait of {wait:.0f} s would pass"
          f" max_wait_s={settings.max_wait_s:g}",
          again=False,
        )
      if failure.wait_s is None:
        await asyncio.sleep(wait)
      # Else the limiter holds this question back with all the others.
    assert failure is not None
    raise failure

  async def _once(self, page: str) -> Any:
    """One request, paid for and let through by the limiter."""
    bound = self.bound(page)
    tokens = len(page) // 4 + self.settings.expected_reply_tokens
    await self.budget.reserve(bound)
    try:
      ticket = await self.limiter.acquire(tokens)
    except BaseException:
      self.budget.give_back(bound)
      raise
    complaint, counted, billed = False, 0, True
    try:
      headers, completion = await self._post(page)
      self.limiter.heard(ticket, headers)
      usage = verdicts.usage(completion)
      counted = sum(usage.values())
      if counted:
        self.budget.settle(bound, **usage)
      return completion
    except transport.Failure as failure:
      complaint, billed = failure.again, failure.billed
      self.limiter.heard(ticket, failure.headers)
      if failure.wait_s is not None:
        self.limiter.pause(failure.wait_s)
      raise
    except judging.Stop:
      billed = False
      raise
    finally:
      if not counted:
        end = self.budget.settle_unknown if billed else self.budget.settle_error
        end(bound)
      self.limiter.release(ticket, complaint=complaint, tokens=counted)

  async def _post(self, page: str) -> tuple[Mapping[str, str], Any]:
    """Headers and JSON of the answer to one request for a completion."""
    content = json.dumps(self.body(page), ensure_ascii=False).encode()
    request = self._http.build_request(
      "POST", self._url, content=content, headers=self._headers
    )
    response, body = await self.attempt(transport.fetch(self._http, request))
    if response.is_error:
      raise self.failure(transport.status_error(response, body))
    try:
      return response.headers, json.loads(body)
    except (ValueError, RecursionError):
      cause = "the reply is not a chat completion"
      failure = transport.Failure(cause, again=True, billed=True)
    raise failure

  async def attempt(self, call: Awaitable[T]) -> T:
    """What one call of the SDK, or of its HTTP client, gives.

    Raises:
      Failure: it brought no answer.
      judging.Stop: it never will.
    """
    import httpx2
    import openai

    timeout_s = self.settings.timeout_s
    try:
      # The SDK's timeout is of every read; this one ends a slow drip too.
      async with asyncio.timeout(timeout_s):
        return await call
    except openai.APIStatusError as error:
      failure = self.failure(error)
    except (openai.APITimeoutError, httpx2.TimeoutException, TimeoutError):
      cause = f"no reply within {timeout_s:g} s"
      failure = transport.Failure(cause, again=True, billed=True)
    except (openai.APIConnectionError, httpx2.TransportError) as error:
      is_ours = isinstance(error, httpx2.TransportError)
      origin = error if is_ours else error.__cause__ or error
      cause = self.clean(
        f"connection failed: {origin or type(origin).__name__}"
      )
      sent = not isinstance(origin, httpx2.ConnectError | httpx2.ConnectTimeout)
      failure = transport.Failure(cause, again=True, billed=sent)
    except (openai.APIError, httpx2.HTTPError, ValueError) as error:
      cause = self.clean(f"unreadable reply: {error}")
      failure = transport.Failure(cause, again=True, billed=True)
    # Raised here, the server's message is not part of any traceback.
    raise failure

  def failure(self, error: Any) -> transport.Failure | judging.Stop:
    """What an error status means for this request, or for the whole run."""
    status = error.status_code
    body = error.body if isinstance(error.body, dict) else {}
    message = body.get("message") or error.message
    cause = " ".join(self.clean(f"HTTP {status}: {message}").split())[:300]
    if status in (401, 403):
      mend = f"check the key in {self.settings.api_key_env or 'api_key_env'}"
    elif "insufficient_quota" in (error.code, error.type):
      mend = "the account's quota is spent; add credit and run again"
    elif status == 404:
      mend = f"check base_url and model={self.settings.model!r}"
    else:
      again = status in (408, 409, 429) or status >= 500
      headers = error.response.headers
      wait_s = transport.retry_after(headers)
      return transport.Failure(
        cause, again=again, wait_s=wait_s, headers=headers
      )
    return judging.Stop(f"{cause} ({mend})")
