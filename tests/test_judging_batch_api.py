"""Judging through the Batch API: nothing is created or paid for twice."""

import json
import os
import signal

import judge_server
import pytest
from test_judging_budget import DEAR, says_using
from test_judging_client import KEY, NOWHERE
from test_judging_runner import (
  judge_with,
  ledger,
  response,
  responses,
  verdicts,
  write,
)
from test_judging_script import same_judge, script

from dpo_jax import judging
from dpo_jax.judging import runner


def serve(ends="completed", rule=judge_server.prefer_longer):
  return judge_server.Server(rule, batch_script=ends)


def batches(server, **changes):
  return judge_with(server, mode="batch", **changes)


def files(tmp_path) -> list[str]:
  return sorted(os.listdir(tmp_path / "verdicts" / "batches"))


def test_a_batch_is_uploaded_polled_and_collected(tmp_path):
  write(tmp_path, responses(5))
  with serve() as server:
    summary = runner.run(batches(server), tmp_path)
    (made,) = server.batches.made
    # Requests and rows are those of live mode.
    rows = {row.unit: row for row in verdicts(tmp_path)}
    (tmp_path / "verdicts" / "dpo.jsonl").unlink()
    runner.run(judge_with(server), tmp_path)
  assert summary.outcomes == {"model": 10}
  assert summary.complete
  assert made["shown"]["completion_window"] == "24h"
  assert made["shown"]["endpoint"] == "/v1/chat/completions"
  batch, live = server.requests[:10], server.requests[10:]
  assert {r.prompt: r.body for r in batch} == {r.prompt: r.body for r in live}
  assert rows == {row.unit: row for row in verdicts(tmp_path)}
  assert files(tmp_path) == []


@pytest.mark.parametrize(
  ("ends", "made"),
  [
    ("half completed", 2),
    ("expired errors completed", 3),
    ("failed half half completed", 4),
  ],
)
def test_what_expired_or_failed_is_sent_again(tmp_path, ends, made):
  write(tmp_path, responses(5))
  with serve(ends) as server:
    summary = runner.run(batches(server, max_retries=9), tmp_path)
    assert len(server.batches.made) == made
    assert len(server.requests) == 10
  assert summary.complete
  assert len(verdicts(tmp_path)) == 10


@pytest.mark.parametrize(
  ("end", "cause"),
  [
    ("expired", "came too late"),
    ("errors", "HTTP 500: no"),
    ("failed", "batch failed: the batch is refused"),
  ],
)
def test_what_fails_for_ever_is_missing_with_its_cause(tmp_path, end, cause):
  write(tmp_path, [response(0)])
  with serve(end) as server, pytest.raises(judging.Stop, match="no verdict"):
    runner.run(batches(server, max_retries=2), tmp_path)
  assert len(server.batches.made) == 3
  assert [row.error for row in verdicts(tmp_path)] == [cause, cause]


@pytest.mark.parametrize(
  ("reply", "outcome"),
  [
    (judge_server.fails(400, "no", code="content_filter"), "2 refusal"),
    (
      judge_server.fails(400, "'temperature' is not supported"),
      "set server.omit",
    ),
    (judge_server.Reply(body=b'{"error": {"message": "upset"}}'), "2: upset"),
  ],
)
def test_an_error_of_a_line_is_read_as_in_live_mode(
  tmp_path, capsys, reply, outcome
):
  write(tmp_path, [response(0)])
  with serve(rule=judge_server.in_turn(reply)) as server:
    try:
      runner.run(batches(server, max_retries=0, omit=("max_tokens",)), tmp_path)
    except judging.Stop as error:
      print(error)
    assert outcome in capsys.readouterr().out
    assert "max_tokens" not in server.requests[0].body


def test_an_unreadable_reply_is_asked_for_once_more(tmp_path):
  write(tmp_path, [response(0)])
  # The first attempt is garbage in both orders, the second in one.
  garbage = judge_server.says("Lorem ipsum, dolor sit amet.")
  rule = judge_server.in_turn(*[garbage] * 3, judge_server.prefer_longer)
  with serve(rule=rule) as server:
    summary = runner.run(batches(server), tmp_path)
    assert len(server.requests) == len({r.prompt for r in server.requests}) == 4
  assert sorted(summary.outcomes) == ["missing", "model"]


def test_trouble_with_the_endpoints_is_borne(tmp_path):
  write(tmp_path, responses(3))
  with serve() as server:
    server.batches.trouble = [
      judge_server.fails(500),
      judge_server.fails(429, retry_after_ms="5"),
    ]
    assert runner.run(batches(server, max_retries=3), tmp_path).complete
    assert len(server.batches.made) == 1
    assert len(server.batches.files) == 2


def test_a_bad_key_stops_and_leaves_a_record_without_it(tmp_path, monkeypatch):
  monkeypatch.setenv("JKEY", KEY)
  write(tmp_path, [response(0)])
  with serve() as server:
    server.batches.trouble = [judge_server.fails(401, f"wrong key {KEY}")]
    used = batches(server, api_key_env="JKEY")
    with pytest.raises(judging.Stop, match=r"401.*check the key in JKEY"):
      runner.run(used, tmp_path)
    (name,) = files(tmp_path)
    for path in tmp_path.rglob("*"):
      assert path.is_dir() or KEY.encode() not in path.read_bytes()
    with pytest.raises(ValueError, match="of another judge, 'judge-as-asked'"):
      runner.run(batches(NOWHERE, model="other"), tmp_path)
    # The same judge continues with the record.
    assert runner.run(used, tmp_path).complete
    assert len(server.batches.made) == 1
  (tmp_path / "verdicts" / "batches" / name).write_text('{"mark": 1}')
  with pytest.raises(ValueError, match=rf"{name}: not the record of a batch"):
    runner.run(batches(NOWHERE), tmp_path)


def test_the_budget_holds_for_batches(tmp_path):
  write(tmp_path, responses(10))
  with serve(rule=judge_server.in_turn(says_using(100, 20))) as server:
    used = {"prices": DEAR}
    summary = runner.run(batches(server, budget_usd=1500.0, **used), tmp_path)
    # Half of 100 + 2 * 20 dollars each.
    assert ledger(tmp_path)["cost"] == pytest.approx(70 * summary.asked)
    assert len(server.requests) == summary.asked
    assert 0 < summary.asked < 20
    assert 70 * summary.asked <= 1500
    assert summary.not_dispatched == 20 - summary.asked
    more = runner.run(batches(server, budget_usd=1e6, **used), tmp_path)
    assert more.complete
    assert len(server.requests) == 20
  assert ledger(tmp_path)["cost"] == pytest.approx(1400)


def recorded(tmp_path) -> bool:
  """Whether the id of a batch is on disk."""
  return any(
    json.loads(path.read_text())["batch_id"]
    for path in (tmp_path / "verdicts" / "batches").glob("[!.]*.json")
  )


def test_a_killed_run_collects_the_batch_that_it_created(tmp_path):
  """Killed while it waits: nothing is uploaded, created or paid for again."""
  write(tmp_path, responses(6))
  flags = ("--config.server.mode=batch", "--config.server.batch_poll_s=0.01")
  with serve("hang") as server:
    with script(tmp_path, server.url, *flags) as child:
      while not recorded(tmp_path):
        assert child.poll() is None, child.stderr.read()
      child.send_signal(signal.SIGKILL)
    # The batch ends while nobody polls it.
    server.batches.finish(0, "completed")
    assert runner.run(same_judge(server, mode="batch"), tmp_path).complete
    assert len(server.batches.made) == 1
    assert len(server.requests) == 12
  assert len(verdicts(tmp_path)) == 12
  lines = (tmp_path / "verdicts" / "dpo.jsonl").read_bytes().splitlines()
  assert len(lines) == 12


def test_a_batch_whose_id_was_never_recorded_is_found_again(tmp_path):
  """Killed by the reply to its creation."""
  write(tmp_path, [response(0)])
  with serve() as server:
    make = server.batches._make

    def make_and_kill(body):
      reply = make(body)
      os.kill(child.pid, signal.SIGKILL)
      return reply

    server.batches._make = make_and_kill
    with script(tmp_path, server.url, "--config.server.mode=batch") as child:
      child.wait(timeout=60)
    assert not recorded(tmp_path)
    assert runner.run(same_judge(server, mode="batch"), tmp_path).complete
    assert len(server.batches.made) == 1
    assert len(server.requests) == 2
