"""Pairwise judging: the types that every judge and its caller share.

A question shows two texts in a fixed order and the reply names a slot. Only the
runner knows which slot is the model's, so a judge cannot favor a side.
"""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Literal

from dpo_jax.core import errors

Choice = Literal["first", "second", "tie", "missing", "refusal"]


class Stop(errors.Stopped):
  """No further question can succeed: a bad key, an exhausted quota."""


@dataclasses.dataclass(frozen=True)
class Question:
  """Which text is the better response? `salt` separates equal questions."""

  prompt: str
  first: str
  second: str
  salt: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a judge returned; `error` is the cause of a missing choice.

  `model`, `fingerprint` and tokens are the server's; `score` is the judge's
  probability that the first text is better, or None.
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
  """`ask` and what its replies depend on; it raises `Stop` to end a run."""

  name: str
  parameters: str
  template_hash: str
  ask: Callable[[Question], Awaitable[Reply]]

  @property
  def identity(self) -> tuple[str, str, str]:
    return self.name, self.parameters, self.template_hash
