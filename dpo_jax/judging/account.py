"""What a judging run did and cost, for the user and in judge.json.

Numbers about models are made from verdict rows alone. judge.json says of the
run what no row can: what was not asked, and what calls cost that left no row.
"""

import collections
import dataclasses
import json
import pathlib
from typing import Any, Literal

from dpo_jax import judging
from dpo_jax.core import console
from dpo_jax.core import settings as settings_lib
from dpo_jax.io import atomic, records, strict_json
from dpo_jax.judging import budget, client, prompts, questions

FILE = "judge.json"

# Causes of missing verdicts that a summary names.
_CAUSES = 3


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a run did, and what the verdict files hold after it.

  Attributes:
    responses: all responses read.
    judged: responses to be judged; the others have an empty chosen text.
    asked: questions put to the judge in this run.
    identical: verdicts that are ties without a call, as both texts are equal.
    outcomes: number of verdicts by outcome, those of earlier runs included.
    control_outcomes: the same of the controls.
    causes: why verdicts that this run asked for are missing, and how many.
    not_dispatched: questions that were not asked, as the budget was reached.
    spending: what was paid, in words.
  """

  responses: int
  judged: int
  asked: int
  identical: int
  outcomes: dict[str, int]
  control_outcomes: dict[str, int]
  causes: dict[str, int]
  not_dispatched: int
  spending: str

  @property
  def empty_references(self) -> int:
    return self.responses - self.judged

  @property
  def missing(self) -> int:
    return sum(
      counts.get("missing", 0)
      for counts in (self.outcomes, self.control_outcomes)
    )

  @property
  def complete(self) -> bool:
    return not (self.missing or self.not_dispatched)

  @property
  def nothing_read(self) -> bool:
    """Whether questions were asked, and no verdict stands at all."""
    return bool(self.asked) and not {*self.outcomes} - {"missing"}

  def __str__(self) -> str:
    lines = [
      f"{self.responses} responses, {self.asked} questions asked;"
      f" verdicts: {_listed(self.outcomes)}"
    ]
    if self.control_outcomes:
      lines.append(f"controls: {_listed(self.control_outcomes)}")
    if self.identical:
      lines.append(f"{self.identical} ties without a call: the same text twice")
    if self.empty_references:
      lines.append(
        f"{self.empty_references} responses not judged: chosen is empty"
      )
    if self.spending:
      lines.append(f"spent: {self.spending}")
    counted = (*self.outcomes.values(), *self.control_outcomes.values())
    total = sum(counted) + self.not_dispatched
    if self.not_dispatched:
      lines.append(
        f"INCOMPLETE: {self.not_dispatched} of {total} questions were not"
        " asked: the budget is reached; a higher budget_usd goes on from here"
      )
    if self.missing:
      lines.append(
        f"INCOMPLETE: {self.missing} of {total} verdicts"
        f" are missing{self._why()}; the same command asks for them again"
      )
    return "\n".join(lines)

  def _why(self) -> str:
    """The commonest causes, each with its count, in brackets."""
    causes = [
      f"{count}: {cause:.100}"
      for cause, count in list(self.causes.items())[:_CAUSES]
    ]
    return f" ({'; '.join(causes)})" if causes else ""


def _listed(counts: dict[str, int]) -> str:
  return ", ".join(f"{n} {name}" for name, n in counts.items()) or "none"


@dataclasses.dataclass(frozen=True)
class _Before:
  """What an earlier judge.json says that no verdict does."""

  calls: int
  unrecorded_cost: float
  modes: tuple[Literal["live", "batch"], ...]

  def __post_init__(self):
    if self.calls < 0 or self.unrecorded_cost < 0:
      raise ValueError(f"{self} has negative numbers")


class Books:
  """Keeps count while a run goes on, and judge.json up to date.

  Attributes:
    directory: of the verdicts.
    asked: questions put to the judge in this run.
    causes: how many verdicts of this run are missing, by their causes.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    settings: client.ServerSettings | None,
    judge: judging.Judge,
    purse: budget.Budget | None,
    rows: list[records.Verdict],
    responses: list[records.Response],
  ):
    """Reads what earlier runs spent.

    Raises:
      ValueError: there is a budget, and earlier costs cannot be told.
    """
    self.directory = directory
    self.asked = 0
    self.causes = collections.Counter()
    self._settings = settings
    self._judge = judge
    self._purse = purse
    self._fingerprint = questions.fingerprint(responses)
    self._prompts = len({row.prompt_id for row in responses})
    self._tokens = [
      sum(row.prompt_tokens for row in rows),
      sum(row.completion_tokens for row in rows),
    ]
    old = self._read()
    self._calls, self._unrecorded = old.calls, old.unrecorded_cost
    self._recorded = 0.0
    self._modes = set(old.modes)
    self._before: float | None = 0.0
    if settings is not None and purse is not None:
      # A row does not say how it was asked for: without knowing better, the
      # dearer of the ways that were used here counts.
      batch_only = self._modes <= {"batch"} and settings.mode == "batch"
      factor = settings.batch_price if batch_only else 1.0
      prices = budget.read_prices(settings.prices)
      self._before = budget.spent(rows, prices, factor)
      if self._before is not None:
        purse.before = self._before + self._unrecorded
      elif settings.budget_usd:
        raise ValueError(
          f"{directory} holds verdicts of judges whose price is unknown, so"
          " that budget_usd cannot be kept: add them to prices, or set"
          " budget_usd=0 for no cap"
        )
      self._modes.add(settings.mode)

  def open(self, plan: questions.Plan, concurrency: int) -> None:
    """Says what is about to be asked, and that it is not done yet."""
    if plan.questions and self._purse:
      estimate = self.estimate(plan, concurrency)
      console.say(str(estimate), "estimate", **dataclasses.asdict(estimate))
    open_units = sum(map(len, plan.questions.values()))
    self._write(complete=False, missing=0, not_dispatched=open_units)

  def estimate(self, plan: questions.Plan, concurrency: int) -> budget.Estimate:
    """What asking the open questions of a plan will take."""
    if not self._settings or not self._purse:
      # A reward is computed here, for nothing.
      calls = len(plan.questions)
      return budget.Estimate(calls, 0, 0, 0.0, 0.0, 0.0, 0.0, self._prompts)
    template = self._settings.load_template()
    pages = [
      len(prompts.fill(template, questions.question(cases[0])).encode())
      for cases in plan.questions.values()
    ]
    return budget.estimate(
      self._purse,
      pages,
      prompts=self._prompts,
      reply_tokens=self._settings.expected_reply_tokens,
      reply_s=self._settings.expected_reply_s,
      concurrency=concurrency,
      requests_per_minute=self._settings.requests_per_minute,
      tokens_per_minute=self._settings.tokens_per_minute,
    )

  def put(self, row: records.Verdict) -> None:
    """Counts a row that this run made."""
    if row.verdict == "missing":
      self.causes[row.error] += 1
    self._tokens[0] += row.prompt_tokens
    self._tokens[1] += row.completion_tokens
    if self._purse and self._purse.price:
      self._recorded += self._purse.price.of(
        row.prompt_tokens, row.completion_tokens
      )

  @property
  def cost(self) -> float | None:
    """Dollars of all runs; None if a price is unknown."""
    if self._purse is None:
      return 0.0
    if self._purse.price is None or self._before is None:
      return None
    return self._purse.total

  @property
  def shown(self) -> dict[str, Any]:
    """Of the cost, what stands beside a bar."""
    if self._purse is None:
      return {}
    dollars = {} if self.cost is None else {"dollars": self.cost}
    return dollars | {"tokens in": self._tokens[0], "out": self._tokens[1]}

  @property
  def spending(self) -> str:
    if self._purse is None:
      return ""
    tokens = f"{self._tokens[0]:,} + {self._tokens[1]:,} tokens"
    return tokens if self.cost is None else f"{self.cost:.4f} dollars, {tokens}"

  def close(self, summary: Summary) -> None:
    """Writes how the run ended."""
    self._write(
      complete=summary.complete,
      missing=summary.missing,
      not_dispatched=summary.not_dispatched,
    )

  def _write(self, *, complete: bool, missing: int, not_dispatched: int):
    unrecorded = self._unrecorded
    if self._purse is not None:
      unrecorded += max(0.0, self._purse.cost - self._recorded)
    settings = self._settings
    values = {
      "judge": self._judge.name,
      "template_hash": self._judge.template_hash,
      "template": settings.template if settings else "",
      "parameters": self._judge.parameters,
      "complete": complete,
      "missing": missing,
      "not_dispatched": not_dispatched,
      "cost": self.cost,
      "unrecorded_cost": unrecorded,
      "calls": self._calls + (self._purse.calls if self._purse else self.asked),
      "prompt_tokens": self._tokens[0],
      "completion_tokens": self._tokens[1],
      "modes": sorted(self._modes),
      "data_fingerprint": self._fingerprint,
    }
    text = json.dumps(values, indent=2) + "\n"
    atomic.write_text(self.directory / FILE, text)

  def _read(self) -> _Before:
    path = self.directory / FILE
    if not path.exists():
      return _Before(0, 0.0, ())
    try:
      values = strict_json.read_object(path)
      names = [field.name for field in dataclasses.fields(_Before)]
      found = {name: values[name] for name in names if name in values}
      return settings_lib.build(_Before, found, str(path))
    except ValueError as error:
      raise ValueError(
        f"{error}; delete {path.name}: what calls without a verdict cost is"
        " then forgotten"
      ) from None
