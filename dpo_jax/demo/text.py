"""Questions of the synthetic world: drawn, and parsed from a dialogue."""

import dataclasses
import functools
import random
import re

from dpo_jax.demo import tables


@dataclasses.dataclass(frozen=True)
class Question:
  """The question in the last human turn of a dialogue.

  Attributes:
    kind: "fact", "check", "compare", "find" or "feed".
    animals: two for "compare", else one.
    attribute: the fact asked for; "" for "find" and "feed".
    claim: the value to be confirmed by "check"; else "".
    code: sum of the table indices of every animal, attribute and phrasing in
      the dialogue so far; `held_out` splits on it.
  """

  kind: str
  animals: tuple[str, ...]
  attribute: str
  claim: str
  code: int

  @functools.cached_property
  def cells(self) -> tuple[tuple[str, str], ...]:
    """The (animal, attribute) facts of a complete response."""
    if self.kind == "compare":
      return ()
    wanted = {"find": ("home", "time"), "feed": ("food", "home")}
    names = wanted.get(self.kind, (self.attribute,))
    return tuple((self.animals[0], name) for name in names)

  @property
  def winner(self) -> str:
    """The heavier or older of the two animals compared."""
    return max(
      self.animals,
      key=lambda a: tables.NUMBERS[tables.FACTS[a][self.attribute]],
    )


def _index() -> dict[str, tuple[str, str, str, int]]:
  """(kind, attribute, claim, phrasing) by the question's skeleton."""
  index = {}
  for kind, table in (
    ("fact", tables.FACT_QUESTIONS),
    ("compare", tables.COMPARE_QUESTIONS),
    ("it", tables.IT_QUESTIONS),
  ):
    for attribute, templates in table.items():
      for phrasing, template in enumerate(templates):
        index[template] = (kind, attribute, "", phrasing)
  for kind, templates in (
    *tables.HOW_QUESTIONS.items(),
    ("same", tables.SAME_QUESTIONS),
  ):
    for phrasing, template in enumerate(templates):
      index[template] = (kind, "", "", phrasing)
  for phrasing, template in enumerate(tables.CHECK_QUESTIONS):
    for attribute in tables.ATTRIBUTES:
      for value in tables.VALUES[attribute]:
        said = template.replace("%", tables.clause(attribute, value))
        index[said] = ("check", attribute, value, phrasing)
  return index


_INDEX = _index()
_ANIMAL = re.compile(r"\b(" + "|".join(tables.ANIMALS) + r")\b")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SMALL_TALK = frozenset(asked for asked, _ in tables.SMALL_TALK)


@functools.lru_cache(maxsize=4096)
def parse(prompt: str) -> Question:
  """The last question of a dialogue, with the turns it refers to.

  Args:
    prompt: "\\n\\nHuman: ...\\n\\nAssistant:", one turn or several.

  Raises:
    ValueError: the prompt is not a dialogue of this world.
  """
  parts = _TURN.split(prompt)
  if parts[0] or parts[-2:] != ["Assistant", ""]:
    raise ValueError(
      f"prompt {prompt[-200:]!r} must start with a human turn and end with"
      ' "\\n\\nAssistant:"'
    )
  question = None
  for role, text in zip(parts[1::2], parts[2::2]):
    asked = text.removeprefix(" ")
    if role == "Human" and asked not in _SMALL_TALK:
      question = _follow(asked, question)
  if question is None:
    raise ValueError(f"prompt {prompt[-200:]!r} asks nothing")
  return question


def _follow(text: str, before: Question | None) -> Question:
  """The question of one human turn, which may refer to `before`."""
  opener = next((o for o in tables.OPENERS[1:] if text.startswith(o)), "")
  text = text.removeprefix(opener)
  animals = tuple(_ANIMAL.findall(text))
  skeleton = _ANIMAL.sub("@", text)
  if skeleton not in _INDEX or "@" in text:
    raise ValueError(
      f"{text[:200]!r} is no question of this world: its oracle judges only"
      " prompts of `world.generate`"
    )
  kind, attribute, claim, phrasing = _INDEX[skeleton]
  if kind in ("it", "same"):
    if before is None or (kind == "same" and before.kind != "fact"):
      raise ValueError(f"{text[:200]!r} refers to no earlier question")
    animals = animals if kind == "same" else before.animals[:1]
    attribute = attribute if kind == "it" else before.attribute
    kind = "fact"
  code = phrasing + sum(tables.ANIMALS.index(animal) for animal in animals)
  code += tables.ATTRIBUTES.index(attribute) if attribute else 0
  code += before.code if before else 0
  return Question(kind, animals, attribute, claim, code)


def held_out(prompt: str) -> bool:
  """Whether a prompt's combination is of the test split: one in six.

  The sum of the indices of its animals, attributes and phrasings is a multiple
  of six. Every (animal, attribute) pair has five of its six plain phrasings in
  training, so that no fact is withheld.
  """
  return parse(prompt).code % 6 == 0


def draw_prompt(rng: random.Random) -> str:
  """A random dialogue that ends with a question.

  Two in three have one turn; the others follow up on an earlier question ("And
  where does it live?", "And the owl?") or start with small talk.
  """
  human, assistant = "\n\nHuman: ", "\n\nAssistant: "
  form = rng.choices(("plain", "talk", "follow"), (0.67, 0.07, 0.26))[0]
  text = ""
  if form == "talk":
    asked, said = rng.choice(tables.SMALL_TALK)
    text = human + asked + assistant + said
  if form != "follow":
    text += human + rng.choice(tables.OPENERS) + _draw_question(rng)
    return text + "\n\nAssistant:"
  # Distinct animals and attributes: nothing is asked twice.
  attributes = rng.sample(tables.ATTRIBUTES, 3)
  animals = rng.sample(tables.ANIMALS, 3)
  attribute, animal = attributes.pop(), animals.pop()
  asked = tables.fill(rng.choice(tables.FACT_QUESTIONS[attribute]), (animal,))
  text = human + rng.choice(tables.OPENERS) + asked
  for _ in range(2 if rng.random() < 0.2 else 1):
    said = rng.choice(tables.STATEMENTS[attribute])
    text += assistant + tables.fill(
      said, (animal,), tables.FACTS[animal][attribute]
    )
    if rng.random() < 0.6:
      attribute = attributes.pop()
      text += human + rng.choice(tables.IT_QUESTIONS[attribute])
    else:
      animal = animals.pop()
      text += human + tables.fill(rng.choice(tables.SAME_QUESTIONS), (animal,))
  return text + "\n\nAssistant:"


def _draw_question(rng: random.Random) -> str:
  """A question that refers to no other."""
  kind = rng.choices(
    ("fact", "check", "compare", "how"), (0.5, 0.15, 0.15, 0.2)
  )[0]
  attribute = rng.choice(tables.ATTRIBUTES)
  animal = rng.choice(tables.ANIMALS)
  if kind == "fact":
    return tables.fill(rng.choice(tables.FACT_QUESTIONS[attribute]), (animal,))
  if kind == "how":
    templates = tables.HOW_QUESTIONS[rng.choice(("find", "feed"))]
    return tables.fill(rng.choice(templates), (animal,))
  if kind == "compare":
    templates = tables.COMPARE_QUESTIONS[rng.choice(("weight", "age"))]
    return tables.fill(
      rng.choice(templates), tuple(rng.sample(tables.ANIMALS, 2))
    )
  value = tables.FACTS[animal][attribute]
  if rng.random() < 0.5:
    value = rng.choice([v for v in tables.VALUES[attribute] if v != value])
  said = rng.choice(tables.CHECK_QUESTIONS).replace(
    "%", tables.clause(attribute, value)
  )
  return tables.fill(said, (animal,))
