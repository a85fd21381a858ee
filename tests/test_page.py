"""report.html holds what the rows say, takes nothing from elsewhere, and shows
any text without obeying it."""

import ast
import base64
import hashlib
import json
import pathlib
import re
import xml.etree.ElementTree

import paged
import pytest
import reported

from dpo_jax.io import markdown, records
from dpo_jax.report import compose, figures, page, report
from dpo_jax.report.page import browse, prose

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  reported.make_run(path, missing=3)
  return path


@pytest.fixture(scope="module")
def text(workdir):
  return compose.compose(reported.SETTINGS, workdir).texts["report.html"]


@pytest.fixture(scope="module")
def written(workdir):
  return report.write(reported.SETTINGS, workdir).with_name("report.html")


def test_the_page_holds_the_rows(workdir, text):
  found = paged.data(text)
  cells = found["head"]["cells"]
  names = {name: model for model, name in paged.NAMES.items()}
  calls, answers = {}, {}
  for prompt_id, turns, prompt, chosen, rows, subset in found["prompts"]:
    assert (turns, subset) == (1, "")
    for cell, sample, response, tokens, finish, outcome, _, judged in rows:
      name, step, temperature = cells[cell]
      unit = (prompt_id, names[name], step, temperature, sample)
      answers[unit] = (prompt, chosen, response, tokens, finish)
      for order, verdict, score, raw, error in judged:
        calls[(*unit, order, "")] = (verdict, score, raw, error)
      decided = {call[1] for call in judged} - {"missing"}
      expected = {("model",): "won", ("chosen",): "lost", (): "none"}
      outcomes = found["head"]["outcomes"]
      assert outcomes[outcome] == expected[tuple(decided)]
  rows = records.read(workdir / "verdicts" / "all.jsonl", records.Verdict)
  assert calls == {r.unit: (r.verdict, r.score, r.raw, r.error) for r in rows}
  responses = [
    row
    for path in (workdir / "responses").glob("*.jsonl")
    for row in records.read(path, records.Response)
  ]
  assert answers == {
    r.unit: (r.prompt, r.chosen, r.response, r.token_count, r.finish_reason)
    for r in responses
  }


def test_final_models_come_before_checkpoints(text):
  cells = paged.data(text)["head"]["cells"]
  finals = [[m, None, t] for m in ("base", "SFT", "DPO") for t in (0.25, 0.75)]
  assert [cell for cell in cells if cell[2] != 1.0] == finals
  assert cells[-2:] == [["DPO", 50, 1.0], ["DPO", 100, 1.0]]


def test_tables_and_sentences_are_those_of_the_markdown(workdir, text):
  lines = compose.compose(reported.SETTINGS, workdir).texts["report.md"]
  shown = re.sub(r"<[^>]*>", " ", text.partition('<section id="browse">')[0])
  numbers = re.findall(r"\d+\.\d+", shown)
  for section in ("## Win rates", "## Judge health", "## Answers"):
    body = lines.partition(f"{section}\n")[2].partition("\n## ")[0]
    for line in body.split("\n"):
      # A bare number of a table's cell, or of a sentence.
      for number in re.findall(r"\d+\.\d+", line):
        assert number in numbers


def test_nothing_is_taken_from_elsewhere(written):
  parsed = paged.Parsed(written.read_text())
  for tag, attributes in parsed.elements:
    assert tag not in {"link", "iframe", "object", "embed", "base"}
    for name, value in attributes.items():
      assert not name.startswith("on"), (tag, name)
      assert name not in {"style", "action", "xlink:href"}, (tag, name)
      if name in {"src", "srcset"}:
        assert value.startswith("data:image/svg+xml;base64,")
      if name == "href":
        assert value.startswith("#")
  (style,) = parsed.styles
  (_, (attributes, script)) = parsed.scripts
  assert not attributes
  for source in (style, script):
    assert not re.search(r"https?:|url\(|@import|\bimport\(|fetch\(", source)
    assert "innerHTML" not in source
    assert "eval(" not in source
  (policy,) = [
    attributes["content"]
    for tag, attributes in parsed.elements
    if attributes.get("http-equiv") == "Content-Security-Policy"
  ]
  digests = [
    base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    for source in (style, script)
  ]
  assert policy.split("; ") == [
    "default-src 'none'",
    f"style-src 'sha256-{digests[0]}'",
    f"script-src 'sha256-{digests[1]}'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
  ]


def test_hostile_texts_add_no_element_and_come_back_whole():
  def made(texts):
    prompts = [
      browse.Prompt(
        f"id{index} {text}",
        f"\n\nHuman: {text}\n\nAssistant:",
        text,
        (paged.answer(("dpo", None, 1.0), text, ["model"], judge=text),),
      )
      for index, text in enumerate(texts)
    ]
    literal = markdown.literal(texts[0])
    lines = [f"> **FLAG**: {literal}"]
    table = markdown.table(("a", literal), [(literal, "1")])
    figure = figures.Figure("x.png", texts, print, literal, ends=texts[0])
    sections = [page.Section("x", literal, [literal], [figure], table)]
    return prompts, paged.render(prompts, texts[0], lines, sections)

  plain = paged.Parsed(made(["text"] * len(paged.HOSTILE))[1])
  for first in range(len(paged.HOSTILE)):
    texts = [*paged.HOSTILE[first:], *paged.HOSTILE[:first]]
    prompts, text = made(texts)
    tags = [tag for tag, _ in paged.Parsed(text).elements if tag != "br"]
    assert tags == [tag for tag, _ in plain.elements]
    for row, prompt in zip(paged.data(text)["prompts"], prompts, strict=True):
      assert row[0] == prompt.id
      assert row[2:4] == [prompt.text, prompt.chosen]
      assert row[4][0][2] == prompt.answers[0].text
      assert row[4][0][7][0][3] == prompt.answers[0].calls[0].text


def test_markup_of_a_report_is_html_and_that_of_texts_is_not():
  shown = prose.html(
    [
      "### Is base < SFT?",
      "",
      "**Yes** <b>no</b> ![image](x.png)",
      "",
      *markdown.table(("name", "n"), [("a", "1.5 [1, 2]"), ("b", "n/a")]),
      "",
      markdown.literal("<i>one</i>\n[two](http://x.example) **3**"),
    ]
  )
  assert "<h3>Is base &lt; SFT?</h3>" in shown
  assert "<strong>Yes</strong> &lt;b&gt;no&lt;/b&gt; </p>" in shown
  assert '<th scope="col">name</th>\n<th scope="col" class="number">' in shown
  assert '<td class="number">1.5 [1, 2]</td>' in shown
  last = shown.rpartition("<p>")[2]
  visible = re.sub(r"<br>|<!-- -->", "", last)
  assert visible.startswith("&lt;i&gt;one&lt;/i&gt;[two](http://x.example) **3")


@pytest.mark.parametrize(
  ("verdicts", "expected"),
  [
    ([], "none"),
    (["missing", "refusal"], "none"),
    (["model"], "won"),
    (["model", "model"], "won"),
    (["model", "missing"], "won"),
    (["chosen", "chosen"], "lost"),
    (["model", "chosen"], "split"),
    (["tie", "tie"], "tie"),
    (["tie", "model"], "tie"),
  ],
)
def test_an_outcome_is_what_all_calls_say(verdicts, expected):
  assert browse.outcome(verdicts) == expected


@pytest.mark.parametrize(
  ("text", "chosen", "verdicts", "expected"),
  [
    ("a", "b", ["model", "model"], ()),
    ("a", "b", ["model", "chosen"], ("orders disagree",)),
    ("a", "b", [], ("not judged",)),
    ("a", " ", [], ("empty chosen answer",)),
    (" ", "b", ["chosen"], ("empty answer",)),
    (" b", "b ", ["tie"], ("same text as chosen",)),
    ("a", "b", ["model", "missing"], ("a call without a verdict",)),
    ("a", "b", ["refusal", "refusal"], ("the judge refused",)),
  ],
)
def test_what_is_odd_is_flagged(text, chosen, verdicts, expected):
  assert browse.flagged(text, chosen, verdicts) == expected


def test_figures_are_images_of_the_rows_in_light_and_dark(written):
  numbers = json.loads(written.with_name("numbers.json").read_text())
  elements = paged.Parsed(written.read_text()).elements
  shown = [a for tag, a in elements if tag == "img"]
  sources = [a for tag, a in elements if tag == "source"]
  assert [image["alt"] for image in shown] == [
    # 4, 16 and 34 of 40 prompts were won at every temperature; three calls on
    # the first two prompts of base at 0.25 are missing: 3 of 39.
    "Win rate of the final models against sampling temperature."
    " base: 7.7% at T = 0.25 to 10.0% at T = 1.0."
    " SFT: 40.0% at T = 0.25 to 40.0% at T = 1.0."
    " DPO: 85.0% at T = 0.25 to 85.0% at T = 1.0.",
    "Win rate of checkpoints against the training step."
    " DPO, T = 1.0: 45.0% at step 50 to 75.0% at step 100.",
  ]
  names = ("win_rate_temperature.png", "win_rate_step.png")
  for name, image, dark in zip(names, shown, sources, strict=True):
    assert dark["media"] == "(prefers-color-scheme: dark)"
    # The labels' colors on light and on dark.
    for address, color in (
      (image["src"], "222222"),
      (dark["srcset"], "ebe7de"),
    ):
      kind, _, data = address.partition(",")
      assert kind == "data:image/svg+xml;base64"
      svg = base64.b64decode(data).decode()
      xml.etree.ElementTree.fromstring(svg)
      assert numbers["figures"][name]["data"] in svg
      assert f"fill: #{color}" in svg
      assert "<script" not in svg
      assert 'href="http' not in svg


def test_nothing_to_draw_is_no_figure():
  text = paged.render([], sections=[page.Section("x", "X", ["A line."])])
  assert "A line." in text
  assert "<figure" not in text


def test_a_wheel_carries_the_files_of_the_page():
  tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
  (patterns,) = [
    ast.literal_eval(keyword.value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    for keyword in node.keywords
    if keyword.arg == "package_data"
  ]
  for path in (ROOT / "dpo_jax").rglob("*"):
    if path.is_file() and path.suffix not in (".py", ".pyc"):
      assert any(
        path.match(f"{package.replace('.', '/')}/{pattern}")
        for package, names in patterns.items()
        for pattern in names
      ), path
