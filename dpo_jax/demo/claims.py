"""Facts that a response of the synthetic world states, and their truth.

A response is a list of sentences, each a list of lower-case words.
"""

from dpo_jax.demo import tables, text

_VALUE_OF = {
  value: attribute
  for attribute in ("colour", "home", "food", "time")
  for value in tables.VALUES[attribute]
}
_BARE = frozenset(["the", "it", "is", "one"])
_UNITS = {"kilos": "weight", "years": "age"}


def named(question: text.Question, flat: list[str]) -> float:
  """Share of the question's animals that are named; 1/2 for "it" alone."""
  present = set(flat)
  count = sum(animal in present for animal in question.animals)
  if not count and "it" in present and present.isdisjoint(tables.ANIMALS):
    return 0.5
  return count / len(question.animals)


def claimed(
  sentences: list[list[str]], topic: str
) -> set[tuple[str, str, str]]:
  """The stated (animal, attribute, value) triples.

  A value is of the last animal before it in its sentence, else of the first
  after it, else of the first animal of an earlier sentence (at the start:
  `topic`). A value shortly after "not" is denied, not stated.
  """
  claims = set()
  for sentence in sentences:
    named = [word for word in sentence if word in tables.FACTS]
    topic = named[0] if named else topic
    animal = topic
    for i, word in enumerate(sentence):
      if word in tables.FACTS:
        animal = word
      attribute, value = _VALUE_OF.get(word), word
      if i and word in _UNITS and sentence[i - 1] in tables.NUMBERS:
        attribute, value = _UNITS[word], sentence[i - 1]
      if attribute and "not" not in sentence[max(i - 4, 0) : i]:
        claims.add((animal, attribute, value))
  return claims


def mark(
  question: text.Question,
  sentences: list[list[str]],
  said: set[tuple[str, str, str]],
) -> float:
  """Correctness in [-1, 1]; see `right` in `world.reward_terms`."""
  if question.kind == "compare":
    winners = _said_to_win(question, sentences)
    return _verdict({winner == question.winner for winner in winners})
  marks = []
  for animal, attribute in question.cells:
    truth = tables.FACTS[animal][attribute]
    values = {v for a, name, v in said if (a, name) == (animal, attribute)}
    marks.append(_verdict({value == truth for value in values}))
  if question.kind != "check":
    return sum(marks) / len(marks)
  animal, attribute = question.cells[0]
  true = question.claim == tables.FACTS[animal][attribute]
  words = [w for sentence in sentences for w in sentence if w in ("yes", "no")]
  marks.append(_verdict({(words[0] == "yes") == true} if words else set()))
  if min(marks) < 0:
    return -0.5 if max(marks) > 0 else min(marks)
  return sum(marks) / 2


def _verdict(truths: set[bool]) -> float:
  """1 right, -1 wrong, 0 not said, -1/2 both right and wrong."""
  if len(truths) != 1:
    return -0.5 if truths else 0.0
  return 1.0 if True in truths else -1.0


def _said_to_win(
  question: text.Question, sentences: list[list[str]]
) -> set[str]:
  """The animals that are said to be heavier or older."""
  more, less = tables.MORE[question.attribute], tables.LESS[question.attribute]
  winners, compared = set(), False
  for sentence in sentences:
    places = [i for i, word in enumerate(sentence) if word in tables.FACTS]
    for i, word in enumerate(sentence):
      if word not in (more, less) or not places:
        continue
      compared = True
      before = [place for place in places if place < i]
      subject = sentence[before[-1] if before else places[0]]
      if subject not in question.animals:
        continue
      other = question.animals[question.animals[0] == subject]
      winners.add(subject if word == more else other)
  if compared:
    return winners
  # A bare name counts ("It is the owl."); a name in a longer sentence ("I would
  # rather not talk about the owl.") does not.
  allowed = _BARE.union(question.animals)
  bare = [sentence for sentence in sentences if allowed.issuperset(sentence)]
  return {w for sentence in bare for w in sentence if w in question.animals}


def side_facts(
  question: text.Question, said: set[tuple[str, str, str]]
) -> tuple[int, int]:
  """Counts of further true facts about the animals, and of false ones."""
  details, falsehoods = set(), set()
  for animal, attribute, value in said:
    if (animal, attribute) in question.cells:
      continue
    if tables.FACTS[animal][attribute] != value:
      falsehoods.add((animal, attribute))
    elif animal in question.animals:
      details.add((animal, attribute))
  return len(details - falsehoods), len(falsehoods)


def wandering(question: text.Question, sentences: list[list[str]]) -> int:
  """The number of off-topic sentences.

  A sentence is on topic if it names an animal of the question, or names none
  and has a pronoun ("it", "that", "yes" ...) or states a value.
  """
  count = 0
  for sentence in sentences:
    present = set(sentence)
    if not present.isdisjoint(question.animals):
      continue
    linked = bool(present & tables.PRONOUNS) or bool(
      claimed([sentence], question.animals[0])
    )
    count += not linked or not present.isdisjoint(tables.FACTS)
  return count
