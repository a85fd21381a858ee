"""The synthetic world: hand-scored responses, splits, labels, win rates."""

import hashlib
import json
import math
import os
import random
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dpo_jax.demo import responses, tables
from dpo_jax.demo import text as text_lib
from dpo_jax.demo import world as world_lib

MARK = "\n\nAssistant:"
COLOUR = "\n\nHuman: What colour is the fox?\n\nAssistant:"
CHECK = "\n\nHuman: Is it true that the fox is red?\n\nAssistant:"
AGREE = "\n\nHuman: Am I right that the owl eats seeds?\n\nAssistant:"
HEAVY = "\n\nHuman: Which is heavier, the fox or the owl?\n\nAssistant:"
FIND = "\n\nHuman: Hello. How do I find the fox?\n\nAssistant:"
FEED = "\n\nHuman: What are the steps to feed the wren?\n\nAssistant:"
EARLIER = COLOUR + " The fox is silver.\n\nHuman: "
WHERE = EARLIER + "And where does it live?\n\nAssistant:"
OWL = EARLIER + "And the owl?\n\nAssistant:"
OWL_AGE = EARLIER + (
  "And the owl?\n\nAssistant: The owl is blue."
  "\n\nHuman: And how old is it?\n\nAssistant:"
)
TALK = "\n\nHuman: Hello!\n\nAssistant: Hello! What would you like to know?"
PROMPTS = (COLOUR, CHECK, AGREE, HEAVY, FIND, FEED, WHERE, OWL, OWL_AGE)


@pytest.fixture(scope="module")
def world():
  return world_lib.generate(3, pretrain=300, train=1200, test=300)


def halves(transcript):
  cut = transcript.rindex(MARK) + len(MARK)
  return transcript[:cut], transcript[cut:]


def prompts(rows):
  return {halves(row["chosen"])[0] for row in rows}


# The fox: silver, orchard, plums, midnight, 11 kilos, 9 years. The owl: blue,
# orchard, seeds, noon, 17 kilos, 11 years. The wren: mill, berries.
# named 1 + right 3 + direct 0.5 = 4.5 is the right and plain answer.
@pytest.mark.parametrize(
  ("prompt", "response", "expected"),
  [
    (COLOUR, " The fox is silver.", 4.5),
    (COLOUR, " It is silver.", 0.5 + 3 + 0.5),
    (COLOUR, " Silver.", 3 + 0.5 - 0),
    (COLOUR, " The fox is silver. It eats plums.", 4.5 + 0.75),
    (COLOUR, " The fox is silver. It lives at the orchard and eats plums.", 6),
    (
      COLOUR,
      " The fox is silver. It lives at the orchard and eats plums."
      " It also wakes at midnight.",
      6,
    ),
    (COLOUR, " The fox is silver. It lives at the mill.", 4.5 - 0.75),
    (COLOUR, " The fox is red.", 1 - 3),
    (COLOUR, " The fox is red. The fox is silver.", 1 - 1.5),
    (COLOUR, " The fox is not red. It is silver.", 1 + 3),
    (COLOUR, " Maybe the fox is silver.", 4.5 - 0.375),
    (
      COLOUR,
      " Maybe the fox is silver. But I am not sure about that.",
      4.5 - 2 * 0.375,
    ),
    (COLOUR, " The fox has a nice colour.", 1),
    (COLOUR, " I am sorry, but I cannot answer that.", -1.5),
    (COLOUR, " I would rather not talk about the fox.", 1 - 1.5),
    (COLOUR, " The owl is blue.", -0.625),
    (COLOUR, " The owl is red.", -0.625 - 0.75),
    # "It" is the first animal of the sentence before.
    (COLOUR, " The owl likes to look for the fox. It is blue.", 1),
    (COLOUR, " The fox likes to look for the owl. It is silver.", 1 + 3),
    (COLOUR, " The fox is silver. Music makes people happy.", 4.5 - 0.625),
    (COLOUR, " That is a good question. The fox is silver.", 1 + 3),
    # Eight words have five runs of four; the last is the first again.
    (COLOUR, " The fox is silver. The fox is silver.", 4.5 - 0.25),
    # Twelve words, nine runs, four different.
    (COLOUR, " The fox is silver." * 3, 4.5 - 5 * 0.25),
    (COLOUR, " The fox is silver", 4.5 - 1),
    (COLOUR, " The fox is silver.\n\nHuman: And the owl?", 4.5 - 1),
    (COLOUR, " The fox is silvery.", 1 - 0.25),
    # Forty words, 35 of them unknown: eight count, and ten are too many.
    (
      COLOUR,
      " The fox is silver and " + " ".join(f"x{i}" for i in range(35)) + ".",
      4.5 - 8 * 0.25 - 10 / 16,
    ),
    (COLOUR, "", -4),
    (COLOUR, " ... \n!", -4),
    (COLOUR, "\n\nHuman: What colour is the fox?", -4),
    (CHECK, " No, the fox is silver.", 4.5),
    (CHECK, " No, that is wrong. The fox is silver.", 4.5),
    (CHECK, " No, that is wrong.", 0 + 1.5 + 0.5),
    (CHECK, " The fox is silver.", 1 + 1.5 + 0.5),
    (CHECK, " Yes, the fox is red.", 1 - 3),
    (CHECK, " Yes, the fox is silver.", 1 - 1.5),
    (AGREE, " Yes, the owl eats seeds.", 4.5),
    (AGREE, " No, the owl eats plums.", 1 - 3),
    (HEAVY, " The owl is heavier than the fox.", 4.5),
    (HEAVY, " The fox is lighter than the owl.", 4.5),
    (HEAVY, " The heavier one is the owl.", 0.5 + 3 + 0.5),
    (HEAVY, " The owl.", 0.5 + 3 + 0.5),
    (HEAVY, " The fox is heavier than the owl.", 1 - 3),
    (HEAVY, " The fox.", 0.5 - 3),
    (HEAVY, " I would rather not talk about the fox.", 0.5 - 1.5),
    (HEAVY, " The owl eats seeds.", 0.5 + 0.75),
    (HEAVY, " The owl is older than the fox.", 1),
    (HEAVY, " It is hard to compare the fox with the owl.", 1),
    (
      HEAVY,
      " The owl is heavier than the fox."
      " The owl weighs seventeen kilos and the fox weighs eleven kilos.",
      6,
    ),
    (HEAVY, " The owl is heavier than the fox. The fox is red.", 4.5 - 0.75),
    (FIND, " Go to the orchard at midnight and wait for the fox.", 4.5),
    (FIND, " Go to the orchard and look for the fox.", 1 + 1.5 + 0.5),
    (FIND, " Go to the orchard at noon and wait for the fox.", 1 + 0),
    (FIND, " Go to the mill at noon and wait for the fox.", 1 - 3),
    (FIND, " Go to the orchard at midnight. Bring plums.", 0 + 3 + 0.5 + 0.75),
    (FEED, " Bring berries to the wren at the mill.", 4.5),
    (WHERE, " The fox lives at the orchard.", 4.5),
    (WHERE, " The fox is silver.", 1 + 0.75),
    (OWL, " The owl is blue.", 4.5),
    (OWL, " The fox is silver.", -0.625),
    (OWL_AGE, " It is eleven years old.", 0.5 + 3 + 0.5),
    (OWL_AGE, " The owl is seventeen years old.", 1 - 3),
    (TALK + FEED, " Leave berries for the wren at the mill.", 4.5),
  ],
)
def test_reward_of_hand_scored_responses(prompt, response, expected):
  assert world_lib.reward(prompt, response) == expected


@pytest.mark.parametrize(
  ("prompt", "message"),
  [
    ("", "start with a human turn"),
    ("What colour is the fox?", "start with a human turn"),
    ("\n\nHuman: What colour is the fox?", "end with"),
    ("\n\nHuman: What is gravity?\n\nAssistant:", "no question of this world"),
    ("\n\nHuman: What colour is the @?\n\nAssistant:", "no question of this"),
    ("\n\nHuman: And the owl?\n\nAssistant:", "no earlier question"),
    (FIND + " Go.\n\nHuman: And the owl?\n\nAssistant:", "no earlier"),
    (TALK + "\n\nHuman: Hello!\n\nAssistant:", "asks nothing"),
  ],
)
def test_foreign_prompts_are_refused(prompt, message):
  with pytest.raises(ValueError, match=message):
    world_lib.reward(prompt, " The fox is silver.")


# Any text, and salads of the world's own words, which reach every term. The
# lower bound is the sum of all penalties at their caps: 3 + 2.25 + 1.5 + 0.75
# + 2.5 + 3 + 2 + 2 + 1.
@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  st.sampled_from(PROMPTS),
  st.text(max_size=300)
  | st.lists(
    st.sampled_from([*sorted(tables.LEXICON), ".", "?", "\n\nHuman:"]),
    max_size=80,
  ).map(" ".join),
)
def test_reward_takes_any_response(prompt, response):
  value = world_lib.reward(prompt, response)
  assert -18 <= value <= 6
  assert (value * 16).is_integer()


def draw(prompt, style, rng):
  return responses.draw(prompt, {style: 1}, rng)


def test_styles_score_as_they_are_meant_to():
  # Bounds from the terms: "slow" and "hedged" may carry one detail; a
  # comparison may name one animal only (-0.5); "wrong" may have one step of
  # two right, even first, and one detail; four times 13 words are 12
  # repeated runs (-3) and 22 words too many (-1.375); two sentences that open
  # with "The best food for the" share two runs.
  bounds = {
    "excellent": (6, 6),
    "good": (4.75, 5.25),
    "plain": (4, 4.5),
    "slow": (3.5, 4.75),
    "hedged": (3.25, 4.875),
    "wandering": (4 - 3 * (0.625 + 0.5), 4.625),
    "flawed": (3.25, 4.5),
    "repeating": (0.125, 4.25),
    "vague": (1, 1),
    "wrong": (-2.5, 2.25),
    "refusing": (-1.5, -0.5),
    "off_topic": (-1.25 - 0.5, -0.625),
    "cut": (-4, 5.25),
  }
  rng = random.Random(0)
  for style, (low, high) in bounds.items():
    for _ in range(60):
      prompt = text_lib.draw_prompt(rng)
      text = draw(prompt, style, rng)
      terms = world_lib.reward_terms(prompt, text)
      value = sum(terms.values())
      assert low <= value <= high, (style, value, prompt, text)
      assert terms["strange"] == 0, text
      assert text[0] == " "
      assert text[1:] == text.strip()


def test_rows_are_transcripts_of_one_prompt(world):
  splits = (world.pretrain, world.train, world.test)
  assert list(map(len, splits)) == [300, 1200, 300]
  for row in world.pretrain + world.train + world.test:
    prompt, chosen = halves(row["chosen"])
    other, rejected = halves(row["rejected"])
    assert prompt == other
    assert chosen != rejected
    assert prompt.startswith("\n\nHuman: ")
    for text in (chosen, rejected):
      assert text.startswith(" ")
      assert text[1:] == text.strip() != ""
  for rows in (world.pretrain, world.train):
    assert len({tuple(row.values()) for row in rows}) == len(rows)


def test_test_prompts_are_unseen_combinations(world):
  seen = prompts(world.pretrain) | prompts(world.train)
  unseen = prompts(world.test)
  assert len(unseen) == 300
  assert not seen & unseen
  # Without openers and small talk, which are no part of a combination.
  assert not {bare(p) for p in seen} & {bare(p) for p in unseen}
  # By hand: fox is animal 4, colour attribute 0, "What colour" phrasing 0.
  assert not text_lib.held_out(COLOUR)
  # lynx 8, home 1, "I am drawing a map" 2, and "And how old" 5 + 0 + 8: 24.
  assert text_lib.held_out(
    "\n\nHuman: I am drawing a map. Where should I put the lynx?"
    "\n\nAssistant: The lynx lives at the quarry."
    "\n\nHuman: And how old is it?\n\nAssistant:"
  )


def bare(prompt):
  for asked, said in tables.SMALL_TALK:
    prompt = prompt.removeprefix(f"\n\nHuman: {asked}\n\nAssistant: {said}")
  for opener in tables.OPENERS[1:]:
    prompt = prompt.replace(f"Human: {opener}", "Human: ", 1)
  return prompt


def test_every_fact_is_in_training():
  """One of six phrasings of each fact is withheld."""
  for animal in tables.ANIMALS:
    for attribute, templates in tables.FACT_QUESTIONS.items():
      asked = [tables.fill(template, (animal,)) for template in templates]
      prompts = [f"\n\nHuman: {text}\n\nAssistant:" for text in asked]
      assert [text_lib.held_out(x) for x in prompts].count(True) == 1
      for prompt in prompts:
        assert text_lib.parse(prompt).cells == ((animal, attribute),)


def test_the_seed_decides_everything(world):
  """In a process with other hashes too."""
  code = (
    "import hashlib; from dpo_jax.demo import world;"
    "w = world.generate(3, pretrain=0, train=50, test=20);"
    "print(hashlib.sha256(repr(w).encode()).hexdigest())"
  )
  again = world_lib.World((), world.train[:50], world.test[:20])
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "PYTHONHASHSEED": "1"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == hashlib.sha256(repr(again).encode()).hexdigest()
  other = world_lib.generate(4, pretrain=0, train=50, test=0)
  assert not set(map(str, other.train)) & set(map(str, world.train))


@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_labels_follow_bradley_terry(world, scale):
  rows = world.train
  if scale != 1.0:
    rows = world_lib.generate(
      9, pretrain=0, train=1200, test=0, scale=scale
    ).train
  margins = np.array(
    [
      np.subtract(*(world_lib.reward(*halves(row[name])) for name in row))
      for row in rows
    ]
  )
  for low, high in ((0, 1), (1, 2), (2, 4), (4, 6), (6, 10)):
    inside = (np.abs(margins) > low) & (np.abs(margins) <= high)
    expected = 1 / (1 + np.exp(-scale * np.abs(margins[inside])))
    surplus = np.sum(margins[inside] > 0) - expected.sum()
    # Four standard deviations of a sum of independent coins.
    assert inside.sum() > 60
    assert abs(surplus) < 4 * math.sqrt(np.sum(expected * (1 - expected)))


def test_write_gives_one_json_line_a_row(world, tmp_path):
  small = world_lib.World(world.pretrain[:3], world.train[:5], world.test[:2])
  world_lib.write(small, tmp_path / "world")
  world_lib.write(small, tmp_path / "world")
  files = sorted(path.name for path in (tmp_path / "world").iterdir())
  assert files == ["pretrain.jsonl", "test.jsonl", "train.jsonl"]
  for name in ("pretrain", "train", "test"):
    text = (tmp_path / "world" / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    rows = [json.loads(line) for line in text.splitlines()]
    assert tuple(rows) == getattr(small, name)


def test_more_rows_than_exist_are_refused(monkeypatch):
  monkeypatch.setattr(text_lib, "draw_prompt", lambda rng: HEAVY)
  # fox 4 + owl 12 + weight 4 + phrasing 0 = 20: a training prompt.
  with pytest.raises(ValueError, match="test=1 rows are more"):
    world_lib.generate(0, pretrain=0, train=0, test=1)
