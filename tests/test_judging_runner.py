import asyncio
import collections
import dataclasses
import json
import os
import signal
import sys
import threading

import judge_server
import pytest
from test_judging_client import KEY, settings

from dpo_jax import judging
from dpo_jax.demo import world as world_lib
from dpo_jax.io import hashing, jsonl, records
from dpo_jax.judging import controls, questions, rewards, runner

PROMPT = "\n\nHuman: hi\n\nAssistant:"


def response(number=0, text=" longer than it", chosen=" short", **changes):
  row = records.Response(
    prompt_id=f"p{number}",
    prompt=PROMPT,
    response=text,
    chosen=chosen,
    model="dpo",
    step=None,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_new_tokens=8,
    seed=0,
    sample_id=0,
    token_count=3,
    finish_reason="eos",
  )
  return dataclasses.replace(row, **changes)


def write(workdir, rows, name="dpo.jsonl"):
  path = workdir / "responses" / name
  path.unlink(missing_ok=True)
  with jsonl.Store(path, records.Response) as store:
    store.append_many(rows)


NO_CONTROLS = controls.ControlSettings(aa=0, gold=0, retests=0)


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
    server=settings(server.url, **changes),
  )


ORACLE = runner.JudgeSettings(
  "oracle", "both", 0, 8, "verdicts", NO_CONTROLS, None
)


def verdicts(
  workdir, name="dpo.jsonl", directory="verdicts"
) -> list[records.Verdict]:
  return records.read(workdir / directory / name, records.Verdict)


def in_a_running_loop(call):
  """What a notebook does: a loop of its own runs the cells."""

  async def cell():
    return call()

  loop = asyncio.new_event_loop()
  try:
    return loop.run_until_complete(cell())
  finally:
    loop.close()


def test_judges_from_a_notebook(tmp_path):
  write(tmp_path, [response(0), response(1, " s", " the longer one")])
  with judge_server.Server(judge_server.prefer_longer) as server:
    judge = judge_with(server)
    found = in_a_running_loop(lambda: runner.run(judge, tmp_path))
  assert found.outcomes == {"model": 2, "chosen": 2}
  assert len(verdicts(tmp_path)) == 4
  with pytest.raises(ValueError, match="responses"):
    in_a_running_loop(lambda: runner.run(ORACLE, tmp_path / "nothing"))


@pytest.mark.parametrize("interval", [1e-6, 5e-3])
def test_a_notebooks_interrupt_ends_the_judging(
  interval, tmp_path, monkeypatch
):
  """Wherever it meets the thread that waits: many turns meet many places."""
  ended = []

  async def endless(*unused):
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    try:
      await asyncio.Event().wait()
    finally:
      ended.append(True)

  monkeypatch.setattr(runner, "_run", endless)
  usual = sys.getswitchinterval()
  sys.setswitchinterval(interval)
  try:
    for turn in range(1, 101):
      with pytest.raises(KeyboardInterrupt):
        in_a_running_loop(lambda: runner.run(ORACLE, tmp_path))
      assert ended == [True] * turn
  finally:
    sys.setswitchinterval(usual)


def test_both_orders_are_asked_and_read_back(tmp_path):
  """A judge that likes the first slot, and one that likes the longer text."""
  write(tmp_path, [response(0), response(1, " s", " the longer one")])
  first_slot = judge_server.says("Comparison: x.\nMore helpful: A")
  with judge_server.Server(lambda request, n: first_slot) as server:
    summary = runner.run(judge_with(server), tmp_path)
  assert summary.outcomes == {"model": 2, "chosen": 2}
  assert {(row.order, row.verdict) for row in verdicts(tmp_path)} == {
    ("model_first", "model"),
    ("chosen_first", "chosen"),
  }
  with judge_server.Server(judge_server.prefer_longer) as server:
    named = judge_with(server, model="longer", verdicts="verdicts-longer")
    summary = runner.run(named, tmp_path)
  assert summary.asked == 4
  rows = verdicts(tmp_path, directory="verdicts-longer")
  assert {(row.prompt_id, row.order): row.verdict for row in rows} == {
    ("p0", "model_first"): "model",
    ("p0", "chosen_first"): "model",
    ("p1", "model_first"): "chosen",
    ("p1", "chosen_first"): "chosen",
  }
  row = next(r for r in rows if r.unit[0] == "p0" and "model_f" in r.order)
  assert row.prompt_tokens > 250
  assert row.completion_tokens == 11
  assert dataclasses.replace(
    row, key="", template_hash="", prompt_tokens=0, completion_tokens=0
  ) == records.Verdict(
    key="",
    prompt_id="p0",
    model="dpo",
    step=None,
    temperature=1.0,
    sample_id=0,
    order="model_first",
    control="",
    verdict="model",
    score=None,
    judge="longer",
    judge_returned="judge-as-served",
    judge_fingerprint="fp_fake",
    template_hash="",
    response_chars=15,
    chosen_chars=6,
    prompt_tokens=0,
    completion_tokens=0,
    raw="Comparison: one is better.\nMore helpful: A",
    error="",
  )


def test_the_random_order_is_seeded_and_shared_by_models(tmp_path):
  numbers = range(40)
  for model in ("sft", "dpo"):
    rows = [response(n, f" {model} {n}", model=model) for n in numbers]
    write(tmp_path, rows, f"{model}.jsonl")
  with judge_server.Server(judge_server.prefer_longer) as server:
    runner.run(judge_with(server, orders="random"), tmp_path)
    assert len(server.requests) == 80
    orders = {
      model: {
        r.prompt_id: r.order for r in verdicts(tmp_path, f"{model}.jsonl")
      }
      for model in ("sft", "dpo")
    }
    assert orders["sft"] == orders["dpo"]
    # 40 fair coins: 7 or fewer of a side has a chance of 2 in 100,000.
    assert min(collections.Counter(orders["dpo"].values()).values()) > 7
    # Another seed turns some round, and asks for these only.
    summary = runner.run(judge_with(server, orders="random", seed=1), tmp_path)
  assert 0 < summary.asked < 80
  assert len(server.requests) == 80 + summary.asked


def test_empty_references_identical_texts_and_empty_responses(tmp_path):
  write(
    tmp_path,
    [
      response(0, chosen=" \n"),
      response(1, " Same. ", " Same."),
      response(2, "", " reference"),
    ],
  )
  with judge_server.Server(judge_server.prefer_longer) as server:
    # One at a time: two in flight may arrive in either order.
    used = judge_with(server, concurrency=1)
    summary = runner.run(used, tmp_path)
    again = runner.run(used, tmp_path)
  assert (summary.responses, summary.judged) == (3, 2)
  assert (summary.asked, summary.identical) == (2, 2)
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
  assert "2 ties without a call" in str(summary)
  assert "1 responses not judged" in str(summary)


def test_a_rerun_asks_only_what_is_new_or_changed(tmp_path):
  rows = [response(n, f" answer {n}") for n in range(6)]
  write(tmp_path, rows)
  with judge_server.Server(judge_server.prefer_longer) as server:
    runner.run(judge_with(server), tmp_path)
    before = (tmp_path / "verdicts" / "dpo.jsonl").read_bytes()
    assert runner.run(judge_with(server), tmp_path).asked == 0
    assert (tmp_path / "verdicts" / "dpo.jsonl").read_bytes() == before
    rows[2] = response(2, " edited")
    write(tmp_path, [*rows, response(6)])
    summary = runner.run(judge_with(server), tmp_path)
  assert summary.asked == 4
  asked = {request.texts[1:] for request in server.requests[12:]}
  assert asked == {
    (" edited", " short"),
    (" short", " edited"),
    (" longer than it", " short"),
    (" short", " longer than it"),
  }
  assert summary.outcomes == {"model": 14}
  assert len({row.key for row in verdicts(tmp_path)}) == 14


def test_equal_questions_are_asked_once(tmp_path):
  """Two models that answer alike, and two samples of one of them."""
  write(tmp_path, [response(0), response(0, sample_id=1)])
  write(tmp_path, [response(0, model="sft")], "sft.jsonl")
  with judge_server.Server(judge_server.prefer_longer) as server:
    assert runner.run(judge_with(server), tmp_path).asked == 2
    # A later response with the same text takes the answer that is there.
    write(tmp_path, [response(0, model="base")], "base.jsonl")
    assert runner.run(judge_with(server), tmp_path).asked == 0
    assert len(server.requests) == 2
  rows = [
    row
    for name in ("dpo", "sft", "base")
    for row in verdicts(tmp_path, f"{name}.jsonl")
  ]
  assert len(rows) == 8
  assert len({row.unit for row in rows}) == 8
  assert {row.verdict for row in rows} == {"model"}
  assert len({row.key for row in rows}) == 2


def test_an_edited_template_is_another_one(tmp_path):
  write(tmp_path, [response(0)])
  path = tmp_path / "template.txt"
  path.write_text("{prompt}{first}{second}")
  with judge_server.Server(judge_server.prefer_longer) as server:
    used = judge_with(server, template=str(path))
    assert runner.run(used, tmp_path).asked == 2
    assert runner.run(used, tmp_path).asked == 0
    path.write_text("{prompt}{first}{second}.")
    with pytest.raises(ValueError, match=r"on template.*verdicts-NAME"):
      runner.run(used, tmp_path)
    apart = dataclasses.replace(used, verdicts="verdicts-2")
    assert runner.run(apart, tmp_path).asked == 2


@pytest.mark.parametrize("other", ["judge", "template"])
def test_another_judge_in_one_directory_is_refused_before_it_is_paid(
  other, tmp_path
):
  write(tmp_path, [response(0), response(1)])
  with judge_server.Server(judge_server.prefer_longer) as server:
    runner.run(judge_with(server), tmp_path)
    changes = {"judge": {"model": "m2"}, "template": {"template": "summary"}}
    changed = judge_with(server, **changes[other])
    asked = len(server.requests)
    for call in (runner.run, runner.estimate):
      with pytest.raises(
        ValueError, match=r"verdicts of judge .*verdicts-NAME"
      ):
        call(changed, tmp_path)
    assert len(server.requests) == asked
    # A directory of its own takes it.
    apart = dataclasses.replace(changed, verdicts="verdicts-other")
    assert runner.run(apart, tmp_path).outcomes == {"model": 4}


def test_a_judge_that_answered_nothing_may_be_replaced(tmp_path):
  write(tmp_path, [response(0), response(1)])
  garbage = judge_server.says("Hm.")
  with judge_server.Server(lambda request, number: garbage) as server:
    nothing = runner.run(judge_with(server), tmp_path)
    assert nothing.outcomes == {"missing": 4}
    assert nothing.nothing_read
    assert "(4: no verdict in the reply)" in str(nothing)
    server.rule = judge_server.prefer_longer
    found = runner.run(judge_with(server, model="m2"), tmp_path)
  assert found.outcomes == {"model": 4}
  assert not found.nothing_read


def test_missing_verdicts_are_reported_and_asked_again(tmp_path):
  write(tmp_path, [response(n, f" answer {n}") for n in range(3)])
  garbage = judge_server.says("Hm.")

  def rule(request, number):
    bad = " answer 1" in request.texts[1:]
    return garbage if bad else judge_server.prefer_longer(request, number)

  with judge_server.Server(rule) as server:
    summary = runner.run(judge_with(server), tmp_path)
    assert summary.outcomes == {"missing": 2, "model": 4}
    assert summary.missing == 2
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
  # The file keeps the failed calls; what is read of it is one row a unit.
  path = tmp_path / "verdicts" / "dpo.jsonl"
  assert path.read_bytes().count(b"\n") == 8
  assert len(verdicts(tmp_path)) == 6


def test_refusals_are_kept_and_not_asked_again(tmp_path):
  write(tmp_path, [response(0)])
  refusal = judge_server.says("I'm sorry, but I can't assist with that.")
  with judge_server.Server(lambda request, n: refusal) as server:
    summary = runner.run(judge_with(server), tmp_path)
    assert summary.outcomes == {"refusal": 2}
    assert runner.run(judge_with(server), tmp_path).asked == 0


def test_no_more_than_concurrency_in_flight(tmp_path):
  write(tmp_path, [response(n, f" answer {n}") for n in range(10)])

  def rule(request, number):
    answer = judge_server.prefer_longer(request, number)
    return dataclasses.replace(answer, hold_s=0.02)

  with judge_server.Server(rule) as server:
    runner.run(judge_with(server, concurrency=3), tmp_path)
  assert server.most_in_flight == 3


def test_a_bad_key_stops_and_keeps_what_was_answered(tmp_path, monkeypatch):
  monkeypatch.setenv("JKEY", KEY)
  write(tmp_path, [response(n, f" answer {n}") for n in range(30)])

  def rule(request, number):
    if number < 10:
      return judge_server.prefer_longer(request, number)
    return judge_server.fails(401, f"Incorrect API key: {KEY}")

  with judge_server.Server(rule) as server:
    used = judge_with(server, concurrency=4, api_key_env="JKEY")
    with pytest.raises(judging.Stop, match=r"HTTP 401.*check the key in JKEY"):
      runner.run(used, tmp_path)
    assert len(server.requests) <= 14
    # When the eleventh question was put, at most three others were open.
    assert 7 <= len(verdicts(tmp_path)) <= 10
    server.rule = judge_server.prefer_longer
    before = len(verdicts(tmp_path))
    assert runner.run(used, tmp_path).asked == 60 - before
  for path in tmp_path.rglob("*"):
    assert path.is_dir() or KEY.encode() not in path.read_bytes()


def test_nothing_to_judge(tmp_path):
  with pytest.raises(ValueError, match=r"no responses.*sample\.py"):
    runner.run(ORACLE, tmp_path)
  write(tmp_path, [])
  with pytest.raises(ValueError, match="no responses"):
    runner.run(ORACLE, tmp_path)
  assert os.listdir(tmp_path) == ["responses"]


def test_only_empty_references(tmp_path):
  write(tmp_path, [response(0, chosen="")])
  summary = runner.run(ORACLE, tmp_path)
  assert (summary.asked, summary.judged) == (0, 0)
  assert "verdicts: none" in str(summary)


def test_a_response_that_stands_twice_is_refused(tmp_path):
  write(tmp_path, [response(0)])
  write(tmp_path, [response(0, " other")], "more.jsonl")
  with pytest.raises(ValueError, match=r"more\.jsonl: .*'p0'.*dpo\.jsonl"):
    runner.run(ORACLE, tmp_path)


def test_verdicts_without_their_responses_are_refused(tmp_path):
  write(tmp_path, [response(0, " Same.", " Same."), response(1, chosen="")])
  runner.run(ORACLE, tmp_path)
  write(tmp_path, [response(1, chosen="")])
  with pytest.raises(ValueError, match=r"verdicts on responses.*'p0'"):
    runner.run(ORACLE, tmp_path)
  (tmp_path / "responses" / "dpo.jsonl").rename(
    tmp_path / "responses" / "sft.jsonl"
  )
  with pytest.raises(ValueError, match=r"not in responses/dpo\.jsonl"):
    runner.run(ORACLE, tmp_path)


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


def test_the_oracle_ties_on_equal_rewards_and_knows_its_world():
  (row,) = world_rows(1)
  judge = rewards.judge("oracle")
  # The reward reads words, so a newline after them changes nothing.
  twin = row.chosen + "\n"
  same = asyncio.run(judge.ask(judging.Question(row.prompt, row.chosen, twin)))
  assert same.choice == "tie"
  with pytest.raises(ValueError, match="hi"):
    asyncio.run(judge.ask(judging.Question(PROMPT, "a", "b")))


def test_length_prefers_the_longer_text_of_any_prompt(tmp_path):
  texts = [(" abc", " ab"), (" a", " ab"), (" ab", " cd")]
  write(tmp_path, [response(n, *pair) for n, pair in enumerate(texts)])
  used = dataclasses.replace(ORACLE, kind="length")
  assert runner.run(used, tmp_path).asked == 6
  rows = {(row.prompt_id, row.order): row for row in verdicts(tmp_path)}
  assert {unit: row.verdict for unit, row in rows.items()} == {
    (f"p{number}", order): outcome
    for number, outcome in enumerate(["model", "chosen", "tie"])
    for order in questions.ORDERS
  }
  row = rows["p0", "chosen_first"]
  assert row.raw == "reward 3 against 4"
  assert (row.judge, row.judge_returned) == ("length", "length")


def test_a_prompt_of_another_world_ends_an_oracle_run(tmp_path):
  rows = [*world_rows(3), response(9)]
  write(tmp_path, rows)
  with pytest.raises(ValueError, match="hi") as caught:
    runner.run(dataclasses.replace(ORACLE, concurrency=1), tmp_path)
  assert not isinstance(caught.value, ExceptionGroup)
  # Six questions were answered before the seventh could not be.
  assert len(verdicts(tmp_path)) == 6


def test_the_key_depends_on_all_that_the_answer_depends_on():
  async def nobody(question):
    raise AssertionError

  judge = judging.Judge("name", "parameters", "template", nobody)

  def keys(judge, row, order="model_first"):
    plan = questions.plan(judge, [questions.Case(None, row, order)], [])
    return next(iter(plan.questions))

  base = keys(judge, response(0))
  others = [
    keys(dataclasses.replace(judge, name="other"), response(0)),
    keys(dataclasses.replace(judge, parameters="other"), response(0)),
    keys(dataclasses.replace(judge, template_hash="other"), response(0)),
    keys(judge, response(0), "chosen_first"),
    keys(judge, response(0, prompt="\n\nHuman: ho\n\nAssistant:")),
    keys(judge, response(0, " other")),
    keys(judge, response(0, chosen=" other")),
  ]
  assert len({base, *others}) == 8
  same = response(7, model="sft", step=3, temperature=0.5, sample_id=2, seed=9)
  assert keys(judge, same) == base


def test_a_score_is_of_the_models_text_in_either_order(tmp_path):
  write(tmp_path, [response(0)])
  with judge_server.Server(judge_server.prefer_longer) as server:
    runner.run(judge_with(server, top_logprobs=2), tmp_path)
  # The server gives nine tenths to the longer text, which is the model's.
  assert [row.score for row in verdicts(tmp_path)] == pytest.approx([0.9, 0.9])


def test_judge_json_says_what_the_rows_cannot(tmp_path):
  write(tmp_path, [response(1), response(0), response(2, chosen=" ")])
  with judge_server.Server(judge_server.prefer_longer) as server:
    used = judge_with(server, temperature=0.5)
    runner.run(used, tmp_path)
  kept = json.loads((tmp_path / "verdicts" / "judge.json").read_text())
  rows = verdicts(tmp_path)
  texts = [t for n in (0, 1) for t in (f"p{n}", PROMPT, " short")]
  assert kept["data_fingerprint"] == hashing.content_hash(*texts)
  assert kept["judge"] == "judge-as-asked"
  assert kept["template"] == "dialogue"
  assert kept["template_hash"] == rows[0].template_hash
  assert json.loads(kept["parameters"])["temperature"] == 0.5
  assert (kept["complete"], kept["missing"]) == (True, 0)
  # Both prompts are one question in each order.
  assert kept["calls"] == 2
  assert kept["prompt_tokens"] == sum(row.prompt_tokens for row in rows)
  assert kept["completion_tokens"] == 22
  garbage = judge_server.says("Hm.")
  write(tmp_path, [response(0), response(1, " new")])
  with judge_server.Server(lambda request, n: garbage) as server:
    runner.run(judge_with(server, temperature=0.5), tmp_path)
  kept = json.loads((tmp_path / "verdicts" / "judge.json").read_text())
  assert (kept["complete"], kept["missing"]) == (False, 2)
  assert kept["calls"] == 2 + 4


def test_a_run_that_is_going_on_is_not_complete(tmp_path):
  write(tmp_path, [response(0)])
  seen = []

  def rule(request, number):
    path = tmp_path / "verdicts" / "judge.json"
    seen.append(json.loads(path.read_text()))
    return judge_server.prefer_longer(request, number)

  with judge_server.Server(rule) as server:
    runner.run(judge_with(server), tmp_path)
  assert (seen[0]["complete"], seen[0]["not_dispatched"]) == (False, 2)
