"""The fake server's Batch API: files, batches, and how a batch can end.

A script names the ends in turn, the last for all that follow:

- completed: every line is answered;
- half: the first half is answered, then the batch expires;
- expired: nothing is answered;
- errors: every line failed with HTTP 500;
- failed: the batch is refused as a whole;
- hang: it is in progress for ever.

A batch is in progress when it is first looked at, and at its end from then on.
What a line asks for is answered by the server's rule when the batch is made,
as that is when it is paid for.
"""

import json
import re
from typing import Any

from dpo_jax.judging import fake_answers

ENDS = ("completed", "half", "expired", "errors", "failed", "hang")


class Batches:
  """Files and batches of one server.

  Attributes:
    files: contents by id.
    made: every batch that was made, in order.
    trouble: answers to give in place of the next calls, in turn.
  """

  def __init__(self, server: Any, script: str):
    self.server = server
    self.ends = script.split()
    unknown = [end for end in self.ends if end not in ENDS]
    if unknown or not self.ends:
      raise ValueError(
        f"batches={script!r} must name ends of batches, in turn: {ENDS}"
      )
    self.files: dict[str, bytes] = {}
    self.made: list[dict] = []
    self.trouble: list[fake_answers.Answer] = []

  def answer(
    self, method: str, path: str, headers: dict[str, str], data: bytes
  ) -> fake_answers.Answer:
    if self.trouble:
      return self.trouble.pop(0)
    _, _, kind, *rest = path.split("/")
    match method, kind, rest:
      case "POST", "files", []:
        return self._upload(headers, data)
      case "GET", "files", [name, "content"] if name in self.files:
        return fake_answers.Answer(
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
    return fake_answers.fails(404, f"no such path: {method} {path}")

  def _upload(self, headers: dict[str, str], data: bytes):
    boundary = re.search(
      r'boundary="?([^";]+)', headers.get("content-type", "")
    )
    parts = data.split(b"--" + boundary[1].encode()) if boundary else []
    for part in parts:
      head, _, body = part.partition(b"\r\n\r\n")
      if b'name="file"' in head:
        return _json(self._file(body.removesuffix(b"\r\n")))
    return fake_answers.fails(400, "no file in the form")

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
    answer = self.server.complete(fake_answers.Request({}, line["body"]))
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


def _json(value: Any) -> fake_answers.Answer:
  return fake_answers.Answer(body=json.dumps(value).encode())
