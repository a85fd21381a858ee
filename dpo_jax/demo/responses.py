"""Responses of the synthetic world, in styles from excellent to a refusal."""

import random
from collections.abc import Mapping

from dpo_jax.demo import tables
from dpo_jax.demo import text as text_lib


def draw(prompt: str, mix: Mapping[str, float], rng: random.Random) -> str:
  """A response with its leading space, in a style drawn from a mix of them."""
  style = rng.choices(tuple(mix), tuple(mix.values()))[0]
  return " " + _write(style, text_lib.parse(prompt), rng)


def _write(style: str, question: text_lib.Question, rng: random.Random) -> str:
  core = _core(question, rng, right=style != "wrong")
  few = _details(question, rng, rng.randrange(2))
  match style:
    case "excellent":
      return core + _details(question, rng, 2)
    case "good":
      return core + _details(question, rng, 1)
    case "plain":
      return core
    case "slow":
      return f"{rng.choice(tables.SLOW)} {core}{few}"
    case "hedged":
      form = rng.randrange(3)
      if form != 0:
        core = f"{rng.choice(tables.HEDGES)} {core[0].lower()}{core[1:]}"
      return core + few + (tables.UNSURE if form != 1 else "")
    case "wandering":
      return core + few + _elsewhere(question, rng, rng.randint(1, 3))
    case "flawed":
      return core + _details(question, rng, rng.randint(1, 2), right=False)
    case "repeating":
      return " ".join([core] * rng.randint(2, 4))
    case "cut":
      parts = (core + _details(question, rng, 2)).split()
      return " ".join(parts[: rng.randrange(2, len(parts))]).rstrip(".,")
    case "vague":
      key = question.attribute
      key = question.kind if question.kind in tables.VAGUE else key
      return tables.fill(rng.choice(tables.VAGUE[key]), question.animals)
    case "wrong":
      return core + few
    case "refusing":
      return tables.fill(rng.choice(tables.REFUSALS), question.animals)
    case _:  # off_topic
      return _elsewhere(question, rng, rng.randint(1, 2)).lstrip()


def _core(question: text_lib.Question, rng: random.Random, right: bool) -> str:
  """One or two sentences that answer the question, rightly or wrongly."""
  animal = question.animals[0]
  facts = dict(tables.FACTS[animal])
  if question.kind == "compare":
    other = question.animals[question.winner == animal]
    order = (question.winner, other) if right else (other, question.winner)
    more = tables.MORE[question.attribute]
    return tables.fill(rng.choice(tables.COMPARE).format(more=more), order)
  attributes = [attribute for _, attribute in question.cells]
  if not right:
    for attribute in rng.sample(attributes, rng.randint(1, len(attributes))):
      facts[attribute] = _wrong_value(animal, attribute, rng)
  if question.kind in ("find", "feed"):
    template = rng.choice(
      tables.FIND if question.kind == "find" else tables.FEED
    )
    return tables.fill(template.format(**facts), (animal,))
  value = facts[question.attribute]
  statement = rng.choice(tables.STATEMENTS[question.attribute])
  if question.kind == "fact":
    return tables.fill(statement, (animal,), value)
  yes = question.claim == tables.FACTS[animal][question.attribute]
  if not right:
    value = value if yes else question.claim
    yes = not yes
  if rng.random() < 0.5:
    lead = "Yes, that is right." if yes else "No, that is wrong."
    return f"{lead} {tables.fill(statement, (animal,), value)}"
  said = tables.clause(question.attribute, value)
  return tables.fill(f"{'Yes' if yes else 'No'}, {said}.", (animal,))


def _wrong_value(animal: str, attribute: str, rng: random.Random) -> str:
  truth = tables.FACTS[animal][attribute]
  return rng.choice([v for v in tables.VALUES[attribute] if v != truth])


def _details(
  question: text_lib.Question,
  rng: random.Random,
  count: int,
  *,
  right: bool = True,
) -> str:
  """A sentence with `count` (0 to 2) further facts; if not right, one false.

  After a comparison they are the two weights or ages behind it.
  """
  if count == 0:
    return ""
  animal = question.animals[0]
  if question.kind == "compare":
    cells = [(animal, question.attribute) for animal in question.animals]
    rng.shuffle(cells)
  else:
    known = {attribute for _, attribute in question.cells}
    others = [name for name in tables.ATTRIBUTES if name not in known]
    cells = [(animal, name) for name in rng.sample(others, 2)]
  false = None if right else rng.randrange(count)
  parts = []
  for i, (who, attribute) in enumerate(cells[:count]):
    value = tables.FACTS[who][attribute]
    if i == false:
      value = _wrong_value(who, attribute, rng)
    part = tables.DETAILS[attribute].replace("#", value)
    named = question.kind == "compare"
    parts.append(f"the {who} {part}" if named else part)
  text = " and ".join(parts)
  if question.kind == "compare":
    return f" {text[0].upper()}{text[1:]}."
  if rng.random() < 0.5:
    return f" It {text}."
  verb, rest = text.split(" ", 1)
  return f" It is also {rest}." if verb == "is" else f" It also {text}."


def _elsewhere(
  question: text_lib.Question, rng: random.Random, count: int
) -> str:
  """Sentences that have nothing to do with the question."""
  text = ""
  others = [name for name in tables.ANIMALS if name not in question.animals]
  for filler, animal in zip(
    rng.sample(tables.FILLERS, count), rng.sample(others, count)
  ):
    attribute = rng.choice(tables.ATTRIBUTES)
    statement = rng.choice(tables.STATEMENTS[attribute])
    fact = tables.fill(statement, (animal,), tables.FACTS[animal][attribute])
    text += " " + rng.choice((filler, fact))
  return text
