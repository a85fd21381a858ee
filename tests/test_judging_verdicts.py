"""The parser of replies: forms of verdicts, JSON, scores, any garbage."""

import collections
import json
import math
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from dpo_jax.judging import verdicts

FORMS = {
  "A": [
    "More helpful: A",
    'More helpful: "A"',
    "More helpful: **A**",
    "**More helpful:** A",
    "**More helpful: A**",
    "More helpful: A.",
    "more helpful: a",
    "MORE HELPFUL: (A)",
    "More helpful: [[A]]",
    "More helpful: Response A",
    "More helpful: <A>",
    "More helpful candidate: A",
    "More helpful: A, because it answers the question.",
    "More helpful: A because B wanders off.",
    "More helpful: A (slightly)",
    "More helpful: A. Both are short, though.",
    "Ｍｏｒｅ ｈｅｌｐｆｕｌ：Ａ",
    "More helpful:\u200b A\u200e",
    "Comparison: B is vague. More helpful: A",
    "More helpful: A\n\nI hope this helps!",
    "More helpful: B\nMore helpful: A",
    "More helpful:\nA",
    "Comparison: B is vague.\n\nA",
    "Comparison: B is vague.\n\n**A**",
    "[[A]]",
    "a",
    "Verdict: A",
    "Final answer: A",
    '{"comparison": "B is vague.", "choice": "A"}',
    "The more helpful response is A.",
    "Sorry for the delay.\nMore helpful: A",
    "More harmless: A",
    'Preferred: "A"',
    "More helpful: A\nComparison: B is vague.",
    'The text says "More helpful: B".\nMore helpful: A',
    "More helpful: Assistant A",
    "More helpful: the AI assistant A",
    "More helpful: Model A",
    "More helpful: A<|im_end|>",
    "More helpful: A</s>\n",
    "More helpful: A\n<|eot_id|><|endoftext|>",
    "More helpful: A<｜end▁of▁sentence｜>",
    "<answer>More helpful: A</answer>",
    "A</s>",
    "My choice is B.\nMore helpful: A",
    "More helpful: A because B is not better.",
    "B is not more helpful than A.\nMore helpful: A",
  ],
  "missing": [
    None,
    "",
    " \n ",
    "Comparison: Response A is vague while B",
    "More helpful:",
    "More helpful: C",
    "More helpful: both",
    "More helpful: neither A nor B",
    "More helpful: A or B",
    'More helpful: "A" or "B"',
    "More helpful: A/B",
    "More helpful: A; B",
    "More helpful: A. B",
    "More helpful: A, B",
    "More helpful: A (tie)",
    "More helpful: A? Hard to say",
    "More helpful: a bit of both",
    "More helpful: A bit of both",
    "More helpful: b/a",
    "More helpful: A1",
    "More helpful: A+",
    "More helpful: not A",
    "Not more helpful: A",
    "This isn't the more helpful: A",
    "More helpful: A\nActually, my final choice is B.",
    "More helpful: A because it is short. Actually, my final choice is B",
    "More helpful: A\nMy final verdict: B",
    "More helpful: A\nI would rather go with candidate B.",
    "More helpful: A\nOn reflection, B is the better one.",
    "More helpful: A\nWait, that is wrong.",
    "More helpful: A. No, wait.",
    "More helpful: A More helpful: B",
    "Less helpful: A",
    "More helpful: A\nMore helpful: unclear",
    "A and B",
    "A\nComparison: that is all.",
    "<html><body>A gateway failed</body></html>",
    "More helpful: А",  # Cyrillic
  ],
  "refusal": [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, but I can’t assist with that.",
    "Sorry, I cannot compare these.",
    "I cannot help with this request.",
    "I am unable to judge this.",
    "Unfortunately, I can't take part in this.",
    "As an AI model I cannot do so.",
  ],
}


# What precedes and follows thinking, in the marks of servers and templates.
THINKING = (
  ("<think>", "</think>"),
  ("<thinking>", "</thinking>"),
  ("<THOUGHT>\n", "\n</THOUGHT>"),
  ("<reasoning effort='high'>", "</reasoning>"),
  ("<seed:think>", "</seed:think>"),
  ("[THINK]", "[/THINK]"),
  ("◁think▷", "◁/think▷"),
  ("<|begin_of_thought|>", "<|end_of_thought|>"),
  ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
  (
    "<|channel|>analysis<|message|>",
    "<|end|><|start|>assistant<|channel|>final<|message|>",
  ),
  ("analysis", "assistantfinal"),
  ("<|channel>thought\n", "<channel|>"),
  ("<unused94>thought\n", "<unused95>"),
  ("<|inner_prefix|>", "<|inner_suffix|>"),
  ("Here is my thought process:\n", "\nHere is my response:\n"),
  ('<details type="reasoning" done="true">', "</details>"),
)


@pytest.mark.parametrize(("opened", "closed"), THINKING)
def test_thinking_is_no_part_of_a_reply(opened, closed):
  thought = "I like it.\nMore helpful: A\nI am sorry, I cannot say.\n"
  for before in (opened, "", f"{opened}Hm.{closed}{opened}"):
    start = f"{before}{thought}{closed}"
    for text, letter in (
      ("\nComparison: kinder.\nMore helpful: B", "B"),
      ("B", "B"),
      ("I am sorry, but I cannot compare these texts.", "refusal"),
      ("", "missing"),
    ):
      assert verdicts.read(start + text) == letter, start + text
    assert verdicts.read_json(f'{start}{{"choice": "B"}}') == "B"
  # Never closed, after a verdict too.
  assert verdicts.read(opened + thought) == "missing"
  tokens = [opened, thought, closed, "More helpful:", " B"]
  value = completion(None, shares=(4, {"A": 0.2, "B": 0.8}), tokens=tokens)
  assert read(value).score == pytest.approx(0.2)
  # A score of the thinking is none of the verdict's.
  tokens = [f'{opened}"choice": "', "B", closed, '{"choice": "B"}']
  value = completion(None, shares=(1, {"A": 0.2, "B": 0.8}), tokens=tokens)
  assert read(value, "json_schema").score is None


@pytest.mark.parametrize("letter", FORMS)
def test_form(letter):
  for text in FORMS[letter]:
    assert verdicts.read(text) == letter, text


def test_forms_of_b_read_like_those_of_a():
  swap = str.maketrans("ABabＡ", "BAbaＢ")
  for text in FORMS["A"][:13] + FORMS["A"][16:18]:
    head, colon, tail = text.rpartition("：" if "：" in text else ":")
    assert verdicts.read(head + colon + tail.translate(swap)) == "B", text


def test_real_judge_outputs(shared):
  """The ties of these files are parse misses, a refusal aside.

  Over the twelve files the parser agrees with every other recorded verdict.
  """
  slots = {"A": "Model", "B": "Chosen"}
  counts = collections.Counter()
  for path in sorted((shared / "seed_results").glob("*.json")):
    for row in json.loads(path.read_text())["results"]:
      assert row["presentation_order"] == "model_first"
      letter = verdicts.read(row["raw_gpt4_response"])
      if row["verdict"] == "Tie":
        counts[letter] += 1
        if letter != "refusal":
          assert row["raw_gpt4_response"].endswith(f'More helpful: "{letter}"')
      else:
        assert slots[letter] == row["verdict"], row["raw_gpt4_response"]
        counts["same"] += 1
  # Counted with grep: 12 files of 150 rows, 13 of them called ties.
  assert counts.pop("same") == 12 * 150 - 13
  assert counts.pop("refusal") == 1
  assert set(counts) == {"A", "B"}
  assert counts.total() == 12


TIES = {
  "tie": [
    "More helpful: tie",
    "More helpful: **Tie**.",
    'Preferred: "tie"',
    "Comparison: both are fine.\n\nTie",
    "More harmless: a tie, because A and B are equal",
    '{"comparison": "x", "choice": "tie"}',
    "Verdict: draw",
    "Ｐｒｅｆｅｒｒｅｄ：ｔｉｅ",
  ],
  "missing": [
    "More helpful: tie or A",
    "More helpful: tie, A is a little better",
    "More helpful: A (tie)",
    "More helpful: tied hands",
    "More helpful: both",
    "It is a tie between A and B.",
  ],
  "A": ["More helpful: A", "Preferred: a", "More harmless: [[A]]"],
}


@pytest.mark.parametrize("found", TIES)
def test_a_tie_is_read_only_where_it_is_allowed(found):
  for text in TIES[found]:
    assert verdicts.read(text, ties=True) == found, text
    without = "missing" if found == "tie" else found
    assert verdicts.read(text) == without, text


@pytest.mark.parametrize(
  "junk",
  [
    *("[", '"', " ", "*\n", "More helpful: ", "A ", "sorry ", "(A", "i'm "),
    *("A\n", "<think>", "a</think>", "not ", "choice ", "</s>", "[/a]", "<|"),
  ],
)
def test_a_long_reply_of_junk_is_read_in_no_time(junk):
  text = junk * (200_000 // len(junk))
  begin = time.process_time()
  for whole in (f"More helpful: {text}", f"{text}\nMore helpful: B"):
    verdicts.read(whole, ties=True)
  verdicts.read_json(text, ties=True)
  assert time.process_time() - begin < 4.0


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
letters = st.sampled_from("AB")


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(text=any_text, letter=letters)
def test_nothing_before_the_last_line_matters(text, letter):
  assert verdicts.read(f"{text}\nMore helpful: {letter}") == letter


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
  before=st.text("\"'*`_([{<“ ", max_size=4),
  after=st.text("\"'*`_)]}>” ", max_size=4),
  letter=st.sampled_from("ABab"),
  noun=st.sampled_from(["", "Response ", "candidate "]),
)
def test_decoration_changes_nothing(before, after, letter, noun):
  text = f"Comparison: x.\nMore helpful: {before}{noun}{letter}{after}"
  assert verdicts.read(text) == letter.upper()


# --- completions


def completion(text, *, shares=None, tokens=None) -> dict:
  """With log-probs of (index of a token, alternatives' probabilities)."""
  logprobs = None
  if shares is not None:
    place, shares = shares
    content = [{"token": t, "logprob": 0.0, "top_logprobs": []} for t in tokens]
    content[place]["top_logprobs"] = [
      {"token": t, "logprob": math.log(p)} for t, p in shares.items()
    ]
    logprobs = {"content": content}
    text = "".join(tokens)
  message = {"role": "assistant", "content": text}
  choice = {"finish_reason": "stop", "message": message, "logprobs": logprobs}
  return {"model": "m", "choices": [choice]}


def read(value, output="text", ties=False):
  return verdicts.read_completion(value, output=output, ties=ties)


TALE = ["Comparison", ": A is", " A", ".\nMore", " helpful:", " B", "\n"]
SHARES = {" A": 0.5, " B": 0.1, " tie": 0.3}


@pytest.mark.parametrize(
  ("tokens", "place", "shares", "ties", "choice", "score"),
  [
    # Of the shares of A and B, however they are spelt: 0.2 of 0.85.
    (
      TALE,
      5,
      {" B": 0.6, " A": 0.15, "B": 0.05, '"A': 0.05, " C": 0.1},
      False,
      "second",
      0.2 / 0.85,
    ),
    # A tie counts half where it is allowed.
    (["More helpful:", " A"], 1, SHARES, False, "first", 0.5 / 0.6),
    (["More helpful:", " A"], 1, SHARES, True, "first", 0.65 / 0.9),
    (["More helpful:", " tie"], 1, SHARES, True, "tie", 0.65 / 0.9),
    (["More helpful:", " tie"], 1, SHARES, False, "missing", None),
    # At the verdict, not at another " A".
    (
      ["More helpful:", " A", " because", " A", " is", " fine"],
      1,
      {" A": 0.7, " B": 0.3},
      False,
      "first",
      0.7,
    ),
    (
      ["More helpful:", " A", "\n\nI hope", " A", " helps"],
      1,
      {" A": 0.7, " B": 0.3},
      False,
      "first",
      0.7,
    ),
    # No score rather than a guess.
    (["More helpful: A"], 0, {"A": 1.0}, False, "first", None),
    (["More helpful:", " A"], 1, {}, False, "first", None),
    (["More helpful:", " A"], 1, {" C": 0.9}, False, "first", None),
  ],
)
def test_a_score_is_the_share_of_the_first_slot(
  tokens, place, shares, ties, choice, score
):
  value = completion(None, shares=(place, shares), tokens=tokens)
  reply = read(value, ties=ties)
  assert reply.choice == choice
  assert reply.score == (score and pytest.approx(score))


JSON = {
  '{"comparison": "x", "choice": "A"}': "first",
  ' {"choice": "B", "comparison": "A"}\n': "second",
  '{"comparison": "x", "choice": "tie"}': "missing",
  '{"comparison": "x", "choice": "a"}': "missing",
  '{"comparison": "x", "choice": "A", "choice": "B"}': "missing",
  '{"comparison": "x", "choice": ["A"]}': "missing",
  '{"comparison": "x"}': "missing",
  '["A"]': "missing",
  '{"comparison": "x", "choice": "A"': "missing",
  'Sure: {"comparison": "x", "choice": "A"}': "missing",
  "More helpful: A": "missing",
  "A": "missing",
  "[" * 100_000: "missing",
  "": "missing",
  "I'm sorry, but I can't assist with that.": "refusal",
}


def test_json_is_read_as_json_alone():
  tokens = ['{"comparison": "A', '", "choice": "', "A", '"}']
  value = completion(None, shares=(2, {"A": 0.8, "B": 0.2}), tokens=tokens)
  assert read(value, "json_schema").score == pytest.approx(0.8)
  for text, choice in JSON.items():
    assert read(completion(text), "json_schema").choice == choice, text[:80]
  text = '{"comparison": "x", "choice": "tie"}'
  assert read(completion(text), "json_schema", ties=True).choice == "tie"


any_json = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(
        [
          *("choices", "message", "content", "usage", "model", "refusal"),
          *("finish_reason", "logprobs", "prompt_tokens", "top_logprobs"),
        ]
      ),
      inner,
      max_size=5,
    )
  ),
  max_leaves=12,
)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  value=any_json, output=st.sampled_from(["text", "json_schema"])
)
def test_no_reply_of_any_shape_breaks_the_reader(value, output):
  for whole in (value, {"choices": [{"message": value}]}, completion(None)):
    reply = read(whole, output)
    assert reply.choice in ("missing", "refusal")
    assert bool(reply.error) == (reply.choice == "missing")
    assert reply.prompt_tokens >= 0


def test_content_as_a_list_of_parts():
  parts = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "B?"}]},
    {"type": "text", "text": "Comparison: x.\nMore "},
    {"type": "text", "text": "helpful: A"},
    {"type": "reasoning", "text": "\nMore helpful: B"},
  ]
  assert read(completion(parts)).text == "Comparison: x.\nMore helpful: A"
  assert read(completion(parts)).choice == "first"
  refused = [{"type": "refusal", "refusal": "I will not compare these."}]
  assert read(completion(refused)).choice == "refusal"
  assert read(completion(parts[:1])).choice == "missing"


def test_half_a_surrogate_pair_can_be_kept():
  value = json.loads('"\\ud83d\\nMore helpful: A"')
  reply = read(completion(value))
  assert (reply.choice, reply.text) == ("first", "?\nMore helpful: A")
