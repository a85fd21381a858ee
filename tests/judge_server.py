"""An OpenAI-compatible judge on a port of this machine, for tests.

A rule turns the n-th request (from 0) into an `Answer`:

  with judge_server.Server(judge_server.prefer_longer) as server:
    ...  # base_url=server.url

Chat completions, files and batches are served, in a thread of its own.
"""

import asyncio
import dataclasses
import json
import math
import re
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

_REASONS = {200: "OK", 401: "Unauthorized", 429: "Too Many Requests"}
_FENCED = re.compile(r"<<<([0-9a-f]{16})\n(.*?)\n\1>>>", re.DOTALL)
_BREAKS = "\r\n|[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]"


def fenced(page: str) -> list[str]:
  """The enclosed texts of a page, without fence lines and bars."""
  return [unbarred(text) for _, text in _FENCED.findall(page)]


def unbarred(text: str) -> str:
  assert text.startswith("| ")
  return re.sub(rf"({_BREAKS})\| ", r"\1", text[2:])


@dataclasses.dataclass(frozen=True)
class Answer:
  """A response, headers as given.

  `hold_s` passes before anything is sent; `cut` sends half of the body and
  hangs up; `drip_s` passes after every byte of it; `reset` sends nothing but
  a reset of the connection.
  """

  status: int = 200
  body: bytes = b""
  content_type: str = "application/json"
  headers: tuple[tuple[str, str], ...] = ()
  cut: bool = False
  reset: bool = False
  hold_s: float = 0.0
  drip_s: float = 0.0


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
    """The conversation, the first and the second text."""
    prompt, first, second = fenced(self.prompt)
    return prompt, first, second


Rule = Callable[[Request, int], Answer]


def says(
  text: str | None, finish_reason="stop", refusal=None, **fields
) -> Answer:
  """A completion with this content; `fields` of it are put over the usual."""
  logprobs = fields.pop("logprobs", None)
  completion = {
    "id": "completion-1",
    "object": "chat.completion",
    "created": 1,
    "model": "judge-as-served",
    "system_fingerprint": "fp_fake",
    "choices": [
      {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text, "refusal": refusal},
        "logprobs": logprobs,
      }
    ],
    "usage": {"prompt_tokens": 100, "completion_tokens": 20},
  }
  return Answer(body=json.dumps(completion | fields).encode())


def fails(status: int, message="no", code=None, **headers: str) -> Answer:
  """An error as the API words it; header names with _ for -."""
  error = {"error": {"message": message, "type": "error", "code": code}}
  return Answer(
    status=status,
    body=json.dumps(error).encode(),
    headers=tuple((k.replace("_", "-"), v) for k, v in headers.items()),
  )


def verdict(request: Request, choice: str) -> Answer:
  """A, B or tie in the form that was asked for, with what it cost."""
  body = request.body
  if "response_format" in body:
    reason = {"comparison": "One is better.", "choice": choice}
    tokens = [json.dumps(reason)[: -len(choice) - 2], choice, '"}']
  else:
    tokens = [f"Comparison: one is better.\n{_label(request)} ", choice]
  logprobs = None
  if body.get("logprobs"):
    logprobs = {"content": [_logprobs(t, t == choice) for t in tokens]}
  text = "".join(tokens)
  usage = {
    # Some four bytes a token, as English has.
    "prompt_tokens": math.ceil(len(request.prompt.encode()) / 4),
    "completion_tokens": math.ceil(len(text) / 4),
  }
  return says(text, logprobs=logprobs, usage=usage)


def _label(request: Request) -> str:
  end = request.prompt[-200:].rpartition(">>>")[2]
  labels = re.findall(r"^(.*:) A$", end, re.MULTILINE)
  return labels[-1] if labels else "More helpful:"


def _logprobs(token: str, chosen: bool) -> dict:
  """Nine to one for the choice over another, certainty for all else."""
  shares = {token: 1.0}
  if chosen:
    shares = {token: 0.9, "B" if token == "A" else "A": 0.1}
  top = [{"token": t, "logprob": math.log(p)} for t, p in shares.items()]
  return {**top[0], "top_logprobs": top}


def prefer_longer(request: Request, number: int) -> Answer:
  """The text with more characters wins; the first if they are equal."""
  _, first, second = request.texts
  return verdict(request, "A" if len(first) >= len(second) else "B")


def always(choice: str) -> Rule:
  return lambda request, number: verdict(request, choice)


def struck(**changes) -> Rule:
  """The longer text wins, but the sending goes wrong: fields of `Answer`."""
  return lambda request, number: dataclasses.replace(
    prefer_longer(request, number), **changes
  )


def in_turn(*steps: Answer | Rule) -> Rule:
  """One step a request; the last stands for all that follow."""

  def rule(request: Request, number: int) -> Answer:
    step = steps[min(number, len(steps) - 1)]
    return step if isinstance(step, Answer) else step(request, number)

  return rule


class Batches:
  """Files and batches of one server, and how a batch can end.

  A script names the ends in turn, the last for all that follow:

  - completed: every line is answered;
  - half: the first half is answered, then the batch expires;
  - expired: nothing is answered;
  - errors: every line failed with HTTP 500;
  - failed: the batch is refused as a whole;
  - hang: it is in progress for ever.

  A batch is in progress when it is first looked at, and at its end from then
  on. What a line asks for is answered by the server's rule when the batch is
  made, as that is when it is paid for.

  Attributes:
    files: contents by id.
    made: every batch that was made, in order.
    trouble: answers to give in place of the next calls, in turn.
  """

  def __init__(self, server: Any, script: str):
    self.server = server
    self.ends = script.split()
    self.files: dict[str, bytes] = {}
    self.made: list[dict] = []
    self.trouble: list[Answer] = []

  def answer(
    self, method: str, path: str, headers: dict[str, str], data: bytes
  ) -> Answer:
    if self.trouble:
      return self.trouble.pop(0)
    _, _, kind, *rest = path.split("/")
    match method, kind, rest:
      case "POST", "files", []:
        return self._upload(headers, data)
      case "GET", "files", [name, "content"] if name in self.files:
        return Answer(
          body=self.files[name], content_type="application/octet-stream"
        )
      case "POST", "batches", []:
        return self._make(json.loads(data))
      case "GET", "batches", []:
        shown = [batch["shown"] for batch in reversed(self.made)]
        return _json({"object": "list", "data": shown, "has_more": False})
      case "GET", "batches", [name]:
        for batch in self.made:
          if batch["shown"]["id"] == name:
            return self._look(batch)
    return fails(404, f"no such path: {method} {path}")

  def _upload(self, headers: dict[str, str], data: bytes):
    boundary = re.search(
      r'boundary="?([^";]+)', headers.get("content-type", "")
    )
    parts = data.split(b"--" + boundary[1].encode()) if boundary else []
    for part in parts:
      head, _, body = part.partition(b"\r\n\r\n")
      if b'name="file"' in head:
        return _json(self._file(body.removesuffix(b"\r\n")))
    return fails(400, "no file in the form")

  def _file(self, data: bytes) -> dict:
    name = f"file-{len(self.files)}"
    self.files[name] = data
    return {
      "id": name,
      "object": "file",
      "bytes": len(data),
      "created_at": 1,
      "filename": "batch.jsonl",
      "purpose": "batch",
      "status": "processed",
    }

  def _make(self, body: dict):
    end = self.ends[min(len(self.made), len(self.ends) - 1)]
    lines = self.files[body["input_file_id"]].decode().split("\n")
    asked = [json.loads(line) for line in lines if line]
    shown = {
      "id": f"batch-{len(self.made)}",
      "object": "batch",
      "status": "validating",
      "endpoint": body["endpoint"],
      "completion_window": body["completion_window"],
      "input_file_id": body["input_file_id"],
      "created_at": 1,
      "metadata": body.get("metadata"),
    }
    self.made.append({"shown": shown, "final": self._final(end, asked)})
    return _json(shown)

  def _final(self, end: str, asked: list[dict]) -> dict:
    """What the batch will be like at its end."""
    if end == "hang":
      return {"status": "in_progress"}
    if end == "failed":
      error = {"code": "invalid", "message": "the batch is refused"}
      return {"status": "failed", "errors": {"data": [error]}}
    done = {"completed": asked, "half": asked[: len(asked) // 2]}.get(end, [])
    good = [self._line(line) for line in done]
    bad = []
    for line in asked[len(done) :]:
      if end == "errors":
        response = {"status_code": 500, "body": {"error": {"message": "no"}}}
        result = {"response": response, "error": None}
      else:
        error = {"code": "batch_expired", "message": "came too late"}
        result = {"response": None, "error": error}
      bad.append({"custom_id": line["custom_id"], **result})
    final = {
      "status": "completed" if end in ("completed", "errors") else "expired"
    }
    for name, results in (("output_file_id", good), ("error_file_id", bad)):
      if results:
        text = "".join(json.dumps(result) + "\n" for result in results)
        final[name] = self._file(text.encode())["id"]
    return final

  def _line(self, line: dict) -> dict:
    answer = self.server.complete(Request({}, line["body"]))
    response = {
      "status_code": answer.status,
      "request_id": "r",
      "body": json.loads(answer.body),
    }
    return {"id": "l", "custom_id": line["custom_id"], "response": response}

  def _look(self, batch: dict):
    shown = batch["shown"]
    if shown["status"] == "validating":
      shown["status"] = "in_progress"
    else:
      shown |= batch["final"]
    return _json(shown)


def _json(value: Any) -> Answer:
  return Answer(body=json.dumps(value).encode())


class Server:
  """Serves a rule; a context manager, which closes every connection.

  Attributes:
    rule: answers chat completions, each line of a batch among them.
    requests: all chat completions that were asked for, in order.
    batches: the files and batches that were sent.
    in_flight: requests received and not answered yet.
    most_in_flight: the highest number of these so far.
  """

  def __init__(self, rule: Rule, *, batch_script: str = "completed"):
    self.rule = rule
    self.batches = Batches(self, batch_script)
    self.requests: list[Request] = []
    self.in_flight = 0
    self.most_in_flight = 0
    self.arrived = threading.Condition()
    self.connections: set[asyncio.Transport] = set()

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
    listener = await self._loop.create_server(
      lambda: _Connection(self), "127.0.0.1", 0
    )
    port = listener.sockets[0].getsockname()[1]
    self.url = f"http://127.0.0.1:{port}/v1"
    ready.set()
    try:
      await self._stop.wait()
    finally:
      listener.close()
      for transport in list(self.connections):
        transport.abort()
      await listener.wait_closed()

  def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
    """Returns once `count` chat completions have been asked for."""
    with self.arrived:
      if not self.arrived.wait_for(
        lambda: len(self.requests) >= count, timeout_s
      ):
        raise TimeoutError(f"{len(self.requests)} of {count} requests came")

  def answer(
    self, method: str, path: str, headers: dict[str, str], data: bytes
  ) -> Answer:
    """What is sent back for a request."""
    # A proxy gets the whole address.
    path = urllib.parse.urlsplit(path).path
    if method == "POST" and path == "/v1/chat/completions":
      return self.complete(Request(headers, json.loads(data)))
    if path.startswith(("/v1/files", "/v1/batches")):
      return self.batches.answer(method, path, headers, data)
    return fails(404, f"no such path: {method} {path}")

  def complete(self, request: Request) -> Answer:
    """The rule's answer to one chat completion, which is counted."""
    with self.arrived:
      number = len(self.requests)
      self.requests.append(request)
      self.arrived.notify_all()
    return self.rule(request, number)


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
      answer = fails(500, f"fake server: {error!r}")
    if answer.hold_s:
      self._later(answer.hold_s, self._send, answer)
    else:
      self._send(answer)

  def _later(self, wait_s: float, call, *arguments) -> None:
    loop = asyncio.get_running_loop()
    self._timer = loop.call_later(wait_s, call, *arguments)

  def _send(self, answer: Answer) -> None:
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


def _head(answer: Answer) -> bytes:
  lines = [
    f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, '-')}",
    f"content-type: {answer.content_type}",
    f"content-length: {len(answer.body)}",
    *(f"{name}: {value}" for name, value in answer.headers),
  ]
  return "\r\n".join(lines).encode() + b"\r\n\r\n"
