"""Judging through the Batch API: half the price, an answer within a day.

Open questions are uploaded as a file, a batch is made of it, and its results
are collected when it has ended; questions that expired, failed or could not
be read go into another batch. A batch is paid for when it is made, so it must
never be lost: a file in `<verdicts>/batches` says which questions go into it
before it is made, and under which id it was made before anything is waited
for. A run that was killed reads these files and collects the same batches. If
it was killed between the making and the note of the id, the server is asked
for a batch with the mark that the file holds.
"""

import asyncio
import collections
import dataclasses
import functools
import json
import pathlib
import uuid
from collections.abc import AsyncIterator, Callable, Set
from typing import Any

from dpo_jax import judging
from dpo_jax.core import settings
from dpo_jax.io import atomic, strict_json
from dpo_jax.judging import client, prompts, questions, transport, verdicts

_ENDED = ("completed", "failed", "expired", "cancelled")
_MARK = "dpo_jax"
# Of a batch's results: what a question may have on average, 512 tokens with 20
# alternatives each, and all of them together. 50,000 verdicts of a hundred
# tokens have 80 MiB.
_REPLY_BYTES = 2**20
_MAX_BYTES = 2**30
# Lines beyond two for each question: each costs time, however short.
_FREE_LINES = 1000


@dataclasses.dataclass
class Item:
  """A question in a batch: its key, how often it was asked, its failures."""

  key: str
  ask: int = 0
  failures: int = 0
  bound: float = 0.0

  def __post_init__(self):
    if min(self.ask, self.failures, self.bound) < 0:
      raise ValueError(f"{self} has negative numbers")


@dataclasses.dataclass
class Batch:
  """A batch as its file holds it; ids are "" until the server gave them."""

  mark: str
  judge: str
  parameters: str
  template_hash: str
  items: tuple[Item, ...]
  file_id: str = ""
  batch_id: str = ""


class Batches:
  """The batches of one directory of verdicts.

  Attributes:
    waiting: batches that were made and not collected.
    todo: items that are in no batch.
  """

  def __init__(
    self,
    used: client.Client,
    directory: pathlib.Path,
    open_questions: dict[str, list[questions.Case]],
    answered: Callable[[str, judging.Reply], None],
    commit: Callable[[], None],
  ):
    """Takes up what an earlier run left.

    Args:
      used: the server, its settings and budget.
      directory: of the batches' files.
      open_questions: cases by key, without an answer.
      answered: called with a key and its reply.
      commit: brings what was answered to the disk before it returns.

    Raises:
      ValueError: a batch of another judge is still to be collected.
    """
    self._client = used
    self._directory = directory
    self._questions = open_questions
    self._answered = answered
    self._commit = commit
    self.waiting = [
      self._load(path) for path in sorted(directory.glob("*.json"))
    ]
    taken = {item.key for batch in self.waiting for item in batch.items}
    for batch in self.waiting:
      for item in batch.items:
        used.budget.hold(item.bound)
    self.todo = collections.deque(
      Item(key) for key in open_questions if key not in taken
    )

  async def run(self, progress: Callable[[], None]) -> None:
    """Makes, waits for and collects batches until nothing is open.

    Raises:
      judging.Stop: the server refuses for good; batches stay on record.
    """
    for batch in self.waiting:
      await self._make(batch)
    while True:
      await self._submit()
      if not self.waiting:
        return
      for batch in list(self.waiting):
        shown = await self._call(
          lambda b=batch: self._client.sdk.batches.retrieve(b.batch_id)
        )
        if shown.status in _ENDED:
          await self._collect(batch, shown)
        progress()
      if self.waiting:
        await asyncio.sleep(self._client.settings.batch_poll_s)

  async def _submit(self) -> None:
    """Makes batches of all items that the budget allows for."""
    budget = self._client.budget
    while self.todo:
      items: list[Item] = []
      while self.todo and len(items) < self._client.settings.batch_size:
        item = self.todo[0]
        item.bound = self._client.bound(self._page(item))
        if not budget.take(item.bound):
          break
        items.append(self.todo.popleft())
      if not items:
        if not self.waiting:
          # Nothing is in flight whose end could make room.
          budget.close()
          self.todo.clear()
        return
      judge = self._client.judge
      batch = Batch(
        uuid.uuid4().hex,
        judge.name,
        judge.parameters,
        judge.template_hash,
        tuple(items),
      )
      self._save(batch)
      self.waiting.append(batch)
      await self._make(batch)

  async def _make(self, batch: Batch) -> None:
    """Brings a batch on record to the server, once."""
    if not batch.batch_id:
      await self._call(functools.partial(self._make_once, batch))

  async def _make_once(self, batch: Batch) -> None:
    sdk = self._client.sdk
    # An earlier attempt may have come through without our learning of it.
    if batch.file_id:
      async for shown in sdk.batches.list(limit=100):
        if (shown.metadata or {}).get(_MARK) == batch.mark:
          batch.batch_id = shown.id
          self._save(batch)
          return
    else:
      known = [item for item in batch.items if item.key in self._questions]
      data = "".join(map(self._line, known)).encode()
      file = await sdk.files.create(
        file=(f"{batch.mark}.jsonl", data), purpose="batch"
      )
      batch.file_id = file.id
      self._save(batch)
    made = await sdk.batches.create(
      input_file_id=batch.file_id,
      endpoint="/v1/chat/completions",
      completion_window="24h",
      metadata={_MARK: batch.mark},
    )
    batch.batch_id = made.id
    self._save(batch)

  async def _collect(self, batch: Batch, shown: Any) -> None:
    """Reads the results of an ended batch; its file goes once all are kept."""
    results: dict[str, dict] = {}
    for name in (shown.error_file_id, shown.output_file_id):
      if name:
        results |= await self._call(lambda n=name: self._fetch(n, batch))
    errors = shown.errors.data if shown.errors and shown.errors.data else []
    cause = f"batch {shown.status}"
    if errors:
      cause = f"{cause}: {errors[0].message}"
      self._stop_without_quota(errors[0].code, cause)
    again = [item for item in batch.items if self._settle(item, results, cause)]
    self._commit()
    self.todo.extend(again)
    self.waiting.remove(batch)
    self._path(batch).unlink()

  async def _fetch(self, name: str, batch: Batch) -> dict[str, dict]:
    """The results in a file of the server's, by custom id.

    Raises:
      transport.Failure: it is larger than the batch's replies can be.
    """
    wanted = {item.key for item in batch.items}
    files = self._client.sdk.files.with_streaming_response
    async with files.content(name) as response:
      return await _results(response.iter_bytes(), wanted)

  def _settle(self, item: Item, results: dict[str, dict], cause: str) -> bool:
    """Accounts for one item; true if it is to be asked again."""
    budget = self._client.budget
    result = results.get(item.key, {})
    response = result.get("response")
    if not isinstance(response, dict) or response.get("status_code") != 200:
      budget.settle_error(item.bound)
      return self._failed(item, result, cause)
    completion = response.get("body")
    usage = verdicts.usage(completion)
    if any(usage.values()):
      budget.settle(item.bound, **usage)
    else:
      budget.settle_unknown(item.bound)
    if item.key not in self._questions:
      return False  # the responses were changed since it was asked
    reply = self._client.read(completion)
    self._answered(item.key, reply)
    item.ask += 1
    return reply.choice == "missing" and item.ask < 2

  def _failed(self, item: Item, result: dict, cause: str) -> bool:
    if item.key not in self._questions:
      return False
    response, error = result.get("response"), result.get("error")
    again = True
    if isinstance(error, dict):
      cause = str(error.get("message") or error.get("code"))
    elif isinstance(response, dict):
      status, body = response.get("status_code"), response.get("body")
      error = body.get("error") if isinstance(body, dict) else None
      error = error if isinstance(error, dict) else {}
      cause = f"HTTP {status}: {error.get('message')}"
      again = status in (408, 409, 429) or (
        isinstance(status, int) and status >= 500
      )
    cause = self._client.clean(cause)[:300]
    if isinstance(error, dict):
      self._stop_without_quota(error.get("code"), cause)
    item.failures += 1
    if again and item.failures <= self._client.settings.max_retries:
      return True
    self._answered(item.key, judging.Reply("missing", "", "", cause))
    return False

  def _stop_without_quota(self, code: Any, cause: str) -> None:
    if code == "insufficient_quota":
      raise judging.Stop(
        f"{self._client.clean(cause)} (the account's quota is spent; add credit"
        " and run again)"
      )

  async def _call(self, call: Callable) -> Any:
    try:
      return await self._client.persist(lambda: self._client.attempt(call()))
    except transport.Failure as failure:
      raise judging.Stop(
        f"the Batch API does not answer: {failure}; batches that were made are"
        " on record, and the same command collects them"
      ) from None

  def _page(self, item: Item) -> str:
    question = questions.question(self._questions[item.key][0])
    return prompts.fill(self._client.template, question, item.ask)

  def _line(self, item: Item) -> str:
    line = {
      "custom_id": item.key,
      "method": "POST",
      "url": "/v1/chat/completions",
      "body": self._client.body(self._page(item)),
    }
    return json.dumps(line) + "\n"

  def _path(self, batch: Batch) -> pathlib.Path:
    return self._directory / f"{batch.mark}.json"

  def _save(self, batch: Batch) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(batch))
    atomic.write_text(self._path(batch), text)

  def _load(self, path: pathlib.Path) -> Batch:
    try:
      batch = settings.build(Batch, strict_json.read(path), "batch")
      # The mark names the file that is written and, in the end, deleted.
      if batch.mark != path.stem:
        raise ValueError(f"it has the mark {batch.mark!r:.80}")
    except ValueError as error:
      raise ValueError(f"{path}: not the record of a batch: {error}") from None
    judge = self._client.judge
    found = (batch.judge, batch.parameters, batch.template_hash)
    if found != (judge.name, judge.parameters, judge.template_hash):
      raise ValueError(
        f"{path}: batch {batch.batch_id or batch.mark} of {batch.judge!r} was"
        " asked with another model, template or parameters and is not collected"
        " yet: collect it with these, or delete the file to give it up"
      )
    return batch


async def _results(
  pieces: AsyncIterator[bytes], wanted: Set[str]
) -> dict[str, dict]:
  """Results by custom id, of the wanted ones.

  Lines that cannot be read or are longer than a reply may be are left out.

  Raises:
    transport.Failure: all of it is more than so many replies can be.
  """
  longest = transport.MAX_REPLY_BYTES
  most = min(longest + len(wanted) * _REPLY_BYTES, _MAX_BYTES)
  found: dict[str, dict] = {}
  size, lines, line = 0, 0, bytearray()
  async for piece in pieces:
    size += len(piece)
    lines += piece.count(b"\n")
    if size > most or lines > _FREE_LINES + 2 * len(wanted):
      raise transport.Failure(
        f"the results of {len(wanted)} questions have {size:,} bytes in"
        f" {lines:,} lines or more, which is too much",
        again=False,
        billed=True,
      )
    first, *others = piece.split(b"\n")
    for number, part in enumerate((first, *others)):
      if number:
        _keep(found, line, wanted)
        line = bytearray()
      # Of one that is too long only so much is held as tells that it is.
      line += part[: longest + 1 - len(line)]
  _keep(found, line, wanted)
  return found


def _keep(found: dict[str, dict], line: bytearray, wanted: Set[str]) -> None:
  if len(line) > transport.MAX_REPLY_BYTES:
    return
  try:
    result = json.loads(bytes(line))
    if result["custom_id"] in wanted:
      found[result["custom_id"]] = result
  except (ValueError, TypeError, KeyError, RecursionError):
    pass
