"""Reading files: the real ones, and every kind of bad line and bad file."""

import gzip
import json
import re

import hypothesis
import pytest
import sourcing
from hypothesis import strategies as st
from sourcing import ASSISTANT, GOOD, PROMPT, line, load

from dpo_jax.data import preferences


@pytest.fixture
def write(tmp_path):
  """Writes bytes to a file and gives its path."""

  def to(data, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(data)
    return path

  return to


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
  # Every kept pair is, piece by piece, a row of the file, in its order.
  texts = [(row["chosen"], row["rejected"]) for row in raw]
  at = -1
  for row in loaded.rows:
    at = texts.index((row.prompt + row.chosen, row.prompt + row.rejected))
    texts[: at + 1] = [None] * (at + 1)
    assert row.prompt.endswith(ASSISTANT)
    assert ASSISTANT not in row.chosen + row.rejected
    assert row.chosen.strip()
    assert row.rejected.strip()
  assert len({row.id for row in loaded.rows}) == len(loaded.rows)


def test_real_splits_share_no_prompt(shared):
  directory = shared / "data" / "hh-rlhf"
  hh = {"kind": "hh", "subsets": ("harmless-base",)}
  train, held_out = (
    load(directory, side=side, **hh) for side in ("train", "eval")
  )
  assert preferences.leaks(train.rows, held_out.rows) == 0
  assert preferences.leaks(train.rows, train.rows) == 1551


# --- malformed rows

BAD_LINES = {
  "cut": (line(GOOD)[:-9] + b"\n", "not JSON"),
  "words": (b"hello\n", "not JSON"),
  "raw newline in a string": (b'{"chosen": "a\rb", "rejected": "c"}\n', "JSON"),
  "zeros of a torn write": (b"\0" * 64 + b"\n", "not JSON"),
  "deep": (b"[" * 100_000 + b"\n", "nested too deeply"),
  "a number of 5,000 digits": (b"9" * 5000 + b"\n", "not JSON"),
  "list": (b"[1, 2]\n", "row is not an object: list"),
  "null": (b"null\n", "row is not an object: NoneType"),
  "latin-1": (b'{"chosen": "\xe9", "rejected": "b"}\n', "not UTF-8"),
  "surrogate bytes": (b'{"chosen": "\xed\xa0\x80"}\n', "not UTF-8"),
  "no chosen": (line({"rejected": "a"}), "field 'chosen' is missing"),
  "no rejected": (line({"chosen": "a"}), "field 'rejected' is missing"),
  "number": (line(GOOD | {"rejected": 3}), "field 'rejected' is not a string"),
  "nan": (b'{"chosen": NaN, "rejected": "a"}\n', "NaN is not a JSON number"),
  "infinite": (b'{"chosen": 1e999}\n', "a number is too large to be finite"),
  "null field": (line(GOOD | {"chosen": None}), "field 'chosen' is not"),
  "null prompt": (line(GOOD | {"prompt": None}), "field 'prompt' is not"),
  "turns": (
    line(GOOD | {"chosen": [{}]}),
    "field 'chosen[0].role' is missing",
  ),
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
  with pytest.raises(
    ValueError, match=f"^{where}.*{re.escape(words)}"
  ) as error:
    load(path)
  assert "skip_bad=0" in str(error.value)
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


@pytest.mark.parametrize(
  "text",
  [
    "\u2028",
    "\u2029",
    "\x85",
    "\0",
    "\x0b",
    "\r",
    "👩‍👩‍👧",
    "שלום",
    "e\u0301",
    "\ufeff",
  ],
)
@pytest.mark.parametrize("escaped", [True, False])
def test_any_text_survives(write, text, escaped):
  row = {"chosen": f"{PROMPT} a{text}b", "rejected": f"{PROMPT} {text}c"}
  data = line(row, ensure_ascii=escaped) + line(GOOD)
  first, second = load(write(data)).rows
  assert (first.chosen, first.rejected) == (f" a{text}b", f" {text}c")
  assert second.chosen == " A tool."


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@hypothesis.given(
  st.lists(st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.booleans()), min_size=1)
)
@hypothesis.settings(
  deadline=None,
  max_examples=50,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_every_row_is_kept_or_counted_and_none_is_changed(write, rows):
  data = b"".join(
    line(sourcing.apart(*texts), ensure_ascii=escaped)
    for *texts, escaped in rows
  )
  loaded = load(write(data + line(GOOD)))
  wanted = [
    (prompt, chosen, rejected)
    for prompt, chosen, rejected, _ in rows
    if prompt.strip()
    and chosen.strip()
    and rejected.strip()
    and chosen != rejected
  ]
  assert sourcing.texts(loaded)[:-1] == wanted
  left_out = sum(
    number
    for reason, number in loaded.counts.items()
    if reason.startswith("quarantined: ")
  )
  assert loaded.counts["read"] == len(rows) + 1 == left_out + len(wanted) + 1


def test_a_byte_order_mark_and_crlf_are_accepted_and_counted(write):
  data = b"\xef\xbb\xbf" + (line(GOOD) * 3).replace(b"\n", b"\r\n")
  loaded = load(write(data[:-2]))
  assert [row.chosen for row in loaded.rows] == [" A tool."] * 3
  assert loaded.counts == {
    "accepted: byte order mark": 1,
    # The last line has no end.
    "accepted: CRLF at the end of a line": 2,
    "read": 3,
    "kept": 3,
    "kept, repeating an earlier pair": 2,
  }


def test_utf_16_is_refused(write):
  with pytest.raises(ValueError, match=r"rows.jsonl:1: not UTF-8"):
    load(write(line(GOOD).decode().encode("utf-16")))


# --- files


def test_broken_gzip_is_refused(write):
  rows = b"".join(
    line({"chosen": f"{PROMPT} {i} {i**i}", "rejected": f"{PROMPT} no {i}"})
    for i in range(200)
  )
  whole = gzip.compress(rows)
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_told_from_rows(write, name):
  path = write(
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", name
  )
  with pytest.raises(
    ValueError, match=rf"{name} is a pointer of git-LFS.*git lfs pull"
  ):
    load(path, filtered={"skip_bad": 9})


def test_a_gzip_of_another_name_is_refused(write):
  with pytest.raises(ValueError, match=r"rows.jsonl is a gzip file"):
    load(write(gzip.compress(line(GOOD))))


@pytest.mark.parametrize("data", [b"", b"\n\n", line({"chosen": "a"})])
def test_nothing_left_is_refused(write, data):
  with pytest.raises(ValueError, match=r"rows.jsonl: no comparison is left"):
    load(write(data), filtered={"skip_bad": 5})


def test_all_quarantined_is_refused_with_the_counts(write):
  row = {"chosen": PROMPT, "rejected": PROMPT + " B."}
  with pytest.raises(ValueError, match="empty chosen response': 2"):
    load(write(line(row) * 2))


@pytest.mark.parametrize(
  "path",
  [
    "nothing",
    "./data/train",
    "/no/such/rows.jsonl",
    # These look like the id of a dataset, and are mistyped files.
    "data/train.jsonl",
    "data/train.jsonl.gz",
    "data/train.json",
    "data/train.parquet",
    "~/train",
    "a/b/c",
  ],
)
def test_a_missing_path_is_refused_without_a_look_at_the_hub(path):
  with pytest.raises(ValueError, match="neither a file, a directory nor a hub"):
    load(path, subsets=("harmless-base",))


# --- directories


@pytest.fixture
def layout(tmp_path, write):
  for subset, text in {"a": " one", "b": " two"}.items():
    (tmp_path / subset).mkdir()
    write(line(GOOD | {"chosen": PROMPT + text}), f"{subset}/train.jsonl")
  return tmp_path


def test_subsets_are_read_in_the_order_of_the_settings(layout):
  for names, wanted in {
    ("b", "a"): [" two", " one"],
    ("a", "b"): [" one", " two"],
    ("b",): [" two"],
  }.items():
    loaded = load(layout, subsets=names, kind="hh")
    assert [row.chosen for row in loaded.rows] == wanted
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


def test_two_files_of_one_split_are_refused(layout, write):
  write(gzip.compress(line(GOOD)), "a/train.jsonl.gz")
  with pytest.raises(ValueError, match=r"train.jsonl and train.jsonl.gz are"):
    load(layout, subsets=("a",))


def test_a_directory_of_pairs_needs_no_subsets(write):
  write(line(GOOD), "train.jsonl")
  path = write(line(GOOD | {"chosen": PROMPT + " x"}), "test.json").parent
  assert [row.chosen for row in load(path).rows] == [" A tool."]
  assert [row.chosen for row in load(path, side="eval").rows] == [" x"]


def test_subsets_of_one_file_are_refused(write):
  with pytest.raises(ValueError, match=r"subsets=\('a',\).*set them to \(\)"):
    load(write(line(GOOD)), subsets=("a",))
