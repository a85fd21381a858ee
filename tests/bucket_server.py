"""Google Cloud Storage on this machine: real HTTP, objects with generations.

It answers what tensorstore asks through the JSON API: reading, writing and
deleting an object, on the condition of a generation or without, and listing in
pages. What Google refuses it refuses: requests without the token, to a bucket
that does not exist, and with a condition that does not hold. An object is there
when all its bytes have come.
"""

import contextlib
import http.server
import json
import threading
import time
import urllib.parse

TOKEN = "ya29.planted0123456789abcdef"
BUCKET = "my-bucket"


class Bucket:
  """What the server holds.

  Attributes:
    objects: {name: (bytes, generation)}.
    asked: (method, name) of each request, in order.
    fault: called with (method, name); an HTTP status answers instead, "cut"
      breaks the connection amid the body.
    listed: whether objects may be listed.
  """

  def __init__(self):
    self.objects = {}
    self.asked = []
    self.generation = 0
    self.changing = threading.Lock()
    self.address = ""
    self.heal()

  def heal(self):
    self.fault = lambda method, name: None
    self.listed = True
    self._holds, self._open = lambda method, name: False, threading.Event()
    self.held = threading.Event()

  def hold(self, when):
    """Answers no request of which `when` says so, until `go_on`."""
    self._holds, self._open = when, threading.Event()
    self.held = threading.Event()

  def go_on(self):
    self._open.set()

  def waits(self, method, name):
    if self._holds(method, name) and not self._open.is_set():
      self.held.set()
      self._open.wait(60)

  def until(self, condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not condition():
      assert time.monotonic() < end, self.asked[-20:]
      # Between two looks; what is waited for is seen, not slept for.
      time.sleep(0.001)

  def put(self, name, content):
    with self.changing:
      self.generation += 1
      self.objects[name] = (content, self.generation)

  def names(self, path):
    """Of the objects below a path, without it."""
    return sorted(
      name.removeprefix(f"{path}/")
      for name in list(self.objects)
      if name.startswith(f"{path}/")
    )


@contextlib.contextmanager
def serve():
  bucket = Bucket()

  class Handler(_Handler):
    pass

  Handler.bucket = bucket
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.daemon_threads = True
  bucket.address = f"http://127.0.0.1:{server.server_port}"
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield bucket
  finally:
    bucket.go_on()
    server.shutdown()
    thread.join()
    server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  bucket: Bucket

  def log_message(self, *_):
    pass

  def handle(self):
    # Whoever asked may be killed.
    with contextlib.suppress(ConnectionError):
      super().handle()

  def _handle(self):
    address = urllib.parse.urlsplit(self.path)
    asked = dict(urllib.parse.parse_qsl(address.query))
    _, _, quoted = address.path.partition("/o/")
    name = asked.get("name") or urllib.parse.unquote(quoted)
    method = self.command
    size = int(self.headers.get("Content-Length") or 0)
    self.bucket.asked.append((method, name))
    fault = self.bucket.fault(method, name)
    body = self.rfile.read(size // 2 if fault == "cut" else size)
    self.bucket.waits(method, name)
    if fault == "cut" or len(body) < size:
      self.close_connection = True
      self.connection.close()
    elif fault:
      self._refuse(fault, "out of order")
    elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
      self._refuse(401, "Invalid Credentials")
    elif f"/b/{BUCKET}/o" not in address.path:
      self._refuse(404, "The specified bucket does not exist.")
    elif not name:
      self._list(asked)
    else:
      with self.bucket.changing:
        self._object(method, name, asked.get("ifGenerationMatch"), body)

  do_GET = do_POST = do_DELETE = _handle

  def _object(self, method, name, wanted, body):
    objects = self.bucket.objects
    content, generation = objects.get(name, (None, 0))
    if wanted is not None and int(wanted) != generation:
      self._refuse(412, "conditionNotMet")
    elif method == "POST":
      self.bucket.generation += 1
      objects[name] = (body, self.bucket.generation)
      about = {"name": name, "generation": str(self.bucket.generation)}
      self._answer(200, json.dumps(about).encode())
    elif content is None:
      self._refuse(404, "No such object")
    elif method == "DELETE":
      del objects[name]
      self._answer(204, b"")
    else:
      self._answer(200, content, {"x-goog-generation": str(generation)})

  def _list(self, asked):
    if not self.bucket.listed:
      return self._refuse(403, "no storage.objects.list")
    first = asked.get("pageToken") or asked.get("startOffset", "")
    end = asked.get("endOffset", "\uffff")
    names = sorted(n for n in list(self.bucket.objects) if first <= n < end)
    page = {"items": [{"name": name} for name in names[:10]]}
    if names[10:]:
      page["nextPageToken"] = names[10]
    self._answer(200, json.dumps(page).encode())

  def _refuse(self, code, why):
    error = {"error": {"code": code, "message": why}}
    self._answer(code, json.dumps(error).encode())

  def _answer(self, code, body, headers=None):
    self.send_response(code)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    if code != 204:
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)
