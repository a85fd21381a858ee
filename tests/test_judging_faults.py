"""What a server may do wrong, and what becomes of it."""

import json
import os
import sys

import judge_server
import planted
import pytest
from test_judging_client import KEY, ask, settings
from test_judging_runner import judge_with, response, verdicts, write
from test_judging_script import ROOT

from dpo_jax import judging
from dpo_jax.judging import runner


def echo(request, number):
  """Repeats the key that it was sent."""
  sent = request.headers["authorization"]
  return judge_server.says(f"{sent}\nMore helpful: A", system_fingerprint=sent)


STATUSES = (400, 408, 429, 500, 503)
ANSWERS = {
  "longer": judge_server.prefer_longer,
  "second": judge_server.always("B"),
  "tie": judge_server.always("tie"),
  "garbage": judge_server.says("Lorem ipsum, dolor sit amet."),
  "empty": judge_server.says(""),
  "null": judge_server.says(None),
  "unsure": judge_server.says("Comparison: alike.\nMore helpful: A or B"),
  "cut": judge_server.says("More helpful: A\nMore", finish_reason="length"),
  "choiceless": judge_server.says("More helpful: A", choices=[]),
  "echo": echo,
  "refusal": judge_server.says("I'm sorry, but I can't assist with that."),
  "refused": judge_server.says(None, refusal="I will not compare these."),
  "filtered": judge_server.says("", finish_reason="content_filter"),
  "html": judge_server.Answer(body=b"<html/>", content_type="text/html"),
  "gateway": judge_server.Answer(502, b"<html/>", content_type="text/html"),
  "junk": judge_server.Answer(body=b'{"id": "1", "choi\xff'),
  "half": judge_server.struck(cut=True),
  "reset": judge_server.struck(reset=True),
  "hang": judge_server.struck(hold_s=3600.0),
  "drip": judge_server.struck(drip_s=0.02),
  "later": judge_server.fails(429, retry_after="0.05"),
} | {str(status): judge_server.fails(status) for status in STATUSES}


def in_turn(names: str) -> judge_server.Rule:
  return judge_server.in_turn(*(ANSWERS[name] for name in names.split()))


# Answers in turn, further settings, what the reply is, its error, requests.
ROWS = {
  "longer": ({}, "first", "", 1),
  "second": ({}, "second", "", 1),
  "500 gateway longer": ({}, "first", "", 3),
  "503 408 longer": ({}, "first", "", 3),
  "429 429 longer": ({}, "first", "", 3),
  "later longer": ({}, "first", "", 2),
  "junk html longer": ({}, "first", "", 3),
  "half reset longer": ({}, "first", "", 3),
  # Time enough for the rest of a request where much else is running.
  "hang longer": ({"timeout_s": 2.0}, "first", "", 2),
  "garbage longer": ({}, "first", "", 2),
  "500": ({}, "missing", "HTTP 500: no", 3),
  "html": ({}, "missing", "the reply is not a chat completion", 3),
  "junk": ({}, "missing", "the reply is not a chat completion", 3),
  "half": ({}, "missing", "connection failed", 3),
  "reset": ({}, "missing", "connection failed", 3),
  "hang": ({"timeout_s": 0.5}, "missing", "no reply within 0.5 s", 3),
  # Every byte comes in time, the whole never does.
  "drip": ({"timeout_s": 0.5}, "missing", "no reply within 0.5 s", 3),
  "400": ({}, "missing", "HTTP 400: no", 1),
  "garbage": ({}, "missing", "no verdict in the reply", 2),
  "empty": ({}, "missing", "no verdict in the reply", 2),
  "null": ({}, "missing", "no verdict in the reply", 2),
  "unsure": ({}, "missing", "no verdict in the reply", 2),
  "tie": ({}, "missing", "no verdict in the reply", 2),
  "cut": ({}, "missing", "cut at max_tokens", 2),
  "choiceless": ({}, "missing", "the reply has no choices", 2),
  "refusal": ({}, "refusal", "", 1),
  "refused": ({}, "refusal", "", 1),
  "filtered": ({}, "refusal", "", 1),
}


@pytest.mark.parametrize("names", ROWS)
def test_a_fault_and_what_becomes_of_it(names):
  changes, choice, error, requests = ROWS[names]
  with judge_server.Server(in_turn(names)) as fake:
    (reply,) = ask(settings(fake.url, **changes))
  assert (reply.choice, bool(reply.error)) == (choice, bool(error))
  assert error in reply.error
  assert len(fake.requests) == requests


def test_a_run_through_every_fault_completes(tmp_path):
  write(tmp_path, [response(n, f" answer {n}") for n in range(60)])
  faulty = in_turn("500 later reset half html junk garbage empty refusal 503")

  def rule(request, number):
    if number % 4:
      return judge_server.prefer_longer(request, number)
    return faulty(request, number // 4 % 10)

  with judge_server.Server(rule) as fake:
    used = judge_with(fake, max_retries=8, max_wait_s=30.0)
    summary = runner.run(used, tmp_path)
    fake.rule = judge_server.prefer_longer
    whole = runner.run(used, tmp_path)
  counts = summary.outcomes
  assert sum(counts.values()) == 120
  assert set(counts) <= {"model", "chosen", "missing", "refusal"}
  assert counts["refusal"] > 0
  assert whole.missing == 0
  for row in verdicts(tmp_path):
    assert (row.verdict == "missing") == bool(row.error)


def test_a_key_is_in_no_file_output_or_argument_whatever_echoes_it(tmp_path):
  write(tmp_path, [response(n, f" answer {n}") for n in range(8)])
  rule = in_turn("echo echo 500 500 half garbage longer")
  with judge_server.Server(rule) as fake:
    done = planted.run(
      [
        sys.executable,
        "judge.py",
        "--config=configs/judge.py:openai",
        f"--config.server.base_url={fake.url}",
        "--config.server.budget_usd=1.0",
        "--config.server.retry_wait_s=0.01",
        f"--workdir={tmp_path}",
      ],
      cwd=ROOT,
      env=os.environ | {"OPENAI_LOG": "debug"},
      timeout=60,
    )
  assert done.returncode == 0, done.stderr
  assert "questions asked" in done.stdout
  assert "about to ask" in done.stderr
  assert "dollars" in done.stdout
  assert "Traceback" not in done.stderr
  files = [path.read_text() for path in tmp_path.rglob("*.jsonl")]
  assert any('"raw": "Bearer [key]' in text for text in files)
  assert planted.search(tmp_path) >= 3
  kept = json.loads((tmp_path / "verdicts" / "judge.json").read_text())
  assert kept["complete"] is True
  assert 0 < kept["cost"] < 1.0


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 304])
@pytest.mark.parametrize("mode", ["live", "batch"])
def test_a_redirect_is_refused(status, mode, tmp_path, monkeypatch):
  """Followed, it would take the key and the texts to another host."""
  monkeypatch.setenv("JKEY", KEY)
  write(tmp_path, [response()])
  with judge_server.Server(judge_server.prefer_longer) as elsewhere:
    answer = judge_server.fails(status, "moved", location=elsewhere.url)
    with judge_server.Server(judge_server.in_turn(answer)) as fake:
      fake.batches.trouble = [answer]
      used = judge_with(fake, api_key_env="JKEY", mode=mode)
      with pytest.raises(judging.Stop, match=f"{status}.*{elsewhere.url}"):
        runner.run(used, tmp_path)
    assert not elsewhere.requests
    assert not elsewhere.batches.files
  assert verdicts(tmp_path) == []
