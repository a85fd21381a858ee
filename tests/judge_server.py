"""An OpenAI-compatible judge on a port of this machine, which misbehaves.

A rule turns the n-th request (from 0) into an `Answer`:

  with judge_server.Server(judge_server.prefer_longer) as server:
    ...  # base_url=server.url

The server runs in a thread of its own and closes every connection it opened.
"""

import asyncio
import dataclasses
import json
import re
import threading
from collections.abc import Callable

_TEXT = re.compile(r"<<<([0-9a-f]{16})\n(.*?)\n\1>>>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Answer:
  """A response, headers as given; `cut` sends half of the body and hangs up.

  `hold_s` passes before anything is sent.
  """

  status: int = 200
  body: bytes = b""
  content_type: str = "application/json"
  headers: tuple[tuple[str, str], ...] = ()
  cut: bool = False
  hold_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Request:
  """What a client sent."""

  headers: dict[str, str]
  body: dict

  @property
  def prompt(self) -> str:
    return self.body["messages"][0]["content"]

  @property
  def texts(self) -> tuple[str, str, str]:
    """The fenced conversation, first and second text."""
    prompt, first, second = (text for _, text in _TEXT.findall(self.prompt))
    return prompt, first, second


Rule = Callable[[Request, int], Answer]


def says(text: str | None, finish_reason="stop", refusal=None) -> Answer:
  """A completion with this content."""
  completion = {
    "id": "completion-1",
    "object": "chat.completion",
    "created": 1,
    "model": "judge-as-served",
    "choices": [
      {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text, "refusal": refusal},
      }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
  }
  return Answer(body=json.dumps(completion).encode())


def fails(status: int, message="no", code=None, **headers: str) -> Answer:
  """An error as the API words it; header names with _ for -."""
  error = {"error": {"message": message, "type": "error", "code": code}}
  return Answer(
    status=status,
    body=json.dumps(error).encode(),
    headers=tuple((k.replace("_", "-"), v) for k, v in headers.items()),
  )


def prefer_longer(request: Request, number: int) -> Answer:
  """Prefers the text with more characters; the first if they are equal."""
  _, first, second = request.texts
  letter = "A" if len(first) >= len(second) else "B"
  return says(f"Comparison: one is longer.\nMore helpful: {letter}")


class Server:
  """Serves a rule; a context manager. `requests` holds what was asked."""

  def __init__(self, rule: Rule):
    self.rule = rule
    self.requests: list[Request] = []
    self.in_flight = 0
    self.most_in_flight = 0
    self.arrived = threading.Condition()
    self._connections: set[asyncio.Task] = set()

  def __enter__(self) -> "Server":
    ready = threading.Event()
    self._thread = threading.Thread(
      target=lambda: asyncio.run(self._serve(ready))
    )
    self._thread.start()
    ready.wait()
    return self

  def __exit__(self, *exc_info) -> None:
    self._loop.call_soon_threadsafe(self._stop.set)
    self._thread.join()

  def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
    """Returns once `count` requests have been received."""
    with self.arrived:
      if not self.arrived.wait_for(
        lambda: len(self.requests) >= count, timeout_s
      ):
        raise TimeoutError(f"{len(self.requests)} of {count} requests came")

  async def _serve(self, ready: threading.Event) -> None:
    self._loop = asyncio.get_running_loop()
    self._stop = asyncio.Event()
    server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
    self.port = server.sockets[0].getsockname()[1]
    self.url = f"http://127.0.0.1:{self.port}/v1"
    ready.set()
    await self._stop.wait()
    server.close()
    for task in self._connections:
      task.cancel()
    await asyncio.gather(*self._connections, return_exceptions=True)

  async def _connection(self, reader, writer) -> None:
    task = asyncio.current_task()
    assert task is not None
    self._connections.add(task)
    try:
      while await self._exchange(reader, writer):
        pass
    except (asyncio.IncompleteReadError, ConnectionError):
      pass  # the client hung up, which is its right
    except asyncio.CancelledError:
      pass  # the server is stopping
    finally:
      self._connections.discard(task)
      writer.close()

  async def _exchange(self, reader, writer) -> bool:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    headers = {
      name.lower(): value
      for name, value in (line.split(": ", 1) for line in lines)
    }
    data = await reader.readexactly(int(headers.get("content-length", "0")))
    if not first.startswith("POST /v1/chat/completions "):
      answer = fails(404, f"no such path: {first}")
    else:
      request = Request(headers, json.loads(data))
      with self.arrived:
        number = len(self.requests)
        self.requests.append(request)
        self.arrived.notify_all()
      answer = self.rule(request, number)
    self.in_flight += 1
    self.most_in_flight = max(self.most_in_flight, self.in_flight)
    try:
      await asyncio.sleep(answer.hold_s)
    finally:
      self.in_flight -= 1
    writer.write(_encode(answer))
    await writer.drain()
    return not answer.cut


def _encode(answer: Answer) -> bytes:
  headers = {
    "content-type": answer.content_type,
    "content-length": str(len(answer.body)),
    **dict(answer.headers),
  }
  head = f"HTTP/1.1 {answer.status} -\r\n" + "".join(
    f"{name}: {value}\r\n" for name, value in headers.items()
  )
  body = answer.body[: len(answer.body) // 2] if answer.cut else answer.body
  return head.encode() + b"\r\n" + body
