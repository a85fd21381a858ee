"""Sources: real files, bad lines and files, sides, filters, limits, counts."""

import gzip
import hashlib
import json
import re
import unicodedata

import hypothesis
import pytest
from hypothesis import strategies as st
from sourcing import (
  ASSISTANT,
  GOOD,
  HUMAN,
  PROMPT,
  apart,
  filters,
  line,
  load,
  source,
  texts,
)

from dpo_jax.data import preferences, sources


@pytest.fixture
def write(tmp_path):
  """Writes rows, or bytes, to a file and gives its path."""

  def to(rows, name="rows.jsonl"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    data = rows if isinstance(rows, bytes) else b"".join(map(line, rows))
    path.write_bytes(data)
    return path

  return to


def numbered(count, start=0):
  return [apart(f"p{i}", f" a{i}", f" b{i}") for i in range(start, count)]


def chosen(loaded):
  return [row.chosen for row in loaded.rows]


def left_out(counts):
  reasons = ("malformed: ", "quarantined: ", "filtered: ")
  return sum(n for reason, n in counts.items() if reason.startswith(reasons))


# --- settings


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"train_path": ""}, "train_path='' must name"),
    ({"held_out": 0.1}, r"held_out=0.1 must be 0, as eval_path='x'"),
    ({"eval_path": ""}, r"held_out=0.0 must be a share between 0 and 1"),
    ({"eval_path": "", "held_out": 1.0}, "held_out=1.0 must be a share"),
    ({"eval_path": "", "held_out": float("nan")}, "held_out=nan must be"),
    ({"weight": 0.0}, "weight=0.0 must be positive and finite"),
    ({"subsets": ("a", "b", "a")}, "subsets=.* names one twice"),
    ({"min_score_ratio": 2.0}, "min_score_ratio=2.0 is for kind='shp'"),
    ({"max_pairs_per_prompt": 3}, "max_pairs_per_prompt=3 is for kinds"),
    ({"kind": "tfds"}, r"subsets=\(\) must name what was written"),
    ({"kind": "tfds", "subsets": ("a",), "streaming": True}, "streaming=True"),
  ],
)
def test_a_source_that_contradicts_itself_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    source("x", **changes)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"skip_bad": -1}, "skip_bad=-1 must not be negative"),
    (
      {"min_response_chars": 9, "max_response_chars": 8},
      "max_response_chars=8 must be at least min_response_chars=9",
    ),
    (
      {"single_turn": True, "max_turns": 2},
      "max_turns=2 contradicts single_turn=True",
    ),
  ],
)
def test_filters_that_contradict_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    filters(**changes)


def test_settings_that_differ_from_the_defaults_are_accepted():
  source("x", kind="shp", min_score_ratio=2.0, max_pairs_per_prompt=5)
  source("x", eval_path="", held_out=0.01)
  filters(min_response_chars=9, max_response_chars=9, single_turn=True)


# --- real rows


@pytest.mark.parametrize(
  ("side", "split", "counts"),
  [
    (
      "train",
      "train",
      {
        "read": 1556,
        "quarantined: empty chosen response": 4,
        "quarantined: rejected does not share chosen's prompt": 1,
        "kept": 1551,
      },
    ),
    (
      "eval",
      "test",
      {
        "read": 256,
        "quarantined: rejected does not share chosen's prompt": 1,
        "kept": 255,
      },
    ),
  ],
)
def test_real_files(shared, side, split, counts):
  directory = shared / "data" / "hh-rlhf"
  hh = {"kind": "hh", "side": side}
  loaded = load(directory, subsets=("harmless-base",), **hh)
  assert loaded.counts == counts
  file = directory / "harmless-base" / f"{split}.jsonl.gz"
  assert load(file, **hh) == loaded
  assert {row.subset for row in loaded.rows} == {"harmless-base"}
  assert {row.subset for row in load(file, **hh).rows} == {""}
  with gzip.open(file) as rows:
    raw = [json.loads(row) for row in rows]
  # Every kept pair is, text by text, a row of the file, in its order.
  remaining = iter([(row["chosen"], row["rejected"]) for row in raw])
  for row in loaded.rows:
    assert (row.prompt + row.chosen, row.prompt + row.rejected) in remaining
    assert row.prompt.endswith(ASSISTANT)
    assert ASSISTANT not in row.chosen + row.rejected
    assert row.chosen.strip()
    assert row.rejected.strip()
  assert len({row.id for row in loaded.rows}) == len(loaded.rows)


# --- malformed rows

BAD_LINES = {
  "cut": (line(GOOD)[:-9] + b"\n", "not JSON"),
  "raw newline in a string": (b'{"chosen": "a\rb", "rejected": "c"}\n', "JSON"),
  "zeros of a torn write": (b"\0" * 64 + b"\n", "not JSON"),
  "deep": (b"[" * 100_000 + b"\n", "nested too deeply"),
  "a number of 5,000 digits": (b"9" * 5000 + b"\n", "not JSON"),
  "list": (b"[1, 2]\n", "row is not an object: list"),
  "latin-1": (b'{"chosen": "\xe9", "rejected": "b"}\n', "not UTF-8"),
  "utf-16": (line(GOOD).decode().encode("utf-16") + b"\n", "not UTF-8"),
  "surrogate bytes": (b'{"chosen": "\xed\xa0\x80"}\n', "not UTF-8"),
  "no chosen": (line({"rejected": "a"}), "field 'chosen' is missing"),
  "number": (line(GOOD | {"rejected": 3}), "field 'rejected' is not a string"),
  "nan": (b'{"chosen": NaN, "rejected": "a"}\n', "NaN is not a JSON number"),
  "infinite": (b'{"chosen": 1e999}\n', "a number is too large to be finite"),
  "lone surrogate": (
    b'{"chosen": "a \\ud83d", "rejected": "b"}\n',
    "field 'chosen' holds a lone surrogate",
  ),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_malformed_row_names_file_line_and_field(write, bad):
  data, words = BAD_LINES[bad]
  path = write(line(GOOD) + b"\n" + data + line(GOOD))
  # The blank line counts: the number is an editor's.
  where = re.escape(f"{path}:3: ")
  words = f"^{where}.*{re.escape(words)}"
  with pytest.raises(ValueError, match=words) as error:
    load(path)
  assert "skip_bad=0" in str(error.value)
  if bad == "utf-16":
    return  # The other half of its newline is a line of its own.
  skipped = load(path, filtered={"skip_bad": 1})
  assert len(skipped.rows) == 2
  assert skipped.counts["read"] == 3
  (key,) = [key for key in skipped.counts if key.startswith("malformed")]
  assert skipped.counts[key] == 1


def test_skip_bad_is_a_limit(write):
  path = write(line(GOOD) + b"{\n" * 3)
  with pytest.raises(ValueError, match=r"rows.jsonl:4: .*3 malformed"):
    load(path, filtered={"skip_bad": 2})
  kept = load(path, filtered={"skip_bad": 3})
  assert kept.counts == {"read": 4, "malformed: not JSON": 3, "kept": 1}


def test_a_cut_last_line_is_not_dropped_silently(write):
  with pytest.raises(ValueError, match=r":2: not JSON"):
    load(write(line(GOOD) + line(GOOD)[:30]))


# --- texts and encodings

ODD = ["\u2028", "\u2029", "\x85", "\0", "\x0b", "\r", "\ufeff", "e\u0301"]
ANY_TEXT = st.one_of(
  st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
  st.lists(st.sampled_from([*ODD, "👩‍👩‍👧", "שלום", "a"]), min_size=1).map(
    "".join
  ),
)
ON_TMP = hypothesis.settings(
  deadline=None,
  max_examples=50,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def visible(text):
  """What is left of a text without format characters and outer white space."""
  return "".join(x for x in text if unicodedata.category(x) != "Cf").strip()


@ON_TMP
@hypothesis.given(
  st.lists(st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.booleans()), min_size=1)
)
@hypothesis.example([("p", " a", f" {odd}c", True) for odd in ODD])
@hypothesis.example([("p", f" a{odd}b", " c", False) for odd in ODD])
def test_every_row_is_kept_or_counted_and_none_is_changed(write, rows):
  data = b"".join(
    line(apart(*row), ensure_ascii=escaped) for *row, escaped in rows
  )
  loaded = load(write(data + line(GOOD)))
  wanted = [
    (prompt, chosen, rejected)
    for prompt, chosen, rejected, _ in rows
    if all(map(visible, (prompt, chosen, rejected))) and chosen != rejected
  ]
  assert texts(loaded)[:-1] == wanted
  assert loaded.counts["read"] == len(rows) + 1
  assert left_out(loaded.counts) == len(rows) - len(wanted)


def test_a_byte_order_mark_and_crlf_are_accepted_and_counted(write):
  data = b"\xef\xbb\xbf" + (line(GOOD) * 3).replace(b"\n", b"\r\n")
  loaded = load(write(data[:-2]))
  assert chosen(loaded) == [" A tool."] * 3
  assert loaded.counts == {
    "accepted: byte order mark": 1,
    # The last line has no end.
    "accepted: CRLF at the end of a line": 2,
    "read": 3,
    "kept": 3,
    "kept, repeating an earlier pair": 2,
  }


# --- files and directories


def test_broken_gzip_is_refused(write):
  rows = [apart("p", f" {i} {i**i}", f" no {i}") for i in range(200)]
  whole = gzip.compress(b"".join(map(line, rows)))
  assert len(load(write(whole, "a.jsonl.gz")).rows) == 200
  for name, data in {
    "cut": whole[: len(whole) // 2],
    "checksum": whole[:-8] + b"\0\0\0\0" + whole[-4:],
    "flipped": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
    "garbage": b"not gzip",
    "tail": whole + b"tail",
  }.items():
    path = write(data, f"{name}.jsonl.gz")
    # One flipped byte may first show as a row that is not JSON.
    with pytest.raises(ValueError, match=rf"{name}.jsonl.gz: broken gzip|:\d+"):
      load(path)
  with pytest.raises(ValueError, match=r"rows.jsonl is a gzip file"):
    load(write(whole))


@pytest.mark.parametrize(
  ("data", "words"),
  [
    (b"", "no rows"),
    (b"\n\n", "no rows"),
    (line({"chosen": "a"}), "no comparison is left"),
    (2 * line(apart("p", "", " b")), "empty chosen response': 2"),
  ],
)
def test_nothing_left_is_refused_with_the_counts(write, data, words):
  with pytest.raises(ValueError, match=words):
    load(write(data), filtered={"skip_bad": 5})


@pytest.mark.parametrize(
  "path",
  [
    *("nothing", "./data/train", "/no/such/rows.jsonl", "~/train", "a/b/c"),
    # These look like the id of a dataset, and are mistyped files.
    *("data/train.jsonl", "data/train.jsonl.gz", "data/train.json"),
    "data/train.parquet",
  ],
)
def test_a_missing_path_is_refused_without_a_look_at_the_hub(path):
  with pytest.raises(ValueError, match="neither a file, a directory nor a hub"):
    load(path, subsets=("harmless-base",))


@pytest.fixture
def layout(tmp_path, write):
  for subset in "ab":
    write([GOOD | {"chosen": f"{PROMPT} {subset}"}], f"{subset}/train.jsonl")
  return tmp_path


@pytest.mark.parametrize("names", [("b", "a"), ("a", "b"), ("b",)])
def test_subsets_are_read_in_the_order_of_the_settings(layout, names):
  loaded = load(layout, subsets=names, kind="hh")
  assert chosen(loaded) == [f" {name}" for name in names]
  assert [row.subset for row in loaded.rows] == list(names)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"subsets": ()}, "name its subsets"),
    ({"subsets": ("a", "c")}, r"/c holds none of \['train.jsonl', "),
    # An existing split is never taken for a missing one.
    ({"subsets": ("a",), "side": "eval"}, r"none of \['test.jsonl'.*'train"),
    ({"subsets": ("c",)}, r"/c holds none of .*, and no parquet"),
    ({"subsets": ("a",), "streaming": True}, "streaming=True changes nothing"),
  ],
)
def test_what_a_directory_lacks_is_named(layout, changes, words):
  with pytest.raises(ValueError, match=words):
    load(layout, kind="hh", **changes)


def test_ambiguous_files_and_subsets_of_a_file_are_refused(layout, write):
  path = write(gzip.compress(line(GOOD)), "a/train.jsonl.gz")
  with pytest.raises(ValueError, match=r"train.jsonl and train.jsonl.gz are"):
    load(layout, subsets=("a",))
  with pytest.raises(ValueError, match=r"subsets=\('a',\).*set them to \(\)"):
    load(path, subsets=("a",))


# --- sides


def test_each_side_reads_its_own_path_and_split(write, tmp_path):
  write(numbered(2), "train.jsonl")
  write(numbered(5, start=2), "test.json")
  other = write(numbered(6, start=5))
  assert chosen(load(tmp_path)) == [" a0", " a1"]
  assert chosen(load(tmp_path, side="eval")) == [" a2", " a3", " a4"]
  assert chosen(load(tmp_path, side="eval", eval_path=str(other))) == [" a5"]


def test_prompts_are_held_out_by_their_hash(write):
  # Two pairs of each prompt, far from each other.
  path = write(
    numbered(400) + [apart(f"p{i}", f" c{i}", " d") for i in range(400)]
  )
  split = {"eval_path": "", "held_out": 0.25}
  train = load(path, **split)
  held_out = load(path, side="eval", **split)

  def taken(prompt):
    data = b"".join(
      len(text).to_bytes(8, "big") + text.encode()
      for text in ("held out", prompt)
    )
    digest = hashlib.sha256(data).digest()[:8]
    return int.from_bytes(digest, "big") / 2**64 < 0.25

  wanted = {f"p{i}" for i in range(400) if taken(f"p{i}")}
  assert {row.prompt for row in held_out.rows} == wanted
  # 400 draws at 1/4: mean 100, standard deviation 8.7.
  assert 65 < len(wanted) < 135
  assert preferences.leaks(train.rows, held_out.rows) == 0
  size = 2 * len(wanted)
  assert train.counts == {
    "read": 800,
    "filtered: the prompt is held out": size,
    "kept": 800 - size,
  }
  assert held_out.counts == {
    "read": 800,
    "filtered: the prompt is trained on": 800 - size,
    "kept": size,
  }


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.floats(0, 1), st.text())
def test_a_larger_share_holds_out_all_that_a_smaller_one_does(share, prompt):
  alone = sources.is_held_out(prompt, share)
  assert not alone or sources.is_held_out(prompt, min(1.0, share * 1.5))
  assert sources.is_held_out(prompt, 1.0)
  assert not sources.is_held_out(prompt, 0.0)


# --- filters


def talk(count):
  """A prompt of this many human turns."""
  middle = f"{ASSISTANT} Yes.".join(f"{HUMAN} Go {i}." for i in range(count))
  return middle + ASSISTANT


TURNS = [apart(talk(n), f" {n}", " x") for n in (1, 2, 3)]
# Characters are counted, not bytes, and not the white space at the ends.
LENGTHS = [
  apart(" 12345 ", " four", " 2 "),
  apart("12345", " fives", " four\n"),
  apart("123456", " שלו", " 😀😀😀"),
]


@pytest.mark.parametrize(
  ("rows", "filtered", "kept", "reason"),
  [
    (TURNS, {"single_turn": True}, [0], "several turns"),
    (TURNS, {"max_turns": 1}, [0], "more than 1 turns"),
    (TURNS, {"max_turns": 2}, [0, 1], "more than 2 turns"),
    (TURNS, {"max_turns": 3}, [0, 1, 2], None),
    (LENGTHS, {"min_response_chars": 3}, [1, 2], "response shorter than 3 c"),
    (LENGTHS, {"min_response_chars": 4}, [1], "response shorter than 4 char"),
    (LENGTHS, {"max_response_chars": 4}, [0, 2], "response longer than 4 ch"),
    (LENGTHS, {"max_response_chars": 3}, [2], "response longer than 3 chara"),
    (LENGTHS, {"max_prompt_chars": 5}, [0, 1], "prompt longer than 5 chara"),
    (LENGTHS, {"max_prompt_chars": 6}, [0, 1, 2], None),
    # A prompt without marks has no turns.
    (LENGTHS, {"single_turn": True}, [0, 1, 2], None),
    # A pair is counted under its first reason only.
    (TURNS[1:] + LENGTHS, {"single_turn": True}, [2, 3, 4], "several turns"),
  ],
)
def test_filters(write, rows, filtered, kept, reason):
  loaded = load(write(rows), filtered=filtered)
  assert chosen(loaded) == [rows[i]["chosen"] for i in kept]
  assert loaded.counts.pop("read") == len(rows)
  assert loaded.counts.pop("kept") == len(kept)
  if reason:
    ((found, number),) = loaded.counts.items()
    assert found.startswith(f"filtered: {reason}")
    assert number == len(rows) - len(kept)
  else:
    assert not loaded.counts


def test_repeats_are_counted_or_dropped(write):
  one, two = apart("p", " a", " b"), apart("p", " a", " c")
  turned = apart("p", " b", " a")
  path = write([one, two, one, turned, one])
  assert load(path).counts == {
    "read": 5,
    "kept": 5,
    "kept, repeating an earlier pair": 2,
    "kept, preferring the opposite of an earlier pair": 2,
  }
  loaded = load(path, filtered={"drop_repeats": True})
  assert texts(loaded) == [tuple(row.values()) for row in (one, two, turned)]
  assert loaded.counts == {
    "read": 5,
    "filtered: repeats an earlier pair": 2,
    "kept": 3,
    "kept, preferring the opposite of an earlier pair": 1,
  }


def test_a_limit_counts_kept_pairs_and_stops_reading(write):
  rows = [apart("p", "", " b"), *numbered(2), apart("p", " x", " x")]
  path = write(b"".join(map(line, rows)) + b"{not JSON")
  loaded = load(path, limit=2)
  assert chosen(loaded) == [" a0", " a1"]
  # The rows behind the second one were not looked at.
  assert loaded.counts == {
    "read": 3,
    "quarantined: empty chosen response": 1,
    "kept": 2,
  }
  with pytest.raises(ValueError, match=r":5: not JSON"):
    load(path, limit=3)
  with pytest.raises(ValueError, match="limit=-1 is negative"):
    load(path, limit=-1)


def test_rows_are_known_by_their_texts_in_any_order(write):
  there = load(write(numbered(3)))
  back = load(write(numbered(3)[::-1], "b.jsonl"))
  assert {row.id for row in there.rows} == {row.id for row in back.rows}
  assert there.fingerprint != back.fingerprint
  assert there.fingerprint == load(write(numbered(3), "c.jsonl")).fingerprint


SHORT = st.sampled_from(["", " ", " a", " bb", " ccc"])
ROW = st.one_of(
  st.builds(apart, st.sampled_from(["", talk(1), talk(2)]), SHORT, SHORT),
  st.sampled_from([{"chosen": " a"}, [], {"chosen": "a", "rejected": "b"}]),
)


@ON_TMP
@hypothesis.given(
  st.lists(ROW, max_size=12), st.booleans(), st.booleans(), st.integers(0, 3)
)
def test_every_row_read_is_kept_or_counted_once(
  write, rows, single_turn, drop_repeats, shortest
):
  rows = [*rows, apart(talk(1), " sound", " pair")]
  counts = load(
    write(rows),
    filtered={
      "single_turn": single_turn,
      "drop_repeats": drop_repeats,
      "min_response_chars": shortest,
      "skip_bad": 99,
    },
  ).counts
  assert counts["read"] == len(rows) == left_out(counts) + counts["kept"]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("fullconv", "in 24 of 24 pairs both responses begin with their prompt"),
    ("jsonstr", "in 24 of 24 pairs chosen and rejected hold lists of messages"),
    ("strlist", "in 24 of 24 pairs chosen and rejected hold lists of messages"),
  ],
)
def test_rows_of_another_form_than_they_seem_are_refused(shared, name, message):
  with pytest.raises(ValueError, match=message):
    sources.read_file(str(shared / "cases" / "data" / f"{name}.jsonl"))


def test_a_single_row_may_look_like_another_form(tmp_path):
  rows = [
    {"prompt": "A", "chosen": "A pen.", "rejected": "A."},
    {"prompt": "B", "chosen": '[{"role": 1}]', "rejected": "[{'role': 2}]"},
    {"prompt": "C", "chosen": "yes", "rejected": "no"},
  ]
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert len(sources.read_file(str(path)).rows) == 3


def test_responses_of_invisible_characters_alone_are_empty(shared):
  # Every second of 24 is two zero-width spaces.
  loaded = sources.read_file(str(shared / "cases" / "data" / "zw.jsonl"))
  assert loaded.counts == {
    "read": 24,
    "quarantined: empty chosen response": 12,
    "kept": 12,
  }
