"""Dollars and tokens: the budget's cap, judge.json, and the estimate."""

import dataclasses
import json

import judge_server
import pytest
import test_console
from test_judging_client import NOWHERE, TEMPLATE, settings
from test_judging_runner import (
  judge_with,
  ledger,
  response,
  responses,
  verdicts,
  write,
)

from dpo_jax import judging
from dpo_jax.core import console
from dpo_jax.judging import budget, client, prompts, questions, runner, usage

mode = test_console.mode
# Dollars per million tokens: a token costs 1 and 2 dollars here.
DEAR = ("judge-as-asked 1e6 2e6",)


def says_using(prompt_tokens: int, completion_tokens: int):
  usage = {
    "prompt_tokens": prompt_tokens,
    "completion_tokens": completion_tokens,
  }
  return judge_server.says("Comparison: x.\nMore helpful: A", usage=usage)


# 140 dollars.
REPLY = judge_server.in_turn(says_using(100, 20))


def bound_of(request: judge_server.Request) -> int:
  """By hand: a token a byte, 64 for the format, 64 of reply at twice that."""
  return len(request.prompt.encode()) + 64 + 2 * 64


def test_a_bound_counts_bytes_and_not_characters():
  dear = budget.Budget(budget.Price(1e6, 2e6), cap=0.0)
  # Each character has three bytes.
  assert dear.bound("日本語", max_tokens=10) == 9 + 64 + 2 * 10


def test_nothing_is_sent_beyond_the_budget_and_a_higher_one_continues(tmp_path):
  write(tmp_path, responses(10))
  with judge_server.Server(REPLY) as server:

    def run(cap, **changes):
      used = judge_with(server, budget_usd=cap, prices=DEAR, **changes)
      return runner.run(used, tmp_path)

    first = run(3000.0, concurrency=4)
    bound, asked = bound_of(server.requests[0]), first.asked
    assert len(server.requests) == len(verdicts(tmp_path)) == asked
    assert 140 * asked <= 3000
    # One call of this bound fits after n others, until one does not.
    assert 140 * (asked - 1) + bound <= 3000 < 140 * asked + bound
    assert first.not_dispatched == 20 - asked
    assert f"INCOMPLETE: {20 - asked} of 20 questions were not" in str(first)
    kept = ledger(tmp_path)
    assert (kept["complete"], kept["not_dispatched"]) == (False, 20 - asked)
    assert kept["cost"] == pytest.approx(140 * asked)
    # The same budget has no room for another call, now or later.
    assert run(3000.0).asked == 0
    assert len(server.requests) == asked
    assert run(1e6).not_dispatched == 0
    assert len(server.requests) == 20
  kept = ledger(tmp_path)
  assert kept["complete"]
  assert kept["cost"] == pytest.approx(140 * 20)
  assert (kept["prompt_tokens"], kept["completion_tokens"]) == (2000, 400)
  assert kept["calls"] == 20


def test_calls_in_flight_are_reserved(tmp_path):
  """Many at once could each see an unspent budget."""
  write(tmp_path, responses(20))
  slow = dataclasses.replace(says_using(1000, 64), hold_s=0.02)
  with judge_server.Server(judge_server.in_turn(slow)) as server:
    used = judge_with(server, budget_usd=5000.0, prices=DEAR, concurrency=16)
    summary = runner.run(used, tmp_path)
  # 1,128 dollars each, less than the bound: a fifth call would make 5,640.
  bound = bound_of(server.requests[0])
  assert bound >= 1128
  expected = 4 - (3 * 1128 + bound > 5000)
  assert len(server.requests) == summary.asked == expected
  assert ledger(tmp_path)["cost"] <= 5000


def test_what_does_not_fit_waits_for_cheaper_replies(tmp_path):
  write(tmp_path, [response(0)])
  with judge_server.Server(REPLY) as server:
    runner.run(judge_with(server, verdicts="verdicts-free"), tmp_path)
    bound = bound_of(server.requests[0])
    # Room for one bound at a time, and for both replies.
    used = judge_with(
      server, budget_usd=bound + 140.0, prices=DEAR, concurrency=2
    )
    assert runner.run(used, tmp_path).asked == 2


def test_a_call_without_a_count_costs_its_bound_in_later_runs_too(tmp_path):
  write(tmp_path, [response(0)])
  counted = says_using(1, 1)
  lost = dataclasses.replace(counted, cut=True)
  uncounted = judge_server.says("Comparison: x.\nMore helpful: A", usage=None)
  rule = judge_server.in_turn(lost, counted, uncounted, counted)
  with judge_server.Server(rule) as server:
    used = judge_with(server, budget_usd=1e6, prices=DEAR, concurrency=1)
    runner.run(used, tmp_path)
    bound = bound_of(server.requests[0])
    # 3 dollars for the counted reply; all pages have the same length.
    assert ledger(tmp_path)["cost"] == pytest.approx(2 * bound + 3)
    # Room for a new call on its own, but not after what was paid before.
    tight = judge_with(server, budget_usd=2 * bound + 100.0, prices=DEAR)
    write(tmp_path, [response(0), response(2, " else")])
    assert runner.run(tight, tmp_path).not_dispatched == 2


def test_an_error_of_the_server_costs_nothing(tmp_path):
  write(tmp_path, [response(0)])
  fails = [judge_server.fails(status) for status in (500, 500, 429)]
  rule = judge_server.in_turn(*fails, judge_server.prefer_longer)
  with judge_server.Server(rule) as server:
    used = judge_with(
      server, budget_usd=1e6, prices=DEAR, concurrency=1, max_retries=3
    )
    runner.run(used, tmp_path)
  rows = verdicts(tmp_path)
  assert rows[0].prompt_tokens > 0
  assert ledger(tmp_path)["cost"] == pytest.approx(
    sum(row.prompt_tokens + 2 * row.completion_tokens for row in rows)
  )
  assert ledger(tmp_path)["calls"] == 5


def test_a_killed_run_has_spent_what_its_rows_say(tmp_path):
  """It wrote rows, and judge.json as it was before them."""
  write(tmp_path, [response(0)])
  with judge_server.Server(REPLY) as server:
    used = judge_with(server, budget_usd=1e6, prices=DEAR)
    runner.run(used, tmp_path)
    before = (tmp_path / "verdicts" / "judge.json").read_bytes()
    write(tmp_path, [response(0), response(1, " else")])
    runner.run(used, tmp_path)
    assert ledger(tmp_path)["cost"] == pytest.approx(4 * 140)
    (tmp_path / "verdicts" / "judge.json").write_bytes(before)
    runner.run(used, tmp_path)
  assert ledger(tmp_path)["cost"] == pytest.approx(4 * 140)


def test_a_shared_reply_is_paid_for_once(tmp_path):
  write(tmp_path, [response(0), response(0, sample_id=1)])
  with judge_server.Server(REPLY) as server:
    runner.run(judge_with(server, prices=DEAR), tmp_path)
    write(tmp_path, [response(0, model="sft")], "sft.jsonl")
    runner.run(judge_with(server, prices=DEAR), tmp_path)
  assert len(server.requests) == 2
  assert ledger(tmp_path)["prompt_tokens"] == 200
  assert ledger(tmp_path)["cost"] == pytest.approx(280.0)


def test_a_cost_without_a_price_is_unknown(tmp_path, capsys):
  write(tmp_path, [response(0)])
  # Calls without a verdict cost, and another judge may replace theirs.
  rule = judge_server.in_turn(judge_server.says("Hm."))
  with judge_server.Server(rule) as server:
    with pytest.raises(judging.Stop):
      runner.run(judge_with(server), tmp_path)
    assert "dollars" not in capsys.readouterr().out
    assert ledger(tmp_path)["cost"] is None
    other = judge_with(server, model="b", budget_usd=1.0, prices=("b 1 1",))
    with pytest.raises(ValueError, match="price is unknown"):
      runner.run(other, tmp_path)


def test_prices():
  assert budget.read_prices(["m 1 2"])["m"].of(3, 4) == pytest.approx(11e-6)
  for line in ("m 1", "m 1 2 3", "m one 2", "m -1 2", "m nan 1", "", "m 1 inf"):
    with pytest.raises(ValueError, match=r"prices: .*must be MODEL"):
      budget.read_prices([line])
  with pytest.raises(ValueError, match="'m' has more than one entry"):
    budget.read_prices(["m 1 2", "m 1 2"])


def test_the_cost_is_shown_while_questions_are_asked(
  tmp_path, mode, monkeypatch, capsys
):
  write(tmp_path, responses(3))
  monkeypatch.setattr(console, "EVERY_S", 0.0)
  mode("json")
  with judge_server.Server(REPLY) as server:
    runner.run(judge_with(server, prices=DEAR, concurrency=1), tmp_path)
  lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
  size = sum(len(request.prompt.encode()) for request in server.requests)
  # Before the first call, 60 tokens a reply.
  assert lines[0]["event"] == "estimate"
  assert (
    f"6 questions: some {round(size / 4):,} + 360 tokens" in lines[0]["text"]
  )
  assert lines[0]["dollars"] == pytest.approx(round(size / 4) + 720)
  shown = [line for line in lines if line["event"] == "progress"]
  assert [line["done"] for line in shown] == [1, 2, 3, 4, 5, 6]
  dollars = [line["dollars"] for line in shown]
  assert dollars == pytest.approx([140, 280, 420, 560, 700, 840])
  assert shown[-1]["tokens in"] == 600


def test_an_estimate_alone_asks_and_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.delenv("UNSET_KEY", raising=False)
  write(tmp_path, responses(3))
  before = sorted(tmp_path.rglob("*"))
  with judge_server.Server(judge_server.prefer_longer) as server:
    # No key is needed.
    used = judge_with(server, prices=DEAR, api_key_env="UNSET_KEY")
    found = runner.estimate(used, tmp_path)
    assert not server.requests
    assert sorted(tmp_path.rglob("*")) == before
    runner.run(judge_with(server, prices=DEAR), tmp_path)
    assert found.calls == len(server.requests) == 6
    assert found.prompts == 3
    size = sum(len(r.prompt.encode()) for r in server.requests)
    assert found.prompt_tokens == round(size / 4)
    # Only what has no verdict counts.
    write(tmp_path, responses(4))
    again = runner.estimate(used, tmp_path)
    assert again.calls == 2


def test_an_estimate_by_hand():
  used = settings(NOWHERE, prices=("judge-as-asked 1 4",))
  case = questions.Case(None, response(0), "model_first")
  size = len(prompts.fill(TEMPLATE, case.question).encode())
  plan = questions.Plan(2, {"a": [case], "b": [case]}, [], {})
  tokens = round(2 * size / 4)
  # 60 tokens a reply.
  found = usage.estimate(plan, client.Client(used), 150)
  dollars = (tokens + 480) / 1e6
  assert found == usage.Estimate(2, tokens, 120, pytest.approx(dollars), 150)
  # See the tests of intervals.
  assert "with 150 prompts, a difference between two models of 16.9 points" in (
    str(found)
  )
  assert "points" not in str(dataclasses.replace(found, prompts=1))
