"""Judges without a server: the text with the higher reward wins."""

import inspect
import pathlib
from typing import Literal

from dpo_jax import judging
from dpo_jax.demo import claims, tables, world
from dpo_jax.demo import text as text_lib
from dpo_jax.io import hashing

Name = Literal["oracle", "length"]

# The modules that define the synthetic world's reward.
_WORLD = (world, claims, tables, text_lib)


def length(prompt: str, response: str) -> float:
  """Characters of the response: works on any text, measures no quality."""
  return float(len(response))


def judge(name: Name) -> judging.Judge:
  """The judge of a reward; equal rewards are a tie."""
  # The source is a parameter: verdicts of an edited reward are not reused.
  if name == "length":
    reward, sources = length, [inspect.getsource(length)]
  else:
    files = [pathlib.Path(module.__file__ or "") for module in _WORLD]
    sources = [path.read_text(encoding="utf-8") for path in files]
    reward = world.reward

  async def ask(question: judging.Question) -> judging.Reply:
    first = reward(question.prompt, question.first)
    second = reward(question.prompt, question.second)
    text = f"reward {first:.6g} against {second:.6g}"
    if first == second:
      return judging.Reply("tie", text, name, "")
    choice = "first" if first > second else "second"
    return judging.Reply(choice, text, name, "")

  return judging.Judge(name, hashing.content_hash(*sources), "", ask)
