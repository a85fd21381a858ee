"""Questions about every response, asked once each, their answers kept.

A question is identified by a hash of all that its answer depends on: what has
an answer on disk is not asked again. A missing verdict is no answer.
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
from dpo_jax.judging import (
  batch_api,
  budget,
  client,
  controls,
  questions,
  rewards,
  usage,
)

_Store = jsonl.Store[records.Verdict]


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """Who judges, and what is asked; explained in configs/judge.py."""

  kind: Literal["server", rewards.Name]
  orders: Literal["both", "random"]
  seed: int
  concurrency: int
  verdicts: str
  controls: controls.ControlSettings
  server: client.ServerSettings | None

  def __post_init__(self):
    settings_lib.check(self)
    # `responses` itself, a path elsewhere or a hidden file would be a mishap.
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
  """Judges `workdir`/responses/*.jsonl into `workdir`/verdicts/*.jsonl.

  ValueError: settings or files cannot be used, and nothing was asked.
  judging.Stop: the judge can answer nothing more; verdicts so far are kept.
  """
  try:
    asyncio.get_running_loop()
  except RuntimeError:
    return asyncio.run(_run(settings, workdir))
  return _in_thread(_run(settings, workdir))


def run_and_say(
  settings: JudgeSettings, workdir: str | os.PathLike
) -> usage.Summary:
  """As `run`, and prints what it did; no verdict at all is a `judging.Stop`."""
  summary = run(settings, workdir)
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
  """What `run` would ask and cost; asks and writes nothing, needs no key."""
  plan, log = _prepare(settings, workdir, _client(settings), jsonl.Store.peek)
  return log.estimate(plan)


def _in_thread(work: Coroutine[Any, Any, usage.Summary]) -> usage.Summary:
  """The result of `work` beside a notebook's loop; an interrupt cancels it."""
  own = asyncio.Runner(loop_factory=asyncio.new_event_loop)
  task, interrupts = own.get_loop().create_task(work), []

  def run_it():
    with own:
      own.run(asyncio.wait([task]))

  # KeyboardInterrupt raised wherever this thread waits could keep a lock.
  def note(*unused):
    interrupts.append(True)
    with contextlib.suppress(RuntimeError):  # The loop has just ended.
      own.get_loop().call_soon_threadsafe(task.cancel)

  thread = threading.Thread(target=run_it)
  main = threading.current_thread() is threading.main_thread()
  usual = signal.default_int_handler
  ours = main and signal.getsignal(signal.SIGINT) is usual
  if ours:
    signal.signal(signal.SIGINT, note)
  try:
    thread.start()
    while thread.is_alive():
      thread.join(0.2)
  finally:
    if ours:
      signal.signal(signal.SIGINT, usual)
  if interrupts:
    raise KeyboardInterrupt
  return task.result()


async def _run(
  settings: JudgeSettings, workdir: str | os.PathLike
) -> usage.Summary:
  used = _client(settings)
  async with used or contextlib.nullcontext(), contextlib.AsyncExitStack() as s:
    plan, log = _prepare(settings, workdir, used, s.enter_context)
    if used and plan.questions:
      found = log.estimate(plan)
      console.say(str(found), "estimate", **dataclasses.asdict(found))
    log.write(plan)
    try:
      await _ask(settings.concurrency, used, plan, log)
    finally:
      summary = log.write(plan)
  return summary


def _client(settings: JudgeSettings) -> client.Client | None:
  server = settings.server
  return client.Client(server, settings.concurrency) if server else None


def _prepare(
  settings: JudgeSettings,
  workdir: str | os.PathLike,
  used: client.Client | None,
  open_store: Callable[[_Store], _Store],
) -> tuple[questions.Plan, usage.UsageLog]:
  """Reads and checks the files; what is wrong with them is a ValueError."""
  judge = used.judge if used else rewards.judge(settings.kind)
  directory = pathlib.Path(workdir) / settings.verdicts
  files = _read_responses(pathlib.Path(workdir) / "responses")
  names = {*files, controls.FILE, *(p.name for p in directory.glob("*.jsonl"))}
  stores = {
    name: open_store(jsonl.Store(directory / name, records.Verdict))
    for name in sorted(names)
  }
  rows = [row for store in stores.values() for row in store.rows]
  found = {(r.judge, r.template_hash) for r in rows if r.verdict != "missing"}
  for name, template in found - {(judge.name, judge.template_hash)}:
    raise ValueError(
      f"{directory} holds verdicts of judge {name!r} on template {template:.8},"
      f" not of {judge.name!r} on {judge.template_hash:.8}, and no report mixes"
      " them: give this one a directory of its own, --config.verdicts="
      "verdicts-NAME (of replicate, with --config.report.verdicts)"
    )
  cases = []
  for name in sorted(names - {controls.FILE}):
    responses = files.get(name, [])
    known = {response.unit for response in responses}
    for row in stores[name].rows:
      if row.unit[:5] not in known:
        raise ValueError(
          f"{stores[name].path} holds verdicts on responses that are not in"
          f" responses/{name}, such as {row.unit}: move the verdicts away, or"
          " use another --workdir"
        )
    cases += [
      questions.Case(stores[name], response, order)
      for response in responses
      if response.chosen.strip()
      for order in questions.orders(settings.orders, settings.seed, response)
    ]
  own = (settings.controls, settings.seed, settings.orders)
  cases += list(controls.cases(*own, cases, stores[controls.FILE]))
  responses = [response for file in files.values() for response in file]
  log = usage.UsageLog(directory, judge, used, rows, responses)
  return questions.plan(judge, cases, rows), log


def _read_responses(
  directory: pathlib.Path,
) -> dict[str, list[records.Response]]:
  """The responses of every file; ValueError unless each is there once."""
  files, seen = {}, {}
  for path in sorted(directory.glob("*.jsonl")):
    if path.name == controls.FILE:
      raise ValueError(f"{path} has the name of the controls: rename it")
    files[path.name] = records.read(path, records.Response)
    for unit in (response.unit for response in files[path.name]):
      if unit in seen:
        raise ValueError(
          f"{path}: (prompt id, model, step, temperature, sample id) = {unit}"
          f" is in {seen[unit]} already: keep one"
        )
      seen[unit] = path
  if not seen:
    raise ValueError(
      f"{directory} holds no responses (*.jsonl): run sample.py with the same"
      " --workdir first"
    )
  return files


async def _ask(
  concurrency: int,
  used: client.Client | None,
  plan: questions.Plan,
  log: usage.UsageLog,
) -> None:
  """Asks the open questions and commits each answer as it arrives."""
  judge = log.judge
  rows: dict[_Store, list[records.Verdict]] = collections.defaultdict(list)
  unseen = set(plan.questions)
  bar = console.Bar(len(unseen), f"judge {judge.name}", "verdict")

  def add(case: questions.Case, row: records.Verdict) -> None:
    rows[case.store].append(row)
    plan.outcomes[case.unit] = row.verdict

  def answer(key: str, reply: judging.Reply) -> None:
    log.asked += 1
    for case, row in questions.rows(judge, key, plan.questions[key], reply):
      add(case, row)
      log.add(row)
    # A batch may answer a question twice.
    bar.update(key in unseen, log.shown)
    unseen.discard(key)

  def commit() -> None:
    while rows:
      store, added = rows.popitem()
      store.append_many(added)

  with bar:
    for case, row in plan.rows:
      add(case, row)
    try:
      if used and used.settings.mode == "batch":
        folder = log.directory / "batches"
        own = (used, folder, plan.questions, answer, commit)
        await batch_api.Batches(*own).run()
      else:
        await _live(concurrency, judge, plan, answer, commit)
    finally:
      commit()


async def _live(
  concurrency: int,
  judge: judging.Judge,
  plan: questions.Plan,
  answer: Callable[[str, judging.Reply], None],
  commit: Callable[[], None],
) -> None:
  todo, room = collections.deque(plan.questions), True
  flying: dict[asyncio.Future, str] = {}
  errors: list[BaseException] = []
  try:
    while not errors:
      # Only committed answers make room: a kill repeats `concurrency` calls.
      while room and todo and len(flying) < concurrency:
        question = plan.questions[todo[0]][0].question
        flying[asyncio.ensure_future(judge.ask(question))] = todo.popleft()
      if not flying:
        return
      await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
      done = [(t, flying.pop(t)) for t in list(flying) if t.done()]
      refused = [k for t, k in done if isinstance(t.exception(), budget.Spent)]
      for task, key in done:
        error = task.exception()
        if error is None:
          answer(key, task.result())
        elif key not in refused:
          errors.append(error)
      commit()
      # What was refused may fit once others have cost less than their bounds.
      room = len(refused) < len(done)
      todo.extendleft(refused)
    raise errors[0]
  finally:
    for task in flying:
      task.cancel()
    await asyncio.gather(*flying, return_exceptions=True)
