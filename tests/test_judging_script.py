"""judge.py in a process of its own: kills, and keys in its output."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import judge_server
import planted
import pytest
from test_judging_client import in_turn
from test_judging_runner import judge_with, response, verdicts, write

from dpo_jax.judging import runner

ROOT = pathlib.Path(__file__).parent.parent


def script(workdir, url, *flags) -> subprocess.Popen:
  """judge.py as a user runs it."""
  return subprocess.Popen(
    [
      sys.executable,
      "judge.py",
      "--config=configs/judge.py:local",
      f"--config.server.base_url={url}",
      f"--workdir={workdir}",
      "--config.controls.aa=0",
      "--config.controls.gold=0",
      "--config.controls.retests=0",
      *flags,
    ],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def same_judge(server, **changes) -> runner.JudgeSettings:
  """The judge of configs/judge.py:local."""
  model = "Qwen/Qwen2.5-7B-Instruct"
  return judge_with(server, model=model, max_tokens=256, **changes)


def test_kills_bill_no_answered_question_twice(tmp_path):
  write(tmp_path, [response(n, f" text {n}") for n in range(40)])
  concurrency, kills = 4, 2
  ceiling = 0

  def rule(request, number):
    # From the ceiling on there is no reply, so that no child finishes first.
    hold_s = 60.0 if number >= ceiling else 0.005
    reply = judge_server.prefer_longer(request, number)
    return dataclasses.replace(reply, hold_s=hold_s)

  path = tmp_path / "verdicts" / "dpo.jsonl"
  with judge_server.Server(rule) as server:
    for kill in range(1, kills + 1):
      ceiling = kill * 20
      with script(
        tmp_path, server.url, f"--config.concurrency={concurrency}"
      ) as child:
        server.wait_for(ceiling - 5)
        child.send_signal(signal.SIGKILL)
    assert 0 < path.read_bytes().count(b"\n") < 80
    server.rule = judge_server.prefer_longer
    runner.run(same_judge(server), tmp_path)
  # Each key occurs once, and only calls in flight at a kill were repeated.
  lines = path.read_bytes().splitlines()
  assert len(lines) == len(verdicts(tmp_path)) == 80
  assert len({row.key for row in verdicts(tmp_path)}) == 80
  assert 80 <= len(server.requests) <= 80 + kills * concurrency


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_verdicts_so_far(number, tmp_path):
  write(tmp_path, [response(n, f" text {n}") for n in range(20)])
  with (
    judge_server.Server(judge_server.held(after=12)) as server,
    script(tmp_path, server.url, "--config.concurrency=2") as child,
  ):
    server.wait_for(14)
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
  assert child.returncode == 128 + number
  assert f"error: stopped by {number.name}" in err
  assert "Traceback" not in err
  assert len(verdicts(tmp_path)) == 12
  assert sorted(os.listdir(tmp_path / "verdicts")) == [
    "controls.jsonl",
    "dpo.jsonl",
    "judge.json",
  ]


def test_a_key_is_in_no_file_output_or_argument_whatever_echoes_it(tmp_path):
  write(tmp_path, [response(n, f" text {n}") for n in range(8)])
  rule = in_turn("echo echo 500 500 half garbage longer")
  with judge_server.Server(rule) as server:
    done = planted.run(
      [
        sys.executable,
        "judge.py",
        "--config=configs/judge.py:openai",
        f"--config.server.base_url={server.url}",
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
