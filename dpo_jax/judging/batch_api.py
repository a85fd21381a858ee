"""Judging through the Batch API: half the price, replies within a day.

A batch is billed once it is created and must not be lost: its record in
`<verdicts>/batches` is written before it is created, and gets its id before the
first poll.
"""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import uuid
from collections.abc import Callable
from typing import Any

from dpo_jax import judging
from dpo_jax.core import settings
from dpo_jax.io import atomic, strict_json
from dpo_jax.judging import budget, prompts, questions, verdicts
from dpo_jax.judging import client as client_lib

_URL = "/v1/chat/completions"
# Questions of a batch: servers take 50,000 lines and 200 MB.
_SIZE = 10_000


@dataclasses.dataclass
class Item:
  """A question's key, its replies and failures, and its bound in dollars."""

  key: str
  ask: int = 0
  failures: int = 0
  bound: float = 0.0


@dataclasses.dataclass
class Batch:
  """Record of a batch on disk; ids are "" until the server assigns them.

  `mark` names the file, and identifies the batch in the server's list.
  """

  mark: str
  judge: str
  parameters: str
  template_hash: str
  items: tuple[Item, ...]
  file_id: str = ""
  batch_id: str = ""


class Batches:
  """Recorded batches that are `waiting`, and items `todo` of further ones."""

  def __init__(
    self,
    client: client_lib.Client,
    directory: pathlib.Path,
    open_questions: dict[str, list[questions.Case]],
    record: Callable[[str, judging.Reply], None],
    commit: Callable[[], None],
  ):
    """Loads the records; replies go to `record`, and to disk by `commit`."""
    self.client, self.directory = client, directory
    self.questions, self.record, self.commit = open_questions, record, commit
    self.identity = client.judge.identity
    self.waiting = [self._load(path) for path in self.directory.glob("*.json")]
    taken = {i.key: i.bound for batch in self.waiting for i in batch.items}
    self.client.budget.reserved = sum(taken.values())
    self.todo = [Item(key) for key in self.questions if key not in taken]

  async def run(self) -> None:
    """Creates, polls and collects batches until no question is open."""
    while True:
      self._fill()
      if not self.waiting:
        return
      for batch in list(self.waiting):
        if not batch.batch_id:
          await self._call(self._create, batch)
        retrieve = self.client.sdk.batches.retrieve
        shown = await self._call(retrieve, batch.batch_id)
        if shown.status in ("completed", "failed", "expired", "cancelled"):
          await self._collect(batch, shown)
      if self.waiting:
        await asyncio.sleep(self.client.settings.batch_poll_s)

  def _fill(self) -> None:
    """Records batches of all items that fit into the budget."""
    spend, most = self.client.budget, self.client.settings.max_tokens
    while self.todo:
      items: list[Item] = []
      with contextlib.suppress(budget.Exhausted):
        while self.todo and len(items) < _SIZE:
          page = self._page(self.todo[0])
          self.todo[0].bound = spend.bound(page, most)
          spend.reserve(self.todo[0].bound)
          items.append(self.todo.pop(0))
      if not items:
        return
      batch = Batch(uuid.uuid4().hex, *self.identity, tuple(items))
      self._save(batch)
      self.waiting.append(batch)

  async def _create(self, batch: Batch) -> None:
    """Creates a recorded batch, unless the server's list has it already."""
    sdk, metadata = self.client.sdk, {"dpo_jax": batch.mark}
    if batch.file_id:
      async for shown in sdk.batches.list(limit=100):
        if shown.metadata == metadata:
          batch.batch_id = shown.id
          return self._save(batch)
    else:
      data = ""
      for item in batch.items:
        if item.key in self.questions:
          line = {"custom_id": item.key, "method": "POST", "url": _URL}
          line["body"] = self.client.body(self._page(item))
          data += json.dumps(line) + "\n"
      file = (f"{batch.mark}.jsonl", data.encode())
      file = await sdk.files.create(file=file, purpose="batch")
      batch.file_id = file.id
      self._save(batch)
    created = await sdk.batches.create(
      input_file_id=batch.file_id,
      endpoint=_URL,
      completion_window="24h",
      metadata=metadata,
    )
    batch.batch_id = created.id
    return self._save(batch)

  async def _collect(self, batch: Batch, shown: Any) -> None:
    """Records the replies of an ended batch, then deletes its record."""
    results: dict[str, dict] = {}
    for name in filter(None, (shown.error_file_id, shown.output_file_id)):
      file = await self._call(self.client.sdk.files.content, name)
      results |= read_results(file.content)
    errors = (shown.errors and shown.errors.data) or []
    causes = [f"batch {shown.status}", *(error.message for error in errors[:1])]
    error = {"message": ": ".join(causes), "code": errors and errors[0].code}
    failures = [
      self._read(item, results.get(item.key, {"error": error}))
      for item in batch.items
    ]
    self.commit()
    self.waiting.remove(batch)
    (self.directory / f"{batch.mark}.json").unlink()
    for failure in failures:
      if failure and failure.fatal:
        raise failure

  def _read(self, item: Item, result: dict) -> client_lib.Failure | None:
    """Records the reply in a result, or queues the item for another batch."""
    response, client = verdicts.as_dict(result.get("response")), self.client
    body, status = response.get("body"), response.get("status_code")
    error = result.get("error") or verdicts.error(body)
    if status == 200 and not error:
      failure, reply = None, client.read(body)
      cost = client.budget.cost_of(verdicts.usage(body), item.bound)
      item.ask += 1
      again = reply.choice == "missing" and item.ask < 2
    else:
      error = verdicts.as_dict(error)
      status = error.get("code") if status == 200 else status
      failure, cost = client.failure(status, error), 0.0
      reply = client_lib.failed(judging.NOTHING, failure)
      item.failures += 1
      retries = client.settings.max_retries
      again = failure.retryable and item.failures <= retries
    client.budget.settle(item.bound, cost)
    # Not for a text that was edited meanwhile. A fatal failure leaves the
    # question open; an unreadable reply is recorded for its tokens.
    if item.key in self.questions and not (failure and failure.fatal):
      self.todo.extend([item] * again)
      if not (again and failure):
        self.record(item.key, reply)
    return failure

  async def _call(self, function: Callable, value: Any) -> Any:
    return await self.client.retry(lambda: self.client.send(function(value)))

  def _page(self, item: Item) -> str:
    question = self.questions[item.key][0].question
    return prompts.fill(self.client.template, question, item.ask)

  def _save(self, batch: Batch) -> None:
    self.directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(batch))
    atomic.write_text(self.directory / f"{batch.mark}.json", text)

  def _load(self, path: pathlib.Path) -> Batch:
    try:
      batch = settings.build(Batch, strict_json.read(path), "batch")
      # The mark names a file that is written and deleted.
      if batch.mark != path.stem:
        raise ValueError(f"it has the mark {batch.mark!r:.80}")
    except ValueError as error:
      raise ValueError(f"{path}: not the record of a batch: {error}") from None
    if (batch.judge, batch.parameters, batch.template_hash) != self.identity:
      raise ValueError(
        f"{path}: batch {batch.batch_id} is of another judge,"
        f" {batch.judge!r}: collect it with that judge, or delete the file"
      )
    return batch


def read_results(content: bytes) -> dict[str, dict]:
  """Results of an output file by custom id, without unreadable lines."""
  lines = map(verdicts.as_dict, map(verdicts.parse, content.split(b"\n")))
  return {str(line.get("custom_id")): line for line in lines}
