"""report.html holds what the rows say, loads nothing, and shows any text as
text."""

import base64
import dataclasses
import hashlib
import json
import re
import xml.etree.ElementTree

import paged
import pytest
import reported

from dpo_jax.io import markdown, records
from dpo_jax.report import figures, page
from dpo_jax.report.page import browse


@pytest.fixture
def directory(tmp_path_factory):
  return reported.written(tmp_path_factory)


@pytest.fixture
def text(directory):
  return (directory / "report.html").read_text()


def test_the_browser_has_all_rows(directory, text):
  names = {"base": "base", "SFT": "sft", "DPO": "dpo"}
  calls, responses = {}, {}
  for prompt in paged.data(text):
    assert prompt["subset"] == ""
    for row in prompt["responses"]:
      cell = (names[row["model"]], row["step"], row["temperature"])
      unit = (prompt["id"], *cell, row["sample"])
      texts = (prompt["text"], prompt["chosen"], row["text"])
      responses[unit] = (*texts, row["tokens"], row["finish"])
      for call in row["calls"]:
        fields = ("verdict", "score", "reply", "error")
        calls[(*unit, call["order"], "")] = tuple(call[f] for f in fields)
      decided = {call["verdict"] for call in row["calls"]} - {"missing"}
      expected = {("model",): "won", ("chosen",): "lost", (): "none"}
      assert row["outcome"] == expected[tuple(decided)]
  workdir = directory.parent
  rows = records.read(workdir / "verdicts" / "all.jsonl", records.Verdict)
  assert calls == {r.unit: (r.verdict, r.score, r.raw, r.error) for r in rows}
  assert responses == {
    r.unit: (r.prompt, r.chosen, r.response, r.token_count, r.finish_reason)
    for path in (workdir / "responses").glob("*.jsonl")
    for r in records.read(path, records.Response)
  }


def test_final_models_come_before_checkpoints():
  # In the order of the page.
  cells = [
    ("base", None, 0.7),
    ("sft", None, 0.7),
    ("dpo", None, 0.7),
    ("dpo", None, 1.0),
    ("aaa", None, 0.7),
    ("sft", 9, 0.7),
    ("dpo", 7, 0.7),
    ("dpo", 50, 0.7),
  ]
  rows = [reported.response(*cell, "p0") for cell in reversed(cells)]
  (prompt,) = browse.prompts(rows, [])
  fields = ("model", "step", "temperature")
  names = {"sft": "SFT", "dpo": "DPO"}
  assert [tuple(row[f] for f in fields) for row in prompt["responses"]] == [
    (names.get(model, model), *cell) for model, *cell in cells
  ]


def test_tables_and_sentences_are_those_of_the_markdown(directory, text):
  shown = re.sub(r"<[^>]*>", " ", text.partition('<section id="browse">')[0])
  numbers = re.findall(r"\d+\.\d+", shown)
  lines = (directory / "report.md").read_text()
  for section in ("## Win rates", "## Judge health", "## Responses"):
    body = lines.partition(f"{section}\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"\d+\.\d+", body)) <= set(numbers)


def test_nothing_is_loaded(text):
  parsed = paged.Parsed(text)
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
  banned = r"https?:|url\(|@import|\bimport\(|fetch\(|innerHTML|eval\("
  for source in (style, script):
    assert not re.search(banned, source)
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


def test_hostile_texts_add_no_markup_and_come_back_whole():
  def rendered(texts):
    prompts = [
      paged.prompt(
        f"id{index} {text}",
        f"\n\nHuman: {text}\n\nAssistant:",
        text,
        [paged.response(("dpo", None, 1.0), text, ["model"], reply=text)],
      )
      for index, text in enumerate(texts)
    ]
    literal = markdown.literal(texts[0])
    table = markdown.table(("a", literal), [(literal, "1")])
    figure = figures.Figure("x.png", texts, print, literal, on_page=True)
    sections = [page.Section("x", literal, [[literal], figure, table])]
    lines = [f"> **FLAG**: {literal}"]
    return prompts, paged.render(prompts, texts[0], lines, sections)

  def elements(text):
    found = paged.Parsed(text).elements
    return [(tag, [*attributes]) for tag, attributes in found if tag != "br"]

  # Each text is the title, a name, a prompt and a response in turn.
  plain = elements(rendered(["text"] * len(paged.HOSTILE))[1])
  for first in range(len(paged.HOSTILE)):
    prompts, text = rendered(paged.HOSTILE[first:] + paged.HOSTILE[:first])
    assert elements(text) == plain
    assert paged.data(text) == prompts


def test_markup_of_a_report_is_html_and_that_of_texts_is_not():
  shown = page.to_html(
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
    (["model", "missing"], "won"),
    (["chosen", "chosen"], "lost"),
    (["model", "chosen"], "split"),
    (["model", "tie"], "tie"),
  ],
)
def test_outcome_of_the_calls_on_a_response(verdicts, expected):
  assert browse.outcome(verdicts) == expected


@pytest.mark.parametrize(
  ("text", "verdicts", "expected"),
  [
    ("a", ["model", "model"], []),
    ("a", ["model", "chosen"], ["orders disagree"]),
    ("a", [], ["not judged"]),
    ("", ["chosen"], ["empty response"]),
    (" Use a fork. ", ["tie"], ["same text as chosen"]),
    ("a", ["missing"], ["a call without a verdict"]),
    ("a", ["refusal", "refusal"], ["the judge refused"]),
  ],
)
def test_flags_of_a_response(text, verdicts, expected):
  row = reported.response("dpo", None, 1.0, "p0", text)
  calls = [reported.verdict(row, "model_first", v) for v in verdicts]
  (prompt,) = browse.prompts([row], calls)
  assert prompt["responses"][0]["flags"] == expected


def test_flags_of_texts_and_calls_that_do_not_match():
  row = reported.response("dpo", None, 1.0, "p0")
  edited = reported.verdict(row, "model_first", "model", response_chars=3)
  empty = dataclasses.replace(row, chosen=" ", prompt_id="p1")
  found = browse.prompts([row, empty], [edited], [edited])
  assert [prompt["responses"][0]["flags"] for prompt in found] == [
    ["judged with other texts", "verdict is not what the reply says"],
    ["empty chosen response"],
  ]


def test_figures_are_images_of_the_rows_in_light_and_dark(directory, text):
  numbers = json.loads((directory / "numbers.json").read_text())
  elements = paged.Parsed(text).elements
  shown = [a for tag, a in elements if tag == "img"]
  sources = [a for tag, a in elements if tag == "source"]
  assert [image["alt"] for image in shown] == [
    "Win rate of the final models against sampling temperature",
    "Win rate of checkpoints against the training step",
  ]
  names = ("win_rate_temperature.png", "win_rate_step.png")
  for name, image, dark in zip(names, shown, sources, strict=True):
    assert dark["media"] == "(prefers-color-scheme: dark)"
    # The labels' colors on light and on dark.
    addresses = {"222222": image["src"], "ebe7de": dark["srcset"]}
    for color, address in addresses.items():
      kind, _, data = address.partition(",")
      assert kind == "data:image/svg+xml;base64"
      svg = base64.b64decode(data).decode()
      xml.etree.ElementTree.fromstring(svg)
      assert numbers["figures"][name]["data"] in svg
      assert f"fill: #{color}" in svg
      assert "#ffffff" not in svg.lower()  # no background
      assert 'href="http' not in svg
