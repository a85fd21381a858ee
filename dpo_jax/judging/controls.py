"""Questions whose answers say something of the judge, not of the models.

- aa: a chosen text against itself, really asked. A sound judge names either
  slot half of the time; both orders are two separate calls.
- gold: a prompt's own chosen answer against another prompt's. A sound judge
  prefers the first nearly always.
- retest: an ordinary question once more, behind other fences. A sound judge
  answers as before.

Samples are drawn by hash, so that each is the same in every run with the same
seed, and a larger one holds a smaller one.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from dpo_jax.core import settings as settings_lib
from dpo_jax.io import hashing, jsonl, records
from dpo_jax.judging import questions

FILE = "controls.jsonl"


@dataclasses.dataclass(frozen=True)
class ControlSettings:
  """How many of each; 0 for none."""

  aa: int
  gold: int
  retests: int

  def __post_init__(self):
    settings_lib.check(self, "controls.")


def cases(
  settings: ControlSettings,
  seed: int,
  orders: str,
  ordinary: Iterable[questions.Case],
  store: jsonl.Store[records.Verdict],
) -> list[questions.Case]:
  """The control cases among these ordinary ones, to be written to `store`."""
  ordinary = list(ordinary)
  prompts = _prompts(case.response for case in ordinary)
  found: list[questions.Case] = []
  drawn = _draw(prompts, settings.aa, "aa", seed)
  for row in drawn:
    found += _both("aa", _control(row, row.chosen), store, orders, seed)
  # Partners stand next to each other in an order that the seed shuffles.
  circle = _draw(prompts, len(prompts), "gold", seed)
  for place, row in enumerate(circle[: settings.gold]):
    others = circle[place + 1 :] + circle[:place]
    other = next(
      (o for o in others if o.chosen.strip() != row.chosen.strip()), None
    )
    if other is not None:
      control = _control(row, other.chosen)
      found += _both("gold", control, store, orders, seed)
  asked = [c for c in ordinary if not questions.same(c)]
  asked.sort(
    key=lambda c: hashing.content_hash("retest", str(seed), repr(c.unit))
  )
  found += [
    questions.Case(store, case.response, case.order, "retest")
    for case in asked[: settings.retests]
  ]
  return found


def _prompts(responses: Iterable[records.Response]) -> list[records.Response]:
  """One response of each prompt, whichever: only its chosen text is used."""
  return list({row.prompt_id: row for row in responses}.values())


def _draw(
  rows: Sequence[records.Response], count: int, name: str, seed: int
) -> list[records.Response]:
  def place(row: records.Response) -> str:
    return hashing.content_hash(name, str(seed), row.prompt_id)

  return sorted(rows, key=place)[:count]


def _control(row: records.Response, against: str) -> records.Response:
  """The row's chosen text in the model's place, against another text."""
  return dataclasses.replace(
    row,
    response=row.chosen,
    chosen=against,
    model="chosen",
    step=None,
    temperature=0.0,
    sample_id=0,
  )


def _both(
  control: records.Control,
  row: records.Response,
  store: jsonl.Store[records.Verdict],
  orders: str,
  seed: int,
) -> list[questions.Case]:
  return [
    questions.Case(store, row, order, control)
    for order in questions.orders(orders, seed, row)
  ]
