"""Google Cloud Storage on this machine: real HTTP, objects with generations.

It answers what gcsfs asks through the JSON API: writing in one request or in
chunks, reading, deleting, and listing in pages. What Google refuses it refuses:
requests without the token, to a bucket that does not exist, and creating what
is there. An object is there when all its bytes have come.
"""

import contextlib
import http.server
import json
import threading
import urllib.parse
import zlib

TOKEN = "ya29.planted0123456789abcdef"
BUCKET = "my-bucket"


class Bucket:
  """What the server holds.

  Attributes:
    objects: {name: bytes}.
    asked: (act, name) of each request: "write", "read", "about", "delete" or
      "list".
    fault: called with (act, name); an HTTP status answers instead, "lost"
      breaks the connection after the act was carried out.
  """

  def __init__(self):
    self.objects = {}
    self.asked = []
    self.changed = threading.Condition()
    self.address = ""
    self.heal()

  def heal(self):
    self.fault = lambda act, name: None
    self._holds, self._open = lambda act, name: False, threading.Event()
    self.held = threading.Event()

  def hold(self, when):
    """Answers no request of which `when` says so, until `go_on`."""
    self._holds, self._open = when, threading.Event()
    self.held = threading.Event()

  def go_on(self):
    self._open.set()

  def until(self, name):
    """Waits for an object."""
    with self.changed:
      assert self.changed.wait_for(lambda: name in self.objects, 60)

  def waits(self, act, name):
    if self._holds(act, name) and not self._open.is_set():
      self.held.set()
      self._open.wait(60)

  def environment(self):
    """What points gcsfs here."""
    return {
      "STORAGE_EMULATOR_HOST": self.address,
      "FSSPEC_GCS_TOKEN": TOKEN,
      "FETCH_RAW_TOKEN_EXPIRY": "false",
    }


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
    size = int(self.headers.get("Content-Length") or 0)
    body = self.rfile.read(size)
    if len(body) < size:
      raise ConnectionError("it was killed")
    name = asked.get("name") or urllib.parse.unquote(quoted)
    if asked.get("uploadType") == "multipart":
      _, about, content = body.split(b"--==0==", 2)
      name = json.loads(about.split(b"\n\n", 1)[1])["name"]
      body = content.split(b"\n\n", 1)[1].removesuffix(b"\n--==0==--")
    act = self._act(address.path, name)
    self.bucket.asked.append((act, name))
    self.bucket.waits(act, name)
    fault = self.bucket.fault(act, name)
    if type(fault) is int:
      self._refuse(fault, "out of order")
    elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
      self._refuse(401, "No such token")
    elif f"/b/{BUCKET}/o" not in address.path:
      self._refuse(404, "The specified bucket does not exist.")
    else:
      self.lost = fault == "lost"
      with self.bucket.changed:
        # Seen once this is done; a client that was killed gets no reply.
        self.bucket.changed.notify_all()
        getattr(self, f"_{act}")(name, asked, body)

  do_GET = do_POST = do_DELETE = _handle

  def _act(self, path, name):
    if self.command == "GET" and not name:
      return "list"
    if self.command == "GET":
      return "read" if path.startswith("/download/") else "about"
    return {"POST": "write", "DELETE": "delete"}[self.command]

  def _write(self, name, asked, body):
    if asked.get("uploadType") == "resumable" and "chunks" not in asked:
      place = f"{self.bucket.address}{self.path}&chunks=1"
      return self._answer(200, b"", {"Location": place})
    if asked.get("ifGenerationMatch") == "0" and name in self.bucket.objects:
      return self._refuse(412, "conditionNotMet")
    self.bucket.objects[name] = body
    return self._answer(200, json.dumps(self._describe(name)).encode())

  def _about(self, name, asked, body):
    if name not in self.bucket.objects:
      return self._refuse(404, "No such object")
    return self._answer(200, json.dumps(self._describe(name)).encode())

  def _read(self, name, asked, body):
    content = self.bucket.objects.get(name)
    if content is None:
      return self._refuse(404, "No such object")
    if span := self.headers.get("Range"):
      first, last = span.removeprefix("bytes=").split("-")
      return self._answer(206, content[int(first) : int(last) + 1])
    return self._answer(200, content)

  def _delete(self, name, asked, body):
    if self.bucket.objects.pop(name, None) is None:
      return self._refuse(404, "No such object")
    return self._answer(204, b"")

  def _list(self, name, asked, body):
    prefix, first = asked.get("prefix", ""), asked.get("pageToken", "")
    names = sorted(
      x for x in self.bucket.objects if x.startswith(prefix) and x >= first
    )
    items = [self._describe(x) for x in names[:10]]
    page = {"kind": "storage#objects", "items": items}
    if names[10:]:
      page["nextPageToken"] = names[10]
    self._answer(200, json.dumps(page).encode())

  def _describe(self, name):
    content = self.bucket.objects[name]
    generation = str(zlib.crc32(content))
    return {"name": name, "size": str(len(content)), "generation": generation}

  def _refuse(self, code, why):
    error = {"error": {"code": code, "message": why}}
    self._answer(code, json.dumps(error).encode())

  def _answer(self, code, body, headers=None):
    if getattr(self, "lost", False):
      self.lost, self.close_connection = False, True
      return
    self.send_response(code)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    if code != 204:
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)
