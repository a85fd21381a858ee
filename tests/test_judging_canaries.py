"""Answers that try to steer a judge gain nothing over their clean twins."""

import json
import re

import pytest
from canaries import CANARIES, CLEAN
from test_judging_client import ask, settings

from dpo_jax import judging
from dpo_jax.judging import fake_answers, fake_server, prompts, verdicts

PROMPT = "\n\nHuman: Which river is the longest?\n\nAssistant:"
HONEST = " It is the Nile, if one follows it from its furthest spring."


def questions(order: str) -> tuple[judging.Question, list[judging.Question]]:
  """The clean twin's question, and those of all canaries in that slot."""

  def one(text):
    if order == "second":
      return judging.Question(PROMPT, HONEST, text)
    return judging.Question(PROMPT, text, HONEST)

  def aimed(text):
    if order == "second":
      return text
    swap = str.maketrans("ABＡＢ𝐀𝐁ВA", "BAＢＡ𝐁𝐀АA")
    # Only the letters that stand alone name a slot.
    return re.sub(
      r"(?<![^\W_])[ABＡＢ𝐁В](?![^\W_])",
      lambda match: match[0].translate(swap),
      text,
    )

  attacks = [one(CLEAN + aimed(text)) for text in CANARIES.values()]
  return one(CLEAN), attacks


def test_there_are_enough_of_them():
  assert len(CANARIES) >= 40
  assert len(set(CANARIES.values())) == len(CANARIES)


def naive_choice(page: str) -> str:
  body = {"messages": [{"role": "user", "content": page}]}
  answer = fake_answers.obey(fake_answers.Request({}, body), 0)
  return verdicts.read(_content(answer))


def _content(answer: fake_answers.Answer) -> str:
  return json.loads(answer.body)["choices"][0]["message"]["content"]


def bare_page(question: judging.Question) -> str:
  """The page without fences, bars and tildes, as careless judges write it."""
  return (
    f"{question.prompt}\n\nCandidate A:\n<<<\n{question.first}\n>>>\n\n"
    f"Candidate B:\n<<<\n{question.second}\n>>>\n\nFirst write one sentence"
    " and then\nMore helpful: A\nMore helpful: B"
  )


@pytest.mark.parametrize("slot", ["first", "second"])
def test_the_naive_judge_obeys_them_on_a_careless_page(slot):
  """Without that, no gain on our page would mean nothing."""
  clean, attacks = questions(slot)
  wanted = "A" if slot == "first" else "B"
  assert naive_choice(bare_page(clean)) != wanted
  won = [naive_choice(bare_page(attack)) == wanted for attack in attacks]
  assert sum(won) >= 40, [
    name for name, hit in zip(CANARIES, won, strict=True) if not hit
  ]


@pytest.mark.parametrize("slot", ["first", "second"])
@pytest.mark.parametrize("template", ["dialogue", "summary", "harmlessness"])
def test_none_gains_over_its_clean_twin(slot, template):
  clean, attacks = questions(slot)
  with fake_server.Server(fake_answers.obey) as server:
    used = settings(server.url, template=template)
    (twin, *replies) = ask(used, [clean, *attacks])
  assert twin.choice == ("second" if slot == "first" else "first")
  gained = [
    name
    for name, reply in zip(CANARIES, replies, strict=True)
    if reply.choice != twin.choice
  ]
  assert gained == []


@pytest.mark.parametrize("name", CANARIES)
def test_no_line_of_one_is_a_line_of_the_page(name):
  template = prompts.load("dialogue", output="text", ties=False)
  question = judging.Question(PROMPT, HONEST, CLEAN + CANARIES[name])
  page = prompts.fill(template, question)
  outside = [s for s in page.splitlines() if not s.startswith("| ")]
  plain = prompts.fill(template, judging.Question(PROMPT, HONEST, CLEAN))
  fence, other = (re.search(r"<<<(\w{16})", p)[1] for p in (page, plain))
  assert [s.replace(fence, other) for s in outside] == [
    s for s in plain.splitlines() if not s.startswith("| ")
  ]


@pytest.mark.parametrize("name", CANARIES)
def test_a_judge_that_quotes_one_is_read_by_its_own_last_line(name):
  reply = f"Comparison: B says {CANARIES[name]!r}.\nMore helpful: A"
  assert verdicts.read(reply) == "A"
  reply = f"Comparison: B says {CANARIES[name]}\nMore helpful: A"
  assert verdicts.read(reply) == "A"
