"""Controls and mixed rows put a flag on a report, and strict makes it fail."""

import dataclasses
import json
import shutil

import judged
import pytest
import reported

from dpo_jax.core import errors
from dpo_jax.io import records
from dpo_jax.report import compose, load, report, verify

SETTINGS = dataclasses.replace(reported.SETTINGS, runs=())


def make(workdir, controls=(), **changes):
  """A run of 40 prompts with control calls, whose rows are then `changes`."""
  reported.make_run(workdir)
  controls = [
    dataclasses.replace(
      row, judge="oracle", judge_returned="oracle", template_hash="t1"
    )
    for row in controls
  ]
  if controls:
    reported.write_rows(workdir / "verdicts" / "controls.jsonl", controls)
  if changes:
    edit(workdir / "verdicts" / "all.jsonl", **changes)


def edit(path, **changes):
  """Rewrites the first rows of a file, each field by a list of values."""
  rows = records.read(path, records.Verdict)
  for name, values in changes.items():
    for index, value in enumerate(values):
      rows[index] = dataclasses.replace(rows[index], **{name: value})
  path.write_bytes(b"".join(map(records.encode, rows)))


def top(workdir):
  """The flags above the first section."""
  made = compose.compose(SETTINGS, workdir)
  head = made.texts["report.md"].split("## Win rates")[0].strip()
  flags = [line for line in head.split("\n") if line.startswith("> **")]
  assert flags == [f"> **{flag.name}**: {flag.text}" for flag in made.flags]
  return flags


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


def test_a_run_without_fault_has_no_flag(tmp_path):
  make(tmp_path, [*aa("tie", "tie", 20), *gold(19, 1)])
  assert top(tmp_path) == []
  text = reported.text(tmp_path, SETTINGS)
  # By SciPy, Wilson of 20 halves of 20: [29.9, 70.1].
  assert "| a text against itself: won | 50 | 50.0 [29.9, 70.1]" in text
  assert "| own answer against another prompt's | 100 | 95.0 [" in text


def test_a_text_that_beats_itself_is_flagged(tmp_path):
  # Seven prompts on one side: 2 / 2^7 = 0.016 is not beyond 1%, eight are.
  make(tmp_path, aa("model", "model", 7))
  assert top(tmp_path) == []
  (tmp_path / "verdicts" / "controls.jsonl").unlink()
  reported.write_rows(
    tmp_path / "verdicts" / "controls.jsonl",
    [
      dataclasses.replace(row, judge="oracle", template_hash="t1")
      for row in aa("model", "model", 8)
    ],
  )
  (flag,) = top(tmp_path)
  assert flag.startswith("> **CONTROL**: a text against itself won 100.0% [")
  assert "p = 0.0078" in flag


def test_an_even_handed_position_bias_is_no_failure_of_the_aa_control(tmp_path):
  make(tmp_path, aa("model", "chosen", 30))
  assert top(tmp_path) == []
  text = reported.text(tmp_path, SETTINGS)
  assert "| a text against itself: first won | 50 | 100.0 [" in text


def first_slot(workdir, count):
  """In `count` prompts of every cell the first slot won both times."""
  reported.make_run(workdir)
  path = workdir / "verdicts" / "all.jsonl"
  rows = [
    dataclasses.replace(
      row, verdict="model" if row.order == "model_first" else "chosen"
    )
    if int(row.prompt_id[1:]) < count
    else row
    for row in records.read(path, records.Verdict)
  ]
  path.write_bytes(b"".join(map(records.encode, rows)))


@pytest.mark.parametrize(("count", "flagged"), [(6, False), (20, True)])
def test_the_first_slot_beyond_its_limit_is_flagged(tmp_path, count, flagged):
  # 20 prompts of 40 at 100% and 20 at 50% are 75%, beyond 60; 6 are 57.5%.
  first_slot(tmp_path, count)
  flags = top(tmp_path)
  assert bool(flags) == flagged
  if flagged:
    assert "the text shown first won 75.0% [" in flags[0]
    assert "beyond the limit of 40 to 60" in flags[0]


def test_four_prompts_are_too_few_to_say_that_a_slot_wins(tmp_path):
  rows = [reported.response("dpo", None, 1.0, f"p{i}") for i in range(4)]
  reported.write_rows(tmp_path / "responses" / "r.jsonl", rows)
  # The first slot wins both calls on three prompts, the second on one: 75%.
  calls = [
    reported.verdict(
      row, order, "model" if (order == "model_first") == (i < 3) else "chosen"
    )
    for i, row in enumerate(rows)
    for order in ("model_first", "chosen_first")
  ]
  reported.write_rows(tmp_path / "verdicts" / "v.jsonl", calls)
  assert top(tmp_path) == []
  assert "| 75.0 [" in reported.text(tmp_path, SETTINGS)


@pytest.mark.parametrize(("right", "wrong"), [(8, 2), (7, 3)])
def test_a_gold_control_below_its_floor_is_flagged(tmp_path, right, wrong):
  make(tmp_path, gold(right, wrong))
  flags = top(tmp_path)
  assert bool(flags) == (right < 8)
  if flags:
    assert "another prompt's in only 70.0% [" in flags[0]
    assert "the floor is 80" in flags[0]


def test_several_returned_models_are_flagged(tmp_path):
  make(tmp_path, judge_returned=["oracle-2", "x|<b>"])
  (flag,) = top(tmp_path)
  assert flag.startswith("> **MIXED**: the judge answered as several models:")
  assert "oracle-2" in flag
  assert "<b>" not in flag


def test_several_fingerprints_are_counted_and_no_flag(tmp_path):
  make(tmp_path, judge_fingerprint=["fp1", "fp2"])
  assert top(tmp_path) == []
  text = reported.text(tmp_path, SETTINGS)
  assert "| fingerprints of the judge's server | 2 |" in text


def test_several_prompt_sets_are_flagged(tmp_path):
  make(tmp_path)
  path = tmp_path / "responses" / "base-None-1.0.jsonl"
  rows = records.read(path, records.Response)
  moved = [
    dataclasses.replace(row, prompt_id=row.prompt_id.replace("p", "q"))
    for row in rows[:3]
  ]
  path.write_bytes(b"".join(map(records.encode, [*moved, *rows[3:]])))
  verdicts = tmp_path / "verdicts" / "all.jsonl"
  names = {row.prompt_id for row in rows[:3]}
  calls = [
    dataclasses.replace(row, prompt_id=row.prompt_id.replace("p", "q"))
    if (row.model, row.temperature) == ("base", 1.0) and row.prompt_id in names
    else row
    for row in records.read(verdicts, records.Verdict)
  ]
  verdicts.write_bytes(b"".join(map(records.encode, calls)))
  (flag,) = top(tmp_path)
  assert flag.startswith(
    "> **MIXED**: the final models answered 2 different sets of prompts, which"
    " share 37 of 43."
  )


def test_one_prompt_id_with_two_texts_is_refused(tmp_path):
  make(tmp_path)
  path = tmp_path / "responses" / "base-None-1.0.jsonl"
  rows = records.read(path, records.Response)
  rows[0] = dataclasses.replace(rows[0], chosen=" Another.")
  path.write_bytes(b"".join(map(records.encode, rows)))
  with pytest.raises(ValueError, match=r"prompt 'p00' .*several texts"):
    compose.compose(SETTINGS, tmp_path)


def test_a_response_that_was_edited_after_judging_is_flagged(tmp_path):
  make(tmp_path)
  path = tmp_path / "responses" / "dpo-None-1.0.jsonl"
  rows = records.read(path, records.Response)
  rows[0] = dataclasses.replace(rows[0], response="Shorter.")
  path.write_bytes(b"".join(map(records.encode, rows)))
  (flag,) = top(tmp_path)
  assert "2 judge calls are about texts of another length" in flag


def test_a_verdict_that_contradicts_its_text_is_flagged(tmp_path):
  raw = [
    "More helpful: A",  # shown first, and "chosen" in the row below
    "More helpful: A",
    '{"comparison": "Both do.", "choice": "B"}',
    "reward 1.5 against 0.25",
  ]
  make(tmp_path, raw=raw, verdict=["chosen", "chosen", "chosen", "chosen"])
  (flag,) = top(tmp_path)
  # Row 0: A is the model. Row 1 is chosen_first: A is chosen. Row 2: B is
  # chosen. Row 3 is chosen_first: the higher reward is chosen's.
  assert "**INCONSISTENT**: 1 verdicts are not what" in flag
  assert "about prompt p00" in flag


@pytest.mark.parametrize(
  ("verdict", "error", "raw", "flagged"),
  [
    ("missing", "", "More helpful: A", True),
    ("missing", "cut at max_tokens", "More helpful: A", False),
    ("missing", "no verdict", "I like both.", False),
    ("refusal", "", "More helpful: A", True),
    ("refusal", "", "I like neither.", False),
    ("refusal", "", "I'm sorry, I cannot.", False),
    ("tie", "", "More helpful: tie", False),
    ("tie", "", "reward 0.5 against 0.5", False),
    ("tie", "", "More helpful: B", True),
    ("model", "", "", False),
  ],
)
def test_verdicts_without_a_winner_against_their_text(
  verdict, error, raw, flagged
):
  row = judged.call(verdict, raw=raw, error=error)
  assert bool(load.odd([row])) == flagged


@pytest.mark.parametrize(
  ("record", "words"),
  [
    ({"complete": True}, None),
    (
      {"complete": False, "not_dispatched": 7, "missing": 2},
      "left 7 questions unasked and 2 without",
    ),
    ({"judge": "another | one"}, "judge is another &#124; one in the judge's"),
    ({"template_hash": "t0"}, "is t0 in the judge's record"),
    ({"data_fingerprint": "00"}, "is 00 in the judge's record"),
  ],
)
def test_the_judges_own_record_is_compared(tmp_path, record, words):
  make(tmp_path)
  (tmp_path / "verdicts" / "judge.json").write_text(json.dumps(record))
  flags = top(tmp_path)
  assert [words in flag for flag in flags] == ([True] if words else [])


def test_strict_fails_once_a_flagged_report_is_written(tmp_path):
  make(tmp_path, gold(1, 9))
  path = report.write(SETTINGS, tmp_path)
  text = path.read_text()
  assert "**CONTROL**" in text
  path.unlink()
  strict = dataclasses.replace(SETTINGS, strict=True)
  with pytest.raises(errors.Stopped, match=r"report\.md is flagged: CONTROL"):
    report.write(strict, tmp_path)
  assert path.read_text() == text
  (tmp_path / "verdicts" / "controls.jsonl").unlink()
  assert report.write(strict, tmp_path) == path


@pytest.mark.parametrize(
  "changes",
  [
    {"aa_alpha": 1.5},
    {"first_slot_limit": 0.4},
    {"resamples": 5},
    {"confidence": 1.5},
    {"gold_floor": -0.1},
    {"verdicts": "../verdicts"},
  ],
)
def test_limits_out_of_range_are_refused(changes):
  with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
    dataclasses.replace(SETTINGS, **changes)


def test_a_second_criterion_has_a_report_of_its_own(tmp_path, capsys):
  make(tmp_path)
  other = tmp_path / "verdicts-harmless"
  shutil.copytree(tmp_path / "verdicts", other)
  edit(other / "all.jsonl", verdict=["tie"] * 2)
  first = report.write(SETTINGS, tmp_path)
  settings = dataclasses.replace(SETTINGS, verdicts=other.name, title="Second")
  second = report.write(settings, tmp_path)
  assert second == tmp_path / "report-harmless" / "report.md"
  assert first.read_text() != second.read_text()
  # base at 0.25 won 4 of 40 prompts; one of these is a tie in the second.
  assert "| base | 0.25 | 40 | 10.0 [" in first.read_text()
  assert "| base | 0.25 | 40 | 8.8 [" in second.read_text()
  assert verify.main([str(tmp_path)]) == 0
  assert capsys.readouterr().out.count("all numbers agree") == 2
  arguments = [str(tmp_path), f"--verdicts={other.name}", "--resamples=300"]
  assert report.main(arguments) == 0
  assert second.read_text().startswith("# Second\n")


def test_the_command_line(tmp_path, capsys):
  make(tmp_path, gold(1, 9))
  assert report.main([str(tmp_path), "--title=Mine", "--resamples=300"]) == 0
  assert capsys.readouterr().out.strip().endswith("report.md")
  # What is not given again is as it was.
  assert report.main([str(tmp_path), "--strict"]) == 1
  assert "flagged: CONTROL" in capsys.readouterr().err
  text = (tmp_path / "report" / "report.md").read_text()
  assert text.startswith("# Mine\n")
  assert report.main([str(tmp_path), "--gold_floor=0.05", "--strict"]) == 0
  assert report.main([str(tmp_path), "--runs", "nothing"]) == 2
  assert "metrics.jsonl is missing" in capsys.readouterr().err
  assert report.main([str(tmp_path / "none")]) == 2
  assert report.main([str(tmp_path), "--gold_floor=7"]) == 2
  with pytest.raises(SystemExit):
    report.main([])
