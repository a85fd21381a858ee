"""A hub to push models to, on this machine: real HTTP, commits on branches.

It answers what huggingface_hub asks when a repository and branches are made and
files are committed, small ones in the commit and weights through LFS, and gives
them back for download. What the hub would refuse it refuses: a commit to no
branch, LFS content that was never sent, or sent with another hash, and requests
without the token.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

TOKEN = "hf_planted0123456789abcdef"


class Hub:
  """What the server holds: {repo: {branch: {path: bytes}}}.

  Attributes:
    repos: see above.
    private: repositories that were made so.
    commits: (repo, branch) of each commit, in order.
    broken: called with (method, path); true answers with 500.
  """

  def __init__(self):
    self.repos = {}
    self.private = set()
    self.commits = []
    self.objects = {}
    self.broken = lambda method, path: False
    self.address = ""


@contextlib.contextmanager
def serve():
  hub = Hub()

  class Handler(_Handler):
    pass

  Handler.hub = hub
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  hub.address = f"http://127.0.0.1:{server.server_port}"
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield hub
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  hub: Hub

  def log_message(self, *_):
    pass

  def _handle(self):
    size = int(self.headers.get("Content-Length") or 0)
    body = self.rfile.read(size)
    if self.headers.get("Transfer-Encoding") == "chunked":
      body = b"".join(self._chunks())
    path = urllib.parse.urlparse(self.path).path
    if self.hub.broken(self.command, path):
      return self._answer(500, b"out of order")
    signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
    if not signed and not path.startswith("/objects/"):
      return self._answer(401, b"", {"X-Error-Message": "no token"})
    parts = [urllib.parse.unquote(part) for part in path.split("/")[1:]]
    match (self.command, *parts):
      case ("POST", "api", "repos", "create"):
        return self._create(json.loads(body))
      case ("POST", "api", "validate-yaml"):
        return self._json({"errors": [], "warnings": []})
      case ("PUT", "objects", oid):
        if hashlib.sha256(body).hexdigest() != oid:
          return self._answer(400, b"another hash")
        self.hub.objects[oid] = body
        return self._answer(200, b"")
      case ("POST", user, name, "info", "lfs", "objects", "batch"):
        return self._batch(json.loads(body))
      case (method, "api", "models", user, name, *rest):
        return self._api(method, f"{user}/{name}", rest, body)
      case ("GET" | "HEAD", user, name, "resolve", revision, *rest):
        return self._file(f"{user}/{name}", revision, "/".join(rest))
    return self._answer(404, b"")

  do_GET = do_HEAD = do_POST = do_PUT = _handle

  def _chunks(self):
    while size := int(self.rfile.readline(), 16):
      yield self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()

  def _create(self, wanted):
    repo = f"{wanted['organization']}/{wanted['name']}"
    url = {"url": f"{self.hub.address}/{repo}"}
    if repo in self.hub.repos:
      return self._json(url, 409)
    self.hub.repos[repo] = {"main": {}}
    if wanted.get("visibility") == "private":
      self.hub.private.add(repo)
    return self._json(url)

  def _batch(self, wanted):
    objects = []
    for item in wanted["objects"]:
      if item["oid"] not in self.hub.objects:
        href = f"{self.hub.address}/objects/{item['oid']}"
        item |= {"actions": {"upload": {"href": href}}}
      objects.append(item)
    self._json({"transfer": "basic", "objects": objects})

  def _api(self, method, repo, rest, body):
    branches = self.hub.repos.get(repo)
    if branches is None:
      return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
    kind, revision = [*rest, "", ""][:2]
    if kind == "refs":
      refs = [{"name": b, "ref": b, "targetCommit": _sha(b)} for b in branches]
      return self._json({"branches": refs, "tags": [], "converts": []})
    if kind == "branch" and method == "POST":
      if revision in branches:
        return self._json({"error": "exists"}, 409)
      branches[revision] = dict(branches["main"])
      return self._json({})
    found = next((b for b in branches if revision in (b, _sha(b))), None)
    if kind in ("preupload", "commit", "tree", "revision") and found is None:
      return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
    if kind == "preupload":
      asked = json.loads(body)["files"]
      return self._json({"files": [_mode(f, branches[found]) for f in asked]})
    if kind == "commit":
      return self._commit(repo, found, body)
    if kind == "tree":
      files = branches[found]
      return self._json([_entry(name, files[name]) for name in sorted(files)])
    files = branches[found or "main"]
    siblings = [{"rfilename": name} for name in sorted(files)]
    sha = _sha(found or "main")
    return self._json({"id": repo, "sha": sha, "siblings": siblings})

  def _commit(self, repo, branch, body):
    files = dict(self.hub.repos[repo][branch])
    for line in body.splitlines():
      step = json.loads(line)
      value = step["value"]
      match step["key"]:
        case "file":
          files[value["path"]] = base64.b64decode(value["content"])
        case "lfsFile":
          content = self.hub.objects.get(value["oid"])
          if content is None or len(content) != value["size"]:
            return self._answer(400, b"the object was not sent")
          files[value["path"]] = content
        case "deletedFile":
          del files[value["path"]]
    self.hub.repos[repo][branch] = files
    self.hub.commits.append((repo, branch))
    url = f"{self.hub.address}/{repo}/commit/{_sha(branch)}"
    return self._json(
      {"success": True, "commitUrl": url, "commitOid": _sha(branch)}
    )

  def _file(self, repo, revision, name):
    branches = self.hub.repos.get(repo, {})
    found = next((b for b in branches if revision in (b, _sha(b))), None)
    data = branches.get(found, {}).get(name)
    if data is None:
      code = "EntryNotFound" if found else "RevisionNotFound"
      return self._answer(404, b"", {"X-Error-Code": code})
    etag = hashlib.sha1(data).hexdigest()
    return self._answer(
      200, data, {"X-Repo-Commit": _sha(found), "ETag": f'"{etag}"'}
    )

  def _json(self, value, code=200):
    self._answer(code, json.dumps(value).encode())

  def _answer(self, code, body, headers=None):
    # Whoever asked may be gone.
    with contextlib.suppress(ConnectionError):
      self._send(code, body, headers)

  def _send(self, code, body, headers):
    self.send_response(code)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)


def _sha(branch):
  return hashlib.sha1(branch.encode()).hexdigest()


def _mode(file, files):
  """How a file is sent, and the hash of what is there: Git's, or LFS's."""
  path, data = file["path"], files.get(file["path"])
  lfs = path.endswith(".safetensors")
  about = {"path": path, "uploadMode": "lfs" if lfs else "regular"}
  if data is not None and lfs:
    about["oid"] = hashlib.sha256(data).hexdigest()
  elif data is not None:
    about["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
  return about | {"shouldIgnore": False}


def _entry(name, data):
  oid = hashlib.sha1(data).hexdigest()
  return {"type": "file", "path": name, "oid": oid, "size": len(data)}
