"""Every edit of a report or of its rows is found, with both values."""

import dataclasses
import json
import re
import shutil

import PIL.Image
import pytest
import reported

from dpo_jax.io import records
from dpo_jax.report import verify


@pytest.fixture
def run(tmp_path_factory, tmp_path):
  """A copy of a run with its report."""
  original = reported.written(tmp_path_factory).parent
  return shutil.copytree(original, tmp_path / "run")


def replace(path, old, new):
  text = path.read_text()
  assert old in text, old
  path.write_text(text.replace(old, new, 1))


def test_a_report_agrees_with_its_rows(run, capsys):
  for path in (run, run / "report"):
    code, text, found = reported.check(capsys, path)
    assert (code, found) == (0, [])
    assert "all numbers agree" in text


EDITS = {
  # DPO won on 34 of 40 prompts: 85%.
  "numbers.json": (
    ('"prompts": 40,', '"prompts": 41,', "41, the rows give 40"),
    ('"win_rate": 0.85,', '"win_rate": 0.8500001,', "1, the rows give 0.85 ("),
  ),
  "win_rates.csv": (
    ("sft,,0.25,40", "sft,,0.25,50", ":5: 50, the rows give 40"),
    ("1.0,40,0.850000", "1.0,40,0.850002", ":10: 0.850002, the rows give 0.85"),
  ),
  "report.html": (
    ('"number">85.0 [', '"number">95.0 [', "95.0, the rows give 85.0"),
    ('_first", "verdict": "model"', '_first", "verdict": "tie"', "rows give"),
  ),
  "report.md": (
    ("**INCOMPLETE**", "**COMPLETE**", "'> **COMPLETE"),
    ("880 calls on 440", "980 calls on 440", "980, the rows give 880"),
    ("| 40 | 85.0 [", "| 40 | 95.0 [", "95.0, the rows give 85.0"),
    ("train, kept | 990", "train, kept | 991", "991, the rows give 990"),
  ),
}


def test_edited_numbers_are_named(run, capsys):
  for name, edits in EDITS.items():
    for old, new, _ in edits:
      replace(run / "report" / name, old, new)
  code, _, found = reported.check(capsys, run)
  assert code == 1
  assert len(found) == sum(map(len, EDITS.values())), found
  for name, edits in EDITS.items():
    lines = [x for x in found if x.startswith(f"{run}/report/{name}:")]
    for _, _, message in edits:
      assert any(message in line for line in lines), message


def test_rounding_of_another_machine_is_no_difference(run, capsys):
  replace(
    run / "report" / "numbers.json",
    '"win_rate": 0.85,',
    '"win_rate": 0.85000000000001,',
  )
  replace(run / "report" / "win_rates.csv", "0.850000", "0.850001")
  assert reported.check(capsys, run)[0] == 0


@pytest.mark.parametrize(
  ("name", "old", "new", "message"),
  [
    ("numbers.json", '"step": null,', '"step": null, "elo": 1,', "elo"),
    ("report.md", "| refusals | 0 |\n", "", "| refusals | 0 |"),
    ("report.md", "## Training\n", "DPO won 99.9%.\n\n## Training\n", "99.9%"),
  ],
)
def test_added_and_removed_lines_are_found(
  run, capsys, name, old, new, message
):
  replace(run / "report" / name, old, new)
  code, _, found = reported.check(capsys, run)
  assert code == 1
  (line,) = found
  assert re.search(rf"{name} has \d+ lines, the rows give \d+; line", line)
  assert message in line


def edit_last_call(run, **changes):
  """Edits the last call, "chosen" on p39 of step 100, chosen shown first."""
  last = ("dpo", 100, "p39", "chosen_first")

  def change(row):
    found = (row.model, row.step, row.prompt_id, row.order) == last
    return dataclasses.replace(row, **changes) if found else row

  reported.edit(run / "verdicts" / "all.jsonl", records.Verdict, change)


def test_edited_rows_are_found(run, capsys):
  edit_last_call(run, verdict="model")
  code, _, found = reported.check(capsys, run)
  assert code == 1
  # 30 prompts of 40 at step 100, and now half of one more.
  (line,) = [x for x in found if "win_rates.csv:12: " in x]
  assert "0.750000, the rows give 0.762500" in line
  # The figure of checkpoints shows the old rate; that of final models is right.
  (line,) = [x for x in found if x.startswith(f"{run}/report/win_rate_")]
  assert "win_rate_step.png: data is" in line


def test_a_verdict_against_its_reply_is_found(run, capsys):
  edit_last_call(run, raw="More helpful: B")
  code, _, found = reported.check(capsys, run)
  assert code == 1
  (line,) = [x for x in found if x.startswith(f"{run}/verdicts: ")]
  assert line.endswith("is chosen, the judge's reply says model")


def test_changed_settings_are_changed_numbers(run, capsys):
  path = run / "report" / "numbers.json"
  replace(path, '"confidence": 0.95', '"confidence": 0.8')
  code, _, found = reported.check(capsys, run)
  assert code == 1
  assert any("report.md" in line for line in found)
  # Of each file the first 20 differences are printed.
  lines = [line for line in found if "report/numbers.json:" in line]
  assert len(lines) == 21
  assert re.search(r"numbers\.json: \d+ more differences$", lines[-1])


def test_changed_figures_are_found(run, capsys):
  report = run / "report"
  rotated, swapped = report / "win_rate_step.png", report / "win_rate_step.pdf"
  with PIL.Image.open(rotated) as image:
    image.rotate(180).save(rotated)
  swapped.write_bytes((report / "reward_margins.pdf").read_bytes())
  missing = report / "reward_accuracy.pdf"
  missing.unlink()
  code, _, found = reported.check(capsys, run)
  assert code == 1
  lines = [line.partition(": ") for line in sorted(found)]
  assert [path for path, _, _ in lines] == [
    str(path) for path in (missing, swapped, rotated)
  ]
  assert lines[0][2].startswith("vector_sha256 is missing, recorded is ")
  assert lines[2][2].startswith("sha256 is ")


def test_a_figure_without_a_record_is_found(run, capsys):
  path = run / "report" / "numbers.json"
  numbers = json.loads(path.read_text())
  figures = numbers["figures"]
  figures["other.png"] = figures.pop("win_rate_step.png")
  path.write_text(json.dumps(numbers))
  code, _, found = reported.check(capsys, run)
  assert code == 1
  assert f"{path}: figures.other.png: not of the rows" in found
  assert any("win_rate_step.png: data is" in line for line in found)


def test_an_image_of_other_numbers_on_the_page_is_found(run, capsys):
  path = run / "report" / "report.html"
  text = path.read_text()
  finals, steps = re.findall(r' src="(data:[^"]*)"', text)
  for other in (steps, "data:image/svg+xml;base64,A"):
    path.write_text(text.replace(finals, other))
    code, _, found = reported.check(capsys, run)
    assert code == 1
    assert len(found) == 1
    assert found[0].startswith(f"{path}:")


def test_paths_that_cannot_be_verified(run, tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  for name, message in (
    ("none", "no such file"),
    ("empty", "no report: `python -m dpo_jax report "),
  ):
    assert verify.main([str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
  (run / "report" / "report.md").write_bytes(b"\xff\xfe")
  assert verify.main([str(run)]) == 2
  assert "not UTF-8 at byte 0" in capsys.readouterr().err
  (run / "report" / "numbers.json").write_text('{"settings": {"title": 3}}')
  assert verify.main([str(run)]) == 2
  assert "settings" in capsys.readouterr().err
