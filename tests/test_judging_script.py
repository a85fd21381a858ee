"""judge.py in a process of its own: exit codes, messages, real kills."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys

import judge_server
import pytest
from test_judging_runner import (
  NO_CONTROLS,
  judge_with,
  response,
  verdicts,
  write,
)

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


def test_three_kills_bill_no_answered_question_twice(tmp_path):
  write(tmp_path, [response(n, f" answer {n}") for n in range(40)])
  concurrency = 4
  ceiling = 0

  def rule(request, number):
    # From the ceiling on nothing is answered, so no child can finish first.
    answer = judge_server.prefer_longer(request, number)
    hold_s = 60.0 if number >= ceiling else 0.005
    return dataclasses.replace(answer, hold_s=hold_s)

  path = tmp_path / "verdicts" / "dpo.jsonl"
  with judge_server.Server(rule) as server:
    for kill in range(1, 4):
      ceiling = kill * 20
      with script(
        tmp_path, server.url, f"--config.concurrency={concurrency}"
      ) as child:
        server.wait_for(ceiling - 5)
        child.send_signal(signal.SIGKILL)
    assert 0 < path.read_bytes().count(b"\n") < 80
    server.rule = judge_server.prefer_longer
    # The judge of configs/judge.py:local, under another address.
    same = judge_with(
      server,
      model="Qwen/Qwen2.5-7B-Instruct",
      max_tokens=256,
      control=NO_CONTROLS,
    )
    runner.run(same, tmp_path)
  # Each key stands once, and only calls in flight at a kill were repeated.
  lines = path.read_bytes().splitlines()
  assert len(lines) == len(verdicts(tmp_path)) == 80
  assert len({row.key for row in verdicts(tmp_path)}) == 80
  assert 80 <= len(server.requests) <= 80 + 3 * concurrency


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_keeps_what_was_answered(tmp_path, name):
  write(tmp_path, [response(n, f" answer {n}") for n in range(20)])

  def rule(request, number):
    answer = judge_server.prefer_longer(request, number)
    return dataclasses.replace(answer, hold_s=30.0 if number >= 12 else 0.0)

  with (
    judge_server.Server(rule) as server,
    script(tmp_path, server.url, "--config.concurrency=2") as child,
  ):
    server.wait_for(14)
    child.send_signal(signal.Signals[name])
    _, err = child.communicate(timeout=30)
  assert child.returncode == 128 + signal.Signals[name]
  assert f"error: stopped by {name}" in err
  assert "Traceback" not in err
  assert len(verdicts(tmp_path)) == 12
  assert sorted(os.listdir(tmp_path / "verdicts")) == [
    "controls.jsonl",
    "dpo.jsonl",
    "judge.json",
  ]


def test_a_server_that_is_not_there_is_code_1_with_the_cause(tmp_path):
  write(tmp_path, [response(0)])
  # A port that was free a moment ago: nobody listens there.
  with judge_server.Server(judge_server.prefer_longer) as server:
    url = server.url
  with script(tmp_path, url, "--config.server.max_retries=0") as child:
    out, err = child.communicate(timeout=60)
  assert child.returncode == 1, err
  assert "INCOMPLETE: 2 of 2 verdicts are missing (2: connection failed" in out
  assert f"no verdict was read from {url}" in err
  assert "Traceback" not in err


def test_a_second_judge_is_refused(tmp_path):
  write(tmp_path, [response(n, f" answer {n}") for n in range(4)])

  def rule(request, number):
    answer = judge_server.prefer_longer(request, number)
    return dataclasses.replace(answer, hold_s=30.0 if number else 0.0)

  with (
    judge_server.Server(rule) as server,
    script(tmp_path, server.url, "--config.concurrency=2") as first,
  ):
    server.wait_for(3)
    with script(tmp_path, server.url) as second:
      _, err = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"is held by pid {first.pid} on" in err
    assert "Traceback" not in err
    first.kill()
    first.communicate()
    # Two were in flight when it was killed; the second judge asked nothing.
    assert len(server.requests) == 3
  assert len(verdicts(tmp_path)) == 1


def test_the_script_says_what_it_did_and_resumes(tmp_path):
  write(tmp_path, [response(0), response(1, " Same.", " Same.")])
  with judge_server.Server(judge_server.prefer_longer) as server:
    with script(tmp_path, server.url) as child:
      out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "2 questions asked; verdicts: 2 model, 2 tie" in out
    assert "judge Qwen" in err
    with script(tmp_path, server.url) as child:
      out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert "0 questions asked; verdicts: 2 model, 2 tie" in out


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.concurrency=0", "concurrency=0 must be at least 1"),
    ("--config.orders=twice", "orders='twice'"),
    ("--config.server.template=none.txt", "template='none.txt': No such file"),
    ("--config.server.api_key_env=UNSET_KEY", "UNSET_KEY is not set"),
    ("--config.kind=oracle", "kind='oracle'"),
  ],
)
def test_the_script_refuses_bad_settings(tmp_path, flag, message):
  write(tmp_path, [response(0)])
  with script(tmp_path, "http://127.0.0.1:9/v1", flag) as child:
    _, err = child.communicate(timeout=60)
  assert child.returncode == 2, err
  assert message in err
  assert "Traceback" not in err
