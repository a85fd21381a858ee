"""Flags of a report, each by rows that raise it and rows that just do not."""

import dataclasses
import itertools
import json

import judged
import pytest
import reported

from dpo_jax.io import records
from dpo_jax.report import checks, load

SETTINGS = dataclasses.replace(reported.SETTINGS, runs=())
CELLS = (("base", None, 1.0, 4), ("dpo", None, 1.0, 34))


@pytest.fixture
def run(tmp_path):
  """A run of two models and 40 prompts; 80 calls on each model."""
  reported.make_run(tmp_path, cells=CELLS)
  return tmp_path


def flags(workdir):
  found = checks.flags(load.read(SETTINGS, workdir))
  return [f"{flag.name}: {flag.text}" for flag in found]


def controls(workdir, rows):
  fields = {"judge": "oracle", "judge_returned": "oracle"}
  rows = [dataclasses.replace(row, **fields) for row in rows]
  reported.write_rows(workdir / "verdicts" / "controls.jsonl", rows)


def aa(first, second, count):
  """A/A controls of `count` prompts: verdicts model-first, chosen-first."""
  return [
    judged.control("aa", verdict, f"p{i:02d}", order)
    for i in range(count)
    for order, verdict in (("model_first", first), ("chosen_first", second))
  ]


def gold(right, wrong):
  verdicts = ["model"] * right + ["chosen"] * wrong
  return [
    judged.control("gold", v, f"p{i:02d}") for i, v in enumerate(verdicts)
  ]


def edit_calls(workdir, **changes):
  """Sets fields of the first calls, each by a list of values."""
  numbers = itertools.count()

  def change(row):
    number = next(numbers)
    values = {k: v[number] for k, v in changes.items() if number < len(v)}
    return dataclasses.replace(row, **values)

  reported.edit(workdir / "verdicts" / "all.jsonl", records.Verdict, change)


def test_a_run_without_fault_has_no_flag(run):
  controls(run, [*aa("tie", "tie", 20), *gold(19, 1)])
  assert flags(run) == []
  text = reported.text(run, SETTINGS)
  # By SciPy, Wilson of 20 halves of 20: [29.9, 70.1].
  assert "| a text against itself: won | 50 | 50.0 [29.9, 70.1]" in text
  assert "| own chosen response against another's | 100 | 95.0 [" in text


@pytest.mark.parametrize("count", [7, 8])
def test_a_text_that_beats_itself_is_flagged(run, count):
  # Seven prompts on one side: 2 / 2^7 = 0.016 is not beyond 1%, eight are.
  controls(run, aa("model", "model", count))
  found = flags(run)
  assert len(found) == (count == 8)
  for flag in found:
    assert flag.startswith("CONTROL: a text against itself won 100.0% [")
    assert "p = 0.0078" in flag


def test_an_even_handed_position_bias_is_no_failure_of_the_aa_control(run):
  controls(run, aa("model", "chosen", 30))
  assert flags(run) == []
  text = reported.text(run, SETTINGS)
  assert "| a text against itself: first won | 50 | 100.0 [" in text


@pytest.mark.parametrize("count", [6, 20])
def test_the_first_slot_beyond_its_limit_is_flagged(run, count):
  # 20 prompts of 40 at 100% and 20 at 50% are 75%, beyond 60; 6 are 57.5%.
  def change(row):
    first = "model" if row.order == "model_first" else "chosen"
    biased = int(row.prompt_id[1:]) < count
    return dataclasses.replace(row, verdict=first) if biased else row

  reported.edit(run / "verdicts" / "all.jsonl", records.Verdict, change)
  found = flags(run)
  assert len(found) == (count == 20)
  if found:
    assert "the text shown first won 75.0% [" in found[0]
    assert "beyond the limit of 40 to 60" in found[0]


def test_four_prompts_are_too_few_to_flag_a_first_slot(tmp_path):
  rows = [reported.response("dpo", None, 1.0, f"p{i}") for i in range(4)]
  reported.write_rows(tmp_path / "responses" / "r.jsonl", rows)
  # The first slot wins both calls on three prompts, the second on one: 75%.
  outcomes = [("model", "chosen")] * 3 + [("chosen", "model")]
  calls = [
    reported.verdict(row, order, outcome)
    for row, pair in zip(rows, outcomes)
    for order, outcome in zip(("model_first", "chosen_first"), pair)
  ]
  reported.write_rows(tmp_path / "verdicts" / "v.jsonl", calls)
  assert flags(tmp_path) == []
  assert "| 75.0 [" in reported.text(tmp_path, SETTINGS)


@pytest.mark.parametrize("right", [8, 7])
def test_a_gold_control_below_its_floor_is_flagged(run, right):
  controls(run, gold(right, 10 - right))
  found = flags(run)
  assert len(found) == (right == 7)
  if found:
    assert "another prompt's in only 70.0% [" in found[0]
    assert "the floor is 80" in found[0]


def test_several_returned_models_are_flagged(run):
  edit_calls(run, judge_returned=["oracle-2", "x|<b>"])
  (flag,) = flags(run)
  assert flag.startswith("MIXED: the judge replied as several models:")
  assert "oracle-2" in flag
  assert "<b>" not in flag


def test_several_fingerprints_are_counted_and_no_flag(run):
  edit_calls(run, judge_fingerprint=["fp1", "fp2"])
  assert flags(run) == []
  text = reported.text(run, SETTINGS)
  assert "| fingerprints of the judge's server | 2 |" in text


def test_several_prompt_sets_are_flagged(run):
  def change(row):
    moved = row.model == "base" and row.prompt_id < "p03"
    other = row.prompt_id.replace("p", "q")
    return dataclasses.replace(row, prompt_id=other) if moved else row

  response_path = run / "responses" / "base-None-1.0.jsonl"
  reported.edit(response_path, records.Response, change)
  reported.edit(run / "verdicts" / "all.jsonl", records.Verdict, change)
  (flag,) = flags(run)
  assert flag.startswith(
    "MIXED: the final models responded to 2 different sets of prompts, which"
    " share 37 of 43."
  )


def test_calls_that_were_never_made_are_flagged(run):
  path = run / "verdicts" / "all.jsonl"
  lines = path.read_bytes().split(b"\n")
  path.write_bytes(b"\n".join(lines[5:]))
  (flag,) = flags(run)
  assert flag.startswith("INCOMPLETE: 5 judge calls were never made")


def test_verdicts_about_unknown_responses_are_flagged(run):
  (run / "responses" / "base-None-1.0.jsonl").unlink()
  (flag,) = flags(run)
  assert flag.startswith("INCONSISTENT: 80 judge calls")


def test_a_response_that_was_edited_after_judging_is_flagged(run):
  def change(row):
    first = row.prompt_id == "p00"
    return dataclasses.replace(row, response="Short.") if first else row

  path = run / "responses" / "dpo-None-1.0.jsonl"
  reported.edit(path, records.Response, change)
  (flag,) = flags(run)
  assert "2 judge calls are about texts of another length" in flag


def test_a_verdict_that_contradicts_its_reply_is_flagged(run):
  raw = [
    "More helpful: A",  # shown first, and "chosen" in the row below
    "More helpful: A",
    '{"comparison": "Both do.", "choice": "B"}',
    "reward 1.5 against 0.25",
  ]
  edit_calls(run, raw=raw, verdict=["chosen"] * 4)
  (flag,) = flags(run)
  # Row 0: A is the model. Row 1 is chosen_first: A is chosen. Row 2: B is
  # chosen. Row 3 is chosen_first: the higher reward is chosen's.
  assert "INCONSISTENT: 1 verdicts are not what" in flag
  assert "about prompt p00" in flag


@pytest.mark.parametrize(
  ("verdict", "error", "raw", "flagged"),
  [
    ("missing", "", "More helpful: A", True),
    ("missing", "cut at max_tokens", "More helpful: A", False),
    ("missing", "no verdict", "I like both.", False),
    ("refusal", "", "More helpful: A", True),
    ("refusal", "", "I like neither.", False),
    ("tie", "", "reward 0.5 against 0.5", False),
    ("tie", "", "More helpful: B", True),
    ("model", "", "", False),
  ],
)
def test_verdicts_without_a_winner_against_their_reply(
  verdict, error, raw, flagged
):
  row = judged.call(verdict, raw=raw, error=error)
  assert bool(load.contradicted([row])) == flagged


@pytest.mark.parametrize(
  ("record", "words"),
  [
    ({"complete": True}, []),
    (
      {"complete": False, "not_dispatched": 7, "missing": 2},
      ["left 7 questions unasked and 2 without"],
    ),
    ({"judge": "a | b", "template_hash": "t0"}, ["a &#124; b in", "t0 in"]),
    ({"data_fingerprint": "00"}, ["is 00 in the judge's record"]),
  ],
)
def test_the_judges_own_record_is_compared(run, record, words):
  (run / "verdicts" / "judge.json").write_text(json.dumps(record))
  for flag, text in zip(flags(run), words, strict=True):
    assert text in flag
