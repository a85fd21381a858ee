"""The report is computed from the rows, and shows any text as text."""

import csv
import dataclasses
import hashlib
import html
import io
import itertools
import re
import shutil

import pytest
import reported

from dpo_jax.io import markdown, records
from dpo_jax.report import report, verify

# Each tries to leave its cell, to add markup, or to hide something.
HOSTILE = [
  "a | b\nsecond\r\nthird\rfourth",
  "</td></table><h1>Out</h1> <!-- comment <img src=x onerror=alert(1)>",
  "[link](javascript:alert(1)) ![image](http://evil.example/x.png)",
  "[ref]: http://evil.example\n# Heading\n> quote\n- item\n1. item\n---",
  "https://evil.example/path www.evil.example mail@evil.example @someone",
  "**bold** _it_ ~~no~~ $x^2$ \\| &lt; &#124; `code` ``` fence",
  "line\u2028separator\u0085next\x0bvertical\x00nul\u202eto left\u200b",
  "日本語 🙂‍↔️ \u05e9\u05dc\u05d5\u05dd",
]
FINALS = dataclasses.replace(reported.SETTINGS, runs=())
DPO = (("dpo", None, 1.0, 34),)


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  reported.make_run(workdir)
  return report.compose(reported.SETTINGS, workdir)


@pytest.fixture
def text(composed):
  return composed.texts["report.md"]


def test_csv_of_win_rates(composed):
  lines = io.StringIO(composed.texts["win_rates.csv"])
  header, *rows = csv.reader(lines)
  assert ",".join(header[:9]) == (
    "model,step,temperature,n,win_rate,low,high,prompts,interval"
  )
  for row, cell in zip(rows, reported.CELLS, strict=True):
    *names, won = (str(value or "") for value in cell)
    assert row[:4] == [*names, "40"]
    rate, low, high = map(float, row[4:7])
    assert rate == pytest.approx(int(won) / 40)
    assert 0 <= low < rate < high <= 1


@pytest.mark.parametrize("name", ["=1+1", "+dpo", "-dpo", "@dpo", "d=p"])
def test_no_name_in_the_csv_is_a_formula(tmp_path, name):
  reported.make_run(tmp_path, cells=((name, None, 1.0, 34),))
  table = report.compose(reported.SETTINGS, tmp_path).texts["win_rates.csv"]
  _, row = csv.reader(io.StringIO(table))
  assert row[0] == ("d=p" if name == "d=p" else "'" + name)


def test_content_of_a_report(text):
  assert text.startswith("# A small run\n")
  assert "Judge oracle, template t1: 880 calls on 440 comparisons" in text
  assert "over 40 prompts" in text
  assert "95% intervals: Wilson score at the effective number" in text
  assert re.search(r"(?m)^\*\*Yes\*\*.*\(0.75, 1.0\), base < SFT < DPO", text)
  for absent in ("INCOMPLETE", "INCONSISTENT", "By subset", "at equal length"):
    assert absent not in text
  assert "by probabilities" not in text
  # 0.725 of 200 pairs: the Wilson interval by SciPy is [0.6593, 0.7823].
  assert "72.5% of 200 pairs, 95% interval [65.9, 78.2] (step 59)" in text
  rows = reported.tables(text)
  (dpo,) = [r for r in rows if r[:3] == ["DPO", "1.0", "40"]]
  assert dpo[3].startswith("85.0 [")
  assert dpo[4:] == ["0", "0", "50.0"]
  assert ["same verdict in both orders, %", "100.0"] in rows
  assert ["DPO", "train, kept", "990"] in rows
  assert ["DPO", "train, quarantined: empty &#124; row", "3"] in rows
  responses = ["DPO", "100", "1.0", "40", "7.0", "11", "12"]
  assert [*responses, "100.0", "0.0", "0.0", "0", "0", "n/a"] in rows
  assert text.index("### Is base") < text.index("### Over training")


def test_win_rates_by_subset(tmp_path):
  """Of 40 prompts the first 10 are helpful-base: DPO won on all of them."""
  reported.make_run(tmp_path)
  for path in (tmp_path / "responses").iterdir():
    reported.edit(
      path,
      records.Response,
      lambda row: dataclasses.replace(
        row, subset="helpful-base" if row.prompt_id < "p10" else "harm | less"
      ),
    )
  text = reported.text(tmp_path)
  section = text.partition("### By subset")[2].partition("###")[0]
  rows = reported.tables(section)
  assert len(rows) == 2 + 2 * 9
  found = {tuple(row[:4]): row[4].split()[0] for row in rows[2:]}
  # 24 of the other 30; base won on 4 of the first, and on no other.
  assert found["helpful-base", "DPO", "1.0", "10"] == "100.0"
  assert found["harm &#124; less", "DPO", "1.0", "30"] == "80.0"
  assert found["helpful-base", "base", "0.75", "10"] == "40.0"
  assert found["harm &#124; less", "base", "0.75", "30"] == "0.0"


def test_paired_differences_and_slopes(text):
  (row,) = [r for r in reported.tables(text) if r[:2] == ["SFT - base", "1.0"]]
  # SFT won on the 4 prompts that base won on, and on 12 more: +30 points, and
  # 12 of 12 one way have p = 2 / 2^12, times 3 temperatures.
  assert row[2] == "40"
  assert row[3].startswith("+30.0 [+")
  assert row[4:] == ["12 : 0", "0.0005", "0.0015"]
  # 18 and 30 prompts of 40 at steps 50 and 100; slopes are 0 or 1.
  assert "DPO with training: it improves. One least-squares slope" in text
  assert "from step 50 to 100 the rate changes by +30.0 [+" in text


def test_a_flat_training_is_undecided(tmp_path):
  cells = [("dpo", step, 1.0, 18) for step in (50, 100)]
  reported.make_run(tmp_path, cells=cells)
  text = reported.text(tmp_path)
  assert "DPO with training: undecided whether it improves." in text
  assert "the rate changes by 0.0 [" in text
  assert "p = n/a" in text


def judged(workdir, rows, verdicts, **fields):
  """Writes responses with one call each, and composes their report."""
  reported.write_rows(workdir / "responses" / "r.jsonl", rows)
  calls = [
    reported.verdict(row, "model_first", verdict, **fields)
    for row, verdict in zip(rows, verdicts, strict=True)
  ]
  reported.write_rows(workdir / "verdicts" / "v.jsonl", calls)
  return report.compose(FINALS, workdir)


def test_optional_columns_of_win_rates(tmp_path):
  rows = [
    reported.response("dpo", None, 1.0, f"p{i}", " long" * (1 + i % 3))
    for i in range(30)
  ]
  composed = judged(tmp_path, rows, ["chosen", "model"] * 15, score=0.25)
  text = composed.texts["report.md"]
  names, _, cells, *_ = reported.tables(text)
  assert names[4:6] == ["at equal length %", "by probabilities %"]
  # Every length won half of its ten prompts: length changes nothing.
  assert cells[3].startswith("50.0 [")
  assert cells[4].startswith("50.0 [")
  assert cells[5] == "25.0"
  assert "It is a second opinion" in text


def test_overlapping_intervals_are_no_order(tmp_path):
  won = {"base": 12, "sft": 20, "dpo": 18}
  cells = [(m, i < won[m]) for m in won for i in range(40)]
  rows = [
    reported.response(model, None, 0.75, f"p{i % 40:02d}")
    for i, (model, _) in enumerate(cells)
  ]
  verdicts = ["model" if won else "chosen" for _, won in cells]
  text = judged(tmp_path, rows, verdicts).texts["report.md"]
  assert "**No**" in text
  assert "**Yes**" not in text
  # Wilson, n = 40, by SciPy: 12 [18.1, 45.4], 20 [35.2, 64.8].
  overlap = "SFT 50.0 [35.2, 64.8] is above base 30.0 [18.1, 45.4]"
  assert f"- T = 0.75: {overlap}, but the intervals overlap." in text
  assert "DPO 45.0 [30.7, 60.2] is not above SFT 50.0 [35.2, 64.8]." in text
  assert "No run has evaluated it." in text


def test_no_verdicts_at_no_temperature_of_interest(tmp_path):
  rows = [
    reported.response(model, None, 0.5, "p0")
    for model in ("base", "sft", "dpo")
  ]
  composed = judged(tmp_path, rows, ["refusal"] * 3)
  assert "Undecided: at no temperature" in composed.texts["report.md"]
  lines = composed.texts["win_rates.csv"].split("\n")
  # Without a verdict: no rate, the whole interval.
  assert lines[1].startswith("base,,0.5,0,nan,0.000000,1.000000,1,")


def test_missing_verdicts_are_bounded_and_have_causes(tmp_path_factory):
  text = (reported.written(tmp_path_factory) / "report.md").read_text()
  assert "> **INCOMPLETE**: 3 of 880 judge calls gave no verdict" in text
  rows = reported.tables(text)
  assert ["timeout &#124; after 30 s", "3"] in rows
  (bounds,) = [row for row in rows if "6.2 to 10.0" in row]
  # 4 prompts of 40 won; both calls on the first and one on the second are
  # missing, so 3 of 39 are left, and 2.5 to 4 of 40 are possible.
  assert bounds == ["base", "", "0.25", "7.7", "6.2 to 10.0", "3", "0"]


def test_an_empty_reference_is_not_part_of_the_data(tmp_path):
  reported.make_run(tmp_path, cells=DPO)
  row = dataclasses.replace(
    reported.response("dpo", None, 1.0, "p99"), chosen=" "
  )
  reported.write_rows(tmp_path / "responses" / "more.jsonl", [row])
  text = reported.text(tmp_path)
  assert "INCOMPLETE" not in text
  # The other 40 prompts are, each with its id, text and chosen response, and
  # every one of these behind its length in bytes.
  texts = ((f"p{i:02d}", reported.PROMPT, " Use a fork.") for i in range(40))
  parts = itertools.chain(*texts)
  data = "".join(f"{len(part)}:{part}" for part in parts)
  digest = hashlib.sha256(data.encode()).hexdigest()
  assert f"Data fingerprint {digest}." in text


def test_the_same_rows_give_the_same_files(tmp_path_factory, tmp_path):
  """The older report's figures, of which one is no longer drawn, are gone."""
  before = reported.written(tmp_path_factory)
  reported.make_run(tmp_path, missing=3)
  (tmp_path / "report").mkdir()
  (tmp_path / "report" / "win_rate_length.png").touch()
  after = report.write(reported.SETTINGS, tmp_path).parent
  files = [
    {path.name: path.read_bytes() for path in directory.iterdir()}
    for directory in (before, after)
  ]
  assert files[0] == files[1]
  figures = ("reward_accuracy", "reward_margins", "training_curves")
  figures += ("win_rate_step", "win_rate_temperature")
  names = ["numbers.json", "report.html", "report.md", "win_rates.csv"]
  for figure in figures:
    names += [f"{figure}.png", f"{figure}.pdf"]
    assert f"]({figure}.png)".encode() in files[0]["report.md"]
  assert sorted(files[0]) == sorted(names)


def test_a_report_by_its_directory_and_its_sections(tmp_path_factory):
  directory = reported.written(tmp_path_factory)
  composed = report.of(directory.parent)
  assert composed.texts["report.md"] == (directory / "report.md").read_text()
  assert "DPO | 1.0 | 40 | 85.0 [" in composed.sections["Win rates"]
  assert "85.0 [" not in composed.sections["Judge health"]
  assert not any("![" in text for text in composed.sections.values())


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_and_not_obeyed(text):
  cell = markdown.literal(text)
  assert not set(cell) & set("|`*_[]\\~$\n\r\u2028\u0085\x0b\x00\u202e")
  # Nothing is left for GitHub to link: the parts of an address are separated.
  visible = cell.replace("<br>", "\n").split("<!-- -->")
  assert not any("://" in part or "www." in part for part in visible)
  assert not any(part[1:].count("@") for part in visible)
  # No other tag is left, and the rest is shown as it was.
  assert "<" not in "".join(visible)
  expected = text.replace("\r\n", "\n").replace("\r", "\n")
  for character in "\u2028\u0085\x0b\x00\u202e\u200b":
    expected = expected.replace(character, f"(U+{ord(character):04X})")
  assert html.unescape("".join(visible)) == expected


def test_hostile_responses_leave_the_tables_whole(tmp_path):
  reported.make_run(tmp_path, text=" " + "\n".join(HOSTILE))
  text = reported.text(tmp_path)
  lines = text.split("\n")
  assert len([line for line in lines if line.startswith("![")]) == 5
  for above, line in itertools.pairwise(lines):
    if above.startswith("|") and line.startswith("|"):
      assert above.count("|") == line.count("|")
  assert "<h1" not in text
  assert "](java" not in text
  headings = [line for line in lines if line.startswith("#")]
  assert len(headings) == 11
  responses = [line for line in lines if line.startswith("| response |")]
  assert len(responses) == 2
  assert "Use a fork." in responses[0]
  assert "<br>second<br>third" in responses[0]


def test_examples_are_responses_to_one_prompt_side_by_side(text):
  rows = reported.tables(text)
  heads = [row for row in rows if row[:2] == ["", "chosen"]]
  assert heads == [["", "chosen", "base", "SFT", "DPO"]] * 2
  responses = [row for row in rows if row[0] == "response"]
  assert responses == [["response", "Use a fork.", *["Beat them."] * 3]] * 2
  verdicts = [row[2:] for row in rows if row[0] == "verdict"]
  assert len(verdicts) == 2
  for cell in itertools.chain(*verdicts):
    first, second = cell.split("<br>")
    assert first in ("won when shown first", "lost when shown first")
    assert second == first.replace("first", "second")


def test_long_texts_are_cut(tmp_path):
  text = " start " + "x" * 5000 + " finish"
  reported.make_run(tmp_path, text=text, cells=DPO)
  text = reported.text(tmp_path)
  assert "start xxx" in text
  assert "finish" not in text
  assert "… (4413 characters)" in text


def test_nothing_to_report_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"verdicts has no verdict rows.*judge"):
    report.write(reported.SETTINGS, tmp_path)
  reported.make_run(tmp_path, cells=DPO)
  (tmp_path / "sft" / "metrics.jsonl").unlink()
  with pytest.raises(ValueError, match=r"metrics\.jsonl is missing"):
    report.write(reported.SETTINGS, tmp_path)
  assert not (tmp_path / "report").exists()


ROW = reported.response("dpo", None, 1.0, "p00")


@pytest.mark.parametrize(
  ("row", "message"),
  [
    (reported.verdict(ROW, "model_first", "tie", judge="gpt"), "gpt, oracle"),
    (ROW, r"are duplicated.*p00"),
    (
      dataclasses.replace(ROW, chosen=" Another.", sample_id=1),
      r"prompt 'p00' .*several texts",
    ),
  ],
)
def test_rows_that_do_not_belong_together_are_refused(tmp_path, row, message):
  reported.make_run(tmp_path, cells=DPO)
  folder = "responses" if isinstance(row, records.Response) else "verdicts"
  reported.write_rows(tmp_path / folder / "more.jsonl", [row])
  with pytest.raises(ValueError, match=message):
    report.compose(FINALS, tmp_path)


@pytest.mark.parametrize(
  ("file", "line", "message"),
  [
    ("verdicts/all.jsonl", '{"key": "cut', r"all\.jsonl:81"),
    ("dpo/metrics.jsonl", '{"loss": 2}\n', r"metrics\.jsonl:62"),
  ],
)
def test_a_malformed_row_is_named(tmp_path, file, line, message):
  reported.make_run(tmp_path, cells=DPO)
  with open(tmp_path / file, "a") as target:
    target.write(line)
  with pytest.raises(ValueError, match=message):
    report.compose(reported.SETTINGS, tmp_path)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("runs", ("dpo", "dpo"), "names a run twice"),
    ("examples", -1, "examples=-1"),
    ("first_slot_limit", 0.4, "0.4"),
    ("confidence", 1.5, "1.5"),
  ],
)
def test_settings_out_of_range_are_refused(field, value, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    dataclasses.replace(reported.SETTINGS, **{field: value})


@pytest.fixture
def no_figures(monkeypatch):
  """Writes empty files for figures, which take most of the time."""
  monkeypatch.setattr(
    report.figures.Figure, "save", lambda figure, path: path.touch()
  )
  monkeypatch.setattr(report.page, "with_images", lambda text, figures: text)


def test_a_second_criterion_has_a_report_of_its_own(
  tmp_path, capsys, no_figures
):
  reported.make_run(tmp_path, cells=DPO)
  path = tmp_path / "verdicts-harmless" / "all.jsonl"
  shutil.copytree(tmp_path / "verdicts", path.parent)

  def tie(row):
    first = row.prompt_id == "p00"
    return dataclasses.replace(row, verdict="tie") if first else row

  reported.edit(path, records.Verdict, tie)
  first = report.write(FINALS, tmp_path)
  arguments = [str(tmp_path), f"--verdicts={path.parent.name}"]
  assert report.main([*arguments, "--title=Second"]) == 0
  second = tmp_path / "report-harmless" / "report.md"
  # 34 of 40 prompts, of which one is a tie in the second.
  assert "| DPO | 1.0 | 40 | 85.0 [" in first.read_text()
  assert "| DPO | 1.0 | 40 | 83.8 [" in second.read_text()
  assert verify.main([str(tmp_path)]) == 0
  assert capsys.readouterr().out.count("all numbers agree") == 2
  assert report.main([*arguments, "--resamples=300"]) == 0
  assert second.read_text().startswith("# Second\n")


def test_the_command_line(tmp_path, capsys, no_figures):
  reported.make_run(tmp_path, missing=1, cells=DPO)
  assert report.main([str(tmp_path), "--title=Mine", "--resamples=300"]) == 0
  assert capsys.readouterr().out.strip().endswith("report.md")
  # Flags that are not given are those of the last report.
  path = tmp_path / "report" / "report.md"
  path.unlink()
  assert report.main([str(tmp_path), "--strict"]) == 1
  assert "report.md is flagged: INCOMPLETE" in capsys.readouterr().err
  assert path.read_text().startswith("# Mine\n\n> **INCOMPLETE**")
  assert report.main([str(tmp_path), "--runs", "nothing"]) == 2
  assert "metrics.jsonl is missing" in capsys.readouterr().err
  assert report.main([str(tmp_path), "--gold_floor=7"]) == 2
  reported.make_run(tmp_path / "clean", cells=DPO)
  assert report.main([str(tmp_path / "clean"), "--strict"]) == 0
