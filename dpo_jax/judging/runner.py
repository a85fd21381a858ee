"""A judging run, top to bottom.

responses/*.jsonl -> cases in both orders, controls -> questions without a reply
on disk -> the judge, live or in batches -> verdicts/*.jsonl and judge.json

A key hashes all that a reply depends on; only a missing verdict is asked again.
"""

import asyncio
import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from dpo_jax import judging
from dpo_jax.core import console
from dpo_jax.core import settings as settings_lib
from dpo_jax.io import jsonl, records
from dpo_jax.judging import batch_api, budget, questions, rewards, usage
from dpo_jax.judging import client as client_lib

_Store = jsonl.Store[records.Verdict]


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """The judge and its questions; fields as in configs/judge.py."""

  kind: Literal["server", rewards.Name]
  orders: Literal["both", "random"]
  seed: int
  concurrency: int
  verdicts: str
  controls: questions.ControlSettings
  server: client_lib.ServerSettings | None

  def __post_init__(self):
    settings_lib.check(self)
    if not re.fullmatch(r"verdicts(-[A-Za-z0-9_-]{1,60})?", self.verdicts):
      raise ValueError(
        f"verdicts={self.verdicts!r} must be 'verdicts' or 'verdicts-NAME',"
        " with letters, digits, _ and - in NAME"
      )
    if (self.kind == "server") != (self.server is not None):
      raise ValueError(
        f"kind={self.kind!r} with server={self.server}: a judge of kind"
        " 'server' needs its server, a reward has none"
      )


def run(settings: JudgeSettings, workdir: str | os.PathLike) -> usage.Summary:
  """Judges `workdir`/responses/*.jsonl, and prints and returns a summary.

  Raises:
    ValueError: wrong settings or files; nothing was asked.
    judging.Stop: the judge cannot continue; verdicts so far are on disk.
  """
  try:
    asyncio.get_running_loop()
  except RuntimeError:
    summary = asyncio.run(_run(settings, workdir))
  else:
    summary = _in_thread(_run(settings, workdir))
  console.result(str(summary), **dataclasses.asdict(summary))
  if summary.nothing_read:
    judge = settings.server.base_url if settings.server else settings.kind
    raise judging.Stop(
      f"no verdict was read from {judge}: see the causes above"
    )
  return summary


def estimate(
  settings: JudgeSettings, workdir: str | os.PathLike
) -> usage.Estimate:
  """Calls, tokens and dollars of `run`; sends and writes nothing."""
  client = _client(settings)
  plan, log = _prepare(settings, workdir, client, jsonl.Store.peek)
  return usage.estimate(plan, client, log.prompts)


async def _run(
  settings: JudgeSettings, workdir: str | os.PathLike
) -> usage.Summary:
  async with contextlib.AsyncExitStack() as stack:
    client = _client(settings)
    if client:
      await stack.enter_async_context(client)
    plan, log = _prepare(settings, workdir, client, stack.enter_context)
    if client and plan.questions:
      count = usage.estimate(plan, client, log.prompts)
      console.say(str(count), "estimate", **dataclasses.asdict(count))
    log.write(plan)
    try:
      await _ask(settings.concurrency, client, plan, log)
    finally:
      summary = log.write(plan)
  return summary


def _client(settings: JudgeSettings) -> client_lib.Client | None:
  server, concurrency = settings.server, settings.concurrency
  return client_lib.Client(server, concurrency) if server else None


def _prepare(
  settings: JudgeSettings,
  workdir: str | os.PathLike,
  client: client_lib.Client | None,
  open_store: Callable[[_Store], _Store],
) -> tuple[questions.Plan, usage.UsageLog]:
  """Reads responses and verdicts, and plans the questions."""
  judge = client.judge if client else rewards.judge(settings.kind)
  directory = pathlib.Path(workdir) / settings.verdicts
  files = questions.read_responses(pathlib.Path(workdir) / "responses")
  names = {*files, *(path.name for path in directory.glob("*.jsonl"))}
  stores = {
    name: open_store(jsonl.Store(directory / name, records.Verdict))
    for name in sorted(names | {questions.CONTROLS_FILE})
  }
  controls = stores.pop(questions.CONTROLS_FILE)
  rows = [row for store in [*stores.values(), controls] for row in store.rows]
  questions.check_judge(directory, judge, rows)
  cases = []
  for name, store in stores.items():
    questions.check_units(store, files.get(name, []))
    cases += [
      questions.Case(store, response, order)
      for response in files.get(name, [])
      if response.chosen.strip()
      for order in questions.orders(settings.orders, settings.seed, response)
    ]
  drawn = (settings.controls, settings.orders, settings.seed)
  cases += list(questions.controls(*drawn, cases, controls))
  responses = [response for file in files.values() for response in file]
  log = usage.UsageLog(directory, judge, client, rows, responses)
  return questions.plan(judge, cases, rows), log


async def _ask(
  concurrency: int,
  client: client_lib.Client | None,
  plan: questions.Plan,
  log: usage.UsageLog,
) -> None:
  """Asks the open questions, and commits each verdict as it arrives."""
  judge, unseen = log.judge, set(plan.questions)
  pending: dict[_Store, list[records.Verdict]] = collections.defaultdict(list)
  bar = console.Bar(len(unseen), f"judge {judge.name}", "verdict")

  def add(case: questions.Case, row: records.Verdict) -> None:
    pending[case.store].append(row)
    plan.outcomes[case.unit] = row.verdict

  def record(key: str, reply: judging.Reply) -> None:
    log.asked += 1
    for case, row in questions.rows(judge, key, plan.questions[key], reply):
      add(case, row)
      log.add(row)
    # In a batch, a second reply may follow an unreadable one.
    bar.update(key in unseen, log.shown)
    unseen.discard(key)

  def commit() -> None:
    while pending:
      store, rows = pending.popitem()
      store.append_many(rows)

  with bar:
    for case, row in plan.rows:
      add(case, row)
    try:
      if client and client.settings.mode == "batch":
        folder = log.directory / "batches"
        batches = (client, folder, plan.questions, record, commit)
        await batch_api.Batches(*batches).run()
      else:
        await _live(concurrency, judge, plan.questions, record, commit)
    finally:
      commit()


async def _live(
  concurrency: int,
  judge: judging.Judge,
  open_questions: dict[str, list[questions.Case]],
  record: Callable[[str, judging.Reply], None],
  commit: Callable[[], None],
) -> None:
  """Asks with `concurrency` requests in flight: the most that a kill loses."""
  todo = collections.deque(open_questions)

  async def work() -> None:
    while todo:
      key = todo.popleft()
      try:
        record(key, await judge.ask(open_questions[key][0].question))
      except budget.Exhausted:
        # Replies in flight may cost less than their bounds: for the others.
        return todo.appendleft(key)
      # Replies that arrived together are committed together.
      await asyncio.sleep(0)
      commit()

  tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
  try:
    await asyncio.gather(*tasks)
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _in_thread(work: Coroutine[Any, Any, usage.Summary]) -> usage.Summary:
  """The result of `work` in a notebook, whose own loop runs in this thread.

  SIGINT cancels `work`. Its handler is replaced: a KeyboardInterrupt raised
  within this thread's wait could leave a lock taken.
  """
  loop = asyncio.new_event_loop()
  task = loop.create_task(work)
  thread = threading.Thread(
    target=loop.run_until_complete, args=(asyncio.wait([task]),)
  )
  handler = signal.signal(
    signal.SIGINT, lambda *_: loop.call_soon_threadsafe(task.cancel)
  )
  try:
    thread.start()
    thread.join()
  finally:
    signal.signal(signal.SIGINT, handler)
    loop.close()
  if task.cancelled():
    raise KeyboardInterrupt
  return task.result()
