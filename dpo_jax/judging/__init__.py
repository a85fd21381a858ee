"""A judge is a question asked of somebody: these types are all it needs.

A question shows two texts in a fixed order; the reply names a slot, never a
model. Who stands in which slot is known to the runner alone, so a judge
cannot favour one side, and any judge can stand in for any other.
"""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Literal

from dpo_jax import errors

Choice = Literal["first", "second", "tie", "missing", "refusal"]


class Stop(errors.Stopped):
  """No further question can be answered: a bad key, a spent quota."""


@dataclasses.dataclass(frozen=True)
class Question:
  """Which of two answers to the prompt is better? Texts are shown as given."""

  prompt: str
  first: str
  second: str


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a judge said.

  `text` is its own words, `model` who it said it was, and `error` the cause
  when the choice is missing, else empty.
  """

  choice: Choice
  text: str
  model: str
  error: str


@dataclasses.dataclass(frozen=True)
class Judge:
  """Somebody who answers questions.

  `name`, `parameters` and `template_hash` go into the key of every verdict:
  two judges that may answer the same question differently must differ in one
  of them. `ask` raises `Stop` when asking on is of no use; every other failure
  is a reply whose choice is missing.
  """

  name: str
  parameters: str
  template_hash: str
  ask: Callable[[Question], Awaitable[Reply]]
