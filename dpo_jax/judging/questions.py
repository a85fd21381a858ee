"""From responses to questions: orders, controls, and what is asked already.

A case is one verdict to be written. Cases of equal content share a key, and so
one question to the judge.

Controls measure the judge, not the models:

- aa: a chosen text against itself; either slot should win half of the time.
- gold: a prompt's own chosen text against another prompt's; it should win.
- retest: an ordinary question again, with other fences; the verdict should be
  the same.

Controls are drawn by hash, so that a larger sample contains the smaller one.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from dpo_jax import judging
from dpo_jax.core import settings as settings_lib
from dpo_jax.io import hashing, jsonl, records

ORDERS: tuple[records.Order, records.Order] = ("model_first", "chosen_first")
CONTROLS_FILE = "controls.jsonl"


@dataclasses.dataclass(frozen=True)
class ControlSettings:
  """Size of each control's sample: prompts, prompts, questions."""

  aa: int
  gold: int
  retests: int

  def __post_init__(self):
    settings_lib.check(self, "controls.")


@dataclasses.dataclass(frozen=True)
class Case:
  """A response in one order, and the file of its verdict."""

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
    texts = (self.response.response, self.response.chosen)
    if self.order == "chosen_first":
      texts = texts[::-1]
    salt = f"{self.control} {self.order}" if self.control else ""
    return judging.Question(self.response.prompt, *texts, salt)


@dataclasses.dataclass
class Plan:
  """Open cases by their question's key, and verdicts that need no call.

  `size` counts all cases; `outcomes` grows as the judge replies.
  """

  size: int
  questions: dict[str, list[Case]]
  rows: list[tuple[Case, records.Verdict]]
  outcomes: dict[tuple, records.Outcome]


def read_responses(
  directory: pathlib.Path,
) -> dict[str, list[records.Response]]:
  """Responses by file; ValueError unless there are any, each once."""
  files, seen = {}, {}
  for path in sorted(directory.glob("*.jsonl")):
    if path.name == CONTROLS_FILE:
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
      f"{directory} has no responses (*.jsonl): run sample.py with the same"
      " --workdir first"
    )
  return files


def check_judge(
  directory: pathlib.Path, judge: judging.Judge, rows: list[records.Verdict]
) -> None:
  """ValueError if a verdict is of another judge or template."""
  found = {(r.judge, r.template_hash) for r in rows if r.verdict != "missing"}
  for name, template in found - {(judge.name, judge.template_hash)}:
    raise ValueError(
      f"{directory} has verdicts of judge {name!r} on template {template:.8},"
      f" not of {judge.name!r} on {judge.template_hash:.8}, and no report mixes"
      " them: give this one a directory of its own, --config.verdicts="
      "verdicts-NAME (of replicate, with --config.report.verdicts)"
    )


def check_units(
  store: jsonl.Store[records.Verdict], responses: list[records.Response]
) -> None:
  """ValueError if a verdict in the file is not on one of the responses."""
  known = {response.unit for response in responses}
  for row in store.rows:
    if row.unit[:5] not in known:
      raise ValueError(
        f"{store.path} has verdicts on responses that are not in"
        f" responses/{store.path.name}, such as {row.unit}: move the verdicts"
        " away, or use another --workdir"
      )


def plan(
  judge: judging.Judge, cases: Sequence[Case], rows: Iterable[records.Verdict]
) -> Plan:
  """Splits cases into judged in `rows`, judged without a call, and open."""
  current: dict[tuple, records.Verdict] = {}
  known: dict[str, records.Verdict] = {}
  for row in rows:
    current[row.unit] = row
    if row.verdict != "missing":
      known[row.key] = row
  result = Plan(len(cases), {}, [], {})
  for case in cases:
    key = _key(judge, case)
    row = current.get(case.unit)
    if row and row.key == key and row.verdict != "missing":
      result.outcomes[case.unit] = row.verdict
    elif case.same and not case.control:
      reply = judging.Reply("tie", "", "", "")
      result.rows.append((case, _verdict(judge, key, case, reply)))
    elif key in known:
      about = {**_about(case), "prompt_tokens": 0, "completion_tokens": 0}
      result.rows.append((case, dataclasses.replace(known[key], **about)))
    else:
      result.questions.setdefault(key, []).append(case)
  return result


def orders(
  setting: str, seed: int, response: records.Response
) -> tuple[records.Order, ...]:
  """Both orders, or the one that the seed draws for the prompt and sample."""
  if setting == "both":
    return ORDERS
  # Independent of the model, so that models are compared in equal orders.
  drawn = hashing.content_hash(
    "order", str(seed), response.prompt_id, str(response.sample_id)
  )
  return (ORDERS[int(drawn, 16) % 2],)


def controls(
  settings: ControlSettings,
  setting: str,
  seed: int,
  ordinary: Sequence[Case],
  store: jsonl.Store[records.Verdict],
) -> Iterator[Case]:
  """Control cases drawn from ordinary ones; `setting` as in `orders`."""
  # Any response of a prompt: aa and gold use its chosen text only.
  prompts = {case.response.prompt_id: case.response for case in ordinary}

  def shuffled(control: str) -> list[records.Response]:
    return sorted(
      prompts.values(),
      key=lambda r: hashing.content_hash(control, str(seed), r.prompt_id),
    )

  def against(
    control: records.Control, row: records.Response, other: str
  ) -> Iterator[Case]:
    shown = dataclasses.replace(
      row,
      response=row.chosen,
      chosen=other,
      model="chosen",
      step=None,
      temperature=0.0,
      sample_id=0,
    )
    for order in orders(setting, seed, shown):
      yield Case(store, shown, order, control)

  for row in shuffled("aa")[: settings.aa]:
    yield from against("aa", row, row.chosen)
  # The partner is the next prompt, cyclically, with another chosen text.
  circle = shuffled("gold")
  for place, row in enumerate(circle[: settings.gold]):
    for other in circle[place + 1 :] + circle[:place]:
      if other.chosen.strip() != row.chosen.strip():
        yield from against("gold", row, other.chosen)
        break
  retests = sorted(
    (case for case in ordinary if not case.same),
    key=lambda c: hashing.content_hash("retest", str(seed), repr(c.unit)),
  )
  for case in retests[: settings.retests]:
    yield Case(store, case.response, case.order, "retest")


def fingerprint(responses: Iterable[records.Response]) -> str:
  """Hash of the sorted (prompt id, prompt, chosen): the evaluation set."""
  rows = {(row.prompt_id, row.prompt, row.chosen) for row in responses}
  return hashing.content_hash(*(text for row in sorted(rows) for text in row))


def rows(
  judge: judging.Judge, key: str, cases: list[Case], reply: judging.Reply
) -> Iterator[tuple[Case, records.Verdict]]:
  """Each case of a question with its verdict; the first has the tokens."""
  for case in cases:
    yield case, _verdict(judge, key, case, reply)
    reply = dataclasses.replace(reply, prompt_tokens=0, completion_tokens=0)


def _key(judge: judging.Judge, case: Case) -> str:
  """Hash of everything that the verdict depends on."""
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
