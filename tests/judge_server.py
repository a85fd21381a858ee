"""A local OpenAI-compatible server of chat completions, files and batches.

A rule maps the n-th request (from 0) to a `Reply`:

  with judge_server.Server(judge_server.prefer_longer) as server:
    ...  # base_url=server.url
"""

import dataclasses
import http.server
import json
import math
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable

_FENCED = re.compile(r"<<<([0-9a-f]{16})\n(.*?)\n\1>>>", re.DOTALL)
_BREAKS = "\r\n|[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]"


def fenced(page: str) -> list[str]:
  """The enclosed texts of a page, without fence lines and bars."""
  return [unbarred(text) for _, text in _FENCED.findall(page)]


def unbarred(text: str) -> str:
  assert text.startswith("| ")
  return re.sub(rf"({_BREAKS})\| ", r"\1", text[2:])


@dataclasses.dataclass(frozen=True)
class Reply:
  """An HTTP response.

  It is sent after `hold_s`. `cut` sends half of the body and closes; `drip_s`
  is the time between bytes; `reset` only resets the connection.
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
  headers: dict[str, str]
  body: dict
  path: str = ""

  @property
  def prompt(self) -> str:
    return self.body["messages"][0]["content"]

  @property
  def texts(self) -> tuple[str, str, str]:
    """The conversation, the first and the second text."""
    prompt, first, second = fenced(self.prompt)
    return prompt, first, second


Rule = Callable[[Request, int], Reply]


def _json(value, status=200, headers=()) -> Reply:
  return Reply(status, json.dumps(value).encode(), headers=tuple(headers))


def says(text: str | None, finish_reason="stop", refusal=None, **fields):
  """A completion with this content; `fields` replace the usual ones."""
  choice = {
    "index": 0,
    "finish_reason": finish_reason,
    "message": {"role": "assistant", "content": text, "refusal": refusal},
    "logprobs": fields.pop("logprobs", None),
  }
  completion = {
    "id": "completion-1",
    "object": "chat.completion",
    "created": 1,
    "model": "judge-as-served",
    "system_fingerprint": "fp_fake",
    "choices": [choice],
    "usage": {"prompt_tokens": 100, "completion_tokens": 20},
  }
  return _json(completion | fields)


def fails(status: int, message="no", code=None, **headers: str) -> Reply:
  """An API error; header names with _ for -."""
  error = {"error": {"message": message, "type": "error", "code": code}}
  named = [(name.replace("_", "-"), value) for name, value in headers.items()]
  return _json(error, status, named)


def verdict(request: Request, choice: str) -> Reply:
  """A, B or tie in the form that the request asks for."""
  body = request.body
  if "response_format" in body:
    reason = {"comparison": "One is better.", "choice": choice}
    tokens = [json.dumps(reason)[: -len(choice) - 2], choice, '"}']
  else:
    end = request.prompt[-200:].rpartition(">>>")[2]
    labels = re.findall(r"^(.*:) A$", end, re.MULTILINE)
    label = labels[-1] if labels else "More helpful:"
    tokens = [f"Comparison: one is better.\n{label} ", choice]
  logprobs = None
  if body.get("logprobs"):
    logprobs = {"content": [_logprobs(t, t == choice) for t in tokens]}
  text = "".join(tokens)
  usage = {
    "prompt_tokens": math.ceil(len(request.prompt.encode()) / 4),
    "completion_tokens": math.ceil(len(text) / 4),
  }
  return says(text, logprobs=logprobs, usage=usage)


def _logprobs(token: str, chosen: bool) -> dict:
  """0.9 for the choice and 0.1 for another, 1 for any other token."""
  shares = {token: 1.0}
  if chosen:
    shares = {token: 0.9, "B" if token == "A" else "A": 0.1}
  top = [{"token": t, "logprob": math.log(p)} for t, p in shares.items()]
  return {**top[0], "top_logprobs": top}


def prefer_longer(request: Request, number: int) -> Reply:
  """The text with more characters wins; the first if they are equal."""
  _, first, second = request.texts
  return verdict(request, "A" if len(first) >= len(second) else "B")


def always(choice: str) -> Rule:
  return lambda request, number: verdict(request, choice)


def in_turn(*steps: Reply | Rule) -> Rule:
  """One step per request; the last is repeated."""

  def rule(request: Request, number: int) -> Reply:
    step = steps[min(number, len(steps) - 1)]
    return step if isinstance(step, Reply) else step(request, number)

  return rule


def held(after: int, seconds: float = 60.0, first: float = 0.0) -> Rule:
  """`prefer_longer` that replies to the first `after` requests only."""
  return lambda request, number: dataclasses.replace(
    prefer_longer(request, number),
    hold_s=seconds if number >= after else first,
  )


class Batches:
  """Files and batches, and the ends of batches in turn, the last repeated.

  completed: every line has a reply. half: the first half has, then the batch
  expires. expired: none has. errors: every line failed with HTTP 500. failed:
  the whole batch is refused. hang: in progress for ever.

  A batch is in progress at its first poll and at its end from then on. The rule
  replies to its lines as it is created, which is when it is billed.

  Attributes:
    files: contents by id.
    made: every batch, in order.
    trouble: replies in place of the next calls.
  """

  def __init__(self, server: "Server", script: str):
    self.server = server
    self.ends = script.split()
    self.files: dict[str, bytes] = {}
    self.made: list[dict] = []
    self.trouble: list[Reply] = []

  def reply(self, method: str, path: str, content_type: str, data: bytes):
    if self.trouble:
      return self.trouble.pop(0)
    _, _, kind, *rest = path.split("/")
    match method, kind, rest:
      case "POST", "files", []:
        boundary = re.search(r'boundary="?([^";]+)', content_type)[1]
        for part in data.split(b"--" + boundary.encode()):
          head, _, body = part.partition(b"\r\n\r\n")
          if b'name="file"' in head:
            return _json(self._file(body.removesuffix(b"\r\n")))
      case "GET", "files", [name, "content"]:
        return Reply(body=self.files[name])
      case "POST", "batches", []:
        return self._make(json.loads(data))
      case "GET", "batches", []:
        shown = [batch["shown"] for batch in reversed(self.made)]
        return _json({"object": "list", "data": shown, "has_more": False})
      case "GET", "batches", [name]:
        (batch,) = (b for b in self.made if b["shown"]["id"] == name)
        shown = batch["shown"]
        if shown["status"] == "validating":
          shown["status"] = "in_progress"
        else:
          shown |= batch["final"]
        return _json(shown)
    return fails(404, f"no such path: {method} {path}")

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

  def _make(self, body: dict) -> Reply:
    names = ("endpoint", "completion_window", "input_file_id", "metadata")
    shown = {
      "id": f"batch-{len(self.made)}",
      "object": "batch",
      "status": "validating",
      "created_at": 1,
      **{name: body.get(name) for name in names},
    }
    end = self.ends[min(len(self.made), len(self.ends) - 1)]
    self.made.append({"shown": shown})
    self.finish(len(self.made) - 1, end)
    return _json(shown)

  def finish(self, number: int, end: str) -> None:
    """Sets how a batch ends."""
    batch = self.made[number]
    data = self.files[batch["shown"]["input_file_id"]].decode()
    asked = [json.loads(line) for line in data.split("\n") if line]
    if end == "hang":
      batch["final"] = {"status": "in_progress"}
      return
    if end == "failed":
      error = {"code": "invalid", "message": "the batch is refused"}
      batch["final"] = {"status": "failed", "errors": {"data": [error]}}
      return
    done = {"completed": asked, "half": asked[: len(asked) // 2]}.get(end, [])
    status = "completed" if end in ("completed", "errors") else "expired"
    batch["final"] = {"status": status}
    bad = {"error": {"code": "batch_expired", "message": "came too late"}}
    if end == "errors":
      body = {"error": {"message": "no"}}
      bad = {"response": {"status_code": 500, "body": body}}
    for name, lines, result in (
      ("output_file_id", done, self._result),
      ("error_file_id", asked[len(done) :], lambda line: bad),
    ):
      if lines:
        results = [{"custom_id": x["custom_id"]} | result(x) for x in lines]
        text = "\n".join(map(json.dumps, results))
        batch["final"][name] = self._file(text.encode())["id"]

  def _result(self, line: dict) -> dict:
    reply = self.server.complete(Request({}, line["body"]))
    body = json.loads(reply.body)
    return {"response": {"status_code": reply.status, "body": body}}


class Server(http.server.ThreadingHTTPServer):
  """Serves a rule; a context manager, which closes every connection.

  Attributes:
    rule: of chat completions, the lines of a batch among them.
    requests: all chat completions, in order.
    batches: the files and batches.
    most_in_flight: the most requests without a reply at a time.
  """

  daemon_threads = True
  block_on_close = False
  request_queue_size = 64

  def __init__(self, rule: Rule, *, batch_script: str = "completed"):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.url = f"http://127.0.0.1:{self.server_port}/v1"
    self.rule = rule
    self.batches = Batches(self, batch_script)
    self.requests: list[Request] = []
    self.in_flight = self.most_in_flight = 0
    self.arrived = threading.Condition()
    self.over = threading.Event()

  def __enter__(self) -> "Server":
    threading.Thread(
      target=self.serve_forever, args=(0.01,), daemon=True
    ).start()
    return self

  def __exit__(self, *exc_info) -> None:
    self.over.set()
    self.shutdown()
    self.server_close()

  def handle_error(self, request, client_address) -> None:
    pass  # a client that was killed, or that gave up

  def wait_for(self, count: int) -> None:
    """Returns once `count` chat completions have been requested."""
    with self.arrived:
      assert self.arrived.wait_for(lambda: len(self.requests) >= count, 60)

  def complete(self, request: Request) -> Reply:
    with self.arrived:
      number = len(self.requests)
      self.requests.append(request)
      self.arrived.notify_all()
    return self.rule(request, number)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  server: Server

  def log_message(self, *unused) -> None:
    pass

  def do_GET(self) -> None:
    server = self.server
    with server.arrived:
      server.in_flight += 1
      server.most_in_flight = max(server.most_in_flight, server.in_flight)
    data = self.rfile.read(int(self.headers.get("content-length", "0")))
    try:
      reply = self._reply(data)
    except Exception as error:  # a broken rule must not look like a hang
      reply = fails(500, f"fake server: {error!r}")
    server.over.wait(reply.hold_s) if reply.hold_s else None
    with server.arrived:
      server.in_flight -= 1
    if reply.reset or server.over.is_set():
      linger = struct.pack("ii", 1, 0)
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
      self.close_connection = True
      return
    body = reply.body[: len(reply.body) // 2] if reply.cut else reply.body
    self.close_connection = reply.cut
    self.send_response(reply.status)
    self.send_header("content-type", reply.content_type)
    self.send_header("content-length", str(len(reply.body)))
    for header in reply.headers:
      self.send_header(*header)
    self.end_headers()
    if not reply.drip_s:
      self.wfile.write(body)
    else:
      for byte in body:
        self.wfile.write(bytes([byte]))
        server.over.wait(reply.drip_s)

  do_POST = do_GET

  def _reply(self, data: bytes) -> Reply:
    # A proxy gets the whole address.
    path = urllib.parse.urlsplit(self.path).path
    if path == "/v1/chat/completions":
      headers = {name.lower(): value for name, value in self.headers.items()}
      request = Request(headers, json.loads(data), self.path)
      return self.server.complete(request)
    if path.startswith(("/v1/files", "/v1/batches")):
      kind = self.headers.get("content-type", "")
      return self.server.batches.reply(self.command, path, kind, data)
    return fails(404, f"no such path: {path}")
