"""Questions whose answers say something of the judge, not of the models.

- aa: a chosen text against itself, really asked: either slot, half of the time.
- gold: a prompt's own chosen answer against another prompt's: the first.
- retest: an ordinary question once more, behind other fences: the same answer.

Drawn by hash: the same for the same seed, and the more hold the fewer.
"""

import dataclasses
from collections.abc import Iterator, Sequence

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
  ordinary: Sequence[questions.Case],
  store: jsonl.Store[records.Verdict],
) -> Iterator[questions.Case]:
  """The control cases among these ordinary ones, to be written to `store`."""
  # One response of each prompt, whichever: only its chosen text is used.
  prompts = {case.response.prompt_id: case.response for case in ordinary}

  def draw(control: str) -> list[records.Response]:
    return sorted(
      prompts.values(),
      key=lambda r: hashing.content_hash(control, str(seed), r.prompt_id),
    )

  def both(
    control: records.Control, row: records.Response, against: str
  ) -> Iterator[questions.Case]:
    shown = dataclasses.replace(
      row,
      response=row.chosen,
      chosen=against,
      model="chosen",
      step=None,
      temperature=0.0,
      sample_id=0,
    )
    for order in questions.orders(orders, seed, shown):
      yield questions.Case(store, shown, order, control)

  for row in draw("aa")[: settings.aa]:
    yield from both("aa", row, row.chosen)
  # Partners are neighbours in an order that the seed shuffles.
  circle = draw("gold")
  for place, row in enumerate(circle[: settings.gold]):
    for other in circle[place + 1 :] + circle[:place]:
      if other.chosen.strip() != row.chosen.strip():
        yield from both("gold", row, other.chosen)
        break
  asked = sorted(
    (case for case in ordinary if not case.same),
    key=lambda c: hashing.content_hash("retest", str(seed), repr(c.unit)),
  )
  for case in asked[: settings.retests]:
    yield questions.Case(store, case.response, case.order, "retest")
