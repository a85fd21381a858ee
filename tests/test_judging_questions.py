"""What is asked: keys of questions, and controls."""

import dataclasses

import judge_server
import pytest
from test_judging_runner import (
  ORACLE,
  judge_with,
  response,
  verdicts,
  write,
)

from dpo_jax import judging
from dpo_jax.judging import questions, runner

SOME = questions.ControlSettings(aa=3, gold=4, retests=5)
LENGTH = dataclasses.replace(ORACLE, kind="length")


def only(**counts) -> runner.JudgeSettings:
  none = {"aa": 0, "gold": 0, "retests": 0}
  return dataclasses.replace(
    LENGTH, controls=questions.ControlSettings(**none | counts)
  )


def control_rows(workdir):
  return verdicts(workdir, "controls.jsonl")


def test_the_key_depends_on_all_that_the_reply_depends_on():
  judge = judging.Judge("name", "parameters", "template", None)

  def key(judge, row, order="model_first"):
    plan = questions.plan(judge, [questions.Case(None, row, order)], [])
    return next(iter(plan.questions))

  base = key(judge, response(0))
  others = [
    key(dataclasses.replace(judge, name="other"), response(0)),
    key(dataclasses.replace(judge, parameters="other"), response(0)),
    key(dataclasses.replace(judge, template_hash="other"), response(0)),
    key(judge, response(0), "chosen_first"),
    key(judge, response(0, prompt="\n\nHuman: ho\n\nAssistant:")),
    key(judge, response(0, " other")),
    key(judge, response(0, chosen=" other")),
  ]
  assert len({base, *others}) == 8
  same = response(7, model="sft", step=3, temperature=0.5, sample_id=2, seed=9)
  assert key(judge, same) == base


def test_controls_are_asked_and_kept_apart(tmp_path):
  rows = [
    response(n, f" answer {n}", f" chosen text number {n}") for n in range(8)
  ]
  write(tmp_path, rows)
  with judge_server.Server(judge_server.prefer_longer) as server:
    used = judge_with(server, control=SOME)
    summary = runner.run(used, tmp_path)
    # Both orders of 8, 3 and 4 prompts, and 5 questions once more.
    assert summary.asked == len(server.requests) == 16 + 6 + 8 + 5
    assert len({r.prompt for r in server.requests}) == 35
    assert runner.run(used, tmp_path).asked == 0
    assert sum(summary.outcomes.values()) == 16
    assert sum(summary.control_outcomes.values()) == 19
  kept = {"aa": [], "gold": [], "retest": []}
  for row in control_rows(tmp_path):
    kept[row.control].append(row)
  assert [len(rows) for rows in kept.values()] == [6, 8, 5]
  for row in kept["aa"] + kept["gold"]:
    about = (row.model, row.step, row.temperature, row.sample_id)
    assert about == ("chosen", None, 0.0, 0)
  # A text against itself: the first slot is called longer, so each order
  # gives another verdict.
  aa = sorted(row.verdict for row in kept["aa"])
  assert aa == 3 * ["chosen"] + 3 * ["model"]
  assert all(row.response_chars == row.chosen_chars for row in kept["aa"])
  ordinary = {row.unit[:-1]: row for row in verdicts(tmp_path)}
  for row in kept["retest"]:
    assert row.verdict == ordinary[row.unit[:-1]].verdict
    assert row.key != ordinary[row.unit[:-1]].key
  shown = [r.texts[1:] for r in server.requests]
  assert sum(first == second for first, second in shown) == 6
  chosen = {row.chosen for row in rows}
  assert sum(set(t) <= chosen and t[0] != t[1] for t in shown) == 8


def test_the_gold_text_is_the_prompts_own(tmp_path):
  rows = [
    response(n, f" answer {n}", f" right {n}", prompt=f"question {n}")
    for n in range(6)
  ]
  write(tmp_path, rows)
  own = {row.prompt: row.chosen for row in rows}

  def rule(request, number):
    prompt, first, _ = request.texts
    return judge_server.verdict(request, "A" if first == own[prompt] else "B")

  with judge_server.Server(rule) as server:
    used = judge_with(server, control=only(gold=6).controls)
    runner.run(used, tmp_path)
  assert [row.verdict for row in control_rows(tmp_path)] == 12 * ["model"]


def test_a_larger_sample_holds_the_smaller_one(tmp_path):
  write(tmp_path, [response(n, f" {n}", f" c{n}") for n in range(12)])
  assert runner.run(only(aa=3), tmp_path).asked == 24 + 6
  assert runner.run(only(aa=7), tmp_path).asked == 8
  # Another seed draws others.
  other = dataclasses.replace(only(aa=3), seed=5)
  assert 0 < runner.run(other, tmp_path).asked <= 6


def test_identical_texts_are_asked_about_as_controls_only(tmp_path):
  write(tmp_path, [response(n, " Same.", " Same.") for n in range(3)])
  used = dataclasses.replace(LENGTH, controls=SOME)
  summary = runner.run(used, tmp_path)
  # No other prompt has another chosen text, and a tie is not tested again.
  assert {row.control for row in control_rows(tmp_path)} == {"aa"}
  assert summary.outcomes == {"tie": 6}
  # One question in each order, as prompt and text are the same for all.
  assert summary.asked == 2


@pytest.mark.parametrize("name", ["responses", "verdicts-", "verdicts-a/b"])
def test_a_directory_that_verdicts_may_not_have(name):
  with pytest.raises(ValueError, match="verdicts="):
    dataclasses.replace(ORACLE, verdicts=name)
