"""A judge is a question asked of somebody: these types are all it needs.

A question shows two texts in a fixed order; the reply names a slot, never a
model. The runner alone knows which slot is whose: a judge cannot favor a side.
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

  `salt` tells apart questions about the same texts: it changes their fences.
  """

  prompt: str
  first: str
  second: str
  salt: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a judge said, and who it said it was.

  `error` is the cause of a missing choice. `score` is the judge's probability
  that the first text is better. Tokens are all that the question took.
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
  """Somebody who answers questions, identified by the other three fields.

  `ask` raises `Stop` when further questions are of no use; any other failure
  is a missing choice.
  """

  name: str
  parameters: str
  template_hash: str
  ask: Callable[[Question], Awaitable[Reply]]

  @property
  def identity(self) -> tuple[str, str, str]:
    return self.name, self.parameters, self.template_hash
