"""A judge is a question asked of somebody: these types are all it needs.

A question shows two texts in a fixed order, and the reply names a slot: only
the runner knows whose it is, so that a judge cannot favor a side.
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
  """Which answer is better? Questions of equal texts differ in their `salt`."""

  prompt: str
  first: str
  second: str
  salt: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a judge said, and who it said it was; `error` is why it is missing.

  `score` is its probability that the first text is better, if it gave one.
  """

  choice: Choice
  text: str
  model: str
  error: str
  fingerprint: str = ""
  score: float | None = None
  prompt_tokens: int = 0
  completion_tokens: int = 0


NOTHING = Reply("missing", "", "", "")


@dataclasses.dataclass(frozen=True)
class Judge:
  """Somebody who answers questions, or raises `Stop` when that is of no use."""

  name: str
  parameters: str
  template_hash: str
  ask: Callable[[Question], Awaitable[Reply]]

  @property
  def identity(self) -> tuple[str, str, str]:
    return self.name, self.parameters, self.template_hash
