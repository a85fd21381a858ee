"""Facts and templates of the synthetic world: sixteen animals, six facts each.

In templates "@" is an animal and "#" a value. A question is parsed by looking
up its skeleton (the text with its animals replaced by "@"), and a value word
belongs to one attribute only, so that parsing is exact.
"""

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

# The first of each is also the form of a claim to be checked.
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

# Six phrasings of every question: three of its own, three shared.
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

FILLERS = (
  "The weather is lovely today.",
  "Music makes people happy.",
  "Bread is best when warm.",
  "My cousin has a new boat.",
  "The market opens on Friday.",
  "Some people like long walks.",
)
SLOW = (
  "That is a good question.",
  "Let me think about that.",
  "I can tell you about this.",
)
REFUSALS = (
  "I am sorry, but I cannot answer that.",
  "I am not able to help with this.",
  "I would rather not talk about the @.",
)
VAGUE = {
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
FIND = (
  "Go to the {home} at {time} and wait for the @.",
  "First walk to the {home}. Then look for the @ at {time}.",
  "To find the @, be at the {home} at {time}.",
)
FEED = (
  "Bring {food} to the @ at the {home}.",
  "First get some {food}. Then take it to the @ at the {home}.",
  "Leave {food} for the @ at the {home}.",
)
COMPARE = (
  "The @ is {more} than the @.",
  "The {more} one is the @.",
  "Of the two, the @ is {more}.",
)
HEDGES = ("Maybe", "Perhaps")
UNSURE = " But I am not sure about that."
PRONOUNS = frozenset(
  ["it", "its", "that", "this", "they", "them", "both", "yes", "no"]
)
WORD = re.compile(r"[^\W_]+")


def fill(template: str, animals: tuple[str, ...], value: str = "") -> str:
  """The template with animals for "@", in order, and `value` for "#"."""
  for animal in animals:
    template = template.replace("@", animal, 1)
  return template.replace("#", value)


def clause(attribute: str, value: str) -> str:
  """The first statement as a clause about "@": "the @ is red"."""
  text = STATEMENTS[attribute][0].rstrip(".").replace("#", value)
  return text[0].lower() + text[1:]


def _words() -> frozenset[str]:
  """Every word of the world's own sentences."""

  def texts(table):
    if isinstance(table, str):
      return [table]
    if isinstance(table, dict):
      table = [*table.keys(), *table.values()]
    return [text for part in table for text in texts(part)]

  tables = (
    *(FILLERS, SLOW, REFUSALS, VAGUE, FIND, FEED, COMPARE, HEDGES),
    *(MORE, LESS, FACTS, STATEMENTS, DETAILS, FACT_QUESTIONS, HOW_QUESTIONS),
    *(COMPARE_QUESTIONS, CHECK_QUESTIONS, IT_QUESTIONS, SAME_QUESTIONS),
    *(OPENERS, SMALL_TALK, PRONOUNS, UNSURE, "also wrong"),
  )
  return frozenset(WORD.findall(" ".join(texts(tables)).lower()))


LEXICON = _words()
