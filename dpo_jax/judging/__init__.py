"""A judge is a question asked of somebody: these types are all it needs.

A question shows two texts in a fixed order; the reply names a slot, never a
model. Who stands in which slot is known to the runner alone, so a judge
cannot favour one side, and any judge can stand in for any other.
"""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Literal

from dpo_jax.core import errors

Choice = Literal["first", "second", "tie", "missing", "refusal"]


class Stop(errors.Stopped):
  """No further question can be answered: a bad key, a spent quota."""


@dataclasses.dataclass(frozen=True)
class Question:
  """Which of two answers to the prompt is better?

  `salt` tells apart questions about the same texts, such as the two orders of
  a text against itself; no judge sees it, but its fences depend on it.
  """

  prompt: str
  first: str
  second: str
  salt: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a judge said.

  `text` is its own words, `model` and `fingerprint` who it said it was, and
  `error` the cause when the choice is missing, else empty. `score` is its
  probability, 0 to 1, that the first text is better, if it gave one. Tokens
  are all that were spent on the question, calls in vain included.
  """

  choice: Choice
  text: str
  model: str
  error: str
  fingerprint: str = ""
  score: float | None = None
  prompt_tokens: int = 0
  completion_tokens: int = 0


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
