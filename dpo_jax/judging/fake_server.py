"""An OpenAI-compatible judge on a port of this machine, which misbehaves.

  python -m dpo_jax.judging.fake_server --script="longer 500%5 429=1%2"

serves until it is interrupted, on the address that it prints; give that to
judge.py as --config.server.base_url to try a run offline. `fake_answers` says
what may stand in a script. Chat completions, files and batches are served.

In a test a rule turns the n-th request (from 0) into an `Answer`:

  with fake_server.Server(fake_answers.prefer_longer) as server:
    ...  # base_url=server.url

That server runs in a thread of its own and closes every connection it opened.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import sys
import threading
import time

from dpo_jax.judging import fake_answers, fake_batches

_REASONS = {200: "OK", 401: "Unauthorized", 429: "Too Many Requests"}


class Server:
  """Serves a rule; a context manager, or `serve` within a loop.

  Attributes:
    rule: answers chat completions, each line of a batch among them.
    requests: all chat completions that were asked for, in order.
    batches: the files and batches that were sent; `fake_batches.Batches`.
    per_minute: requests taken in a minute, stated in x-ratelimit headers and
      enforced with 429; 0 for any number.
    in_flight: requests received and not answered yet.
    most_in_flight: the highest number of these so far.
  """

  def __init__(
    self,
    rule: fake_answers.Rule,
    *,
    latency_s: float = 0.0,
    per_minute: int = 0,
    batch_script: str = "completed",
    keep: bool = True,
  ):
    self.rule = rule
    self.latency_s = latency_s
    self.per_minute = per_minute
    self.batches = fake_batches.Batches(self, batch_script)
    self.requests: list[fake_answers.Request] = []
    self.count = 0
    self.in_flight = 0
    self.most_in_flight = 0
    self.arrived = threading.Condition()
    self.connections: set[asyncio.Transport] = set()
    self._keep = keep
    self._minute = (0, 0)
    self._started = time.monotonic()

  def __enter__(self) -> "Server":
    ready = threading.Event()
    self._thread = threading.Thread(
      target=lambda: asyncio.run(self._run(ready))
    )
    self._thread.start()
    ready.wait()
    return self

  def __exit__(self, *exc_info) -> None:
    self._loop.call_soon_threadsafe(self._stop.set)
    self._thread.join()

  async def _run(self, ready: threading.Event) -> None:
    self._loop = asyncio.get_running_loop()
    self._stop = asyncio.Event()
    async with self.serve(0):
      ready.set()
      await self._stop.wait()

  @contextlib.asynccontextmanager
  async def serve(self, port: int):
    """Listens on the port, any free one for 0, while the context lasts."""
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(
      lambda: _Connection(self), "127.0.0.1", port
    )
    self.port = listener.sockets[0].getsockname()[1]
    self.url = f"http://127.0.0.1:{self.port}/v1"
    try:
      yield self
    finally:
      listener.close()
      for transport in list(self.connections):
        transport.abort()
      await listener.wait_closed()

  def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
    """Returns once `count` chat completions have been asked for."""
    with self.arrived:
      if not self.arrived.wait_for(lambda: self.count >= count, timeout_s):
        raise TimeoutError(f"{self.count} of {count} requests came")

  def answer(
    self, method: str, path: str, headers: dict[str, str], data: bytes
  ) -> fake_answers.Answer:
    """What is sent back for a request."""
    path = path.partition("?")[0]
    if method == "POST" and path == "/v1/chat/completions":
      answer = self.complete(fake_answers.Request(headers, json.loads(data)))
      return self._limited(answer) if self.per_minute else answer
    if path.startswith(("/v1/files", "/v1/batches")):
      return self.batches.answer(method, path, headers, data)
    return fake_answers.fails(404, f"no such path: {method} {path}")

  def complete(self, request: fake_answers.Request) -> fake_answers.Answer:
    """The rule's answer to one chat completion, which is counted."""
    with self.arrived:
      number = self.count
      self.count += 1
      if self._keep:
        self.requests.append(request)
      self.arrived.notify_all()
    answer = self.rule(request, number)
    if self.latency_s:
      hold_s = answer.hold_s + self.latency_s
      answer = dataclasses.replace(answer, hold_s=hold_s)
    return answer

  def _limited(self, answer: fake_answers.Answer) -> fake_answers.Answer:
    # Minutes count from the server's start.
    now = time.monotonic() - self._started
    minute, taken = self._minute
    if int(now // 60) != minute:
      minute, taken = int(now // 60), 0
    self._minute = (minute, taken + 1)
    left = self.per_minute - taken - 1
    reset_s = f"{60 - now % 60:.3f}s"
    if left < 0:
      answer = fake_answers.fails(429, "too many requests in this minute")
    return dataclasses.replace(
      answer,
      headers=(
        *answer.headers,
        ("x-ratelimit-limit-requests", str(self.per_minute)),
        ("x-ratelimit-remaining-requests", str(max(0, left))),
        ("x-ratelimit-reset-requests", reset_s),
      ),
    )


class _Connection(asyncio.Protocol):
  """One connection: a request, its answer, the next request."""

  def __init__(self, server: Server):
    self._server = server
    self._data = bytearray()
    self._busy = False
    self._timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport) -> None:
    self._transport = transport
    self._server.connections.add(transport)

  def connection_lost(self, exc) -> None:
    self._server.connections.discard(self._transport)
    if self._timer:
      self._timer.cancel()
    if self._busy:
      self._server.in_flight -= 1

  def data_received(self, data: bytes) -> None:
    self._data += data
    self._next()

  def _next(self) -> None:
    end = self._data.find(b"\r\n\r\n")
    if self._busy or end < 0:
      return
    first, *lines = self._data[:end].decode("latin-1").split("\r\n")
    headers = {
      name.lower(): value.strip()
      for name, _, value in (line.partition(":") for line in lines)
    }
    start = end + 4
    length = int(headers.get("content-length", "0"))
    if len(self._data) < start + length:
      return
    data = bytes(self._data[start : start + length])
    del self._data[: start + length]
    self._busy = True
    server = self._server
    server.in_flight += 1
    server.most_in_flight = max(server.most_in_flight, server.in_flight)
    method, path, *_ = first.split(" ")
    try:
      answer = server.answer(method, path, headers, data)
    except Exception as error:  # a broken rule must not look like a hang
      answer = fake_answers.fails(500, f"fake server: {error!r}")
    if answer.hold_s:
      self._later(answer.hold_s, self._send, answer)
    else:
      self._send(answer)

  def _later(self, wait_s: float, call, *arguments) -> None:
    loop = asyncio.get_running_loop()
    self._timer = loop.call_later(wait_s, call, *arguments)

  def _send(self, answer: fake_answers.Answer) -> None:
    if answer.reset:
      self._transport.abort()
      return
    body = answer.body[: len(answer.body) // 2] if answer.cut else answer.body
    head = _head(answer)
    if answer.drip_s:
      self._transport.write(head)
      self._drip(body, answer.drip_s)
      return
    self._transport.write(head + body)
    self._done(close=answer.cut)

  def _drip(self, body: bytes, wait_s: float) -> None:
    if not body:
      self._done(close=False)
      return
    self._transport.write(body[:1])
    self._later(wait_s, self._drip, body[1:], wait_s)

  def _done(self, *, close: bool) -> None:
    self._busy = False
    self._server.in_flight -= 1
    if close:
      self._transport.close()
    else:
      self._next()


def _head(answer: fake_answers.Answer) -> bytes:
  lines = [
    f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, '-')}",
    f"content-type: {answer.content_type}",
    f"content-length: {len(answer.body)}",
    *(f"{name}: {value}" for name, value in answer.headers),
  ]
  return "\r\n".join(lines).encode() + b"\r\n\r\n"


async def _main(arguments: argparse.Namespace) -> None:
  server = Server(
    fake_answers.read_script(arguments.script),
    latency_s=arguments.latency_s,
    per_minute=arguments.requests_per_minute,
    batch_script=arguments.batches,
    keep=False,
  )
  async with server.serve(arguments.port):
    print(server.url, flush=True)
    try:
      await asyncio.Event().wait()
    finally:
      print(f"{server.count} chat completions were asked for", file=sys.stderr)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax.judging.fake_server",
    description=(fake_answers.__doc__ or "").partition("\n")[0],
  )
  add = parser.add_argument
  add("--script", default="longer", help="see dpo_jax/judging/fake_answers.py")
  add("--port", type=int, default=0, help="0 for any free one")
  add("--latency-s", type=float, default=0.0, help="before every answer")
  add(
    "--requests-per-minute",
    type=int,
    default=0,
    help="a rate limit to keep, told in headers; 0 for none",
  )
  add(
    "--batches",
    default="completed",
    help="how batches end: completed, half, expired, failed, hang; in turn",
  )
  arguments = parser.parse_args()
  try:
    asyncio.run(_main(arguments))
  except ValueError as error:
    parser.error(str(error))
  except KeyboardInterrupt:
    pass


if __name__ == "__main__":
  main()
