"""Judges in this process: exact and free, they prefer the higher reward."""

import functools
import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal

from dpo_jax import judging
from dpo_jax.demo import claims, tables, world
from dpo_jax.demo import text as text_lib
from dpo_jax.io import hashing

Name = Literal["oracle", "length"]

# All that the synthetic world's reward follows from.
_WORLD = (world, claims, tables, text_lib)


def length(prompt: str, response: str) -> float:
  """Characters of the response: any text has some, and they mean nothing."""
  return float(len(response))


def judge(name: Name) -> judging.Judge:
  """The judge by the world's true reward ("oracle"), or by `length`."""
  if name == "length":
    return prefer_higher(name, length, [inspect.getsource(length)])
  sources = [
    pathlib.Path(module.__file__ or "").read_text(encoding="utf-8")
    for module in _WORLD
  ]
  return prefer_higher(name, world.reward, sources)


def prefer_higher(
  name: str, reward: Callable[[str, str], float], sources: Sequence[str]
) -> judging.Judge:
  """A judge that prefers the text of higher reward; equal ones are a tie.

  Args:
    name: of the judge.
    reward: (prompt, response) -> float.
    sources: source code that the reward follows from: verdicts of an earlier
      reward are never taken for those of this one.
  """
  # Both orders and repeated references ask for the same rewards.
  reward = functools.lru_cache(maxsize=65536)(reward)

  async def ask(question: judging.Question) -> judging.Reply:
    first = reward(question.prompt, question.first)
    second = reward(question.prompt, question.second)
    text = f"reward {first:.6g} against {second:.6g}"
    if first == second:
      return judging.Reply("tie", text, name, "")
    choice = "first" if first > second else "second"
    return judging.Reply(choice, text, name, "")

  return judging.Judge(
    name=name,
    parameters=hashing.content_hash(*sources),
    template_hash="",
    ask=ask,
  )
