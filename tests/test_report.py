"""The report is made of the rows, and shows any text without obeying it."""

import csv
import dataclasses
import hashlib
import html.parser
import itertools

import matplotlib
import numpy as np
import PIL.Image
import pytest
import reported

from dpo_jax import winrates
from dpo_jax.io import markdown, records
from dpo_jax.report import compose, figures, report

COLUMNS = ("model", "step", "temperature", "n", "win_rate", "low", "high")
# Each tries to leave its cell, to add markup, or to hide something.
HOSTILE = [
  "a | b | c",
  "first\nsecond\r\nthird\rfourth",
  "<script>alert(1)</script> <img src=x onerror=alert(1)>",
  "</td></table><h1>Out</h1> <!-- comment",
  "`code` ``` fence ~~~",
  "[link](javascript:alert(1)) ![image](http://evil.example/x.png)",
  "[ref]: http://evil.example\n# Heading\n> quote\n- item\n1. item\n---",
  "https://evil.example/path www.evil.example mail@evil.example @someone",
  "**bold** _it_ ~~no~~ $x^2$ \\| &lt; &#124; {#id}",
  "line\u2028separator\u2029paragraph\u0085next\x0bvertical\x00nul\x1besc",
  "right\u202eto left\u2066 \u200bzero\ufeff",
  "日本語 🙂‍↔️ \u05e9\u05dc\u05d5\u05dd",
  "",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  reported.make_run(workdir)
  return report.write(reported.SETTINGS, workdir)


def read(path):
  return path.read_bytes().decode()


def tables(text):
  """Cells of all table rows, split as GitHub does: at every bare pipe."""
  lines = [line for line in text.split("\n") if line.startswith("|")]
  return [line.strip("|").split("|") for line in lines]


def test_the_csv_has_the_rates_of_the_rows(finished):
  with open(finished.parent / "win_rates.csv", newline="") as file:
    header, *rows = csv.reader(file)
  assert header[:7] == list(COLUMNS)
  assert header[7:9] == ["prompts", "interval"]
  assert [row[:3] for row in rows] == [
    [model, "" if step is None else str(step), str(temperature)]
    for model, step, temperature, _ in reported.cells()
  ]
  for row, (_, _, _, won) in zip(rows, reported.cells(), strict=True):
    assert row[3] == "40"
    rate, low, high = map(float, row[4:7])
    assert rate == pytest.approx(won / 40)
    assert 0 <= low < rate < high <= 1


def test_the_report_says_what_was_judged_and_found(finished):
  text = read(finished)
  assert text.startswith("# A small run\n")
  assert "Judge oracle, template t1: 880 calls on 440 comparisons" in text
  assert "over 40 prompts" in text
  assert "95% intervals: Wilson score at the effective number" in text
  assert "**Yes**" in text
  assert "By subset" not in text
  assert "(0.75, 1.0), base < SFT < DPO" in text
  assert "INCOMPLETE" not in text
  assert "INCONSISTENT" not in text
  # 0.725 of 200 pairs: the Wilson interval by SciPy is [0.6593, 0.7823].
  assert "72.5% of 200 pairs, 95% interval [65.9, 78.2] (step 59)" in text
  rows = tables(text)
  stripped = [[cell.strip() for cell in row] for row in rows]
  (dpo,) = [r for r in stripped if r[:3] == ["DPO", "1.0", "40"]]
  assert dpo[3].startswith("85.0 [")
  assert dpo[4:] == ["0", "0", "50.0"]
  assert ["same verdict in both orders, %", "100.0"] in stripped
  assert ["DPO", "train, kept", "990"] in stripped
  assert ["DPO", "train, quarantined: empty &#124; row", "3"] in stripped
  answers = ["DPO", "100", "1.0", "40", "7.0", "11", "12"]
  assert [*answers, "100.0", "0.0", "0.0", "0", "0", "n/a"] in stripped


def test_subsets_have_rates_of_their_own(tmp_path):
  """Of 40 prompts the first 10 are helpful-base: DPO won on all of them."""
  reported.make_run(tmp_path)
  for path in (tmp_path / "responses").iterdir():
    rows = records.read(path, records.Response)
    named = [
      dataclasses.replace(
        row, subset="helpful-base" if at < 10 else "harm | less"
      )
      for at, row in enumerate(rows)
    ]
    path.write_bytes(b"".join(map(records.encode, named)))
  text = reported.text(tmp_path)
  section = text.partition("### By subset")[2].partition("###")[0]
  rows = [[cell.strip() for cell in row] for row in tables(section)]
  assert len(rows) == 2 + 2 * 9
  found = {tuple(row[:4]): row[4].split()[0] for row in rows[2:]}
  assert found["helpful-base", "DPO", "1.0", "10"] == "100.0"
  # 24 of the other 30; SFT won on 16 in all, and base on 4 of the first.
  assert found["harm &#124; less", "DPO", "1.0", "30"] == "80.0"
  assert found["helpful-base", "SFT", "0.25", "10"] == "100.0"
  assert found["harm &#124; less", "SFT", "0.25", "30"] == "20.0"
  assert found["helpful-base", "base", "0.75", "10"] == "40.0"
  assert found["harm &#124; less", "base", "0.75", "30"] == "0.0"


def test_the_report_compares_models_prompt_by_prompt(finished):
  text = read(finished)
  rows = [[cell.strip() for cell in row] for row in tables(text)]
  (row,) = [r for r in rows if r[:2] == ["SFT - base", "1.0"]]
  # SFT won on the 4 prompts that base won on, and on 12 more: +30 points, and
  # 12 of 12 one way have p = 2 / 2^12, times 3 temperatures.
  assert row[2] == "40"
  assert row[3].startswith("+30.0 [+")
  assert row[4:] == ["12 : 0", "0.0005", "0.0015"]
  # 18 and 30 prompts of 40 at steps 50 and 100; slopes are 0 or 1.
  assert "DPO with training: it improves. One least-squares slope" in text
  assert "from step 50 to 100 the rate changes by +30.0 [+" in text


def test_a_flat_training_is_said_to_be_undecided(tmp_path):
  reported.make_run(tmp_path)
  path = tmp_path / "verdicts" / "all.jsonl"
  rows = records.read(path, records.Verdict)
  won = {r.prompt_id: r.verdict for r in rows if r.step == 50}
  rows = [
    dataclasses.replace(r, verdict=won[r.prompt_id]) if r.step == 100 else r
    for r in rows
  ]
  path.write_bytes(b"".join(map(records.encode, rows)))
  text = reported.text(tmp_path)
  assert "DPO with training: it cannot be told whether it improves." in text
  assert "the rate changes by 0.0 [" in text
  assert "p = n/a" in text


def test_second_columns_stand_only_where_they_can_be_told(tmp_path, finished):
  text = read(finished)
  assert "at equal length" not in text
  assert "by probabilities" not in text
  rows = [
    reported.response("dpo", None, 1.0, f"p{i}", " long" * (1 + i % 3))
    for i in range(30)
  ]
  reported.write_rows(tmp_path / "responses" / "r.jsonl", rows)
  calls = [
    reported.verdict(
      row, "model_first", "model" if i % 2 else "chosen", score=0.25
    )
    for i, row in enumerate(rows)
  ]
  reported.write_rows(tmp_path / "verdicts" / "v.jsonl", calls)
  settings = dataclasses.replace(reported.SETTINGS, runs=())
  text = reported.text(tmp_path, settings)
  header, _, row = [x for x in text.split("\n") if x.startswith("| ")][:3]
  names = [cell.strip() for cell in header.strip("|").split("|")]
  cells = [cell.strip() for cell in row.strip("|").split("|")]
  assert names[3:6] == [
    "win rate %",
    "at equal length %",
    "by probabilities %",
  ]
  # Every length won half of its ten prompts: length changes nothing.
  assert cells[3].startswith("50.0 [")
  assert cells[4].startswith("50.0 [")
  assert cells[5] == "25.0"
  assert "It is a second opinion" in text


def test_figures_are_linked_relatively_and_decode(finished):
  text = read(finished)
  grey, blue, orange = (0x73, 0x73, 0x73), (0, 0x72, 0xB2), (0xD5, 0x5E, 0)
  for name, width, colors in [
    # A column of 3.25 inches at 300 dots an inch; two and their gap, 6.75.
    ("win_rate_temperature.png", 975, (grey, blue, orange)),
    ("win_rate_step.png", 975, (blue,)),
    ("training_curves.png", 2025, (blue, orange)),
    ("reward_margins.png", 975, (grey,)),
    ("reward_accuracy.png", 975, (blue, orange)),
  ]:
    assert f"]({name})" in text
    with PIL.Image.open(finished.parent / name) as image:
      assert image.size[0] == width
      assert width / 3 < image.size[1] < width
      assert image.info["dpi"][0] == pytest.approx(300, abs=1)
      pixels = np.asarray(image.convert("RGB"))
    # Every line is there: a marker alone fills hundreds of pixels.
    for color in colors:
      assert (pixels == color).all(axis=-1).sum() > 500


def test_the_same_rows_give_the_same_bytes(finished):
  before = {p.name: p.read_bytes() for p in finished.parent.iterdir()}
  report.write(reported.SETTINGS, finished.parent.parent)
  after = {p.name: p.read_bytes() for p in finished.parent.iterdir()}
  assert before == after
  assert sorted(before) == [
    "numbers.json",
    "report.html",
    "report.md",
    "reward_accuracy.pdf",
    "reward_accuracy.png",
    "reward_margins.pdf",
    "reward_margins.png",
    "training_curves.pdf",
    "training_curves.png",
    "win_rate_step.pdf",
    "win_rate_step.png",
    "win_rate_temperature.pdf",
    "win_rate_temperature.png",
    "win_rates.csv",
  ]


def test_a_report_is_had_by_its_path_and_by_its_sections(finished):
  made = report.of(finished.parent.parent)
  assert made.texts["report.md"] == read(finished)
  assert "DPO | 1.0 | 40 | 85.0 [" in made.sections["Win rates"]
  assert "85.0 [" not in made.sections["Judge health"]
  assert not any("![" in text for text in made.sections.values())


def test_missing_verdicts_are_visible(tmp_path):
  reported.make_run(tmp_path, missing=3)
  text = reported.text(tmp_path)
  assert "> **INCOMPLETE**: 3 of 880 judge calls gave no verdict" in text
  stripped = [[cell.strip() for cell in row] for row in tables(text)]
  assert ["timeout &#124; after 30 s", "3"] in stripped
  (bounds,) = [row for row in stripped if "6.2 to 10.0" in row]
  # 4 prompts of 40 won; both calls on the first and one on the second are
  # missing, so 3 of 39 are left, and 2.5 to 4 of 40 are possible.
  assert bounds == ["base", "", "0.25", "7.7", "6.2 to 10.0", "3", "0"]


def test_answers_without_a_call_are_visible(tmp_path):
  reported.make_run(tmp_path)
  path = tmp_path / "verdicts" / "all.jsonl"
  lines = path.read_bytes().split(b"\n")
  path.write_bytes(b"\n".join(lines[5:]))
  text = reported.text(tmp_path)
  assert "> **INCOMPLETE**: 5 judge calls were never made" in text


def test_an_empty_reference_needs_no_verdict(tmp_path):
  reported.make_run(tmp_path)
  row = dataclasses.replace(
    reported.response("dpo", None, 1.0, "p99"), chosen=" "
  )
  reported.write_rows(tmp_path / "responses" / "more.jsonl", [row])
  text = reported.text(tmp_path)
  assert "INCOMPLETE" not in text
  # Nor is it part of what was asked: the other 40 prompts are, each with its
  # id, text and chosen answer, every one behind its length in bytes.
  parts = [
    part
    for i in range(40)
    for part in (f"p{i:02d}", reported.PROMPT, " Use a fork.")
  ]
  data = "".join(f"{len(part)}:{part}" for part in parts)
  digest = hashlib.sha256(data.encode()).hexdigest()
  assert f"Data fingerprint {digest}." in text


def test_verdicts_about_unknown_answers_are_visible(tmp_path):
  reported.make_run(tmp_path)
  (tmp_path / "responses" / "dpo-100-1.0.jsonl").unlink()
  text = reported.text(tmp_path)
  assert "> **INCONSISTENT**: 80 judge calls" in text


def test_overlap_is_said_to_be_overlap(tmp_path):
  finals = [("base", 12), ("sft", 20), ("dpo", 18)]
  rows = [
    (reported.response(model, None, 0.75, f"p{i:02d}"), i < won)
    for model, won in finals
    for i in range(40)
  ]
  reported.write_rows(
    tmp_path / "responses" / "r.jsonl", [row for row, _ in rows]
  )
  calls = [
    reported.verdict(row, "model_first", "model" if won else "chosen")
    for row, won in rows
  ]
  reported.write_rows(tmp_path / "verdicts" / "v.jsonl", calls)
  settings = dataclasses.replace(reported.SETTINGS, runs=())
  # An earlier report's figure of checkpoints that are gone.
  (tmp_path / "report").mkdir()
  (tmp_path / "report" / "win_rate_step.png").touch()
  path = report.write(settings, tmp_path)
  text = read(path)
  assert "**No**" in text
  assert "**Yes**" not in text
  # Wilson, n = 40, by SciPy: 12 [18.1, 45.4], 20 [35.2, 64.8].
  overlap = "SFT 50.0 [35.2, 64.8] is above base 30.0 [18.1, 45.4]"
  assert f"- T = 0.75: {overlap}, but the intervals overlap." in text
  assert "DPO 45.0 [30.7, 60.2] is not above SFT 50.0 [35.2, 64.8]." in text
  assert "No run has evaluated it." in text
  assert not (path.parent / "win_rate_step.png").exists()
  assert not (path.parent / "training_curves.png").exists()


def test_three_stages_below_0_7_leave_the_question_open(tmp_path):
  rows = [
    reported.response(model, None, 0.5, "p0")
    for model in ("base", "sft", "dpo")
  ]
  reported.write_rows(tmp_path / "responses" / "r.jsonl", rows)
  calls = [reported.verdict(row, "model_first", "refusal") for row in rows]
  reported.write_rows(tmp_path / "verdicts" / "v.jsonl", calls)
  settings = dataclasses.replace(reported.SETTINGS, runs=())
  made = compose.compose(settings, tmp_path)
  assert "It cannot be told" in made.texts["report.md"]
  lines = made.texts["win_rates.csv"].split("\n")
  # Nothing was read: no rate, the whole interval, and no crash.
  assert lines[1].startswith("base,,0.5,0,nan,0.000000,1.000000,1,")


class Shown(html.parser.HTMLParser):
  """What a browser would show of a cell, and the tags it would obey."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.text, self.tags = "", []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.text += "\n" if tag == "br" else ""

  def handle_endtag(self, tag):
    self.tags.append(tag)

  def handle_data(self, data):
    self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_and_not_obeyed(text):
  cell = markdown.literal(text)
  assert not set(cell) & set("|`*_[]\\~$\n\r\u2028\u2029\u0085\x0b\x00\u202e")
  shown = Shown(cell)
  assert set(shown.tags) <= {"br"}
  # Nothing is left for GitHub to link: the parts of an address stand apart.
  visible = cell.replace("<br>", "").split("<!-- -->")
  assert not any("://" in part or "www." in part for part in visible)
  assert not any(part[1:].count("@") for part in visible)
  expected = text.replace("\r\n", "\n").replace("\r", "\n")
  for character in "\u2028\u2029\u0085\x0b\x00\x1b\u202e\u2066\u200b\ufeff":
    expected = expected.replace(character, f"(U+{ord(character):04X})")
  assert shown.text == expected


def test_hostile_answers_leave_the_tables_whole(tmp_path):
  reported.make_run(tmp_path, text=" " + "\n".join(HOSTILE[:-1]))
  text = reported.text(tmp_path)
  images = [line for line in text.split("\n") if line.startswith("![")]
  assert len(images) == 5
  lines = text.split("\n")
  for above, line in itertools.pairwise(lines):
    if above.startswith("|") and line.startswith("|"):
      assert above.count("|") == line.count("|")
  assert "<script" not in text
  assert "<h1" not in text
  assert "](java" not in text
  headings = [line for line in lines if line.startswith("#")]
  assert len(headings) == 10
  (answer,) = [line for line in lines if line.startswith("| answer")][:1]
  assert "Use a fork." in answer
  assert "U+2028" in answer or "characters)" in answer


def test_long_texts_are_cut_where_it_matters_least(tmp_path):
  reported.make_run(tmp_path, text=" start " + "x" * 5000 + " finish")
  text = reported.text(tmp_path)
  assert "start xxx" in text
  assert "finish" not in text
  assert "… (4413 characters)" in text


def test_examples_are_answers_to_one_prompt_side_by_side(finished):
  rows = [[cell.strip() for cell in row] for row in tables(read(finished))]
  heads = [row for row in rows if row[:2] == ["", "chosen"]]
  assert heads == [["", "chosen", "base", "SFT", "DPO"]] * 2
  answers = [row for row in rows if row[0] == "answer"]
  assert answers == [["answer", "Use a fork.", *["Beat them."] * 3]] * 2
  verdicts = [row[2:] for row in rows if row[0] == "verdict"]
  assert len(verdicts) == 2
  for model_verdicts in verdicts:
    for cell in model_verdicts:
      first, second = cell.split("<br>")
      assert first in ("won when shown first", "lost when shown first")
      assert second == first.replace("first", "second")


def test_nothing_to_report_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"verdicts has no verdict rows.*judge"):
    report.write(reported.SETTINGS, tmp_path)
  (tmp_path / "verdicts").mkdir()
  (tmp_path / "verdicts" / "empty.jsonl").touch()
  with pytest.raises(ValueError, match=r"verdicts has no verdict rows.*judge"):
    report.write(reported.SETTINGS, tmp_path)
  reported.make_run(tmp_path)
  (tmp_path / "sft" / "metrics.jsonl").unlink()
  with pytest.raises(ValueError, match=r"metrics\.jsonl is missing"):
    report.write(reported.SETTINGS, tmp_path)
  assert not (tmp_path / "report").exists()


def test_rows_that_do_not_belong_together_are_refused(tmp_path):
  reported.make_run(tmp_path)
  row = reported.response("dpo", None, 1.0, "p99")
  extra = tmp_path / "verdicts" / "extra.jsonl"
  reported.write_rows(
    extra, [reported.verdict(row, "model_first", "model", judge="gpt")]
  )
  with pytest.raises(ValueError, match="gpt, oracle"):
    report.write(reported.SETTINGS, tmp_path)
  extra.unlink()
  again = tmp_path / "responses" / "again.jsonl"
  reported.write_rows(again, [reported.response("dpo", None, 1.0, "p00")])
  with pytest.raises(ValueError, match=r"stand more than once.*p00"):
    report.write(reported.SETTINGS, tmp_path)


def test_a_malformed_row_is_named(tmp_path):
  reported.make_run(tmp_path)
  path = tmp_path / "verdicts" / "all.jsonl"
  path.write_bytes(path.read_bytes() + b'{"key": "cut')
  with pytest.raises(ValueError, match=r"all\.jsonl:881"):
    report.write(reported.SETTINGS, tmp_path)


def test_a_malformed_metric_is_named(tmp_path):
  reported.make_run(tmp_path)
  path = tmp_path / "dpo" / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 1}\n{"loss": 2}\n')
  with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
    report.write(reported.SETTINGS, tmp_path)


@pytest.mark.parametrize(
  "run", ["../../x", "/etc", "a/b", "a\0b", "x" * 300, "", ".."]
)
def test_run_names_stay_inside_the_working_directory(run):
  with pytest.raises(ValueError, match="must be the name of a directory"):
    dataclasses.replace(reported.SETTINGS, runs=(run,))


@pytest.mark.parametrize(
  "changes", [{"examples": -1}, {"seed": -1}, {"runs": ("dpo", "dpo")}]
)
def test_settings_out_of_range_are_refused(changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    dataclasses.replace(reported.SETTINGS, **changes)


def rate(model, step, temperature, n=40):
  calls = [
    reported.verdict(
      reported.response(model, step, temperature, f"p{i}"),
      "model_first",
      "model",
    )
    for i in range(n)
  ]
  (found,) = winrates.win_rates(calls, winrates.Settings())
  return found


@pytest.mark.parametrize("count", [0, 1, 9])
def test_figures_of_any_number_of_lines(tmp_path, count):
  finals = [rate(f"model {i} $x$", None, 1.0) for i in range(count)]
  steps = [rate("dpo", 100 * i, 1.0) for i in range(count)]
  for draw, rates in (
    (figures.win_rate_by_temperature, finals),
    (figures.win_rate_by_step, steps),
  ):
    path = draw(rates, tmp_path / "figure.png")
    with PIL.Image.open(path) as image:
      assert image.size == (975, 690)


def test_figures_leave_the_settings_of_matplotlib_alone(tmp_path):
  with matplotlib.rc_context({"font.size": 23.0}):
    figures.training_curves({"sft": []}, tmp_path / "curves.png")
    assert matplotlib.rcParams["font.size"] == 23.0
  with PIL.Image.open(tmp_path / "curves.png") as image:
    assert np.asarray(image.convert("L")).min() < 100
