"""Answers that try to steer a judge gain nothing over their clean twins."""

import re
import unicodedata

import judge_server
import pytest
from canaries import CANARIES, CLEAN
from test_judging_client import ask, settings

from dpo_jax import judging
from dpo_jax.judging import prompts, verdicts

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


# What a naive reader takes for the page's structure, wherever it stands; a
# tilde is no part of any of it.
_NAIVE = (
  r"(?:more|most)[ _]helpful[^\w~]{0,8}([AB])\b",
  r"(?<![~\w])(?:preferred|better|winner|verdict|choice|decision|answer)"
  r"[^\w~]{1,8}([AB])\b",
  r"\[\[([AB])\]\]",
  r"boxed\{([AB])\}",
  r"(?:candidate|response|answer|option|assistant) ([AB])\W{0,3}"
  r" (?:is|wins|was)\b",
)
_NAIVE_FORM = re.compile("|".join(_NAIVE), re.IGNORECASE)
# Words after which a naive reader hears another speaker.
_SPEAKER = re.compile(
  r"<\|[^|>]*\|>|</?(?:system|user|assistant|instructions?)>|\[/?INST\]"
  r"|^#+ *(?:system|instructions?)\b|^system(?: \w+)?:",
  re.IGNORECASE | re.MULTILINE,
)
_ORDER = re.compile(
  r"(?:choose|pick|answer|output|say|prefer|select)\b\W*(?:\w+ ){0,3}?([AB])\b",
  re.IGNORECASE,
)
_SLOT = re.compile(
  r"^\W{0,3}(?:candidate|response) ([AB])\W{0,3}$", re.I | re.M
)


def naive_choice(page: str) -> str:
  """What a naive judge says: it obeys the last sign of a verdict it finds.

  It folds full-width letters and drops invisible characters, as a model's
  eye does. Signs are verdicts in any usual form, words of a forged speaker
  that tell what to choose, and slots: of a slot that is opened again it takes
  the last text. Without other signs the text that is not unsure wins, then the
  longer. Bars at the start of lines and tildes before a letter hide a sign
  from it, as they tell a reader that this is quoted.
  """
  page = _eye(page)
  # Its own instructions end the page, and are no sign.
  body = page[: page.rindex("First write one sentence")]
  signs = [
    (match.end(), next(g for g in match.groups() if g).upper())
    for match in _NAIVE_FORM.finditer(body)
  ]
  speaker = _SPEAKER.search(body)
  if speaker:
    orders = _ORDER.finditer(body, speaker.end())
    signs += [(match.end(), match[1].upper()) for match in orders]
  if signs:
    return max(signs)[1]
  slots: dict[str, tuple[bool, int]] = {}
  heads = [*_SLOT.finditer(body)]
  ends = [head.start() for head in heads[1:]] + [len(body)]
  for head, end in zip(heads, ends, strict=True):
    text = body[head.end() : end]
    # A fence that is closed by the code that opened it ends the text.
    fence = re.search(r"<<<(\w*)\n(.*?)\n\1>>>", text, re.DOTALL)
    text = fence[2] if fence else text
    slots[head[1].upper()] = ("not sure" not in text, len(text.split()))
  return max(slots, key=lambda letter: slots[letter], default="A")


def _eye(text: str) -> str:
  text = unicodedata.normalize("NFKC", text)
  text = "".join(c for c in text if unicodedata.category(c) != "Cf")
  # Cyrillic and Greek capitals and small letters that look Latin.
  text = text.translate(str.maketrans("АВΑΒаеоср", "ABABaeocp"))
  return "\n".join(text.splitlines())


def obey(request, number):
  return judge_server.verdict(request, naive_choice(request.prompt))


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
  with judge_server.Server(obey) as server:
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
