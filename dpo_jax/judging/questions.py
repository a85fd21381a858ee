"""From responses to questions: what is asked, and what needs no asking.

A case is one verdict to be written; cases of the same key are one question.
"""

import dataclasses
from collections.abc import Iterable, Iterator

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

  @property
  def same(self) -> bool:
    """Whether both texts are equal: a tie without a call."""
    return self.response.response.strip() == self.response.chosen.strip()

  @property
  def question(self) -> judging.Question:
    """The two texts in the order in which they are shown."""
    texts = (self.response.response, self.response.chosen)
    if self.order == "chosen_first":
      texts = texts[::-1]
    salt = f"{self.control} {self.order}" if self.control else ""
    return judging.Question(self.response.prompt, *texts, salt)


@dataclasses.dataclass
class Plan:
  """Questions by key with the cases they answer, and rows that need none."""

  size: int
  questions: dict[str, list[Case]]
  rows: list[tuple[Case, records.Verdict]]
  outcomes: dict[tuple, records.Outcome]
  identical: int


def plan(
  judge: judging.Judge,
  cases: list[Case],
  rows: Iterable[records.Verdict],
) -> Plan:
  """Sorts the cases into answered by `rows`, answerable at once, and open."""
  current: dict[tuple, records.Verdict] = {}
  answered: dict[str, records.Verdict] = {}
  for row in rows:
    current[row.unit] = row
    if row.verdict != "missing":
      answered[row.key] = row
  result = Plan(len(cases), {}, [], {}, identical=0)
  for case in cases:
    key = _key(judge, case)
    tie = case.same and not case.control
    result.identical += tie
    row = current.get(case.unit)
    if row and row.key == key and row.verdict != "missing":
      result.outcomes[case.unit] = row.verdict
    elif tie:
      reply = judging.Reply("tie", "", "", "")
      result.rows.append((case, _verdict(judge, key, case, reply)))
    elif key in answered:
      about = {**_about(case), "prompt_tokens": 0, "completion_tokens": 0}
      result.rows.append((case, dataclasses.replace(answered[key], **about)))
    else:
      result.questions.setdefault(key, []).append(case)
  return result


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


def fingerprint(responses: Iterable[records.Response]) -> str:
  """Hash of the sorted (prompt id, prompt, chosen): what was compared with."""
  rows = {(row.prompt_id, row.prompt, row.chosen) for row in responses}
  return hashing.content_hash(*(text for row in sorted(rows) for text in row))


def _key(judge: judging.Judge, case: Case) -> str:
  response = case.response
  return hashing.content_hash(
    *judge.identity,
    case.order,
    response.prompt,
    response.response,
    response.chosen,
    *((case.control,) if case.control else ()),
  )


def _about(case: Case) -> dict:
  names = ("prompt_id", "model", "step", "temperature", "sample_id")
  return {name: getattr(case.response, name) for name in names}


def rows(
  judge: judging.Judge, key: str, cases: list[Case], reply: judging.Reply
) -> Iterator[tuple[Case, records.Verdict]]:
  """The rows of one question with their cases; the first has its tokens."""
  for case in cases:
    yield case, _verdict(judge, key, case, reply)
    reply = dataclasses.replace(reply, prompt_tokens=0, completion_tokens=0)


def _verdict(
  judge: judging.Judge, key: str, case: Case, reply: judging.Reply
) -> records.Verdict:
  outcome, score = reply.choice, reply.score
  model_first = case.order == "model_first"
  if score is not None and not model_first:
    score = 1.0 - score
  if outcome in ("first", "second"):
    outcome = "model" if model_first == (outcome == "first") else "chosen"
  return records.Verdict(
    **_about(case),
    key=key,
    order=case.order,
    control=case.control,
    verdict=outcome,
    score=score,
    judge=judge.name,
    judge_returned=reply.model,
    judge_fingerprint=reply.fingerprint,
    template_hash=judge.template_hash,
    response_chars=len(case.response.response),
    chosen_chars=len(case.response.chosen),
    prompt_tokens=reply.prompt_tokens,
    completion_tokens=reply.completion_tokens,
    raw=reply.text,
    error=reply.error,
  )
