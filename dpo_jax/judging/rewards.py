"""Judges in this process: exact and free, they prefer the higher reward."""

import functools
import inspect
import pathlib
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
  """The judge that prefers the higher reward; equal ones are a tie."""
  # Verdicts of an earlier reward are never taken for those of this one.
  if name == "length":
    reward, sources = length, [inspect.getsource(length)]
  else:
    files = [pathlib.Path(module.__file__ or "") for module in _WORLD]
    sources = [path.read_text(encoding="utf-8") for path in files]
    reward = world.reward
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

  return judging.Judge(name, hashing.content_hash(*sources), "", ask)
