"""SHP, StackExchange and TL;DR into pairs, worked out by hand."""

import re
import sys

import hypothesis
import pytest
from hypothesis import strategies as st
from sourcing import apart, line, load, texts

from dpo_jax.data import preferences
from dpo_jax.data.sources import stack_exchange


@pytest.fixture
def read(tmp_path):
  """Writes rows of a kind to a file and loads it."""

  def of(kind, *rows, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line(row) for row in rows))
    return load(path, kind=kind, **changes)

  return of


# --- SHP


def vote(label, score_a, score_b, history="Why?", **changes):
  return {
    "post_id": "qt3nxl",
    "domain": "askculinary_train",
    "history": history,
    "human_ref_A": f"A{score_a}",
    "human_ref_B": f"B{score_b}",
    "labels": label,
    "score_A": score_a,
    "score_B": score_b,
    "score_ratio": 1.0,
  } | changes


WHY = "\n\nHuman: Why?\n\nAssistant:"


def test_shp_keeps_what_has_twice_the_votes(read):
  loaded = read(
    "shp",
    vote(1, 6, 3),  # 2.0
    vote(0, 3, 7),  # 2.33
    vote(1, 5, 3),  # 1.67
    vote(0, 5, 9),  # 1.8
    vote(1, 8, 1),
    min_score_ratio=2.0,
  )
  assert texts(loaded) == [
    (WHY, " A6", " B3"),
    (WHY, " B7", " A3"),
    (WHY, " A8", " B1"),
  ]
  assert loaded.counts == {
    "read": 5,
    "filtered: score ratio below 2": 2,
    "kept": 3,
  }
  assert read("shp", vote(1, 5, 3)).counts == {"read": 1, "kept": 1}


def test_shp_names_the_subreddit(read):
  domains = ("askculinary_train", "ask_it_validation", "askphysics", 3)
  rows = [vote(1, 6, 3, f"{i}", domain=d) for i, d in enumerate(domains)]
  found = [row.subset for row in read("shp", *rows).rows]
  assert found == ["askculinary", "ask_it", "askphysics", ""]


def test_shp_takes_the_first_pairs_of_a_post(read):
  rows = [vote(1, n, 1, history) for n in (4, 5, 6) for history in "xy"]
  loaded = read("shp", *rows, max_pairs_per_prompt=2)
  assert [(row.prompt[9], row.chosen) for row in loaded.rows] == [
    ("x", " A4"),
    ("y", " A4"),
    ("x", " A5"),
    ("y", " A5"),
  ]
  assert loaded.counts["filtered: more than 2 pairs of a prompt"] == 2


# --- StackExchange


def question(*answers, html="<p>Why?</p>"):
  return {
    "qid": 31,
    "question": html,
    "answers": [
      {"answer_id": i, "text": text, "pm_score": score, "selected": False}
      for i, (text, score) in enumerate(answers)
    ],
    "date": "2016/01/01",
    "metadata": ["https://ai.stackexchange.com"],
  }


def test_every_two_answers_of_different_score_are_a_pair(read):
  loaded = read(
    "se", question(("<p>a</p>", 1), ("<p>b</p>", 3), ("<p>c</p>", 1))
  )
  assert sorted(texts(loaded)) == [(WHY, " b", " a"), (WHY, " b", " c")]
  assert loaded.counts == {
    "read": 1,
    "pairs of answers": 3,
    "filtered: answers of equal score": 1,
    "kept": 2,
  }
  assert {row.subset for row in loaded.rows} == {"ai.stackexchange.com"}


@pytest.mark.parametrize("metadata", [[], [3], ["https://[x"], None])
def test_a_question_without_a_url_has_no_site(read, metadata):
  row = question(("<p>a</p>", 1), ("<p>b</p>", 3)) | {"metadata": metadata}
  assert [one.subset for one in read("se", row).rows] == [""]


def test_the_first_pairs_of_a_question_are_a_sample(read):
  answers = [(f"<p>{letter}</p>", i) for i, letter in enumerate("abcdef")]
  whole = read("se", question(*answers))
  assert whole.counts["kept"] == 15
  few = read("se", question(*answers), max_pairs_per_prompt=4)
  assert few.rows == whole.rows[:4]
  assert few.counts["filtered: more than 4 pairs of a prompt"] == 11
  # Answers in another order are the same pairs.
  assert read("se", question(*answers[::-1])).rows == whole.rows
  # Not just pairs of the first answer.
  assert len({letter for r in few.rows for letter in r.chosen + r.rejected}) > 4


def test_se_counts_what_it_leaves_out(read):
  loaded = read(
    "se",
    question(("<p>a</p>", 1), ("<p></p>", 3), ("<p>a</p>", 5)),
    question(("<p>a</p>", 1), ("b", 2), html="<p> </p>"),
    question(("a", 1)),
    question(),
    question(("a", 1), ("b", -1)),
  )
  assert loaded.counts == {
    "read": 5,
    "pairs of answers": 4,
    "quarantined: empty chosen response": 1,
    "quarantined: empty rejected response": 1,
    "quarantined: identical responses": 1,
    "quarantined: empty prompt": 1,
    "kept": 1,
  }
  assert texts(loaded) == [(WHY, " a", " b")]


@pytest.mark.parametrize(
  ("html", "text"),
  [
    ("plain", "plain"),
    ("", ""),
    ("<p>one</p>\n\n<p>two</p>\n", "one\n\ntwo"),
    # Inline elements are text; a new line in HTML is a space.
    ("<p>an <em>old</em>\n<a href='x'>link</a>.</p>", "an old link."),
    ("<p>use <code>x  = 1</code></p>", "use x = 1"),
    ("<p>a &lt;b&gt; &amp; c&nbsp;d</p>", "a <b> & c\u00a0d"),
    (
      "<p>so:</p><pre><code>if x:\n    y = [1]\n</code></pre><p>done</p>",
      "so:\n\n<code>if x:\n    y = [1]\n</code>\n\ndone",
    ),
    ("<ul>\n<li>one</li>\n<li><p>two</p></li>\n</ul>", "one\n\ntwo"),
    ("<h1>Top</h1><blockquote>a<p>b</p>c</blockquote>", "Top\n\na\n\nb\n\nc"),
    ("a<br>b <br/> c", "a\nb\nc"),
    ("<p>a<!-- no --><script>no()</script><style>no</style>b</p>", "ab"),
    ("<p>unclosed <b>bold<p>next", "unclosed bold\n\nnext"),
    ("<pre> </pre>x", "x"),
    ("<p>שלום 👩‍👩‍👧 \u2028</p>", "שלום 👩‍👩‍👧 \u2028"),
    # What the parser takes for a file, an address, or XML.
    ("https://example.com/a.html", "https://example.com/a.html"),
    ("<?xml version='1.0'?><p>x</p>", "x"),
  ],
)
def test_html_becomes_text(html, text):
  assert stack_exchange.strip_html(html) == text


def test_a_missing_parser_is_named(read, monkeypatch):
  monkeypatch.setitem(sys.modules, "bs4", None)
  with pytest.raises(ImportError, match="pip install beautifulsoup4"):
    read("se", question(("a", 1), ("b", 2)))


@hypothesis.given(st.lists(st.text("ab \n<>&;/pre!-", max_size=12), max_size=6))
def test_any_html_becomes_text_or_is_quarantined(pieces):
  html = "".join(f"<{p}>{p}" for p in pieces)
  try:
    text = stack_exchange.strip_html(html)
  except preferences.Quarantined:
    return
  assert text == text.strip(" \n")


# --- TL;DR


def summary(choice, *summaries, **info):
  return {
    "info": {
      "id": "t3_1",
      "post": "My cat sings.\n\nAll night.",
      "title": "Help",
      "subreddit": "cats",
      "site": None,
      "article": None,
    }
    | info,
    "summaries": [{"text": text, "policy": "sup2"} for text in summaries],
    "choice": choice,
    "worker": "w",
    "batch": "batch3",
    "split": "train",
  }


POST = (
  "SUBREDDIT: r/cats\n\nTITLE: Help\n\n"
  "POST: My cat sings.\n\nAll night.\n\nTL;DR:"
)


def test_tldr_asks_for_a_summary_of_the_post(read):
  loaded = read(
    "tldr", summary(0, " Cat sings.", " Dog."), summary(1, "Dog.\n", "  Cat.")
  )
  assert texts(loaded) == [
    (POST, " Cat sings.", " Dog."),
    (POST, " Cat.", " Dog."),
  ]
  assert [row.subset for row in loaded.rows] == ["cats", "cats"]
  assert loaded.counts == {"read": 2, "kept": 2}


def test_tldr_leaves_news_articles_out(read):
  news = {"post": None, "subreddit": None, "title": "T", "article": "(CNN) Now"}
  loaded = read(
    "tldr",
    summary(0, " a", " b", **news),
    summary(0, " a", " b"),
    summary(1, " c", " d", article=""),
  )
  assert loaded.counts == {
    "read": 3,
    "filtered: a news article, not a post": 1,
    "kept": 2,
  }


def test_tldr_reads_flat_rows_with_the_cue_on_either_side(read):
  loaded = read(
    "tldr",
    apart(POST, " Cat.", "Dog. "),
    apart(POST.removesuffix("\n\nTL;DR:"), "TL;DR: Cat.", "TL;DR:  Dog."),
    apart(POST + " ", "Cat.", "Dog."),
  )
  assert texts(loaded) == [(POST, " Cat.", " Dog.")] * 3


# --- rows left out, of all three


@pytest.mark.parametrize(
  ("kind", "row", "reason"),
  [
    ("shp", vote(0, 9, 3), "the label contradicts the scores"),
    ("shp", vote(1, 3, 9), "the label contradicts the scores"),
    ("shp", vote(1, 9, 0), "a score below 1 has no ratio"),
    ("shp", vote(1, 9, 3, history=" \n"), "empty prompt"),
    ("shp", vote(1, 9, 3, human_ref_A=" "), "empty chosen response"),
    ("shp", vote(1, 9, 3, human_ref_A="B3"), "identical responses"),
    ("tldr", summary(0, " a", " b", post=" "), "empty prompt"),
    ("tldr", summary(0, " ", " b"), "empty chosen response"),
    ("tldr", summary(0, " a", " a "), "identical responses"),
    ("tldr", apart("\n", " a", " b"), "empty prompt"),
  ],
)
def test_rows_without_a_preference_are_quarantined(read, kind, row, reason):
  good = {"shp": vote(1, 6, 3), "tldr": summary(0, " a", " b")}[kind]
  counts = read(kind, row, good).counts
  assert counts == {"read": 2, f"quarantined: {reason}": 1, "kept": 1}


@pytest.mark.parametrize(
  ("kind", "row", "words"),
  [
    ("shp", vote(1, 6, 3, history=None), "field 'history' is not a string"),
    ("shp", vote(1, 6, 3, human_ref_B=3), "field 'human_ref_B' is not a str"),
    ("shp", vote(1, 6, 3, score_A=4.0), "'score_A' is not an integer but 4.0"),
    ("shp", vote(2, 6, 3), "field 'labels' is neither 0 nor 1: 2"),
    ("se", {"question": "<p>a</p>"}, "field 'answers' is not a list"),
    ("se", {"question": 1, "answers": []}, "field 'question' is not a string"),
    ("se", {"question": "", "answers": ["b"]}, "field 'answers[0]' is not an"),
    ("se", question((None, 2)), "field 'answers[0].text' is not a string"),
    ("se", question(("a", None)), "'answers[0].pm_score' is not an integer"),
    ("tldr", summary(2, " a", " b"), "field 'choice' is neither 0 nor 1: 2"),
    ("tldr", summary(None, " a", " b"), "field 'choice' is not an integer"),
    ("tldr", summary(0, " a"), "field 'summaries' is not a list of two"),
    ("tldr", summary(0, " a", None), "'summaries[1].text' is not a string"),
    ("tldr", summary(0, "a", "b", post=None), "'info.post' is not a string"),
    ("tldr", summary(0, "a", "b", title=7), "'info.title' is not a string"),
    ("tldr", summary(0, "a", "b") | {"info": None}, "'info' is not an object"),
    ("tldr", apart("Sum up.", " a", " b"), "neither the prompt ends nor both"),
    ("tldr", apart("S.", "TL;DR: a", " b"), "neither the prompt ends nor both"),
    ("tldr", {"prompt": POST, "chosen": " a"}, "field 'rejected' is missing"),
  ],
)
def test_a_bad_field_is_named(read, kind, row, words):
  words = f"rows.jsonl:1: .*{re.escape(words)}"
  with pytest.raises(ValueError, match=words):
    read(kind, row)
