"""Synthetic preference pairs whose true reward is known, for the demo.

Dialogues about animals, in HH form, get responses of a dozen styles from
excellent to a refusal. Two responses are a pair, and its label is drawn from
Bradley-Terry on `reward`, a function of the text alone. So the whole pipeline
(base, SFT, DPO, sampling, judging) runs in minutes on a CPU, with an exact
judge. Test prompts are unseen combinations of animals, facts, phrasings and
turns, while every fact is in training (`text.held_out`).
"""

import dataclasses
import json
import math
import os
import pathlib
import random
import re
from collections.abc import Mapping

from dpo_jax.demo import claims, responses, tables
from dpo_jax.demo import text as text_lib

# Percentages of response styles: of the pairs, with few excellent responses, so
# that DPO can beat the chosen ones, and of the base model's training text.
_STYLES = {
  "excellent": (13, 1),
  "good": (8, 2),
  "plain": (14, 8),
  "slow": (10, 5),
  "hedged": (9, 8),
  "wandering": (10, 15),
  "flawed": (8, 8),
  "repeating": (5, 9),
  "cut": (4, 9),
  "vague": (7, 11),
  "wrong": (7, 10),
  "refusing": (3, 6),
  "off_topic": (2, 8),
}
PAIRS = {style: shares[0] for style, shares in _STYLES.items()}
RAW = {style: shares[1] for style, shares in _STYLES.items()}

_SENTENCE = re.compile(r"[.!?\n]+")
_NEXT_TURN = re.compile(r"\n\n(?:Human|Assistant):")
_REFUSAL_WORDS = re.compile(r"\b(i cannot|i am not able|i would rather not)\b")
_HEDGE_WORDS = re.compile(
  r"\b(maybe|perhaps|probably|might|i guess|not sure)\b"
)


def reward(prompt: str, response: str) -> float:
  """True reward of a response: the sum of `reward_terms`.

  Args:
    prompt: a dialogue of this world, ending with "\\n\\nAssistant:".
    response: any text.

  Returns:
    A multiple of 1/16: 6 for a perfect response, 4.5 for a right and plain
    one, about 1 for a vague one, below 0 for wrong, refusing and empty ones.

  Raises:
    ValueError: the prompt is not of this world.
  """
  return sum(reward_terms(prompt, response).values())


def reward_terms(prompt: str, response: str) -> dict[str, float]:
  """The terms of a response's reward, by name.

  With their weights:

  named [1]: share of the question's animals that are named; half for "it".
  right [3]: the mean over the facts asked for (two for "how do I") of 1
    right, 0 not said, -1 wrong, -1/2 both. To "is it true" the yes or no and
    the fact count half each, but one of them wrong makes -1, or -1/2 if the
    other is right. For a comparison it is the animal said to be heavier or
    older, or is the bare answer ("The owl.").
  direct [1/2]: the first sentence already has (part of) the right answer.
  detail [3/4]: each further true fact about the animals asked about, up to 2.
  false [-3/4]: each false statement beyond the facts asked for, up to 3.
  refusal [-3/2]: a refusal.
  hedge [-3/8]: each "maybe", "probably", "not sure" ..., up to 2.
  wander [-5/8]: each off-topic sentence, up to 4.
  repeat [-1/4]: each repeated 4-gram of words, up to 12.
  strange [-1/4]: each word outside this world's lexicon, up to 8.
  long [-1/16]: each word beyond 30, up to 32.
  unfinished [-1]: no full stop at the end, or another turn (not read).
  empty [-4]: no words at all; then the only term.
  """
  question = text_lib.parse(prompt)
  text = _NEXT_TURN.split(response, maxsplit=1)[0]
  lowered = text.lower()
  sentences = [tables.WORD.findall(part) for part in _SENTENCE.split(lowered)]
  sentences = [sentence for sentence in sentences if sentence]
  if not sentences:
    return {"empty": -4.0}
  flat = [word for sentence in sentences for word in sentence]
  topic = question.animals[0]
  said = claims.claimed(sentences, topic)
  opening = claims.mark(
    question, sentences[:1], claims.claimed(sentences[:1], topic)
  )
  details, falsehoods = claims.side_facts(question, said)
  finished = text == response and text.rstrip()[-1] in ".!?"
  runs = [tuple(flat[i : i + 4]) for i in range(len(flat) - 3)]
  hedges = len(_HEDGE_WORDS.findall(lowered))
  strange = sum(word not in tables.LEXICON for word in flat)
  wandering = claims.wandering(question, sentences)
  # Multiples of 1/16 and counts are exact in floating point, so that two
  # responses tie exactly or differ by at least 1/16.
  return {
    "named": claims.named(question, flat),
    "right": 3 * claims.mark(question, sentences, said),
    "direct": 0.5 * (opening > 0),
    "detail": 0.75 * min(details, 2),
    "false": -0.75 * min(falsehoods, 3),
    "refusal": -1.5 * bool(_REFUSAL_WORDS.search(lowered)),
    "hedge": -0.375 * min(hedges, 2),
    "wander": -0.625 * min(wandering, 4),
    "repeat": -0.25 * min(len(runs) - len(set(runs)), 12),
    "strange": -0.25 * min(strange, 8),
    "long": -0.0625 * min(max(len(flat) - 30, 0), 32),
    "unfinished": -1.0 * (not finished),
  }


@dataclasses.dataclass(frozen=True)
class World:
  """Rows {"chosen": transcript, "rejected": transcript} of three splits.

  Attributes:
    pretrain: pairs of RAW responses; the base model learns both of each.
    train: pairs of PAIRS responses, for SFT on chosen and for DPO.
    test: like train, with unseen prompts, all distinct.
  """

  pretrain: tuple[dict[str, str], ...]
  train: tuple[dict[str, str], ...]
  test: tuple[dict[str, str], ...]


def generate(
  seed: int, *, pretrain: int, train: int, test: int, scale: float = 1.0
) -> World:
  """Draws the three splits; a split's first n rows do not depend on any size.

  Args:
    seed: the only source of randomness.
    pretrain: number of pairs for the base model.
    train: number of preference pairs.
    test: number of pairs with unseen prompts; thousands are available.
    scale: P(a preferred to b) = sigmoid(scale * (reward(a) - reward(b))); 0
      gives random labels, 100 nearly noiseless ones.

  Raises:
    ValueError: more rows than this world has.
  """
  sizes = {"pretrain": pretrain, "train": train, "test": test}
  return World(
    **{name: _split(seed, name, size, scale) for name, size in sizes.items()}
  )


def _split(
  seed: int, name: str, size: int, scale: float
) -> tuple[dict[str, str], ...]:
  """`size` distinct rows; in the test split, of distinct prompts."""
  mix = RAW if name == "pretrain" else PAIRS
  rng = random.Random(f"dpo_jax world {seed} {name}")
  rows, seen = [], set()
  misses = 0
  while len(rows) < size:
    prompt = text_lib.draw_prompt(rng)
    row = None
    if text_lib.held_out(prompt) == (name == "test"):
      row = _pair(prompt, mix, scale, rng)
    key = prompt if name == "test" else row and (prompt, *row)
    if row is None or key in seen:
      misses += 1
      if misses > 10_000:
        raise ValueError(
          f"{name}={size} rows are more than this world has: no new one was"
          f" drawn after {len(rows)} rows; set it lower"
        )
      continue
    misses = 0
    seen.add(key)
    rows.append({"chosen": prompt + row[0], "rejected": prompt + row[1]})
  return tuple(rows)


def _pair(
  prompt: str, mix: Mapping[str, float], scale: float, rng: random.Random
) -> tuple[str, str]:
  """(chosen, rejected): two different responses with a Bradley-Terry label."""
  first = responses.draw(prompt, mix, rng)
  second = first
  while second == first:
    second = responses.draw(prompt, mix, rng)
  margin = scale * (reward(prompt, first) - reward(prompt, second))
  # tanh, unlike exp, cannot overflow.
  if rng.random() < 0.5 + 0.5 * math.tanh(0.5 * margin):
    return first, second
  return second, first


def write(world: World, directory: str | os.PathLike[str]) -> None:
  """Writes pretrain.jsonl, train.jsonl and test.jsonl, each atomically."""
  folder = pathlib.Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  for name, rows in vars(world).items():
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part = folder / f"{name}.jsonl.part"
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(folder / f"{name}.jsonl")
