"""From responses to questions: what is asked, and what needs no asking.

A case is one verdict to be written. Cases of the same key (same judge, prompt,
texts and order) are one question, whose answer is written for each of them.
"""

import dataclasses
from collections.abc import Iterable

from dpo_jax import judging
from dpo_jax.io import hashing, jsonl, records

ORDERS: tuple[records.Order, records.Order] = ("model_first", "chosen_first")


@dataclasses.dataclass(frozen=True)
class Case:
  """One verdict to be written: a response in an order, and where it goes."""

  store: jsonl.Store[records.Verdict]
  response: records.Response
  order: records.Order
  control: records.Control = ""

  @property
  def unit(self) -> tuple:
    return (*self.response.unit, self.order, self.control)


@dataclasses.dataclass
class Plan:
  """Questions by key with the cases they answer, and rows that need none."""

  questions: dict[str, list[Case]]
  rows: list[tuple[Case, records.Verdict]]
  outcomes: dict[tuple, records.Outcome]
  identical: int


def plan(
  judge: judging.Judge,
  cases: Iterable[Case],
  stores: Iterable[jsonl.Store[records.Verdict]],
) -> Plan:
  """Sorts the cases into answered, answerable without a call, and open."""
  current: dict[tuple, records.Verdict] = {}
  answered: dict[str, records.Verdict] = {}
  for store in stores:
    for row in store.rows:
      current[row.unit] = row
      if row.verdict != "missing":
        answered[row.key] = row
  result = Plan(questions={}, rows=[], outcomes={}, identical=0)
  for case in cases:
    key = _key(judge, case)
    tie = not case.control and same(case)
    result.identical += tie
    row = current.get(case.unit)
    if row and row.key == key and row.verdict != "missing":
      result.outcomes[case.unit] = row.verdict
    elif tie:
      reply = judging.Reply("tie", "", "", "")
      result.rows.append((case, verdict(judge, key, case, reply)))
    elif key in answered:
      result.rows.append((case, _about(case, answered[key])))
    else:
      result.questions.setdefault(key, []).append(case)
  return result


def same(case: Case) -> bool:
  """Whether both texts are one, which is a tie that nobody need be asked."""
  return case.response.response.strip() == case.response.chosen.strip()


def orders(
  setting: str, seed: int, response: records.Response
) -> tuple[records.Order, ...]:
  """Both orders, or the one that the seed draws for the prompt and sample."""
  if setting == "both":
    return ORDERS
  # All models meet a prompt in the same order, so that they stay comparable.
  drawn = hashing.content_hash(
    "order", str(seed), response.prompt_id, str(response.sample_id)
  )
  return (ORDERS[int(drawn, 16) % 2],)


def question(case: Case) -> judging.Question:
  """The two texts in the order in which they are shown."""
  response = case.response
  texts = (response.response, response.chosen)
  if case.order == "chosen_first":
    texts = texts[::-1]
  salt = f"{case.control} {case.order}" if case.control else ""
  return judging.Question(response.prompt, *texts, salt)


def fingerprint(responses: Iterable[records.Response]) -> str:
  """Hash of the sorted (prompt id, prompt, chosen): what was compared with."""
  rows = {(row.prompt_id, row.prompt, row.chosen) for row in responses}
  return hashing.content_hash(*(text for row in sorted(rows) for text in row))


def _key(judge: judging.Judge, case: Case) -> str:
  response = case.response
  control = (case.control,) if case.control else ()
  return hashing.content_hash(
    judge.name,
    judge.parameters,
    judge.template_hash,
    case.order,
    response.prompt,
    response.response,
    response.chosen,
    *control,
  )


def rows(
  judge: judging.Judge, key: str, cases: list[Case], reply: judging.Reply
) -> list[records.Verdict]:
  """The rows of one question; what it cost stands in the first alone."""
  free = dataclasses.replace(reply, prompt_tokens=0, completion_tokens=0)
  return [
    verdict(judge, key, case, free if number else reply)
    for number, case in enumerate(cases)
  ]


def verdict(
  judge: judging.Judge, key: str, case: Case, reply: judging.Reply
) -> records.Verdict:
  """The row that a reply makes."""
  outcome: records.Outcome
  shown_first = case.order == "model_first"
  score = reply.score
  if score is not None and not shown_first:
    score = 1.0 - score
  if reply.choice in ("first", "second"):
    model_wins = shown_first == (reply.choice == "first")
    outcome = "model" if model_wins else "chosen"
  else:
    outcome = reply.choice
  response = case.response
  return records.Verdict(
    key=key,
    prompt_id=response.prompt_id,
    model=response.model,
    step=response.step,
    temperature=response.temperature,
    sample_id=response.sample_id,
    order=case.order,
    control=case.control,
    verdict=outcome,
    score=score,
    judge=judge.name,
    judge_returned=reply.model,
    judge_fingerprint=reply.fingerprint,
    template_hash=judge.template_hash,
    response_chars=len(response.response),
    chosen_chars=len(response.chosen),
    prompt_tokens=reply.prompt_tokens,
    completion_tokens=reply.completion_tokens,
    raw=reply.text,
    error=reply.error,
  )


def _about(case: Case, row: records.Verdict) -> records.Verdict:
  """The answer to the same question, about another response of equal text."""
  response = case.response
  return dataclasses.replace(
    row,
    prompt_id=response.prompt_id,
    model=response.model,
    step=response.step,
    temperature=response.temperature,
    sample_id=response.sample_id,
    # Nothing was asked for this row.
    prompt_tokens=0,
    completion_tokens=0,
  )
