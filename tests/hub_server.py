"""A hub of one dataset on this machine: real HTTP, a folder's real files.

It answers what `datasets` asks of the hub: the list of a revision's files, and
the files, whole or in ranges. `asked` logs every request for a file's content.
"""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse

COMMIT = "a" * 40


@contextlib.contextmanager
def serve(root: pathlib.Path, repo: str, revisions: tuple[str, ...]):
  """Serves `root` as each revision of a dataset; gives (address, asked)."""
  asked: list[str] = []

  class Handler(_Handler):
    pass

  Handler.root, Handler.asked = root, asked
  Handler.repo, Handler.revisions = repo, (*revisions, COMMIT)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}", asked
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  root: pathlib.Path
  asked: list[str]
  repo: str
  revisions: tuple[str, ...]

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    address = urllib.parse.urlparse(self.path)
    api, files = (
      f"/api/datasets/{self.repo}/",
      f"/datasets/{self.repo}/resolve/",
    )
    for start, answer in (
      (f"{api}revision/", self._revision),
      (f"{api}tree/", self._tree),
      (files, self._file),
    ):
      if address.path.startswith(start):
        revision, _, name = address.path.removeprefix(start).partition("/")
        if urllib.parse.unquote(revision) in self.revisions:
          answer(urllib.parse.unquote(name), "recursive=true" in address.query)
          return
    self._missing()

  def _revision(self, *_):
    files = [p for p in self.root.rglob("*") if p.is_file()]
    names = [{"rfilename": p.relative_to(self.root).as_posix()} for p in files]
    self._json({"id": self.repo, "sha": COMMIT, "siblings": names})

  def _tree(self, name, recursive):
    folder = self.root / name
    if folder.is_dir():
      found = folder.rglob("*") if recursive else folder.iterdir()
      self._json([self._entry(path) for path in sorted(found)])
    else:
      self._missing()

  def _entry(self, path):
    name = path.relative_to(self.root).as_posix()
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    oid = hashlib.sha1(name.encode()).hexdigest()
    return {"type": kind, "path": name, "oid": oid, "size": size}

  def _file(self, name, _):
    path = self.root / name
    if not path.is_file():
      self._missing()
      return
    data = path.read_bytes()
    headers = {
      "X-Repo-Commit": COMMIT,
      "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
    }
    wanted = self.headers.get("Range")
    if self.command == "GET":
      self.asked.append(name)
    if wanted and self.command == "GET":
      first, last = wanted.removeprefix("bytes=").split("-")
      last = min(int(last or len(data)), len(data) - 1)
      headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
      self._answer(206, data[int(first) : last + 1], headers)
    else:
      self._answer(200, data, headers)

  def _missing(self):
    self._answer(
      404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
    )

  def _json(self, value):
    self._answer(200, json.dumps(value).encode(), {})

  def _answer(self, code, body, headers):
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)
