"""Asks all open questions of a plan, a few at a time or in batches.

Answers are committed as they arrive; those that arrive together share a flush
to the disk.
"""

import asyncio
import collections
import pathlib
import threading
from collections.abc import Callable

from dpo_jax import judging, records
from dpo_jax.interface import console
from dpo_jax.judging import account, batch_api, budget, client, questions


class Writer:
  """Rows on their way to their files; `serve` has to run beside the callers.

  A flush takes milliseconds, in which other answers arrive: it runs in a
  thread, and all that arrived meanwhile is the next one.
  """

  def __init__(self):
    self._pending = collections.defaultdict(list)
    self._arrived = asyncio.Event()
    self._written = asyncio.Event()
    self._lock = threading.Lock()

  def put(self, case: questions.Case, row: records.Verdict) -> None:
    self._pending[case.store].append(row)

  async def commit(self) -> None:
    """Returns when the rows that were put so far are on disk."""
    self._arrived.set()
    await self._written.wait()

  async def serve(self) -> None:
    while True:
      await self._arrived.wait()
      self._arrived.clear()
      written, self._written = self._written, asyncio.Event()
      pending, self._pending = self._pending, collections.defaultdict(list)
      await asyncio.to_thread(self._append, pending)
      written.set()

  def flush(self) -> None:
    """Commits what is pending, after the flush that may be going on."""
    pending, self._pending = self._pending, collections.defaultdict(list)
    self._append(pending)

  def _append(self, pending) -> None:
    with self._lock:
      for store, rows in pending.items():
        store.append_many(rows)


async def ask(
  concurrency: int,
  judge: judging.Judge,
  used: client.Client | None,
  plan: questions.Plan,
  books: account.Books,
) -> None:
  """Asks the open questions and commits each answer as it arrives."""
  rows = Writer()
  books.open(plan, concurrency)
  bar = console.Bar(len(plan.questions), f"judge {judge.name}", "verdict")

  def put(key: str, reply: judging.Reply) -> None:
    books.asked += 1
    cases = plan.questions[key]
    for case, row in zip(
      cases, questions.rows(judge, key, cases, reply), strict=True
    ):
      rows.put(case, row)
      books.put(row)
      plan.outcomes[case.unit] = row.verdict

  def progress(count: int = 1) -> None:
    bar.update(count, books.shown)

  with bar:
    for case, row in plan.rows:
      rows.put(case, row)
      plan.outcomes[case.unit] = row.verdict
    try:
      if used is not None and used.settings.mode == "batch":
        await _batches(used, books.directory, plan, put, rows, progress)
      else:
        await _live(concurrency, judge, plan, put, rows, progress)
    finally:
      rows.flush()


async def _live(
  concurrency: int,
  judge: judging.Judge,
  plan: questions.Plan,
  put: Callable[[str, judging.Reply], None],
  rows: Writer,
  progress: Callable[[], None],
) -> None:
  remaining = iter(plan.questions.items())

  async def work() -> None:
    for key, cases in remaining:
      try:
        reply = await judge.ask(questions.question(cases[0]))
      except budget.Spent:
        return
      put(key, reply)
      # Only then the next question: a kill repeats `concurrency` calls at most.
      await rows.commit()
      progress()

  await _all(work, min(concurrency, len(plan.questions)), rows.serve)


async def _batches(
  used: client.Client,
  directory: pathlib.Path,
  plan: questions.Plan,
  put: Callable[[str, judging.Reply], None],
  rows: Writer,
  progress: Callable[[int], None],
) -> None:
  shown = 0

  def look() -> None:
    nonlocal shown
    done = sum(
      plan.outcomes.get(cases[0].unit, "missing") != "missing"
      for cases in plan.questions.values()
    )
    progress(done - shown)
    shown = done

  batches = batch_api.Batches(
    used, directory / "batches", plan.questions, put, rows.flush
  )
  await batches.run(look)


async def _all(work: Callable, count: int, serve: Callable) -> None:
  """Runs `count` workers beside a server for them.

  The first error ends them all and is raised as it is, out of its group.
  """
  try:
    async with asyncio.TaskGroup() as group:
      helper = group.create_task(serve())
      workers = [group.create_task(work()) for _ in range(count)]
      await asyncio.gather(*workers)
      helper.cancel()
  except ExceptionGroup as errors:
    error = errors.exceptions[0]
  else:
    return
  raise error
