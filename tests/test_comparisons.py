"""Reading pairs: the real files, and every kind of bad row or bad file."""

import gzip
import json
import re

import pytest

from dpo_jax import comparisons

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PROMPT = f"{HUMAN} What is a pen?{ASSISTANT}"
GOOD = {"chosen": PROMPT + " A tool.", "rejected": PROMPT + " No."}


def line(row, **options):
  return json.dumps(row, **options).encode() + b"\n"


@pytest.fixture
def write(tmp_path):
  """Writes bytes to a file and gives its path."""

  def to(data, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(data)
    return path

  return to


def load(path, **options):
  return comparisons.load(path, **({"split": "train"} | options))


# --- real rows


@pytest.mark.parametrize(
  ("split", "counts"),
  [
    (
      "train",
      {
        "read": 1556,
        "quarantined: empty chosen response": 4,
        "quarantined: rejected does not share chosen's prompt": 1,
        "kept": 1551,
      },
    ),
    (
      "test",
      {
        "read": 256,
        "quarantined: rejected does not share chosen's prompt": 1,
        "kept": 255,
      },
    ),
  ],
)
def test_real_files(shared, split, counts):
  directory = shared / "data" / "hh-rlhf"
  loaded = load(directory, split=split, subsets=("harmless-base",))
  assert loaded.counts == counts
  file = directory / "harmless-base" / f"{split}.jsonl.gz"
  assert load(file) == loaded
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


def test_real_splits_share_no_prompt_and_filters_count(shared):
  directory = shared / "data" / "hh-rlhf"
  options = {"subsets": ("harmless-base",)}
  train = load(directory, **options)
  held_out = load(directory, split="test", **options)
  assert comparisons.leaks(train.rows, held_out.rows) == 0
  assert comparisons.leaks(train.rows, train.rows) == 1551
  first = load(directory, limit=7, **options)
  assert first.rows == train.rows[:7]
  assert first.fingerprint != train.fingerprint
  single = load(directory, split="test", single_turn=True, **options)
  wanted = [r for r in held_out.rows if r.prompt.count("Human:") == 1]
  assert [r for r in single.rows if r.prompt.count("Human:") == 1] == wanted
  assert len(single.rows) + single.counts["filtered: several turns"] == 255
  assert len(single.rows) <= 72


# --- forms


def test_both_forms_give_the_same_pair(write):
  apart = {"prompt": PROMPT, "chosen": " A tool.", "rejected": " No."}
  loaded = load(write(line(GOOD) + line(apart)))
  wanted = comparisons.Comparison(
    comparisons.content_id(PROMPT, " A tool.", " No."),
    PROMPT,
    " A tool.",
    " No.",
  )
  assert loaded.rows == (wanted, wanted)
  assert loaded.counts == {
    "read": 2,
    "kept": 2,
    "kept, repeating an earlier pair": 1,
  }


def test_the_prompt_ends_at_the_last_assistant_turn(write):
  talk = f"{PROMPT} A tool.{HUMAN} For what?{ASSISTANT}"
  row = {"chosen": talk + " Writing.", "rejected": talk + " Eating."}
  (pair,) = load(write(line(row))).rows
  assert (pair.prompt, pair.chosen, pair.rejected) == (
    talk,
    " Writing.",
    " Eating.",
  )


def test_ids_depend_on_every_text_and_on_their_borders():
  one = comparisons.content_id
  ids = [one("a", "b", "c"), one("ab", "", "c"), one("a", "bc", ""), one("abc")]
  assert len(set(ids)) == 4
  assert all(len(i) == 16 and int(i, 16) >= 0 for i in ids)


# --- quarantine

OTHER = f"{HUMAN} What is ink?{ASSISTANT}"


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"chosen": "A tool.", "rejected": "No."}, "no '\\n\\nAssistant:'"),
    (
      {"chosen": PROMPT + " A.", "rejected": OTHER + " B."},
      "rejected does not share chosen's prompt",
    ),
    # As long as chosen's prompt: slicing by length would keep it.
    (
      {"chosen": PROMPT + " A.", "rejected": "x" * len(PROMPT) + " B."},
      "rejected does not share chosen's prompt",
    ),
    (
      {
        "chosen": PROMPT + " A.",
        "rejected": f"{PROMPT} B.{HUMAN} Why?{ASSISTANT} So.",
      },
      "rejected goes on for more turns than chosen",
    ),
    (
      {
        "chosen": f"{PROMPT} B.{HUMAN} Why?{ASSISTANT} So.",
        "rejected": PROMPT + " A.",
      },
      "rejected does not share chosen's prompt",
    ),
    ({"chosen": PROMPT, "rejected": PROMPT + " B."}, "empty chosen response"),
    ({"chosen": PROMPT + " \n\t", "rejected": PROMPT + " B."}, "empty chosen"),
    ({"chosen": PROMPT + " A.", "rejected": PROMPT}, "empty rejected response"),
    ({"chosen": PROMPT + " A.", "rejected": PROMPT + " A."}, "identical"),
    ({"prompt": " ", "chosen": " A.", "rejected": " B."}, "empty prompt"),
  ],
)
def test_pairs_without_a_preference_are_quarantined(write, row, reason):
  loaded = load(write(line(row) + line(GOOD)))
  (key,) = [key for key in loaded.counts if key.startswith("quarantined")]
  assert reason in key
  assert loaded.counts[key] == 1
  assert loaded.counts["read"] == 2
  assert len(loaded.rows) == 1


# --- malformed rows

BAD_LINES = {
  "cut": (line(GOOD)[:-9] + b"\n", "not JSON"),
  "words": (b"hello\n", "not JSON"),
  "raw newline in a string": (b'{"chosen": "a\rb", "rejected": "c"}\n', "JSON"),
  "zeros of a torn write": (b"\0" * 64 + b"\n", "not JSON"),
  "deep": (b"[" * 100_000 + b"\n", "not JSON"),
  "a number of 5,000 digits": (b"9" * 5000 + b"\n", "not JSON"),
  "list": (b"[1, 2]\n", "row is not an object: list"),
  "null": (b"null\n", "row is not an object: NoneType"),
  "latin-1": (b'{"chosen": "\xe9", "rejected": "b"}\n', "not UTF-8"),
  "surrogate bytes": (b'{"chosen": "\xed\xa0\x80"}\n', "not UTF-8"),
  "no chosen": (line({"rejected": "a"}), "field 'chosen' is missing"),
  "no rejected": (line({"chosen": "a"}), "field 'rejected' is missing"),
  "number": (line(GOOD | {"rejected": 3}), "field 'rejected' is not a string"),
  "nan": (b'{"chosen": NaN, "rejected": "a"}\n', "field 'chosen' is not a"),
  "null field": (line(GOOD | {"chosen": None}), "field 'chosen' is not"),
  "null prompt": (line(GOOD | {"prompt": None}), "field 'prompt' is not"),
  "turns": (line(GOOD | {"chosen": [{}]}), "field 'chosen' is not a string"),
  "lone surrogate": (
    b'{"chosen": "a \\ud83d", "rejected": "b"}\n',
    "field 'chosen' holds a lone surrogate",
  ),
  "twice": (
    b'{"chosen": "a", "rejected": "b", "chosen": "c"}\n',
    "field 'chosen' stands more than once",
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
  skipped = load(path, skip_bad=1)
  assert len(skipped.rows) == 2
  assert skipped.counts["read"] == 3
  (key,) = [key for key in skipped.counts if key.startswith("malformed")]
  assert skipped.counts[key] == 1


def test_skip_bad_is_a_limit(write):
  path = write(line(GOOD) + b"{\n" * 3)
  with pytest.raises(ValueError, match=r"rows.jsonl:4: .*3 malformed"):
    load(path, skip_bad=2)
  assert load(path, skip_bad=3).counts["malformed: not JSON"] == 3


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


def test_byte_order_mark_crlf_and_a_missing_last_newline(write):
  data = b"\xef\xbb\xbf" + (line(GOOD) * 2).replace(b"\n", b"\r\n")
  loaded = load(write(data[:-2]))
  assert len(loaded.rows) == 2
  assert loaded.rows[0].chosen == " A tool."


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
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "tail": whole + b"tail",
  }.items():
    path = write(data, f"{name}.jsonl.gz")
    # One flipped byte may first show as a row that is not JSON.
    with pytest.raises(ValueError, match=rf"{name}.jsonl.gz: broken gzip|:\d+"):
      load(path)


def test_a_gzip_without_its_ending_is_not_utf_8(write):
  with pytest.raises(ValueError, match=r"rows.jsonl:1: not UTF-8"):
    load(write(gzip.compress(line(GOOD))))


def test_a_pointer_of_git_lfs_is_not_read_as_rows(write):
  with pytest.raises(ValueError, match=r"rows.jsonl:1: not JSON"):
    load(write(b"version https://git-lfs.github.com/spec/v1\nsize 12\n"))


@pytest.mark.parametrize("data", [b"", b"\n\n", line({"chosen": "a"})])
def test_nothing_left_is_refused(write, data):
  with pytest.raises(ValueError, match=r"rows.jsonl: no comparison is left"):
    load(write(data), skip_bad=5)


def test_all_quarantined_is_refused_with_the_counts(write):
  row = {"chosen": PROMPT, "rejected": PROMPT + " B."}
  with pytest.raises(ValueError, match="empty chosen response': 2"):
    load(write(line(row) * 2))


@pytest.mark.parametrize(
  "path",
  [
    "",
    "nothing",
    "./data/train",
    "/no/such/rows.jsonl",
    # These look like the id of a dataset, and are mistyped files.
    "data/train.jsonl",
    "data/train.jsonl.gz",
    "data/train.json",
    "~/train",
    "a/b/c",
  ],
)
def test_a_missing_path_is_refused_without_a_look_at_the_hub(path):
  with pytest.raises(ValueError, match="neither a file, a directory nor a hub"):
    load(path, subsets=("harmless-base",))


# Threads of the client may outlive the failed request.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_hub_id_that_cannot_be_read_is_a_value_error():
  # conftest.py switches the hub off.
  with pytest.raises(ValueError, match="not read from the hub"):
    load("nobody/nothing", subsets=("harmless-base",))


def test_directories(tmp_path, write):
  with pytest.raises(ValueError, match="name its subsets"):
    load(tmp_path)
  with pytest.raises(ValueError, match=r"neither .*train.jsonl.gz nor"):
    load(tmp_path, subsets=("a",))
  for subset, text in {"a": " one", "b": " two"}.items():
    (tmp_path / subset).mkdir()
    write(line(GOOD | {"chosen": PROMPT + text}), f"{subset}/train.jsonl")
  loaded = load(tmp_path, subsets=("b", "a"))
  assert [row.chosen for row in loaded.rows] == [" two", " one"]
  # An existing split is never taken for a missing one.
  with pytest.raises(ValueError, match=r"neither .*test.jsonl.gz nor"):
    load(tmp_path, subsets=("a",), split="test")
  with pytest.raises(ValueError, match=r"neither .*c/train.jsonl.gz nor"):
    load(tmp_path, subsets=("a", "c"))
