"""The synthetic world's true reward as a judge: exact, free and unbiased."""

import functools
import pathlib

from dpo_jax import judging, records, synthetic
from dpo_jax.world import synthetic_claims, synthetic_tables, synthetic_text

# All that a reward follows from.
_SOURCES = (synthetic, synthetic_claims, synthetic_tables, synthetic_text)


def oracle() -> judging.Judge:
  """A judge that prefers the text of higher true reward.

  It is named after the reward's source code, so that verdicts of an earlier
  reward are never taken for those of this one.
  """
  sources = [
    pathlib.Path(module.__file__ or "").read_text(encoding="utf-8")
    for module in _SOURCES
  ]
  # Both orders and repeated references ask for the same rewards.
  reward = functools.lru_cache(maxsize=65536)(synthetic.reward)

  async def ask(question: judging.Question) -> judging.Reply:
    first = reward(question.prompt, question.first)
    second = reward(question.prompt, question.second)
    text = f"reward {first:.6g} against {second:.6g}"
    if first == second:
      return judging.Reply("tie", text, "oracle", "")
    choice = "first" if first > second else "second"
    return judging.Reply(choice, text, "oracle", "")

  return judging.Judge(
    name="oracle",
    parameters=records.content_hash(*sources),
    template_hash="",
    ask=ask,
  )
