"""Questions about every response, asked once each, their answers kept.

A question is known by the hash of all that its answer depends on. Before
asking, the runner looks the hash up among the verdicts on disk, so that a run
that was killed, or run again after an edit, asks only what has no answer yet;
a missing verdict is no answer and is asked again.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Literal

from dpo_jax import judging, records
from dpo_jax.interface import console
from dpo_jax.judging import (
  account,
  asking,
  budget,
  client,
  controls,
  inputs,
  questions,
  rewards,
  server,
)
from dpo_jax.storage import row_store


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """Who judges, and what is asked.

  Attributes:
    kind: "server" for a model behind an OpenAI-compatible server; or the name
      of a reward, whose higher value wins.
    orders: "both" asks about every pair twice, each text first once; "random"
      asks once, in an order drawn with `seed` for each prompt and sample.
    seed: of the random orders, and of the samples of controls.
    concurrency: most questions in flight at a time.
    verdicts: directory of the verdicts, beside `responses`; another one for
      each criterion.
    controls: questions about the judge itself.
    server: how to reach the server; None for a reward.
  """

  kind: Literal["server", rewards.Name]
  orders: Literal["both", "random"]
  seed: int
  concurrency: int
  verdicts: str
  controls: controls.ControlSettings
  server: server.ServerSettings | None

  def __post_init__(self):
    if self.concurrency < 1:
      raise ValueError(f"concurrency={self.concurrency} must be at least 1")
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
  tasks, interrupts = [], []
  outcome = concurrent.futures.Future()

  async def cancellable():
    tasks.append((asyncio.get_running_loop(), asyncio.current_task()))
    if interrupts:
      work.close()
      raise asyncio.CancelledError
    return await work

  def run_it():
    try:
      outcome.set_result(asyncio.run(cancellable()))
    except BaseException as error:
      outcome.set_exception(error)

  def note(number, frame):
    interrupts.append(number)
    for loop, task in tasks:
      with contextlib.suppress(RuntimeError):  # The loop has just ended.
        loop.call_soon_threadsafe(task.cancel)

  thread = threading.Thread(target=run_it)
  with _interrupts_to(note):
    thread.start()
    # In turns: a signal that comes as this thread begins to wait is seen when
    # it has waited.
    while thread.is_alive():
      thread.join(0.2)
  if interrupts:
    raise KeyboardInterrupt
  return outcome.result()


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
  files = inputs.read_responses(workdir / "responses")
  directory = workdir / settings.verdicts
  inputs.refuse_leftovers(directory, files)
  stores = {
    name: row_store.Store(directory / name, records.Verdict).peek()
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
  inputs.refuse_other_judge(directory, judge, stores.values())
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
  files = inputs.read_responses(workdir / "responses")
  directory = workdir / settings.verdicts
  inputs.refuse_leftovers(directory, files)
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
      name: stack.enter_context(
        row_store.Store(directory / name, records.Verdict)
      )
      for name in [*(path.name for path in files), controls.FILE]
    }
    inputs.refuse_other_judge(directory, judge, stores.values())
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
      await asking.ask(settings.concurrency, judge, used, plan, books)
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
  stores: dict[str, row_store.Store[records.Verdict]],
) -> list[questions.Case]:
  """All that is to be judged: every response, and then the controls."""
  ordinary = []
  for path, responses in files.items():
    store = stores[path.name]
    inputs.refuse_strangers(store, responses)
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
