import json
import math

import hypothesis
import hypothesis.strategies as st
import judge_server
import pytest
from test_judging_client import QUESTION, ask, settings

from dpo_jax.judging import prompts, verdicts


def completion(text, *, shares=None, tokens=None, **changes) -> dict:
  """With log-probabilities of these shares at the token of this number."""
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
  return {"model": "m", "choices": [choice | changes]}


def read(value, output="text", ties=False):
  return verdicts.read_completion(value, output=output, ties=ties)


def test_a_score_is_the_share_of_the_first_slot():
  tokens = ["Comparison", ": A is", " A", ".\nMore", " helpful:", " B", "\n"]
  shares = {" B": 0.6, " A": 0.15, "B": 0.05, '"A': 0.05, " C": 0.1}
  reply = read(completion(None, shares=(5, shares), tokens=tokens))
  assert reply.choice == "second"
  # Of the shares of A and B, however they are spelt: 0.2 of 0.85.
  assert reply.score == pytest.approx(0.2 / 0.85)


def test_a_tie_counts_half_where_there_are_ties():
  tokens = ["More helpful:", " A"]
  shares = {" A": 0.5, " B": 0.1, " tie": 0.3}
  value = completion(None, shares=(1, shares), tokens=tokens)
  assert read(value).score == pytest.approx(0.5 / 0.6)
  assert read(value, ties=True).score == pytest.approx(0.65 / 0.9)
  tie = completion(None, shares=(1, shares), tokens=["More helpful:", " tie"])
  assert read(tie, ties=True).choice == "tie"
  assert read(tie, ties=True).score == pytest.approx(0.65 / 0.9)
  assert read(tie).choice == "missing"
  assert read(tie).score is None


@pytest.mark.parametrize(
  "tokens",
  [
    ["More helpful:", " A", " because", " A", " is", " fine"],
    ["More helpful:", " A", "\n\nI hope", " A", " helps"],
  ],
)
def test_the_score_is_taken_where_the_verdict_stands(tokens):
  value = completion(None, shares=(1, {" A": 0.7, " B": 0.3}), tokens=tokens)
  assert read(value).score == pytest.approx(0.7)


def test_a_score_in_json():
  tokens = ['{"comparison": "A', '", "choice": "', "A", '"}']
  value = completion(None, shares=(2, {"A": 0.8, "B": 0.2}), tokens=tokens)
  reply = read(value, "json_schema")
  assert (reply.choice, reply.score) == ("first", pytest.approx(0.8))


@pytest.mark.parametrize(
  ("tokens", "place", "shares"),
  [
    (["More helpful: A"], 0, {"A": 1.0}),  # the letter is no token
    (["More helpful:", " A"], 1, {}),
    (["More helpful:", " A"], 1, {" C": 0.9}),
  ],
)
def test_no_score_rather_than_a_guess(tokens, place, shares):
  reply = read(completion(None, shares=(place, shares), tokens=tokens))
  assert (reply.choice, reply.score) == ("first", None)


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


@pytest.mark.parametrize("text", JSON, ids=lambda text: text[:30])
def test_json_is_read_as_json_alone(text):
  assert read(completion(text), "json_schema").choice == JSON[text]


def test_a_tie_in_json_where_it_is_allowed():
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
  max_leaves=20,
)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(
  value=any_json, output=st.sampled_from(["text", "json_schema"])
)
def test_no_reply_of_any_shape_breaks_the_reader(value, output):
  for whole in (value, {"choices": [{"message": value}]}, completion(None)):
    reply = read(whole, output)
    assert reply.choice in ("missing", "refusal")
    assert bool(reply.error) == (reply.choice == "missing")
    assert reply.prompt_tokens >= 0


def test_half_a_surrogate_pair_can_be_kept():
  value = json.loads('"\\ud83d\\nMore helpful: A"')
  reply = read(completion(value))
  assert (reply.choice, reply.text) == ("first", "?\nMore helpful: A")


@pytest.mark.parametrize("ties", [False, True])
def test_a_schema_and_logprobs_are_asked_for_and_read(ties):
  rule = judge_server.always("tie" if ties else "B")
  with judge_server.Server(rule) as fake:
    used = settings(fake.url, output="json_schema", ties=ties, top_logprobs=5)
    (reply,) = ask(used)
  body = fake.requests[0].body
  schema = body["response_format"]["json_schema"]
  assert body["response_format"]["type"] == "json_schema"
  assert schema["strict"] is True
  assert schema["schema"] == prompts.schema(ties=ties)
  assert list(schema["schema"]["properties"]) == ["comparison", "choice"]
  choices = schema["schema"]["properties"]["choice"]["enum"]
  assert choices == (["A", "B", "tie"] if ties else ["A", "B"])
  assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
  assert reply.choice == ("tie" if ties else "second")
  # 0.9 for the choice; 0.1 for A beside it.
  assert reply.score == pytest.approx(0.1 + 0.45 if ties else 0.1)


def test_a_server_that_cannot_is_not_asked_otherwise():
  answer = judge_server.fails(400, "response_format is not supported")
  with judge_server.Server(lambda request, number: answer) as fake:
    (reply,) = ask(settings(fake.url, output="json_schema"), [QUESTION])
  assert reply.choice == "missing"
  assert "response_format is not supported" in reply.error
  assert len(fake.requests) == 1
