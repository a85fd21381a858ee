"""Questions about every response, asked once each, their answers kept.

A question is known by the hash of all that its answer depends on. Before
asking, the runner looks the hash up among the verdicts on disk, so that a run
that was killed, or run again after an edit, asks only what has no answer yet;
a missing verdict is no answer and is asked again.
"""

import asyncio
import collections
import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Literal

import tqdm

from dpo_jax import judging, records
from dpo_jax.judging import client, oracle, questions


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """Who judges, and what is asked.

  Attributes:
    kind: "server" for a model behind an OpenAI-compatible server, "oracle" for
      the true reward of the synthetic world.
    orders: "both" asks about every pair twice, each text first once; "random"
      asks once, in an order drawn with `seed` for each prompt and sample.
    seed: of the random orders.
    concurrency: questions in flight at a time.
    server: how to reach the server; None for the oracle.
  """

  kind: Literal["server", "oracle"]
  orders: Literal["both", "random"]
  seed: int
  concurrency: int
  server: client.ServerSettings | None

  def __post_init__(self):
    if self.concurrency < 1:
      raise ValueError(f"concurrency={self.concurrency} must be at least 1")
    if (self.kind == "server") != (self.server is not None):
      raise ValueError(
        f"kind={self.kind!r} with server={self.server}: a judge of kind"
        " 'server' needs its server, the oracle has none"
      )


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a run did, and what the verdict files hold after it.

  Attributes:
    responses: all responses read.
    empty_references: responses kept from the judge, as chosen is empty.
    asked: questions put to the judge in this run.
    identical: verdicts that are ties without a call, as both texts are equal.
    outcomes: number of verdicts by outcome, those of earlier runs included.
  """

  responses: int
  empty_references: int
  asked: int
  identical: int
  outcomes: dict[str, int]

  @property
  def missing(self) -> int:
    return self.outcomes.get("missing", 0)

  def __str__(self) -> str:
    counts = ", ".join(f"{n} {name}" for name, n in self.outcomes.items())
    lines = [
      f"{self.responses} responses, {self.asked} questions asked;"
      f" verdicts: {counts or 'none'}"
    ]
    if self.identical:
      lines.append(f"{self.identical} ties without a call: the same text twice")
    if self.empty_references:
      lines.append(
        f"{self.empty_references} responses not judged: chosen is empty"
      )
    if self.missing:
      lines.append(
        f"INCOMPLETE: {self.missing} of {sum(self.outcomes.values())} verdicts"
        " are missing; the same command asks for them again"
      )
    return "\n".join(lines)


def run(settings: JudgeSettings, workdir: str | os.PathLike) -> Summary:
  """Judges `workdir`/responses/*.jsonl into `workdir`/verdicts/*.jsonl.

  Not to be called from a running event loop.

  Raises:
    ValueError: settings or files cannot be used; nothing was asked.
    judging.Stop: the judge can answer nothing more; verdicts so far are kept.
    records.Held: another process is judging this directory.
  """
  return asyncio.run(_run(settings, pathlib.Path(workdir)))


async def _run(settings: JudgeSettings, workdir: pathlib.Path) -> Summary:
  files = read_responses(workdir / "responses")
  extra = {path.name for path in (workdir / "verdicts").glob("*.jsonl")}
  extra -= {path.name for path in files}
  if extra:
    raise ValueError(
      f"{workdir / 'verdicts'} holds {sorted(extra)} without responses of that"
      " name: move these verdicts away, or use another --workdir"
    )
  async with contextlib.AsyncExitStack() as stack:
    if settings.server is None:
      judge = oracle.oracle()
    else:
      judge = await stack.enter_async_context(client.connect(settings.server))
    stores = {
      path: stack.enter_context(
        records.Store(workdir / "verdicts" / path.name, records.Verdict)
      )
      for path in files
    }
    cases = []
    for path, responses in files.items():
      _refuse_strangers(stores[path], responses)
      cases += [
        questions.Case(stores[path], response, order)
        for response in responses
        if response.chosen.strip()
        for order in _orders(settings, response)
      ]
    plan = questions.plan(judge, cases, stores.values())
    await _ask(judge, plan, settings.concurrency)
  total = sum(map(len, files.values()))
  judged = len({case.response.unit for case in cases})
  return Summary(
    responses=total,
    empty_references=total - judged,
    asked=len(plan.questions),
    identical=plan.identical,
    outcomes=dict(collections.Counter(sorted(plan.outcomes.values()))),
  )


def read_responses(
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
  store: records.Store[records.Verdict], responses: list[records.Response]
) -> None:
  """Verdicts on responses that are gone would be counted as if they stood."""
  known = {response.unit for response in responses}
  strangers = [row for row in store.rows if row.unit[:-1] not in known]
  if strangers:
    raise ValueError(
      f"{store.path} holds {len(strangers)} verdicts on responses that are not"
      f" in the responses file, such as {strangers[0].unit}: move the verdicts"
      " away, or use another --workdir"
    )


def _orders(
  settings: JudgeSettings, response: records.Response
) -> tuple[records.Order, ...]:
  if settings.orders == "both":
    return questions.ORDERS
  # All models meet a prompt in the same order, so that they stay comparable.
  drawn = records.content_hash(
    "order", str(settings.seed), response.prompt_id, str(response.sample_id)
  )
  return (questions.ORDERS[int(drawn, 16) % 2],)


class _Writer:
  """Commits rows as they arrive; those that arrive together share a flush."""

  def __init__(self):
    self._pending = collections.defaultdict(list)
    self._arrived = asyncio.Event()
    self._written = asyncio.Event()

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
      self.flush()
      written, self._written = self._written, asyncio.Event()
      written.set()

  def flush(self) -> None:
    while self._pending:
      store, rows = self._pending.popitem()
      store.append_many(rows)


async def _ask(
  judge: judging.Judge, plan: questions.Plan, concurrency: int
) -> None:
  """Asks the open questions and commits each answer as it arrives."""
  writer = _Writer()
  remaining = iter(plan.questions.items())
  bar = tqdm.tqdm(
    total=len(plan.questions),
    desc=f"judge {judge.name}",
    unit="verdict",
    mininterval=0.5,
    disable=not plan.questions,
    file=sys.stderr,
  )

  async def work() -> None:
    for key, cases in remaining:
      reply = await judge.ask(questions.question(cases[0]))
      for case in cases:
        row = questions.verdict(judge, key, case, reply)
        writer.put(case, row)
        plan.outcomes[case.unit] = row.verdict
      # Only then the next question: a kill repeats `concurrency` calls at most.
      await writer.commit()
      bar.update()

  with bar:
    for case, row in plan.rows:
      writer.put(case, row)
      plan.outcomes[case.unit] = row.verdict
    try:
      await _all(work, min(concurrency, len(plan.questions)), writer.serve)
    finally:
      writer.flush()


async def _all(work: Callable, count: int, serve: Callable) -> None:
  """Runs `count` workers beside a server for them.

  The first error ends them all and is raised as it is, out of its group.
  """
  try:
    async with asyncio.TaskGroup() as group:
      server = group.create_task(serve())
      workers = [group.create_task(work()) for _ in range(count)]
      await asyncio.gather(*workers)
      server.cancel()
  except ExceptionGroup as errors:
    error = errors.exceptions[0]
  else:
    return
  raise error
