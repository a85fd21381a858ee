"""Whole runs against a local server and by rewards: what is asked and kept."""

import asyncio
import collections
import dataclasses
import json
import os
import signal
import threading

import judge_server
import pytest
from judged import PROMPT, call, response
from test_judging_client import KEY, NOWHERE, in_turn, settings

from dpo_jax import judging
from dpo_jax.demo import world as world_lib
from dpo_jax.io import hashing, jsonl, locks, records
from dpo_jax.judging import questions, runner

NO_CONTROLS = questions.ControlSettings(aa=0, gold=0, retests=0)
ORACLE = runner.JudgeSettings(
  "oracle", "both", 0, 8, "verdicts", NO_CONTROLS, None
)
GARBAGE = judge_server.says("Hm.")


def responses(count) -> list[records.Response]:
  """On equal prompts, with texts of their own."""
  return [response(n, f" answer {n}") for n in range(count)]


def write(workdir, rows, name="dpo.jsonl"):
  path = workdir / "responses" / name
  path.unlink(missing_ok=True)
  with jsonl.Store(path, records.Response) as store:
    store.append_many(rows)


def judge_with(
  server,
  *,
  orders="both",
  seed=0,
  concurrency=8,
  verdicts="verdicts",
  control=NO_CONTROLS,
  **changes,
) -> runner.JudgeSettings:
  return runner.JudgeSettings(
    kind="server",
    orders=orders,
    seed=seed,
    concurrency=concurrency,
    verdicts=verdicts,
    controls=control,
    server=settings(getattr(server, "url", server), **changes),
  )


def verdicts(
  workdir, name="dpo.jsonl", directory="verdicts"
) -> list[records.Verdict]:
  return records.read(workdir / directory / name, records.Verdict)


def ledger(workdir) -> dict:
  return json.loads((workdir / "verdicts" / "judge.json").read_text())


# --- notebooks


def in_a_running_loop(call):
  """As in a notebook, whose own loop runs the cells."""

  async def cell():
    return call()

  # An interrupt must reach the cell, not the loop's own handler.
  loop = asyncio.new_event_loop()
  try:
    return loop.run_until_complete(cell())
  finally:
    loop.close()


def test_judges_from_a_notebook_until_it_is_interrupted(tmp_path, monkeypatch):
  write(tmp_path, [response(0)])
  found = in_a_running_loop(
    lambda: runner.run(dataclasses.replace(ORACLE, kind="length"), tmp_path)
  )
  assert found.outcomes == {"model": 2}
  with pytest.raises(ValueError, match="responses"):
    in_a_running_loop(lambda: runner.run(ORACLE, tmp_path / "nothing"))
  ended = []

  async def endless(*unused):
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    try:
      await asyncio.Event().wait()
    finally:
      ended.append(True)

  monkeypatch.setattr(runner, "_run", endless)
  # Many turns, so that it meets the waiting thread in many places.
  for turn in range(1, 51):
    with pytest.raises(KeyboardInterrupt):
      in_a_running_loop(lambda: runner.run(ORACLE, tmp_path))
    assert ended == [True] * turn
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- orders and rows


def test_both_orders_are_asked_and_read_back(tmp_path):
  """A judge that prefers the first slot, and one that prefers longer texts."""
  write(tmp_path, [response(0), response(1, " s", " the longer one")])
  with judge_server.Server(judge_server.always("A")) as server:
    summary = runner.run(judge_with(server), tmp_path)
  assert summary.outcomes == {"model": 2, "chosen": 2}
  assert {(row.order, row.verdict) for row in verdicts(tmp_path)} == {
    ("model_first", "model"),
    ("chosen_first", "chosen"),
  }
  with judge_server.Server(judge_server.prefer_longer) as server:
    longer = judge_with(
      server, model="longer", verdicts="verdicts-longer", top_logprobs=2
    )
    assert runner.run(longer, tmp_path).asked == 4
  rows = verdicts(tmp_path, directory="verdicts-longer")
  assert {(row.prompt_id, row.order): row.verdict for row in rows} == {
    ("p0", "model_first"): "model",
    ("p0", "chosen_first"): "model",
    ("p1", "model_first"): "chosen",
    ("p1", "chosen_first"): "chosen",
  }
  # The server gives nine tenths to the longer text.
  scores = {row.prompt_id: row.score for row in rows}
  assert scores == {"p0": pytest.approx(0.9), "p1": pytest.approx(0.1)}
  row = next(r for r in rows if r.unit[0] == "p0" and "model_f" in r.order)
  assert row.prompt_tokens > 250
  assert row == call(
    "model",
    "p0",
    score=row.score,
    key=row.key,
    judge="longer",
    judge_returned="judge-as-served",
    judge_fingerprint="fp_fake",
    template_hash=row.template_hash,
    response_chars=15,
    chosen_chars=6,
    prompt_tokens=row.prompt_tokens,
    completion_tokens=11,
    raw="Comparison: one is better.\nMore helpful: A",
  )


def test_the_random_order_is_seeded_and_shared_by_models(tmp_path):
  for model in ("sft", "dpo"):
    rows = [response(n, f" {model} {n}", model=model) for n in range(40)]
    write(tmp_path, rows, f"{model}.jsonl")
  used = dataclasses.replace(ORACLE, kind="length", orders="random")
  assert runner.run(used, tmp_path).asked == 80
  orders = {
    model: {r.prompt_id: r.order for r in verdicts(tmp_path, f"{model}.jsonl")}
    for model in ("sft", "dpo")
  }
  assert orders["sft"] == orders["dpo"]
  # 40 fair coins: 7 or fewer of a side has a chance of 2 in 100,000.
  assert min(collections.Counter(orders["dpo"].values()).values()) > 7
  # Another seed turns some round, and asks for these only.
  assert 0 < runner.run(dataclasses.replace(used, seed=1), tmp_path).asked < 80


def test_empty_references_identical_texts_and_empty_responses(tmp_path):
  rows = [
    response(0, chosen=" \n"),
    response(1, " Same. ", " Same."),
    response(2, "", " reference"),
  ]
  write(tmp_path, rows)
  with judge_server.Server(judge_server.prefer_longer) as server:
    # One at a time: two in flight may arrive in either order.
    used = judge_with(server, concurrency=1)
    summary = runner.run(used, tmp_path)
    again = runner.run(used, tmp_path)
  assert (summary.responses, summary.judged, summary.asked) == (3, 2, 2)
  assert [request.texts[1:] for request in server.requests] == [
    ("", " reference"),
    (" reference", ""),
  ]
  outcomes = {(r.prompt_id, r.order): r.verdict for r in verdicts(tmp_path)}
  assert outcomes == {
    ("p1", "model_first"): "tie",
    ("p1", "chosen_first"): "tie",
    ("p2", "model_first"): "chosen",
    ("p2", "chosen_first"): "chosen",
  }
  assert again == dataclasses.replace(summary, asked=0)
  assert "1 responses not judged" in str(summary)
  write(tmp_path, [response(0, chosen="")])
  (tmp_path / "verdicts" / "dpo.jsonl").unlink()
  assert "verdicts: none" in str(runner.run(used, tmp_path))


def test_judge_json_has_what_the_rows_cannot(tmp_path):
  write(tmp_path, [response(1), response(0), response(2, chosen=" ")])
  seen = []

  def rule(request, number):
    seen.append(ledger(tmp_path))
    return judge_server.prefer_longer(request, number)

  with judge_server.Server(rule) as server:
    used = judge_with(server, temperature=0.5)
    runner.run(used, tmp_path)
    # Both prompts are one question in each order.
    assert (seen[0]["complete"], seen[0]["not_dispatched"]) == (False, 4)
    kept, rows = ledger(tmp_path), verdicts(tmp_path)
    texts = [t for n in (0, 1) for t in (f"p{n}", PROMPT, " short")]
    assert kept["data_fingerprint"] == hashing.content_hash(*texts)
    assert kept["judge"] == "judge-as-asked"
    assert kept["template"] == "dialogue"
    assert kept["template_hash"] == rows[0].template_hash
    assert json.loads(kept["parameters"])["temperature"] == 0.5
    assert (kept["complete"], kept["missing"], kept["calls"]) == (True, 0, 2)
    assert kept["prompt_tokens"] == sum(row.prompt_tokens for row in rows)
    assert kept["completion_tokens"] == 22
    server.rule = judge_server.in_turn(GARBAGE)
    write(tmp_path, [response(0), response(1, " new")])
    runner.run(used, tmp_path)
  kept = ledger(tmp_path)
  assert (kept["complete"], kept["missing"]) == (False, 2)
  assert kept["calls"] == 2 + 4


# --- resuming


def test_a_rerun_asks_only_what_is_new_or_changed(tmp_path, capsys):
  rows = responses(6)
  write(tmp_path, rows)
  with judge_server.Server(judge_server.prefer_longer) as server:
    runner.run(judge_with(server), tmp_path)
    assert "12 questions asked; verdicts: 12 model" in capsys.readouterr().out
    before = (tmp_path / "verdicts" / "dpo.jsonl").read_bytes()
    runner.run(judge_with(server), tmp_path)
    assert "0 questions asked; verdicts: 12 model" in capsys.readouterr().out
    assert (tmp_path / "verdicts" / "dpo.jsonl").read_bytes() == before
    rows[2] = response(2, " edited")
    write(tmp_path, [*rows, response(6)])
    summary = runner.run(judge_with(server), tmp_path)
  assert summary.asked == 4
  assert {request.texts[1:] for request in server.requests[12:]} == {
    (" edited", " short"),
    (" short", " edited"),
    (" longer than it", " short"),
    (" short", " longer than it"),
  }
  assert summary.outcomes == {"model": 14}
  assert len({row.key for row in verdicts(tmp_path)}) == 14


def test_equal_questions_are_asked_once(tmp_path):
  """Two models with equal responses, and two samples of one of them."""
  write(tmp_path, [response(0), response(0, sample_id=1)])
  write(tmp_path, [response(0, model="sft")], "sft.jsonl")
  with judge_server.Server(judge_server.prefer_longer) as server:
    assert runner.run(judge_with(server), tmp_path).asked == 2
    # A later response with the same text takes the verdict on disk.
    write(tmp_path, [response(0, model="base")], "base.jsonl")
    assert runner.run(judge_with(server), tmp_path).asked == 0
    assert len(server.requests) == 2
  names = [f"{model}.jsonl" for model in ("dpo", "sft", "base")]
  rows = [row for name in names for row in verdicts(tmp_path, name)]
  assert len(rows) == len({row.unit for row in rows}) == 8
  assert {row.verdict for row in rows} == {"model"}
  assert len({row.key for row in rows}) == 2


@pytest.mark.parametrize("edited", [False, True])
def test_another_judge_in_one_directory_is_refused_before_it_is_paid(
  edited, tmp_path
):
  """A judge of another name, or an edited template."""
  write(tmp_path, responses(2))
  path = tmp_path / "template.txt"
  path.write_text("{prompt}{first}{second}")
  with judge_server.Server(judge_server.prefer_longer) as server:
    used = judge_with(server, template=str(path))
    runner.run(used, tmp_path)
    assert runner.run(used, tmp_path).asked == 0
    if edited:
      path.write_text("{prompt}{first}{second}.")
    else:
      used = judge_with(server, template=str(path), model="m2")
    for call in (runner.run, runner.estimate):
      with pytest.raises(
        ValueError, match=r"verdicts of judge .* on template.*verdicts-NAME"
      ):
        call(used, tmp_path)
    assert len(server.requests) == 4
    apart = dataclasses.replace(used, verdicts="verdicts-other")
    assert runner.run(apart, tmp_path).outcomes == {"model": 4}


def test_a_judge_without_a_verdict_fails_and_may_be_replaced(tmp_path, capsys):
  write(tmp_path, responses(2))
  with judge_server.Server(judge_server.in_turn(GARBAGE)) as server:
    message = f"no verdict was read from {server.url}"
    with pytest.raises(judging.Stop, match=message):
      runner.run(judge_with(server), tmp_path)
    out = capsys.readouterr().out
    assert "INCOMPLETE: 4 of 4 verdicts are missing" in out
    assert "(4: no verdict in the reply)" in out
  with pytest.raises(judging.Stop, match="no verdict was read"):
    runner.run(judge_with(NOWHERE, max_retries=0), tmp_path)
  assert "connection failed" in capsys.readouterr().out
  with judge_server.Server(judge_server.prefer_longer) as server:
    found = runner.run(judge_with(server, model="m2"), tmp_path)
  assert found.outcomes == {"model": 4}


def test_missing_verdicts_are_reported_and_asked_again(tmp_path):
  write(tmp_path, responses(3))

  def rule(request, number):
    bad = " answer 1" in request.texts[1:]
    return GARBAGE if bad else judge_server.prefer_longer(request, number)

  with judge_server.Server(rule) as server:
    summary = runner.run(judge_with(server), tmp_path)
    assert summary.outcomes == {"missing": 2, "model": 4}
    assert "INCOMPLETE: 2 of 6 verdicts" in str(summary)
    missing = [r for r in verdicts(tmp_path) if r.verdict == "missing"]
    assert {(r.raw, r.error) for r in missing} == {
      ("Hm.", "no verdict in the reply")
    }
    server.rule = judge_server.prefer_longer
    before = len(server.requests)
    summary = runner.run(judge_with(server), tmp_path)
    assert len(server.requests) - before == 2
  assert summary.outcomes == {"model": 6}
  assert "INCOMPLETE" not in str(summary)
  # The file keeps the failed calls; reading it gives one row a unit.
  path = tmp_path / "verdicts" / "dpo.jsonl"
  assert path.read_bytes().count(b"\n") == 8
  assert len(verdicts(tmp_path)) == 6


def test_a_judges_escapes_are_not_printed_raw(tmp_path, capsys):
  write(tmp_path, [response(0)])
  rude = judge_server.fails(400, "\x1b]0;title\x07\x1b[2J")
  with (
    judge_server.Server(judge_server.in_turn(rude)) as server,
    pytest.raises(judging.Stop),
  ):
    runner.run(judge_with(server), tmp_path)
  assert r"HTTP 400: \x1b]0;title\x07" in (out := capsys.readouterr().out)
  assert "\x1b" not in out


def test_refusals_are_kept_and_not_asked_again(tmp_path):
  write(tmp_path, [response(0)])
  with judge_server.Server(in_turn("refusal")) as server:
    assert runner.run(judge_with(server), tmp_path).outcomes == {"refusal": 2}
    assert runner.run(judge_with(server), tmp_path).asked == 0


def test_no_more_than_concurrency_in_flight(tmp_path):
  write(tmp_path, responses(10))
  rule = judge_server.held(after=0, seconds=0.02)
  with judge_server.Server(rule) as server:
    runner.run(judge_with(server, concurrency=3), tmp_path)
  assert server.most_in_flight == 3


def test_a_second_judge_is_refused(tmp_path):
  write(tmp_path, responses(2))
  path = tmp_path / "verdicts" / "dpo.jsonl"
  with (
    judge_server.Server(judge_server.prefer_longer) as server,
    jsonl.Store(path, records.Verdict),
  ):
    with pytest.raises(locks.Held, match=f"is held by pid {os.getpid()} on"):
      runner.run(judge_with(server), tmp_path)
    assert server.requests == []


@pytest.mark.parametrize("status", [301, 307])
@pytest.mark.parametrize("mode", ["live", "batch"])
def test_a_redirect_is_refused(status, mode, tmp_path, monkeypatch):
  """Followed, it would take the key and the texts to another host."""
  monkeypatch.setenv("JKEY", KEY)
  write(tmp_path, [response()])
  with judge_server.Server(judge_server.prefer_longer) as elsewhere:
    moved = judge_server.fails(status, "moved", location=elsewhere.url)
    with judge_server.Server(judge_server.in_turn(moved)) as server:
      server.batches.trouble = [moved]
      used = judge_with(server, api_key_env="JKEY", mode=mode)
      with pytest.raises(judging.Stop, match=f"{status}.*{elsewhere.url}"):
        runner.run(used, tmp_path)
    assert not elsewhere.requests
    assert not elsewhere.batches.files
  assert verdicts(tmp_path) == []


def test_a_bad_key_stops_and_keeps_the_verdicts_so_far(tmp_path, monkeypatch):
  monkeypatch.setenv("JKEY", KEY)
  write(tmp_path, responses(30))
  bad = judge_server.fails(401, f"Incorrect API key: {KEY}")
  rule = judge_server.in_turn(*[judge_server.prefer_longer] * 10, bad)
  with judge_server.Server(rule) as server:
    used = judge_with(server, concurrency=4, api_key_env="JKEY")
    with pytest.raises(judging.Stop, match=r"HTTP 401.*check the key in JKEY"):
      runner.run(used, tmp_path)
    assert len(server.requests) <= 14
    # At the eleventh question at most three others were open.
    assert 7 <= len(verdicts(tmp_path)) <= 10
    server.rule = judge_server.prefer_longer
    before = len(verdicts(tmp_path))
    assert runner.run(used, tmp_path).asked == 60 - before
  for path in tmp_path.rglob("*"):
    assert path.is_dir() or KEY.encode() not in path.read_bytes()


# --- refused inputs


def test_nothing_to_judge(tmp_path):
  with pytest.raises(ValueError, match=r"no responses.*sample\.py"):
    runner.run(ORACLE, tmp_path)
  write(tmp_path, [])
  with pytest.raises(ValueError, match="no responses"):
    runner.run(ORACLE, tmp_path)
  assert os.listdir(tmp_path) == ["responses"]


def test_responses_and_verdicts_that_do_not_fit_are_refused(tmp_path):
  write(tmp_path, [response(0, " Same.", " Same."), response(1, chosen="")])
  runner.run(ORACLE, tmp_path)
  write(tmp_path, [response(1, " other")], "more.jsonl")
  with pytest.raises(ValueError, match=r"more\.jsonl: .*'p1'.*dpo\.jsonl"):
    runner.run(ORACLE, tmp_path)
  (tmp_path / "responses" / "dpo.jsonl").unlink()
  with pytest.raises(ValueError, match=r"not in responses/dpo\.jsonl.*'p0'"):
    runner.run(ORACLE, tmp_path)
  write(tmp_path, [response(0)], "controls.jsonl")
  with pytest.raises(ValueError, match="rename it"):
    runner.run(ORACLE, tmp_path)


def test_a_reward_has_no_server_and_a_server_has_settings():
  with pytest.raises(ValueError, match="kind='server' with server=None"):
    dataclasses.replace(ORACLE, kind="server")
  with pytest.raises(ValueError, match="kind='oracle'"):
    dataclasses.replace(judge_with(NOWHERE), kind="oracle")


# --- rewards


def world_rows(count: int) -> list[records.Response]:
  rows = []
  world = world_lib.generate(0, pretrain=0, train=0, test=count)
  for number, pair in enumerate(world.test):
    prompt, marker, chosen = pair["chosen"].rpartition("\n\nAssistant:")
    rejected = pair["rejected"].removeprefix(prompt + marker)
    rows.append(response(number, rejected, chosen, prompt=prompt + marker))
  return rows


def test_the_oracle_prefers_the_higher_reward_in_either_order(tmp_path):
  rows = world_rows(60)
  write(tmp_path, rows)
  summary = runner.run(ORACLE, tmp_path)
  found = {(row.prompt_id, row.order): row for row in verdicts(tmp_path)}
  assert len(found) == 120
  for row in rows:
    margin = world_lib.reward(row.prompt, row.response) - world_lib.reward(
      row.prompt, row.chosen
    )
    expected = "model" if margin > 0 else "chosen" if margin < 0 else "tie"
    for order in questions.ORDERS:
      assert found[row.prompt_id, order].verdict == expected
  assert set(summary.outcomes) >= {"model", "chosen"}
  assert summary.missing == 0
  assert runner.run(ORACLE, tmp_path).asked == 0


def test_a_prompt_of_another_world_ends_an_oracle_run(tmp_path):
  rows = [*world_rows(3), response(9)]
  write(tmp_path, rows)
  with pytest.raises(ValueError, match="hi") as caught:
    runner.run(dataclasses.replace(ORACLE, concurrency=1), tmp_path)
  assert not isinstance(caught.value, ExceptionGroup)
  # Six questions were judged before the seventh could not be.
  assert len(verdicts(tmp_path)) == 6
