"""Every number that is changed after the fact is found, with both values."""

import copy
import dataclasses
import json
import re
import shutil

import judged
import PIL.Image
import PIL.PngImagePlugin
import pytest
import reported

from dpo_jax.io import records, strict_json
from dpo_jax.report import dpo_replication, figures, report, verify


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("original")
  reported.make_run(workdir, missing=3)
  control = dataclasses.replace(
    judged.control("gold", "model", "p00"), judge="oracle", template_hash="t1"
  )
  reported.write_rows(workdir / "verdicts" / "controls.jsonl", [control])
  report.write(reported.SETTINGS, workdir)
  return workdir


@pytest.fixture
def run(original, tmp_path):
  return shutil.copytree(original, tmp_path / "run")


def check(capsys, *paths):
  """Exit code, output and differences of one call."""
  code = verify.main([str(path) for path in paths])
  text = capsys.readouterr().out
  lines = text.split("\n")
  return code, text, [x[8:] for x in lines if x.startswith("DIFFERS ")]


def replace(path, old, new):
  text = path.read_text()
  assert text.count(old) >= 1, old
  path.write_text(text.replace(old, new, 1))


def test_a_report_agrees_with_its_rows(run, capsys):
  for path in (run, run / "report"):
    code, text, found = check(capsys, path)
    assert (code, found) == (0, [])
    assert "all numbers agree" in text


@pytest.mark.parametrize(
  ("name", "old", "new", "message"),
  [
    # 34 of 40 prompts won: 85%.
    (
      "win_rates.csv",
      "dpo,,1.0,40,0.850000",
      "dpo,,1.0,40,0.950000",
      "win_rates.csv:10: win_rate is 0.950000, the rows give 0.850000",
    ),
    (
      "win_rates.csv",
      "sft,,0.25,40",
      "sft,,0.25,50",
      "win_rates.csv:5: n is 50, the rows give 40",
    ),
    (
      "report.md",
      "| DPO | 1.0 | 40 | 85.0 [",
      "| DPO | 1.0 | 40 | 95.0 [",
      "95.0 stands there, the rows give 85.0",
    ),
    (
      "report.md",
      "880 calls on 440",
      "980 calls on 440",
      "980 stands there, the rows give 880",
    ),
    (
      "report.md",
      "72.5% of 200 pairs",
      "82.5% of 200 pairs",
      "82.5 stands there, the rows give 72.5",
    ),
    (
      "report.md",
      "train, kept | 990",
      "train, kept | 991",
      "991 stands there, the rows give 990",
    ),
    ("report.md", "**Yes**", "**No**", "'**No**: at every"),
    (
      "report.html",
      '<td class="number">85.0 [',
      '<td class="number">95.0 [',
      "95.0 stands there, the rows give 85.0",
    ),
    ("report.html", "85.0% at T = 1.0", "95.0% at T = 1.0", "report.html:"),
    ("report.html", '"model_first", "model"', '"model_first", "tie"', "there"),
    ("report.md", "> **INCOMPLETE**", "> **COMPLETE**", "COMPLETE"),
    (
      "numbers.json",
      '"win_rate": 0.85,',
      '"win_rate": 0.86,',
      ".win_rate is 0.86, the rows give 0.85",
    ),
    (
      "numbers.json",
      '"prompts": 40,',
      '"prompts": 41,',
      "is 41, the rows give 40",
    ),
    (
      "numbers.json",
      '"step": null,',
      '"step": null, "elo": 1,',
      ".elo is not from the rows",
    ),
    ("numbers.json", '"step": null,', '"stolen": 0,', "step is missing"),
  ],
)
def test_an_edited_number_is_named(run, capsys, name, old, new, message):
  replace(run / "report" / name, old, new)
  code, _, found = check(capsys, run)
  assert code == 1
  assert all(f"{run}/report/{name}" in line for line in found)
  assert any(message in line for line in found), found


def test_an_edited_verdict_is_found(run, capsys):
  path = run / "verdicts" / "all.jsonl"
  rows = records.read(path, records.Verdict)
  # The last checkpoint, step 100, won on 30 prompts of 40: now on one less.
  index = next(i for i, r in enumerate(rows) if r.step == 100)
  for i in (index, index + 1):
    rows[i] = dataclasses.replace(rows[i], verdict="chosen")
  path.write_bytes(b"".join(map(records.encode, rows)))
  code, _, found = check(capsys, run)
  assert code == 1
  (line,) = [x for x in found if "win_rates.csv:12: win_rate " in x]
  assert line.endswith("win_rate is 0.750000, the rows give 0.725000")
  # The figure of checkpoints shows the old rate; that of final models is right.
  figures = [x for x in found if x.startswith(f"{run}/report/win_rate_")]
  assert any("win_rate_step.png: the fingerprint" in x for x in figures)
  assert not any("win_rate_temperature.png" in x for x in figures)


def test_a_removed_row_is_found(run, capsys):
  path = run / "verdicts" / "all.jsonl"
  lines = path.read_bytes().split(b"\n")
  path.write_bytes(b"\n".join(lines[:-3] + lines[-1:]))
  code, _, found = check(capsys, run)
  assert code == 1
  assert any("calls is 880, the rows give 878" in line for line in found)


def test_a_line_that_was_added_or_removed_is_found(run, capsys):
  path = run / "report" / "report.md"
  text = path.read_text()
  path.write_text(text + "\nDPO won 99.9%.\n")
  code, _, found = check(capsys, run)
  assert code == 1
  assert any("the rows do not give: DPO won 99.9%" in line for line in found)
  path.write_text(text.replace("| refusals | 0 |\n", ""))
  code, _, found = check(capsys, run)
  assert any("a line is missing: | refusals | 0 |" in line for line in found)
  table = run / "report" / "win_rates.csv"
  path.write_text(text)
  table.write_text(table.read_text() + "dpo,,2.0,40,0.9,0.8,0.95\n")
  code, _, found = check(capsys, run)
  assert any("has 13 lines, the rows give 12" in line for line in found)


def test_files_of_another_size_are_refused_in_little_time(run, capsys):
  path = run / "report" / "report.md"
  path.write_text("1\n" * 200_000)
  code, _, found = check(capsys, run)
  assert code == 1
  assert len(found) == 1
  assert found[0].startswith(f"{path} has 200001 lines, the rows give ")
  table = run / "report" / "win_rates.csv"
  table.write_text("x" * 200_000)
  assert verify.main([str(run)]) == 2
  assert f"{table}: field larger than" in capsys.readouterr().err


def test_changed_settings_are_changed_numbers(run, capsys):
  replace(
    run / "report" / "numbers.json", '"confidence": 0.95', '"confidence": 0.8'
  )
  code, _, found = check(capsys, run)
  assert code == 1
  assert any("report.md" in line for line in found)


def test_a_verdict_against_its_own_text_is_found(run, capsys):
  path = run / "verdicts" / "all.jsonl"
  rows = records.read(path, records.Verdict)
  assert (rows[-1].order, rows[-1].verdict) == ("chosen_first", "chosen")
  rows[-1] = dataclasses.replace(rows[-1], raw="More helpful: B")
  path.write_bytes(b"".join(map(records.encode, rows)))
  code, _, found = check(capsys, run)
  assert code == 1
  (line,) = [x for x in found if x.startswith(str(path))]
  assert line.endswith("is chosen, its raw text says model")


def test_a_figure_of_other_numbers_is_found(run, capsys):
  path = run / "report" / "win_rate_temperature.png"
  before = path.read_bytes()
  with PIL.Image.open(path) as image:
    drawn = image.text["Description"]
    image.rotate(180).save(path)
  code, _, found = check(capsys, run)
  assert code == 1
  assert all(str(path) in line for line in found)
  assert any("sha256" in line for line in found)
  assert any("fingerprint of its data is None" in line for line in found)
  # The other figure in its place carries the fingerprint of other data.
  path.write_bytes((run / "report" / "win_rate_step.png").read_bytes())
  _, _, found = check(capsys, run)
  assert any(f"not {drawn[:16]}" in line for line in found)
  path.unlink()
  _, _, found = check(capsys, run)
  assert found == [f"{path} is missing"]
  path.write_bytes(before)
  assert check(capsys, run)[0] == 0


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


def test_the_fingerprint_in_a_png_is_read_as_pillow_reads_it(run):
  for path in (run / "report").glob("*.png"):
    with PIL.Image.open(path) as image:
      assert figures.drawn(path.read_bytes()) == image.text["Description"]
  data = path.read_bytes()
  assert figures.drawn(data[:50]) is None
  assert figures.drawn(b"") is None
  assert figures.drawn(data.replace(b"Description\0", b"Subscription")) is None


def test_the_vector_figures_are_verified_too(run, capsys):
  path = run / "report" / "win_rate_step.pdf"
  other = run / "report" / "win_rate_temperature.pdf"
  data = path.read_bytes()
  assert (
    figures.drawn(data)
    == json.loads((run / "report" / "numbers.json").read_text())["figures"][
      "win_rate_step.png"
    ]["data"]
  )
  path.write_bytes(other.read_bytes())
  code, _, found = check(capsys, run)
  assert code == 1
  assert len(found) == 2
  assert all(line.startswith(f"{path}: ") for line in found)
  path.unlink()
  assert check(capsys, run)[2] == [f"{path} is missing"]


def test_what_cannot_be_verified(run, tmp_path, capsys):
  cases = {
    "none": "no such file",
    "empty": "no report: `python -m dpo_jax report ",
  }
  (tmp_path / "empty").mkdir()
  for name, message in cases.items():
    assert verify.main([str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
  (run / "report" / "report.md").write_bytes(b"\xff\xfe")
  assert verify.main([str(run)]) == 2
  assert "not UTF-8 at byte 0" in capsys.readouterr().err
  (run / "report" / "numbers.json").write_text('{"settings": {"title": 3}}')
  assert verify.main([str(run)]) == 2
  assert "settings" in capsys.readouterr().err


# Rate and interval in per cent, as printed in the table of shared/design.
TABLE = """
base  22.0 [16,29]  27.3 [21,35]  29.3 [23,37]  29.3 [23,37]
sft   29.3 [23,37]  34.0 [27,42]  46.7 [39,55]  46.0 [38,54]
dpo   25.3 [19,33]  36.0 [29,44]  46.0 [38,54]  42.0 [34,50]
"""


def test_real_result_files(shared, capsys):
  code, text, found = check(capsys, shared / "seed_results")
  assert code == 1
  assert TABLE in text
  files = {re.search(r"/(eval_.*?\.json):", line)[1] for line in found}
  assert {name.split("_")[1] for name in files} == {
    f"pythia-2.8b-dpo-{t}" for t in ("0.5", "0.75", "1.0")
  }
  assert "3 of 12 files disagree" in text
  # Published are 64.0, 52.7 and 58.0.
  for line in (
    "win_counts.Model is 96, its rows give 54",
    "win_counts.Chosen is 54, its rows give 96",
    "winrates.model_winrate is 64, its rows give 36",
    "win_counts.Model is 79, its rows give 69",
    "win_counts.Model is 87, its rows give 63",
  ):
    assert any(x.endswith(line) for x in found), line
  # Counted with jq: 13 ties, one of which begins with an apology.
  assert "12 verdicts that the judge's text states were missed" in text
  assert "1 are refusals" in text
  rows = [
    row
    for path in (shared / "seed_results").glob("*.json")
    for row in json.loads(path.read_text())["results"]
  ]
  texts = ("model_response", "chosen_response")
  same = [r for r in rows if len({r[name].strip() for name in texts}) == 1]
  assert f"{len(same)} rows compare a text with itself" in text
  assert {row["verdict"] for row in same} == {"Model"}  # always shown first
  assert f"the text shown first won {len(same)} of these" in text
  gaps = [
    (len(r["model_response"]) - len(r["chosen_response"]), r["verdict"])
    for r in rows
    if r["verdict"] in ("Model", "Chosen")
  ]
  longer = sum(v == ("Model" if g > 0 else "Chosen") for g, v in gaps if g)
  unequal = sum(g != 0 for g, _ in gaps)
  assert f"The longer text won {longer} of {unequal} decided rows" in text
  assert longer > 0.6 * unequal


def content():
  """A result file of four rows: model, model (missed), chosen, refusal."""
  texts = ["More helpful: A", 'More helpful: "A"', "More helpful: B"]
  rows = [
    {
      "sample_id": index,
      "prompt": "p",
      "model_response": "short",
      "chosen_response": "longer text",
      "presentation_order": "model_first",
      "verdict": verdict,
      "raw_gpt4_response": raw,
    }
    for index, (verdict, raw) in enumerate(
      zip(["Model", "Tie", "Chosen", "Tie"], [*texts, "I'm sorry, I cannot."])
    )
  ]
  return {
    "metadata": {
      "run_name": "eval_tiny-dpo-0.7_20250101_000000",
      "temperature": 0.7,
      "total_samples_evaluated": 4,
    },
    "win_counts": {"Model": 1, "Chosen": 1, "Tie": 2, "Error": 0},
    "winrates": {
      "model_winrate": 25.0,
      "chosen_winrate": 25.0,
      "tie_rate": 50.0,
      "error_rate": 0.0,
    },
    "results": rows,
  }


def write(tmp_path, value, name="eval_one.json"):
  path = tmp_path / name
  path.write_text(value if isinstance(value, str) else json.dumps(value))
  return path


def test_a_consistent_file_passes(tmp_path, capsys):
  path = write(tmp_path, content())
  code, text, found = check(capsys, path)
  assert (code, found) == (0, [])
  assert "dpo  25.0 [5,70]" in text
  assert "1 verdicts that the judge's text states were missed" in text
  assert "The longer text won 1 of 2 decided rows (50.0%)" in text
  file = dpo_replication.read(path)
  assert (file.model, file.missed, file.refusals) == ("dpo", [1], [3])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c["win_counts"].update(Model=2), "Model is 2, its rows give 1"),
    (
      lambda c: c["winrates"].update(tie_rate=40.0),
      "winrates.tie_rate is 40, its rows give 50",
    ),
    (
      lambda c: c["metadata"].update(total_samples_evaluated=5),
      "total_samples_evaluated is 5, its rows give 4",
    ),
    (
      lambda c: c["results"][0].update(raw_gpt4_response="More helpful: B"),
      "results[0].verdict is Model, its raw text says Chosen",
    ),
    (
      lambda c: c["results"][2].update(presentation_order="chosen_first"),
      "results[2].verdict is Chosen, its raw text says Model",
    ),
  ],
)
def test_an_inconsistent_file_is_named(tmp_path, capsys, change, message):
  value = content()
  change(value)
  path = write(tmp_path, value)
  code, _, (line,) = check(capsys, path)
  assert code == 1
  assert line.startswith(f"{path}: ")
  assert message in line


def test_no_rows_are_no_crash(tmp_path, capsys):
  value = content()
  value["results"] = []
  value["win_counts"] = dict.fromkeys(value["win_counts"], 0)
  value["winrates"] = dict.fromkeys(value["winrates"], 0.0)
  value["metadata"]["total_samples_evaluated"] = 0
  write(tmp_path, value)
  code, text, _ = check(capsys, tmp_path)
  assert code == 0
  assert "dpo  n/a [0,100]" in text


def test_two_files_of_one_model_are_called_by_their_names(tmp_path, capsys):
  for name in ("eval_one.json", "eval_two.json"):
    write(tmp_path, content(), name)
  code, text, _ = check(capsys, tmp_path)
  assert code == 0
  assert "eval_one  25.0 [5,70]" in text
  assert "eval_two  25.0 [5,70]" in text


def without(*path):
  def change(value):
    for key in path[:-1]:
      value = value[key]
    del value[path[-1]]

  return change


def having(new, *path):
  def change(value):
    for key in path[:-1]:
      value = value[key]
    value[path[-1]] = new

  return change


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (without("metadata"), "metadata is missing"),
    (without("win_counts", "Tie"), "win_counts.Tie is missing"),
    (without("results", 2, "verdict"), r"results\[2\].verdict is missing"),
    (having("x", "results"), "results is 'x', which is not a list"),
    (having(3, "results", 1), r"results\[1\] must be an object"),
    (
      having("Both", "results", 1, "verdict"),
      r"results\[1\].verdict is 'Both'",
    ),
    (having("b", "results", 0, "presentation_order"), "not one of"),
    (having(1.5, "win_counts", "Model"), "1.5, which is not a whole number"),
    (having(True, "win_counts", "Model"), "True, which is not a whole number"),
    (having("1", "metadata", "temperature"), "'1', which is not a number"),
    (having(True, "metadata", "temperature"), "True, which is not a number"),
    (having(10**400, "metadata", "temperature"), "too large"),
    (having(7, "results", 0, "raw_gpt4_response"), "must be text or null"),
    (
      having("x" * 20_001, "results", 0, "raw_gpt4_response"),
      "has 20001 characters",
    ),
    (having([], "metadata"), "metadata is .*not an object"),
  ],
)
def test_malformed_files_are_refused_by_field(
  tmp_path, capsys, change, message
):
  value = copy.deepcopy(content())
  change(value)
  path = write(tmp_path, value)
  assert verify.main([str(path)]) == 2
  error = capsys.readouterr().err
  assert str(path) in error
  assert re.search(message, error), error
  with pytest.raises(ValueError, match=message):
    dpo_replication.read(path)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "Expecting value"),
    (b'{"a": 1', "Expecting"),
    (b'{"a": NaN}', "NaN is not a JSON number"),
    (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    (b"\xef\xbb\xbf\xef\xbb\xbf{}", "BOM"),
    (b'{"a": 1e999}', "too large to be finite"),
    (b'{"a": [{"b": ["\\ud800"]}]}', "'b' holds a lone surrogate"),
    (b'{"\\uDFFF": 1}', "holds a lone surrogate"),
    (b"9" * 5000, "digits"),
  ],
)
def test_strange_json_is_refused_with_its_file(tmp_path, data, message):
  path = tmp_path / "eval_x.json"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=rf"eval_x\.json: .*{message}"):
    strict_json.read(path)


def test_json_at_its_limits_is_read(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  path.write_bytes(b"[1,2,3,445]")
  monkeypatch.setattr(strict_json, "MAX_BYTES", 10)
  with pytest.raises(ValueError, match=r"x\.json: longer than 0 MiB"):
    strict_json.read(path)
  path.write_bytes(b"[1,2,3,44]")
  assert strict_json.read(path) == [1, 2, 3, 44]
