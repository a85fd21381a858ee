"""Everything that the fake server's script can do, and what becomes of it."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from test_judging_client import KEY, ask, settings
from test_judging_runner import judge_with, response, verdicts, write

from dpo_jax import judging
from dpo_jax.judging import fake_answers, fake_server, runner

ROOT = pathlib.Path(__file__).parent.parent

# Script, further settings, what the reply is, its error, requests made.
ROWS = {
  "longer": ({}, "first", "", 1),
  "shorter": ({}, "second", "", 1),
  "second": ({}, "second", "", 1),
  "500*2 longer": ({}, "first", "", 3),
  "503=0.01 longer": ({}, "first", "", 2),
  "429*2 longer": ({}, "first", "", 3),
  "429=0.05 longer": ({}, "first", "", 2),
  "500": ({}, "missing", "HTTP 500: as the script says", 3),
  "408 html longer": ({}, "first", "", 3),
  "html": ({}, "missing", "the reply is not a chat completion", 3),
  "junk": ({}, "missing", "the reply is not a chat completion", 3),
  "half": ({}, "missing", "connection failed", 3),
  "reset": ({}, "missing", "connection failed", 3),
  "half reset longer": ({}, "first", "", 3),
  # Time enough for the rest of a request where much else is running.
  "hang": ({"timeout_s": 0.5}, "missing", "no reply within 0.5 s", 3),
  "hang longer": ({"timeout_s": 2.0}, "first", "", 2),
  # Every byte comes in time, the whole never does.
  "drip=0.02": ({"timeout_s": 0.5}, "missing", "no reply within 0.5 s", 3),
  "slow=0.01": ({}, "first", "", 1),
  "garbage": ({}, "missing", "no verdict in the reply", 2),
  "empty": ({}, "missing", "no verdict in the reply", 2),
  "null": ({}, "missing", "no verdict in the reply", 2),
  "unsure": ({}, "missing", "no verdict in the reply", 2),
  "cut": ({}, "missing", "cut at max_tokens", 2),
  "garbage longer": ({}, "first", "", 2),
  "tie": ({}, "missing", "no verdict in the reply", 2),
  "refusal": ({}, "refusal", "", 1),
  "400": ({}, "missing", "HTTP 400", 1),
  "say=More_helpful:_B": ({}, "second", "", 1),
}


@pytest.mark.parametrize("script", ROWS)
def test_a_fault_and_what_becomes_of_it(script):
  changes, choice, error, requests = ROWS[script]
  rule = fake_answers.read_script(script)
  with fake_server.Server(rule) as fake:
    (reply,) = ask(settings(fake.url, **changes))
  assert (reply.choice, bool(reply.error)) == (choice, bool(error))
  assert error in reply.error
  assert len(fake.requests) == requests


@pytest.mark.parametrize("script", ["401", "403", "404", "quota"])
def test_a_hopeless_fault_stops_the_run(script):
  rule = fake_answers.read_script(f"{script} longer")
  with fake_server.Server(rule) as fake, pytest.raises(judging.Stop):
    ask(settings(fake.url))
  assert len(fake.requests) == 1


def test_shares_of_all_requests_are_struck_alike_each_time():
  rule = fake_answers.read_script("longer 500%10 refusal%20")
  request = fake_answers.Request(
    {}, {"messages": [{"role": "user", "content": ""}]}
  )
  kinds = []
  for number in range(2000):
    try:
      answer = rule(request, number)
    except ValueError:  # a verdict needs a page
      kinds.append("verdict")
      continue
    kinds.append("500" if answer.status == 500 else "refusal")
  # Binomial: four standard deviations are 54 and 72.
  assert abs(kinds.count("500") - 200) < 54
  assert abs(kinds.count("refusal") - 400) < 72


@pytest.mark.parametrize(
  "script", ["", "500%5", "nonsense", "longer=3", "hang=x", "200", "longer*x"]
)
def test_a_script_that_is_none(script):
  with pytest.raises(ValueError, match="script"):
    fake_answers.read_script(script)


def test_a_run_through_every_fault_completes(tmp_path):
  write(tmp_path, [response(n, f" answer {n}") for n in range(60)])
  rule = fake_answers.read_script(
    "longer 500%5 429=0.01%3 reset%3 half%3 html%3 junk%2 garbage%3 empty%2"
    " refusal%3 503=0.01%2"
  )
  with fake_server.Server(rule) as fake:
    used = judge_with(fake, max_retries=8, max_wait_s=30.0)
    summary = runner.run(used, tmp_path)
    fake.rule = fake_answers.prefer_longer
    whole = runner.run(used, tmp_path)
  counts = summary.outcomes
  assert sum(counts.values()) == 120
  assert set(counts) <= {"model", "chosen", "missing", "refusal"}
  assert counts["refusal"] > 0
  assert whole.missing == 0
  for row in verdicts(tmp_path):
    assert (row.verdict == "missing") == bool(row.error)


def test_a_rate_limit_of_the_server_is_kept_to():
  questions = [judging.Question("p", f" {n}", " no") for n in range(10)]
  rule = fake_answers.prefer_longer
  with fake_server.Server(rule, per_minute=6) as fake:
    used = settings(fake.url, max_wait_s=0.01, max_retries=0)
    with pytest.raises(judging.Stop, match="asks everybody to wait"):
      ask(used, questions)
  # The headers said so: none was sent to be turned away.
  assert len(fake.requests) == 6


def serve(*flags) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-m", "dpo_jax.judging.fake_server", *flags],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def test_the_server_and_the_script_as_a_user_runs_them(tmp_path):
  """The key is in no file, no output and no argument, whatever echoes it."""
  write(tmp_path, [response(n, f" answer {n}") for n in range(8)])
  with serve("--script=echo*2 500*2 half garbage*2 longer") as fake:
    try:
      url = fake.stdout.readline().strip()
      command = [
        sys.executable,
        "judge.py",
        "--config=configs/judge.py:openai",
        f"--config.server.base_url={url}",
        "--config.server.budget_usd=1.0",
        "--config.server.retry_wait_s=0.01",
        f"--workdir={tmp_path}",
      ]
      environment = os.environ | {"OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug"}
      done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
      )
    finally:
      fake.send_signal(signal.SIGINT)
      said = fake.communicate(timeout=20)
  assert done.returncode == 0, done.stderr
  assert "questions asked" in done.stdout
  assert "about to ask" in done.stderr
  assert "dollars" in done.stdout
  assert "chat completions were asked for" in said[1]
  assert "Traceback" not in done.stderr + said[1]
  assert KEY not in done.stdout + done.stderr + "".join(said) + "".join(command)
  assert any("[key]" in row.raw for row in verdicts(tmp_path)) or any(
    "[key]" in path.read_text() for path in tmp_path.rglob("*.jsonl")
  )
  for path in tmp_path.rglob("*"):
    assert path.is_dir() or KEY.encode() not in path.read_bytes()
  kept = json.loads((tmp_path / "verdicts" / "judge.json").read_text())
  assert kept["complete"] is True
  assert 0 < kept["cost"] < 1.0
