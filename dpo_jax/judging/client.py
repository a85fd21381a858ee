"""A judge behind any OpenAI-compatible server.

The judge is the only place that retries. Its failures are of three kinds: the
whole run is of no use (a bad key, a spent quota, an unknown model) and stops;
the server is in trouble and is asked again after a wait; or the reply cannot
be read and is asked for once more. What is left after that is a missing
verdict with its cause, never a tie and never a loss.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import json
import os
import random
import time
from collections.abc import AsyncIterator
from typing import Any

from dpo_jax import judging
from dpo_jax.judging import prompts, verdicts

_CHOICES: dict[verdicts.Letter, judging.Choice] = {
  "A": "first",
  "B": "second",
  "missing": "missing",
  "refusal": "refusal",
}


@dataclasses.dataclass(frozen=True)
class ServerSettings:
  """Where and how to ask.

  Attributes:
    base_url: of the API, such as https://api.openai.com/v1.
    api_key_env: name of the environment variable that holds the key; "" for a
      server that wants none. The key itself is never written anywhere.
    model: pinned name of the judging model, as the server knows it.
    temperature: of the judge's own sampling; 0 for the most repeatable one.
    max_tokens: cap on a reply.
    timeout_s: of one request.
    max_retries: further requests after a failure of the server.
    retry_wait_s: first wait, doubled with each retry, if the server names none.
    max_wait_s: cap on all the waits of one request together.
    template: file of the prompt's template; "" for the built-in dialogue one.
  """

  base_url: str
  api_key_env: str
  model: str
  temperature: float
  max_tokens: int
  timeout_s: float
  max_retries: int
  retry_wait_s: float
  max_wait_s: float
  template: str

  def __post_init__(self):
    if not self.base_url.startswith(("http://", "https://")):
      raise ValueError(
        f"base_url={self.base_url!r} must start with http:// or https://"
      )
    if not self.model:
      raise ValueError("model='' must name the judging model")
    for name in ("max_tokens", "timeout_s"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    for name in ("temperature", "max_retries", "retry_wait_s", "max_wait_s"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@contextlib.asynccontextmanager
async def connect(settings: ServerSettings) -> AsyncIterator[judging.Judge]:
  """The judge at `settings.base_url`, for as long as the context lasts.

  Raises:
    ValueError: the key's environment variable is unset or holds no key, or
      the template cannot be used.
    ImportError: the openai package is not installed.
  """
  try:
    import openai  # lazily: only a judge over HTTP needs it
  except ImportError as error:
    raise ImportError(
      "judging over HTTP needs the openai package: pip install openai"
    ) from error
  template = prompts.load(settings.template)
  key = _read_key(settings.api_key_env)
  # Without an explicit address the SDK would take one from the environment.
  async with openai.AsyncOpenAI(
    api_key=key or "none",
    base_url=settings.base_url,
    timeout=settings.timeout_s,
    max_retries=0,
  ) as client:
    server = _Server(settings, client, key)

    async def ask(question: judging.Question) -> judging.Reply:
      return await server.ask(prompts.fill(template, question))

    yield judging.Judge(
      name=settings.model,
      parameters=json.dumps(
        {
          "temperature": settings.temperature,
          "max_tokens": settings.max_tokens,
        }
      ),
      template_hash=template.hash,
      ask=ask,
    )


def _read_key(variable: str) -> str:
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


class _Failure(Exception):
  """A request that brought no reply; `wait_s` is what the server asked for."""

  def __init__(self, cause: str, *, again: bool, wait_s: float | None = None):
    super().__init__(cause)
    self.again = again
    self.wait_s = wait_s


class _Server:
  """Requests to one server, whose calls to wait hold for all questions."""

  def __init__(self, settings: ServerSettings, client: Any, key: str):
    self._settings = settings
    self._client = client
    self._key = key
    self._open_at = 0.0

  async def ask(self, text: str) -> judging.Reply:
    reply = judging.Reply("missing", "", "", "not asked")
    for _ in range(2):
      try:
        completion = await self._request(text)
      except _Failure as failure:
        return dataclasses.replace(reply, error=str(failure))
      reply = self._reply(completion)
      if reply.choice != "missing":
        break
    return reply

  def _reply(self, completion: Any) -> judging.Reply:
    model = self._clean(completion.model or "")
    if not completion.choices:
      return judging.Reply("missing", "", model, "the reply has no choices")
    choice = completion.choices[0]
    refused = choice.message.refusal or ""
    text = self._clean(choice.message.content or refused)
    if refused or choice.finish_reason == "content_filter":
      return judging.Reply("refusal", text, model, "")
    if choice.finish_reason == "length":
      error = "the reply was cut at max_tokens"
      return judging.Reply("missing", text, model, error)
    letter = verdicts.read(text)
    error = "no verdict in the reply" if letter == "missing" else ""
    return judging.Reply(_CHOICES[letter], text, model, error)

  async def _request(self, text: str) -> Any:
    """A completion, after as many retries and waits as are allowed."""
    settings = self._settings
    waited = 0.0
    wait = 0.0
    failure = None
    for attempt in range(settings.max_retries + 1):
      wait = max(wait, self._open_at - time.monotonic())
      if wait > 0:
        if waited + wait > settings.max_wait_s:
          cause = failure or "the server is asking everybody to wait"
          raise _Failure(
            f"{cause}; a wait of {wait:.0f} s would pass"
            f" max_wait_s={settings.max_wait_s:g}",
            again=False,
          )
        await asyncio.sleep(wait)
        waited += wait
      try:
        return await self._once(text)
      except _Failure as error:
        failure = error
      if not failure.again:
        break
      wait = 0.0
      if failure.wait_s is None:
        # Without jitter, all that failed together would return together.
        jitter = random.uniform(0.5, 1.0)
        wait = settings.retry_wait_s * 2**attempt * jitter
      else:
        self._open_at = max(self._open_at, time.monotonic() + failure.wait_s)
    assert failure is not None
    raise failure

  async def _once(self, text: str) -> Any:
    import openai

    settings = self._settings
    try:
      completion = await self._client.chat.completions.create(
        model=settings.model,
        messages=[{"role": "user", "content": text}],
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
      )
    except openai.APIStatusError as error:
      failure = self._failure(error)
    except openai.APITimeoutError:
      cause = f"no reply within {settings.timeout_s:g} s"
      failure = _Failure(cause, again=True)
    except openai.APIConnectionError as error:
      cause = self._clean(f"connection failed: {error.__cause__ or error}")
      failure = _Failure(cause, again=True)
    except (openai.APIError, ValueError) as error:
      cause = self._clean(f"unreadable reply: {error}")
      failure = _Failure(cause, again=True)
    else:
      if isinstance(completion, openai.types.chat.ChatCompletion):
        return completion
      # A page of HTML with status 200 comes back as a plain string.
      failure = _Failure("the reply is not a chat completion", again=True)
    # Raised here, the server's message is not part of any traceback.
    raise failure

  def _failure(self, error: Any) -> _Failure | judging.Stop:
    status, code = error.status_code, error.code
    body = error.body
    message = body.get("message") if isinstance(body, dict) else body
    cause = self._clean(f"HTTP {status}: {message or error.message}")
    cause = " ".join(cause.split())[:300]
    if status in (401, 403):
      mend = f"check the key in {self._settings.api_key_env or 'api_key_env'}"
    elif code == "insufficient_quota":
      mend = "the account's quota is spent; add credit and run again"
    elif status == 404:
      mend = f"check base_url and model={self._settings.model!r}"
    else:
      again = status in (408, 409, 429) or status >= 500
      return _Failure(cause, again=again, wait_s=_retry_after(error.response))
    return judging.Stop(f"{cause} ({mend})")

  def _clean(self, text: str) -> str:
    """Text from outside without the key, even if a server echoes it."""
    return text.replace(self._key, "[key]") if self._key else text


def _retry_after(response: Any) -> float | None:
  """Seconds that the server asks to wait, or None if it names no time."""
  headers = response.headers
  for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
    try:
      wait = float(headers.get(name, ""))
    except ValueError:
      continue
    if wait >= 0:
      return wait * unit_s
  try:
    date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    return max(0.0, date.timestamp() - time.time())
  except (TypeError, ValueError):
    return None
