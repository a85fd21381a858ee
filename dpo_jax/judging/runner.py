"""Questions about every response, asked once each, their answers kept.

A question is known by the hash of all that its answer depends on. Before
asking, the runner looks the hash up among the verdicts on disk, so that a run
that was killed, or run again after an edit, asks only what has no answer yet;
a missing verdict is no answer and is asked again.

A verdict that no report would count, or that a report would refuse, is found
before anything is asked and paid for.
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
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, Literal

from dpo_jax import judging
from dpo_jax.core import console
from dpo_jax.core import settings as settings_lib
from dpo_jax.io import jsonl, records
from dpo_jax.judging import (
  account,
  batch_api,
  budget,
  client,
  controls,
  questions,
  rewards,
)


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


def run(settings: JudgeSettings, workdir: str | os.PathLike) -> account.Summary:
  """Judges `workdir`/responses/*.jsonl into `workdir`/verdicts/*.jsonl.

  Where an event loop is running already, as in a notebook, another one runs in
  a thread of its own.

  Raises:
    ValueError: settings or files cannot be used; nothing was asked.
    judging.Stop: the judge can answer nothing more; verdicts so far are kept.
    locks.Held: another process is judging this directory.
  """
  work = _run(settings, pathlib.Path(workdir))
  try:
    asyncio.get_running_loop()
  except RuntimeError:
    return asyncio.run(work)
  return _in_thread(work)


def run_and_say(
  settings: JudgeSettings, workdir: str | os.PathLike
) -> account.Summary:
  """As `run`, and prints what it did.

  Raises:
    judging.Stop: also where questions were asked and no verdict was read.
  """
  summary = run(settings, workdir)
  console.result(str(summary), **dataclasses.asdict(summary))
  if summary.nothing_read:
    judge = settings.server.base_url if settings.server else settings.kind
    raise judging.Stop(
      f"no verdict was read from {judge}: mend what is said above; the same"
      " command asks again"
    )
  return summary


def _in_thread(work: Coroutine[Any, Any, account.Summary]) -> account.Summary:
  """The result of `work`, which an interrupt of this thread cancels.

  KeyboardInterrupt is raised when `work` has ended: raised wherever this thread
  waits, it could leave a lock taken that the other one needs.
  """
  interrupts = []
  own = asyncio.Runner(loop_factory=asyncio.new_event_loop)
  task = own.get_loop().create_task(work)

  def run_it():
    with own:
      own.run(asyncio.wait([task]))

  def note(number, frame):
    interrupts.append(number)
    with contextlib.suppress(RuntimeError):  # The loop has just ended.
      own.get_loop().call_soon_threadsafe(task.cancel)

  thread = threading.Thread(target=run_it)
  with _interrupts_to(note):
    thread.start()
    # In turns: a signal that comes as this thread begins to wait is seen when
    # it has waited.
    while thread.is_alive():
      thread.join(0.2)
  if interrupts:
    raise KeyboardInterrupt
  return task.result()


@contextlib.contextmanager
def _interrupts_to(note: Callable[[int, Any], None]) -> Iterator[None]:
  """Calls `note` instead of raising KeyboardInterrupt, where that is raised."""
  raised = signal.getsignal(signal.SIGINT) is signal.default_int_handler
  here = threading.current_thread() is threading.main_thread()
  if not (raised and here):
    yield
    return
  signal.signal(signal.SIGINT, note)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def estimate(
  settings: JudgeSettings, workdir: str | os.PathLike
) -> budget.Estimate:
  """What `run` would ask, and what that would cost.

  Nothing is asked, nothing is written, and no key is needed.

  Raises:
    ValueError: as `run`, for settings and files.
  """
  workdir = pathlib.Path(workdir)
  files = _read_responses(workdir / "responses")
  directory = workdir / settings.verdicts
  _refuse_leftovers(directory, files)
  stores = {
    name: jsonl.Store(directory / name, records.Verdict).peek()
    for name in [*(path.name for path in files), controls.FILE]
  }
  purse = None
  if settings.kind != "server":
    judge = rewards.judge(settings.kind)
  else:
    assert settings.server is not None  # JudgeSettings saw to it
    template = settings.server.load_template()
    judge = client.judge(settings.server, template, _unasked)
    purse = budget.Budget(settings.server.price, settings.server.budget_usd)
  _refuse_other_judge(directory, judge, stores.values())
  cases = _cases(settings, files, stores)
  plan = questions.plan(judge, cases, stores.values())
  books = account.Books(
    directory,
    settings.server,
    judge,
    purse,
    [row for store in stores.values() for row in store.rows],
    [case.response for case in cases if not case.control],
  )
  return books.estimate(plan, settings.concurrency)


async def _unasked(question: judging.Question) -> judging.Reply:
  raise AssertionError(f"{question} is only to be counted")


async def _run(
  settings: JudgeSettings, workdir: pathlib.Path
) -> account.Summary:
  files = _read_responses(workdir / "responses")
  directory = workdir / settings.verdicts
  _refuse_leftovers(directory, files)
  async with contextlib.AsyncExitStack() as stack:
    used = None
    if settings.kind != "server":
      judge = rewards.judge(settings.kind)
    else:
      assert settings.server is not None
      connection = client.connect(settings.server, settings.concurrency)
      used = await stack.enter_async_context(connection)
      judge = used.judge
    stores = {
      name: stack.enter_context(jsonl.Store(directory / name, records.Verdict))
      for name in [*(path.name for path in files), controls.FILE]
    }
    _refuse_other_judge(directory, judge, stores.values())
    cases = _cases(settings, files, stores)
    plan = questions.plan(judge, cases, stores.values())
    books = account.Books(
      directory,
      settings.server,
      judge,
      used.budget if used else None,
      [row for store in stores.values() for row in store.rows],
      [case.response for case in cases if not case.control],
    )
    try:
      await _ask(settings.concurrency, judge, used, plan, books)
    finally:
      summary = account.Summary(
        responses=sum(map(len, files.values())),
        judged=len({c.response.unit for c in cases if not c.control}),
        asked=books.asked,
        identical=plan.identical,
        outcomes=_count(plan, control=False),
        control_outcomes=_count(plan, control=True),
        causes=dict(books.causes.most_common()),
        not_dispatched=len(cases) - len(plan.outcomes),
        spending=books.spending,
      )
      books.close(summary)
  return summary


def _count(plan: questions.Plan, *, control: bool) -> dict[str, int]:
  found = (
    outcome
    for unit, outcome in plan.outcomes.items()
    if bool(unit[-1]) == control
  )
  return dict(collections.Counter(sorted(found)))


def _cases(
  settings: JudgeSettings,
  files: dict[pathlib.Path, list[records.Response]],
  stores: dict[str, jsonl.Store[records.Verdict]],
) -> list[questions.Case]:
  """All that is to be judged: every response, and then the controls."""
  ordinary = []
  for path, responses in files.items():
    store = stores[path.name]
    _refuse_strangers(store, responses)
    ordinary += [
      questions.Case(store, response, order)
      for response in responses
      if response.chosen.strip()
      for order in questions.orders(settings.orders, settings.seed, response)
    ]
  return ordinary + controls.cases(
    settings.controls,
    settings.seed,
    settings.orders,
    ordinary,
    stores[controls.FILE],
  )


def _refuse_leftovers(
  directory: pathlib.Path, files: Iterable[pathlib.Path]
) -> None:
  """ValueError where verdicts stand without a file of responses."""
  names = {path.name for path in files}
  if controls.FILE in names:
    raise ValueError(
      f"responses/{controls.FILE} has the name of the controls' verdicts:"
      " rename it"
    )
  extra = {path.name for path in directory.glob("*.jsonl")} - names
  extra -= {controls.FILE}
  if extra:
    raise ValueError(
      f"{directory} holds {sorted(extra)} without responses of that name: move"
      " these verdicts away, or use another --workdir"
    )


def _read_responses(
  directory: pathlib.Path,
) -> dict[pathlib.Path, list[records.Response]]:
  """The responses of every file; ValueError unless each stands once."""
  files = {
    path: records.read(path, records.Response)
    for path in sorted(directory.glob("*.jsonl"))
  }
  if not any(files.values()):
    raise ValueError(
      f"{directory} holds no responses (*.jsonl): run sample.py with the same"
      " --workdir first"
    )
  seen: dict[tuple, pathlib.Path] = {}
  for path, responses in files.items():
    for response in responses:
      if response.unit in seen:
        raise ValueError(
          f"{path}: (prompt id, model, step, temperature, sample id) ="
          f" {response.unit} stands in {seen[response.unit]} already: keep one"
        )
      seen[response.unit] = path
  return files


def _refuse_strangers(
  store: jsonl.Store[records.Verdict], responses: list[records.Response]
) -> None:
  """Verdicts on responses that are gone would be counted as if they stood."""
  known = {response.unit for response in responses}
  strangers = [row for row in store.rows if row.unit[:5] not in known]
  if strangers:
    raise ValueError(
      f"{store.path} holds {len(strangers)} verdicts on responses that are not"
      f" in the responses file, such as {strangers[0].unit}: move the verdicts"
      " away, or use another --workdir"
    )


def _refuse_other_judge(
  directory: pathlib.Path,
  judge: judging.Judge,
  stores: Iterable[jsonl.Store[records.Verdict]],
) -> None:
  """One directory holds one judge's verdicts on one template's pages.

  A report refuses others, so that answers to pay for would be of no use. What
  a judge left that answered nothing may stay.

  Raises:
    ValueError: another one's answers are there.
  """
  rows = [
    row for store in stores for row in store.rows if row.verdict != "missing"
  ]
  for what, field in (("judge", "judge"), ("template", "template_hash")):
    own = {"judge": judge.name, "template": judge.template_hash}[what]
    others = {getattr(row, field) for row in rows} - {own}
    if others:
      raise ValueError(
        f"{directory} holds verdicts of another {what},"
        f" {', '.join(sorted(others))}, than {own}, and no report mixes them:"
        " give this one a directory of its own, --config.verdicts=verdicts-NAME"
        " (of replicate, with --config.report.verdicts), or move those away"
      )


class _Writer:
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


async def _ask(
  concurrency: int,
  judge: judging.Judge,
  used: client.Client | None,
  plan: questions.Plan,
  books: account.Books,
) -> None:
  """Asks the open questions and commits each answer as it arrives."""
  rows = _Writer()
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
  rows: _Writer,
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
  rows: _Writer,
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
