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


def check(capsys, *paths):
  """Exit code, output and differences of one call."""
  code = verify.main([str(path) for path in paths])
  text = capsys.readouterr().out
  lines = text.split("\n")
  return code, text, [x[8:] for x in lines if x.startswith("DIFFERS ")]


def replace(path, old, new):
  text = path.read_text()
  assert old in text, old
  path.write_text(text.replace(old, new, 1))


def test_a_report_agrees_with_its_rows(run, capsys):
  for path in (run, run / "report"):
    code, text, found = check(capsys, path)
    assert (code, found) == (0, [])
    assert "all numbers agree" in text


def test_edited_numbers_are_named(run, capsys):
  # DPO won on 34 of 40 prompts: 85%.
  edits = [
    (
      "numbers.json",
      '"prompts": 40,',
      '"prompts": 41,',
      "41, the rows give 40",
    ),
    (
      "numbers.json",
      '"win_rate": 0.85,',
      '"win_rate": 0.8500001,',
      "0.8500001, the rows give 0.85 (",
    ),
    (
      "win_rates.csv",
      "sft,,0.25,40",
      "sft,,0.25,50",
      ":5: 50, the rows give 40",
    ),
    (
      "win_rates.csv",
      "dpo,,1.0,40,0.850000",
      "dpo,,1.0,40,0.850002",
      ":10: 0.850002, the rows give 0.850000",
    ),
    (
      "report.html",
      '<td class="number">85.0 [',
      '<td class="number">95.0 [',
      "95.0, the rows give 85.0",
    ),
    (
      "report.html",
      '"model_first", "verdict": "model"',
      '"model_first", "verdict": "tie"',
      "the rows give",
    ),
    ("report.md", "> **INCOMPLETE**", "> **COMPLETE**", "'> **COMPLETE"),
    (
      "report.md",
      "880 calls on 440",
      "980 calls on 440",
      "980, the rows give 880",
    ),
    ("report.md", "**Yes**", "**No**", "'**No**: at every"),
    (
      "report.md",
      "| DPO | 1.0 | 40 | 85.0 [",
      "| DPO | 1.0 | 40 | 95.0 [",
      "95.0, the rows give 85.0",
    ),
    (
      "report.md",
      "72.5% of 200 pairs",
      "72.6% of 200 pairs",
      "72.6, the rows give 72.5",
    ),
    (
      "report.md",
      "train, kept | 990",
      "train, kept | 991",
      "991, the rows give 990",
    ),
  ]
  for name, old, new, _ in edits:
    replace(run / "report" / name, old, new)
  code, _, found = check(capsys, run)
  assert code == 1
  assert len(found) == len(edits), found
  for name, _, _, message in edits:
    assert any(
      line.startswith(f"{run}/report/{name}:") and message in line
      for line in found
    ), message


def test_rounding_of_another_machine_is_no_difference(run, capsys):
  replace(
    run / "report" / "numbers.json",
    '"win_rate": 0.85,',
    '"win_rate": 0.85000000000001,',
  )
  replace(run / "report" / "win_rates.csv", "0.850000", "0.850001")
  assert check(capsys, run)[0] == 0


@pytest.mark.parametrize(
  ("name", "old", "new", "message"),
  [
    ("numbers.json", '"step": null,', '"step": null, "elo": 1,', "elo"),
    ("numbers.json", '"step": null,', "", '"step": null'),
    ("report.md", "| refusals | 0 |\n", "", "| refusals | 0 |"),
    ("report.md", "## Training\n", "DPO won 99.9%.\n\n## Training\n", "99.9%"),
    ("win_rates.csv", "base,,0.25", "dpo,,2.0,40,0.9\nbase,,0.25", "dpo,,2.0"),
  ],
)
def test_added_and_removed_lines_are_found(
  run, capsys, name, old, new, message
):
  replace(run / "report" / name, old, new)
  code, _, found = check(capsys, run)
  assert code == 1
  (line,) = found
  assert re.search(rf"{name} has \d+ lines, the rows give \d+; line", line)
  assert message in line


def test_edited_rows_are_found(run, capsys):
  path = run / "verdicts" / "all.jsonl"
  # The last checkpoint, step 100, won on 30 prompts of 40: now on one less.
  reported.edit(
    path,
    records.Verdict,
    lambda row: (
      dataclasses.replace(row, verdict="chosen")
      if (row.step, row.prompt_id) == (100, "p00")
      else row
    ),
  )
  code, _, found = check(capsys, run)
  assert code == 1
  (line,) = [x for x in found if "win_rates.csv:12: " in x]
  assert "0.750000, the rows give 0.725000" in line
  # The figure of checkpoints shows the old rate; that of final models is right.
  figures = [x for x in found if x.startswith(f"{run}/report/win_rate_")]
  assert len(figures) == 1
  assert "win_rate_step.png: data is" in figures[0]


def test_a_removed_row_is_found(run, capsys):
  path = run / "verdicts" / "all.jsonl"
  path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-2]))
  code, _, found = check(capsys, run)
  assert code == 1
  assert any("win_rates.csv:12: 40, the rows give 39" in x for x in found)


def test_a_verdict_against_its_reply_is_found(run, capsys):
  # The last call, on p39 of step 100, is chosen_first and "chosen".
  last = ("dpo", 100, "p39", "chosen_first")
  reported.edit(
    run / "verdicts" / "all.jsonl",
    records.Verdict,
    lambda row: (
      dataclasses.replace(row, raw="More helpful: B")
      if (row.model, row.step, row.prompt_id, row.order) == last
      else row
    ),
  )
  code, _, found = check(capsys, run)
  assert code == 1
  (line,) = [x for x in found if x.startswith(f"{run}/verdicts: ")]
  assert line.endswith("is chosen, the judge's reply says model")


def test_changed_settings_are_changed_numbers(run, capsys):
  path = run / "report" / "numbers.json"
  replace(path, '"confidence": 0.95', '"confidence": 0.8')
  code, text, found = check(capsys, run)
  assert code == 1
  assert any("report.md" in line for line in found)
  # Of each file the first differences are printed.
  assert sum("report/numbers.json" in line for line in found) == 20
  assert re.search(r"report/numbers\.json: \d+ more differences", text)


def test_changed_figures_are_found(run, capsys):
  report = run / "report"
  rotated, swapped = report / "win_rate_step.png", report / "win_rate_step.pdf"
  with PIL.Image.open(rotated) as image:
    image.rotate(180).save(rotated)
  swapped.write_bytes((report / "reward_margins.pdf").read_bytes())
  missing = report / "reward_accuracy.pdf"
  missing.unlink()
  code, _, found = check(capsys, run)
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
  code, _, found = check(capsys, run)
  assert code == 1
  assert f"{path}: figures.other.png: not of the rows" in found
  assert any("win_rate_step.png: data is" in line for line in found)


def test_an_image_of_other_numbers_on_the_page_is_found(run, capsys):
  path = run / "report" / "report.html"
  text = path.read_text()
  finals, steps = re.findall(r' src="(data:[^"]*)"', text)
  for other in (steps, "data:image/svg+xml;base64,A"):
    path.write_text(text.replace(finals, other))
    code, _, found = check(capsys, run)
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
