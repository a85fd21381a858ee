"""The language of the embedded world: its facts and how they are asked about.

A valley has sixteen animals with six facts each. In every template below "@"
stands for an animal and "#" for a value, so that a question found in a text
is read back by one dictionary look-up on its skeleton (the text with its
animals replaced by "@"). Writing and reading share the same tables, and a
value word belongs to one attribute only, so that nothing has to be guessed.
"""

import dataclasses
import functools
import random
import re

ATTRIBUTES = ("colour", "home", "food", "time", "weight", "age")

_TABLE = """
badger red    bridge  honey     midnight six       fifteen
boar   golden pond    mushrooms dawn     nine      twelve
crow   white  harbour beetles   midnight four      seventeen
deer   white  mill    nuts      dusk     five      ten
fox    silver orchard plums     midnight eleven    nine
goat   silver marsh   nuts      dawn     sixteen   fourteen
hare   golden tower   clover    noon     three     five
heron  purple quarry  beetles   dusk     two       eight
lynx   green  quarry  berries   midnight fifteen   six
mole   green  pond    honey     noon     ten       two
newt   red    marsh   seeds     dusk     eight     seven
otter  blue   bridge  clover    dawn     thirteen  sixteen
owl    blue   orchard seeds     noon     seventeen eleven
swan   black  tower   mushrooms dusk     seven     four
toad   purple harbour plums     noon     twelve    thirteen
wren   black  mill    berries   dawn     fourteen  three
"""
FACTS = {
  line.split()[0]: dict(zip(ATTRIBUTES, line.split()[1:], strict=True))
  for line in _TABLE.strip().splitlines()
}
ANIMALS = tuple(FACTS)
_COUNTED = """
two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen
"""
NUMBERS = {word: i for i, word in enumerate(_COUNTED.split(), start=2)}
VALUES = {
  attribute: tuple(sorted({facts[attribute] for facts in FACTS.values()}))
  for attribute in ATTRIBUTES
}

# Statements: the first of each is also what a claim to be checked looks like.
STATEMENTS = {
  "colour": ("The @ is #.", "The colour of the @ is #.", "The @ has a # coat."),
  "home": (
    "The @ lives at the #.",
    "The home of the @ is at the #.",
    "You will find the @ at the #.",
  ),
  "food": (
    "The @ eats #.",
    "The @ likes to eat #.",
    "The best food for the @ is #.",
  ),
  "time": (
    "The @ wakes at #.",
    "The @ gets up at #.",
    "The day of the @ starts at #.",
  ),
  "weight": (
    "The @ weighs # kilos.",
    "The weight of the @ is # kilos.",
    "The @ weighs in at # kilos.",
  ),
  "age": (
    "The @ is # years old.",
    "The age of the @ is # years.",
    "The @ has lived for # years.",
  ),
}
# The same facts said of "it".
DETAILS = {
  "colour": "is #",
  "home": "lives at the #",
  "food": "eats #",
  "time": "wakes at #",
  "weight": "weighs # kilos",
  "age": "is # years old",
}

# Six phrasings of every question: some of its own, some shared ("%" stands for
# what differs).
_INDIRECT = {
  "colour": "what colour the @ is",
  "home": "where the @ lives",
  "food": "what the @ eats",
  "time": "when the @ wakes",
  "weight": "how much the @ weighs",
  "age": "how old the @ is",
}
_OWN_QUESTIONS = {
  "colour": (
    "What colour is the @?",
    "Which colour does the @ have?",
    "I want to paint the @. Which colour should I take?",
  ),
  "home": (
    "Where does the @ live?",
    "In which place does the @ live?",
    "I am drawing a map. Where should I put the @?",
  ),
  "food": (
    "What does the @ eat?",
    "Which food does the @ like?",
    "I am packing lunch for the @. What should I take?",
  ),
  "time": (
    "When does the @ wake?",
    "At which time does the @ get up?",
    "I want to greet the @ as it wakes. When should I come?",
  ),
  "weight": (
    "How much does the @ weigh?",
    "How many kilos does the @ weigh?",
    "I have to carry the @. How heavy is it?",
  ),
  "age": (
    "How old is the @?",
    "How many years has the @ lived?",
    "I am baking a birthday cake for the @. How old is it?",
  ),
}
FACT_QUESTIONS = {
  attribute: (
    *_OWN_QUESTIONS[attribute],
    f"Can you tell me {indirect}?",
    f"My child asked {indirect}. What should I say?",
    f"Do you know {indirect}?",
  )
  for attribute, indirect in _INDIRECT.items()
}
HOW_QUESTIONS = {
  kind: (
    f"How do I {kind} the @?",
    f"What is the best way to {kind} the @?",
    f"Can you tell me how to {kind} the @?",
    f"What are the steps to {kind} the @?",
    f"I would like to {kind} the @. What should I do?",
    last,
  )
  for kind, last in (
    ("find", "I looked for the @ all day. Where and when should I go?"),
    ("feed", "The @ looks hungry. What do I bring, and where?"),
  )
}
MORE = {"weight": "heavier", "age": "older"}
LESS = {"weight": "lighter", "age": "younger"}
COMPARE_QUESTIONS = {
  attribute: (
    f"Which is {more}, the @ or the @?",
    f"Of the @ and the @, which one is {more}?",
    f"Is the @ or the @ the {more} one?",
    f"Tell me which is {more}, the @ or the @.",
    f"We had a bet. Is the @ or the @ {more}?",
    f"If I compare the @ with the @, which is {more}?",
  )
  for attribute, more in MORE.items()
}
CHECK_QUESTIONS = (
  "Is it true that %?",
  "I heard that %. Is that right?",
  "Someone told me that %. Is it so?",
  "Am I right that %?",
  "I wrote down that %. Can you check it?",
  "My friend says that %. Is my friend right?",
)
# After an earlier question: the same animal again, or the same fact again.
IT_QUESTIONS = {
  "colour": ("And what colour is it?", "Which colour does it have?"),
  "home": ("And where does it live?", "Where is its home?"),
  "food": ("And what does it eat?", "Which food does it like?"),
  "time": ("And when does it wake?", "When does it get up?"),
  "weight": ("And how much does it weigh?", "How heavy is it?"),
  "age": ("And how old is it?", "How many years has it lived?"),
}
SAME_QUESTIONS = ("And the @?", "What about the @?", "Thanks. And for the @?")
OPENERS = (
  "",
  "Hello. ",
  "Good day. ",
  "Quick question. ",
  "Please help me. ",
  "I am new in the valley. ",
  "I have been wondering. ",
  "One more thing. ",
)
SMALL_TALK = (
  ("Hello!", "Hello! What would you like to know?"),
  ("Hi, who are you?", "I know the animals of the valley. Ask me about them."),
  ("Can I ask you something?", "Of course. What would you like to know?"),
)

_FILLERS = (
  "The weather is lovely today.",
  "Music makes people happy.",
  "Bread is best when warm.",
  "My cousin has a new boat.",
  "The market opens on Friday.",
  "Some people like long walks.",
)
_SLOW = (
  "That is a good question.",
  "Let me think about that.",
  "I can tell you about this.",
)
_REFUSALS = (
  "I am sorry, but I cannot answer that.",
  "I am not able to help with this.",
  "I would rather not talk about the @.",
)
_VAGUE = {
  "colour": (
    "The @ has a nice colour.",
    "The colour of the @ is hard to miss.",
  ),
  "home": ("The @ lives in the valley.", "The home of the @ is not far away."),
  "food": ("The @ eats what it can find.", "The @ likes good food."),
  "time": ("The @ wakes when it likes.", "The @ gets up every day."),
  "weight": ("The @ has some weight.", "You can carry the @ with care."),
  "age": ("The @ has lived for some time.", "The @ has seen many years."),
  "find": ("Just look around for the @.", "The @ can be found with care."),
  "feed": ("Just bring the @ some food.", "The @ will eat with care."),
  "compare": ("It is hard to compare the @ with the @.",),
}
_FIND = (
  "Go to the {home} at {time} and wait for the @.",
  "First walk to the {home}. Then look for the @ at {time}.",
  "To find the @, be at the {home} at {time}.",
)
_FEED = (
  "Bring {food} to the @ at the {home}.",
  "First get some {food}. Then take it to the @ at the {home}.",
  "Leave {food} for the @ at the {home}.",
)
_COMPARE = (
  "The @ is {more} than the @.",
  "The {more} one is the @.",
  "Of the two, the @ is {more}.",
)
_HEDGES = ("Maybe", "Perhaps")
_UNSURE = " But I am not sure about that."
PRONOUNS = frozenset(
  ["it", "its", "that", "this", "they", "them", "both", "yes", "no"]
)
WORD = re.compile(r"[^\W_]+")


@dataclasses.dataclass(frozen=True)
class Question:
  """What the last human turn of a dialogue asks.

  Attributes:
    kind: "fact", "check", "compare", "find" or "feed".
    animals: who is asked about; two for "compare", else one.
    attribute: which fact; "" for "find" and "feed".
    claim: the value whose truth is asked by "check"; else "".
    code: sum of the table positions of every animal, attribute and phrasing
      in the dialogue so far; `held_out` splits on it.
  """

  kind: str
  animals: tuple[str, ...]
  attribute: str
  claim: str
  code: int

  @functools.cached_property
  def cells(self) -> tuple[tuple[str, str], ...]:
    """The (animal, attribute) facts that a full answer states."""
    if self.kind == "compare":
      return ()
    wanted = {"find": ("home", "time"), "feed": ("food", "home")}
    names = wanted.get(self.kind, (self.attribute,))
    return tuple((self.animals[0], name) for name in names)

  @property
  def winner(self) -> str:
    """The heavier or older of the two animals compared."""
    return max(self.animals, key=lambda a: NUMBERS[FACTS[a][self.attribute]])


def fill(template: str, animals: tuple[str, ...], value: str = "") -> str:
  """Puts animals for "@", in order, and `value` for "#"."""
  for animal in animals:
    template = template.replace("@", animal, 1)
  return template.replace("#", value)


def clause(attribute: str, value: str) -> str:
  """The first statement as a clause about "@": "the @ is red"."""
  text = STATEMENTS[attribute][0].rstrip(".").replace("#", value)
  return text[0].lower() + text[1:]


def _index() -> dict[str, tuple[str, str, str, int]]:
  """Every question's skeleton -> (kind, attribute, claim, phrasing)."""
  index = {}

  def add(skeleton, kind, attribute, claim, phrasing):
    if skeleton in index:
      raise ValueError(f"two questions share the skeleton {skeleton!r}")
    index[skeleton] = (kind, attribute, claim, phrasing)

  for kind, table in (
    ("fact", FACT_QUESTIONS),
    ("compare", COMPARE_QUESTIONS),
    ("it", IT_QUESTIONS),
  ):
    for attribute, templates in table.items():
      for phrasing, template in enumerate(templates):
        add(template, kind, attribute, "", phrasing)
  for kind, templates in (*HOW_QUESTIONS.items(), ("same", SAME_QUESTIONS)):
    for phrasing, template in enumerate(templates):
      add(template, kind, "", "", phrasing)
  for phrasing, template in enumerate(CHECK_QUESTIONS):
    for attribute in ATTRIBUTES:
      for value in VALUES[attribute]:
        said = template.replace("%", clause(attribute, value))
        add(said, "check", attribute, value, phrasing)
  return index


_INDEX = _index()
_ANIMAL = re.compile(r"\b(" + "|".join(ANIMALS) + r")\b")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SMALL_TALK = frozenset(asked for asked, _ in SMALL_TALK)


@functools.lru_cache(maxsize=4096)
def parse(prompt: str) -> Question:
  """Reads the last question of a dialogue, with the turns it refers to.

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
  """One human turn, read after the question `before`."""
  opener = next((o for o in OPENERS[1:] if text.startswith(o)), "")
  text = text.removeprefix(opener)
  animals = tuple(_ANIMAL.findall(text))
  skeleton = _ANIMAL.sub("@", text)
  if skeleton not in _INDEX or "@" in text:
    raise ValueError(
      f"{text[:200]!r} is no question of this world: its oracle can only"
      " judge prompts that `generate` wrote"
    )
  kind, attribute, claim, phrasing = _INDEX[skeleton]
  if kind in ("it", "same"):
    if before is None or (kind == "same" and before.kind != "fact"):
      raise ValueError(f"{text[:200]!r} refers to no earlier question")
    animals = animals if kind == "same" else before.animals[:1]
    attribute = attribute if kind == "it" else before.attribute
    kind = "fact"
  code = phrasing + sum(ANIMALS.index(animal) for animal in animals)
  code += ATTRIBUTES.index(attribute) if attribute else 0
  code += before.code if before else 0
  return Question(kind, animals, attribute, claim, code)


def held_out(prompt: str) -> bool:
  """Whether a prompt's combination belongs to the test split alone.

  One combination in six: the sum of the positions of its animals, attributes
  and phrasings is a multiple of six. Every (animal, attribute) pair thus has
  five of its six plain phrasings in training, so no fact is withheld.
  """
  return parse(prompt).code % 6 == 0


def draw_prompt(rng: random.Random) -> str:
  """A random dialogue that ends with a question: two in three of one turn.

  The others follow up on an earlier question ("And where does it live?",
  "And the owl?") or start with small talk.
  """
  human, assistant = "\n\nHuman: ", "\n\nAssistant: "
  form = rng.choices(("plain", "talk", "follow"), (0.67, 0.07, 0.26))[0]
  text = ""
  if form == "talk":
    asked, said = rng.choice(SMALL_TALK)
    text = human + asked + assistant + said
  if form != "follow":
    text += human + rng.choice(OPENERS) + _draw_question(rng)
    return text + "\n\nAssistant:"
  # Distinct animals and attributes: nothing is asked twice.
  attributes = rng.sample(ATTRIBUTES, 3)
  animals = rng.sample(ANIMALS, 3)
  attribute, animal = attributes.pop(), animals.pop()
  asked = fill(rng.choice(FACT_QUESTIONS[attribute]), (animal,))
  text = human + rng.choice(OPENERS) + asked
  for _ in range(2 if rng.random() < 0.2 else 1):
    said = rng.choice(STATEMENTS[attribute])
    text += assistant + fill(said, (animal,), FACTS[animal][attribute])
    if rng.random() < 0.6:
      attribute = attributes.pop()
      text += human + rng.choice(IT_QUESTIONS[attribute])
    else:
      animal = animals.pop()
      text += human + fill(rng.choice(SAME_QUESTIONS), (animal,))
  return text + "\n\nAssistant:"


def _draw_question(rng: random.Random) -> str:
  """A question that stands alone."""
  kind = rng.choices(
    ("fact", "check", "compare", "how"), (0.5, 0.15, 0.15, 0.2)
  )[0]
  attribute = rng.choice(ATTRIBUTES)
  animal = rng.choice(ANIMALS)
  if kind == "fact":
    return fill(rng.choice(FACT_QUESTIONS[attribute]), (animal,))
  if kind == "how":
    templates = HOW_QUESTIONS[rng.choice(("find", "feed"))]
    return fill(rng.choice(templates), (animal,))
  if kind == "compare":
    templates = COMPARE_QUESTIONS[rng.choice(("weight", "age"))]
    return fill(rng.choice(templates), tuple(rng.sample(ANIMALS, 2)))
  value = FACTS[animal][attribute]
  if rng.random() < 0.5:
    value = rng.choice([v for v in VALUES[attribute] if v != value])
  said = rng.choice(CHECK_QUESTIONS).replace("%", clause(attribute, value))
  return fill(said, (animal,))


def write_answer(style: str, question: Question, rng: random.Random) -> str:
  """The text of one style; every choice inside it is uniform."""
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
      return f"{rng.choice(_SLOW)} {core}{few}"
    case "hedged":
      form = rng.randrange(3)
      if form != 0:
        core = f"{rng.choice(_HEDGES)} {core[0].lower()}{core[1:]}"
      return core + few + (_UNSURE if form != 1 else "")
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
      key = question.kind if question.kind in _VAGUE else key
      return fill(rng.choice(_VAGUE[key]), question.animals)
    case "wrong":
      return core + few
    case "refusing":
      return fill(rng.choice(_REFUSALS), question.animals)
    case "off_topic":
      return _elsewhere(question, rng, rng.randint(1, 2)).lstrip()
  raise ValueError(f"style {style!r} is none that `write_answer` knows")


def _core(question: Question, rng: random.Random, right: bool) -> str:
  """The sentence or two that answer the question, rightly or wrongly."""
  animal = question.animals[0]
  facts = dict(FACTS[animal])
  if question.kind == "compare":
    other = question.animals[question.winner == animal]
    order = (question.winner, other) if right else (other, question.winner)
    more = MORE[question.attribute]
    return fill(rng.choice(_COMPARE).format(more=more), order)
  attributes = [attribute for _, attribute in question.cells]
  if not right:
    for attribute in rng.sample(attributes, rng.randint(1, len(attributes))):
      facts[attribute] = _wrong_value(animal, attribute, rng)
  if question.kind in ("find", "feed"):
    template = rng.choice(_FIND if question.kind == "find" else _FEED)
    return fill(template.format(**facts), (animal,))
  value = facts[question.attribute]
  statement = rng.choice(STATEMENTS[question.attribute])
  if question.kind == "fact":
    return fill(statement, (animal,), value)
  yes = question.claim == FACTS[animal][question.attribute]
  if not right:
    value = value if yes else question.claim
    yes = not yes
  if rng.random() < 0.5:
    lead = "Yes, that is right." if yes else "No, that is wrong."
    return f"{lead} {fill(statement, (animal,), value)}"
  said = clause(question.attribute, value)
  return fill(f"{'Yes' if yes else 'No'}, {said}.", (animal,))


def _wrong_value(animal: str, attribute: str, rng: random.Random) -> str:
  truth = FACTS[animal][attribute]
  return rng.choice([v for v in VALUES[attribute] if v != truth])


def _details(
  question: Question,
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
    others = [name for name in ATTRIBUTES if name not in known]
    cells = [(animal, name) for name in rng.sample(others, 2)]
  false = None if right else rng.randrange(count)
  parts = []
  for i, (who, attribute) in enumerate(cells[:count]):
    value = FACTS[who][attribute]
    if i == false:
      value = _wrong_value(who, attribute, rng)
    part = DETAILS[attribute].replace("#", value)
    named = question.kind == "compare"
    parts.append(f"the {who} {part}" if named else part)
  text = " and ".join(parts)
  if question.kind == "compare":
    return f" {text[0].upper()}{text[1:]}."
  if rng.random() < 0.5:
    return f" It {text}."
  verb, rest = text.split(" ", 1)
  return f" It is also {rest}." if verb == "is" else f" It also {text}."


def _elsewhere(question: Question, rng: random.Random, count: int) -> str:
  """Sentences that have nothing to do with the question."""
  text = ""
  others = [name for name in ANIMALS if name not in question.animals]
  for filler, animal in zip(
    rng.sample(_FILLERS, count), rng.sample(others, count)
  ):
    attribute = rng.choice(ATTRIBUTES)
    statement = rng.choice(STATEMENTS[attribute])
    fact = fill(statement, (animal,), FACTS[animal][attribute])
    text += " " + rng.choice((filler, fact))
  return text


def _words() -> frozenset[str]:
  """Every word of the world's own sentences."""

  def texts(table):
    if isinstance(table, str):
      return [table]
    if isinstance(table, dict):
      table = [*table.keys(), *table.values()]
    return [text for part in table for text in texts(part)]

  tables = (
    *(_FILLERS, _SLOW, _REFUSALS, _VAGUE, _FIND, _FEED, _COMPARE, _HEDGES),
    *(MORE, LESS, FACTS, STATEMENTS, DETAILS, FACT_QUESTIONS, HOW_QUESTIONS),
    *(COMPARE_QUESTIONS, CHECK_QUESTIONS, IT_QUESTIONS, SAME_QUESTIONS),
    *(OPENERS, SMALL_TALK, PRONOUNS, _UNSURE, "also wrong"),
  )
  return frozenset(WORD.findall(" ".join(texts(tables)).lower()))


LEXICON = _words()
