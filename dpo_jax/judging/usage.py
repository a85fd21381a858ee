"""Estimate, usage and summary of a judging run, and their file judge.json.

judge.json has what no verdict row can: questions that were not asked, and the
cost of calls without a row.
"""

import collections
import dataclasses
import json
import pathlib

from dpo_jax import judging
from dpo_jax.core import console
from dpo_jax.core import settings as settings_lib
from dpo_jax.io import atomic, records, strict_json
from dpo_jax.judging import client as client_lib
from dpo_jax.judging import prompts, questions
from dpo_jax.winrates import intervals

# Of a usual reply, one sentence and the verdict; for the estimate.
_REPLY_TOKENS = 60


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Usage of a run without errors; `dollars` is None without a price."""

  calls: int
  prompt_tokens: int
  completion_tokens: int
  dollars: float | None
  prompts: int

  def __str__(self) -> str:
    text = (
      f"about to ask {self.calls:,} questions: some {self.prompt_tokens:,} +"
      f" {self.completion_tokens:,} tokens"
    )
    if self.dollars is None:
      text += "; the price is unknown"
    else:
      text += f", {self.dollars:.4f} dollars"
    difference = intervals.detectable_difference(self.prompts)
    if difference is not None:
      text += (
        f"\nwith {self.prompts:,} prompts, a difference between two models of"
        f" {100 * difference:.1f} points is detectable (95% interval, 80%"
        " power; less where their scores are correlated)"
      )
    return text


@dataclasses.dataclass(frozen=True)
class Summary:
  """Questions `asked` by a run, and counts of all verdicts after it.

  `causes` are the errors of its missing verdicts, the commonest first.
  """

  responses: int
  judged: int
  asked: int
  outcomes: dict[str, int]
  control_outcomes: dict[str, int]
  causes: dict[str, int]
  not_dispatched: int
  spending: str

  @property
  def missing(self) -> int:
    both = (self.outcomes, self.control_outcomes)
    return sum(counts.get("missing", 0) for counts in both)

  @property
  def complete(self) -> bool:
    return not (self.missing or self.not_dispatched)

  @property
  def nothing_read(self) -> bool:
    return bool(self.asked) and not {*self.outcomes} - {"missing"}

  def __str__(self) -> str:
    asked = f"{self.responses} responses, {self.asked} questions asked"
    lines = [f"{asked}; verdicts: {_listed(self.outcomes)}"]
    if self.control_outcomes:
      lines.append(f"controls: {_listed(self.control_outcomes)}")
    if self.responses > self.judged:
      empty = self.responses - self.judged
      lines.append(f"{empty} responses not judged: chosen is empty")
    if self.spending:
      lines.append(f"spent: {self.spending}")
    counted = (*self.outcomes.values(), *self.control_outcomes.values())
    total = sum(counted) + self.not_dispatched
    if self.not_dispatched:
      lines.append(
        f"INCOMPLETE: {self.not_dispatched} of {total} questions were not"
        " asked: the budget is reached; run again with a higher budget_usd"
      )
    if self.missing:
      causes = list(self.causes.items())[:3]
      why = "; ".join(f"{count}: {cause:.200}" for cause, count in causes)
      why = console.visible(why)
      lines.append(
        f"INCOMPLETE: {self.missing} of {total} verdicts are missing"
        f"{f' ({why})' if why else ''}; the same command asks for them again"
      )
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
  return ", ".join(f"{n} {name}" for name, n in counts.items()) or "none"


def estimate(
  plan: questions.Plan,
  client: client_lib.Client | None,
  prompt_count: int,
) -> Estimate:
  """Usage of the open questions of a plan; a reward (no client) is free."""
  calls = len(plan.questions)
  if not client:
    return Estimate(calls, 0, 0, 0.0, prompt_count)
  price = client.settings.price
  size = sum(
    len(prompts.fill(client.template, cases[0].question).encode())
    for cases in plan.questions.values()
  )
  # English has about four bytes a token; the budget does not rely on it.
  tokens = (round(size / 4), calls * _REPLY_TOKENS)
  return Estimate(
    calls,
    *tokens,
    dollars=price.of(*tokens) if price else None,
    prompts=prompt_count,
  )


@dataclasses.dataclass(frozen=True)
class _Totals:
  """The fields of judge.json that the next run adds to."""

  calls: int = 0
  cost: float | None = 0.0
  prompt_tokens: int = 0
  completion_tokens: int = 0


class UsageLog:
  """Counts a run's usage on top of earlier runs', and writes judge.json."""

  def __init__(
    self,
    directory: pathlib.Path,
    judge: judging.Judge,
    client: client_lib.Client | None,
    rows: list[records.Verdict],
    responses: list[records.Response],
  ):
    """Reads judge.json; ValueError: a budget, and `rows` of unknown cost."""
    self.directory, self.judge, self._client = directory, judge, client
    self.asked, self._responses = 0, len(responses)
    self._judged = [row for row in responses if row.chosen.strip()]
    self.prompts = len({row.prompt_id for row in self._judged})
    self._causes = collections.Counter()
    self._tokens = [
      sum(row.prompt_tokens for row in rows),
      sum(row.completion_tokens for row in rows),
    ]
    self._path, old = directory / "judge.json", _Totals()
    if self._path.exists():
      found = strict_json.read_object(self._path)
      values = {
        name: found.get(name, value) for name, value in vars(old).items()
      }
      old = settings_lib.build(_Totals, values, str(self._path))
    self._calls, self._known = old.calls, old.cost is not None
    if not client:
      return
    client.budget.cost = old.cost or 0.0
    if client.budget.price:
      # Rows of a run that was killed before it wrote judge.json.
      new = zip(self._tokens, (old.prompt_tokens, old.completion_tokens))
      client.budget.cost += client.budget.price.of(
        *(max(0, n - o) for n, o in new)
      )
    if client.budget.cap and not self._known:
      raise ValueError(
        f"{directory} has verdicts whose price is unknown, so that budget_usd"
        " cannot be kept: set budget_usd=0, or another --config.verdicts"
      )

  def add(self, row: records.Verdict) -> None:
    if row.verdict == "missing":
      self._causes[row.error] += 1
    self._tokens[0] += row.prompt_tokens
    self._tokens[1] += row.completion_tokens

  @property
  def cost(self) -> float | None:
    """Dollars of all runs; None if a price is unknown."""
    if not self._client:
      return 0.0
    known = self._known and self._client.budget.price
    return self._client.budget.cost if known else None

  @property
  def shown(self) -> dict[str, float]:
    """Usage for the progress bar."""
    dollars = {} if self.cost is None else {"dollars": self.cost}
    tokens = {"tokens in": self._tokens[0], "out": self._tokens[1]}
    return dollars | tokens if self._client else {}

  def write(self, plan: questions.Plan) -> Summary:
    """The summary of the outcomes so far; also writes judge.json."""
    client, spending = self._client, ""
    if client:
      spending = f"{self._tokens[0]:,} + {self._tokens[1]:,} tokens"
      if self.cost is not None:
        spending = f"{self.cost:.4f} dollars, {spending}"
    outcomes = ({}, {})
    for unit, outcome in sorted(plan.outcomes.items(), key=lambda x: x[1]):
      counts = outcomes[bool(unit[-1])]
      counts[outcome] = counts.get(outcome, 0) + 1
    summary = Summary(
      responses=self._responses,
      judged=len(self._judged),
      asked=self.asked,
      outcomes=outcomes[0],
      control_outcomes=outcomes[1],
      causes=dict(self._causes.most_common()),
      not_dispatched=plan.size - len(plan.outcomes),
      spending=spending,
    )
    values = {
      "judge": self.judge.name,
      "template_hash": self.judge.template_hash,
      "template": client.settings.template if client else "",
      "parameters": self.judge.parameters,
      "complete": summary.complete,
      "missing": summary.missing,
      "not_dispatched": summary.not_dispatched,
      "cost": self.cost,
      "calls": self._calls + (client.budget.calls if client else self.asked),
      "prompt_tokens": self._tokens[0],
      "completion_tokens": self._tokens[1],
      "data_fingerprint": questions.fingerprint(self._judged),
    }
    atomic.write_text(self._path, json.dumps(values, indent=2) + "\n")
    return summary
