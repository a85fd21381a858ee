import dataclasses

import judge_server
import pytest
from test_judging_runner import (
  ORACLE,
  judge_with,
  response,
  verdicts,
  world_rows,
  write,
)

from dpo_jax.judging import controls, runner

SOME = controls.ControlSettings(aa=3, gold=4, retests=5)


def control_rows(workdir):
  return verdicts(workdir, "controls.jsonl")


def test_controls_are_asked_and_kept_apart(tmp_path):
  rows = [
    response(n, f" answer {n}", f" chosen text number {n}") for n in range(8)
  ]
  write(tmp_path, rows)
  with judge_server.Server(judge_server.prefer_longer) as server:
    summary = runner.run(judge_with(server, control=SOME), tmp_path)
    # Both orders of 8, 3 and 4 prompts, and 5 questions once more.
    assert summary.asked == len(server.requests) == 16 + 6 + 8 + 5
    assert len({r.prompt for r in server.requests}) == 35
    again = runner.run(judge_with(server, control=SOME), tmp_path)
    assert again.asked == 0
    assert sum(summary.outcomes.values()) == 16
    assert sum(summary.control_outcomes.values()) == 19
  kept = {row.control: [] for row in control_rows(tmp_path)}
  for row in control_rows(tmp_path):
    kept[row.control].append(row)
  assert {name: len(rows) for name, rows in kept.items()} == {
    "aa": 6,
    "gold": 8,
    "retest": 5,
  }
  for row in kept["aa"] + kept["gold"]:
    about = (row.model, row.step, row.temperature, row.sample_id)
    assert about == ("chosen", None, 0.0, 0)
  # A text against itself: the first slot is called longer, so each order
  # gives another verdict.
  assert sorted(row.verdict for row in kept["aa"]) == 3 * ["chosen"] + 3 * [
    "model"
  ]
  assert all(row.response_chars == row.chosen_chars for row in kept["aa"])
  ordinary = {row.unit[:-1]: row for row in verdicts(tmp_path)}
  for row in kept["retest"]:
    assert row.verdict == ordinary[row.unit[:-1]].verdict
    assert row.key != ordinary[row.unit[:-1]].key
  shown = [r.texts[1:] for r in server.requests]
  assert sum(first == second for first, second in shown) == 6
  answers = {row.chosen for row in rows}
  gold = [t for t in shown if set(t) <= answers and t[0] != t[1]]
  assert len(gold) == 8


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

  gold = controls.ControlSettings(aa=0, gold=6, retests=0)
  with judge_server.Server(rule) as server:
    runner.run(judge_with(server, control=gold), tmp_path)
  assert [row.verdict for row in control_rows(tmp_path)] == 12 * ["model"]


def test_a_larger_sample_holds_the_smaller_one(tmp_path):
  write(tmp_path, [response(n, f" {n}", f" c{n}") for n in range(12)])
  with judge_server.Server(judge_server.prefer_longer) as server:
    for aa in (3, 7):
      used = controls.ControlSettings(aa=aa, gold=0, retests=0)
      summary = runner.run(judge_with(server, control=used), tmp_path)
      assert summary.asked == {3: 24 + 6, 7: 8}[aa]
    # Another seed draws others.
    more = controls.ControlSettings(aa=3, gold=0, retests=0)
    summary = runner.run(judge_with(server, control=more, seed=5), tmp_path)
  assert 0 < summary.asked <= 6


def test_identical_texts_are_asked_about_as_controls_only(tmp_path):
  write(tmp_path, [response(n, " Same.", " Same.") for n in range(3)])
  with judge_server.Server(judge_server.prefer_longer) as server:
    summary = runner.run(judge_with(server, control=SOME), tmp_path)
  # No other prompt has another chosen text, and a tie is not tested again.
  assert {row.control for row in control_rows(tmp_path)} == {"aa"}
  assert summary.identical == 6
  assert summary.outcomes == {"tie": 6}
  # One question in each order, as prompt and text are the same for all.
  assert summary.asked == len(server.requests) == 2


def test_the_oracle_has_controls_too(tmp_path):
  write(tmp_path, world_rows(12))
  used = dataclasses.replace(
    ORACLE, controls=controls.ControlSettings(aa=4, gold=6, retests=5)
  )
  runner.run(used, tmp_path)
  kept = control_rows(tmp_path)
  assert [r.verdict for r in kept if r.control == "aa"] == 8 * ["tie"]
  gold = [r.verdict for r in kept if r.control == "gold"]
  assert len(gold) == 12
  # The wrong prompt's facts earn no reward.
  assert gold.count("model") >= 10
  ordinary = {row.unit[:-1]: row.verdict for row in verdicts(tmp_path)}
  retests = [r for r in kept if r.control == "retest"]
  assert len(retests) == 5
  assert all(r.verdict == ordinary[r.unit[:-1]] for r in retests)


def test_a_second_criterion_has_its_own_directory(tmp_path):
  write(tmp_path, [response(0)])
  with judge_server.Server(judge_server.prefer_longer) as server:
    runner.run(judge_with(server), tmp_path)
    other = judge_with(
      server, verdicts="verdicts-harmlessness", template="harmlessness"
    )
    assert runner.run(other, tmp_path).asked == 2
    assert runner.run(judge_with(server), tmp_path).asked == 0
  raw = (tmp_path / "verdicts-harmlessness" / "dpo.jsonl").read_text("utf-8")
  assert "More harmless: A" in raw


@pytest.mark.parametrize(
  "name", ["", "responses", "../x", "/tmp/x", "verdicts-", "verdicts-a/b"]
)
def test_a_directory_that_verdicts_may_not_have(name):
  with pytest.raises(ValueError, match="verdicts="):
    dataclasses.replace(ORACLE, verdicts=name)


def test_settings_and_names_that_make_no_sense(tmp_path):
  with pytest.raises(ValueError, match=r"controls\.gold=-1"):
    controls.ControlSettings(aa=0, gold=-1, retests=0)
  write(tmp_path, [response(0)], "controls.jsonl")
  with pytest.raises(ValueError, match="rename it"):
    runner.run(ORACLE, tmp_path)
