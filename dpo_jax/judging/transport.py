"""Below a request: connections, waits that a server asks for, failures."""

import dataclasses
import email.utils
import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

from dpo_jax.judging import limits

# Of one reply: 4,096 tokens with 20 alternatives each have 8 MiB.
MAX_REPLY_BYTES = 16 * 2**20


class Failure(Exception):
  """A request that brought no reply.

  Attributes:
    again: whether asking again may help.
    wait_s: what the server asked for.
    billed: whether it may have been paid for all the same.
    headers: of the server's answer, if there was one.
  """

  def __init__(
    self,
    cause: str,
    *,
    again: bool,
    wait_s: float | None = None,
    billed: bool = False,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(cause)
    self.headers = headers or {}
    self.again = again
    self.wait_s = wait_s
    self.billed = billed


def spread(concurrency: int) -> Any:
  """A transport over several small pools of connections, used in turn.

  A pool looks at each of its connections twice for every request, which in one
  pool of 64 took a quarter of a call's time.
  """
  import httpx2

  class Spread(httpx2.AsyncBaseTransport):
    def __init__(self):
      # Reading the system's certificates takes longer than many requests.
      context = httpx2.create_ssl_context()
      self._pools = [
        httpx2.AsyncHTTPTransport(verify=context)
        for _ in range(max(1, concurrency // 8))
      ]
      self._turns = itertools.cycle(self._pools)

    async def handle_async_request(self, request):
      return await next(self._turns).handle_async_request(request)

    async def aclose(self):
      for pool in self._pools:
        await pool.aclose()

  return Spread()


@dataclasses.dataclass(frozen=True)
class StatusError:
  """What an answer of an error status says, as the SDK's own errors name it."""

  status_code: int
  message: str
  body: Any
  code: str | None
  type: str | None
  response: Any


async def fetch(http: Any, request: Any) -> tuple[Any, bytes]:
  """A response and its body; ValueError if that passes `MAX_REPLY_BYTES`."""
  response = await http.send(request, stream=True)
  try:
    body = bytearray()
    async for piece in response.aiter_bytes():
      body += piece
      if len(body) > MAX_REPLY_BYTES:
        raise ValueError(f"more than {MAX_REPLY_BYTES >> 20} MiB")
  finally:
    await response.aclose()
  return response, bytes(body)


def status_error(response: Any, content: bytes) -> StatusError:
  """Reads {"error": {"message", "code", "type"}} or whatever stands there."""
  try:
    body = json.loads(content)
  except (ValueError, RecursionError):
    body = None
  if isinstance(body, dict):
    body = body.get("error", body)
  fields = body if isinstance(body, dict) else {}
  text = content[:1000].decode("utf-8", "replace").strip()
  return StatusError(
    status_code=response.status_code,
    message=text or f"Error code: {response.status_code}",
    body=body,
    code=fields.get("code"),
    type=fields.get("type"),
    response=response,
  )


def retry_after(headers: Mapping[str, str]) -> float | None:
  """Seconds that the server asks to wait, or None if it names no time."""
  for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
    wait = limits.seconds(headers.get(name, ""))
    if wait is not None:
      return wait * unit_s
  try:
    date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    return max(0.0, date.timestamp() - time.time())
  except (TypeError, ValueError):
    return None
