"""The real tokenizer and a trained one: round trips, refusals, the cut rule."""

import json
import shutil
import unicodedata

import hypothesis
import pytest
from hypothesis import strategies as st

from dpo_jax import comparisons, tokenizer

TEXTS = [
  "",
  " ",
  "plain words",
  "  runs of   spaces\t\tand tabs ",
  "line\nline\r\nline\r",
  "emoji 👩🏽‍🚀 👨‍👩‍👧‍👦 🇫🇷",
  "שלום عليكم ‏mixed‎ left",
  "汉字 한국어 ไทย",
  "nul \0 bell \a escape \x1b",
  "separators \u2028 \u2029 \x85 \x0b \x0c",
  "byte order \ufeff mark",
  "curly “quotes” – and … dots",
  "\n\nHuman: a\n\nAssistant: b",
  "<|endoftext|",
  "|endoftext|>",
]


@pytest.fixture(scope="module")
def pythia(shared):
  return tokenizer.load(shared / "tokenizer" / "pythia")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  directory = tmp_path_factory.mktemp("trained")
  words = ["the pen is blue", "a pen is a tool", "ink is wet"] * 4
  return tokenizer.train(words, 300, directory), directory


# --- round trips


def test_ids_of_pythia(pythia):
  # The vocabulary of the published model: its card and config.json.
  assert (pythia.eos_id, pythia.pad_id, pythia.vocab_size) == (0, 1, 50277)
  assert pythia.decode([0, 1]) == "<|endoftext|><|padding|>"
  assert pythia.encode("") == []


@pytest.mark.parametrize("text", TEXTS)
def test_texts_round_trip(pythia, trained, text):
  assert pythia.decode(pythia.encode(text)) == text
  assert trained[0].decode(trained[0].encode(text)) == text
  assert 0 not in pythia.encode(text)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_any_text_round_trips(pythia, trained, text):
  # Pythia's tokenizer brings text into NFC; a trained one changes nothing.
  normal = unicodedata.normalize("NFC", text)
  assert pythia.decode(pythia.encode(text)) == normal
  assert trained[0].decode(trained[0].encode(text)) == text


def test_pythia_composes_accents(pythia):
  assert pythia.decode(pythia.encode("cafe\u0301")) == "caf\u00e9"


def test_every_real_row_round_trips_and_comes_back_from_batches(pythia, shared):
  loaded = comparisons.load(
    shared / "data" / "hh-rlhf", split="test", subsets=("harmless-base",)
  )
  texts = [row.prompt + row.chosen for row in loaded.rows]
  ids = pythia.encode_all(texts)
  assert [pythia.decode(i) for i in ids] == [
    unicodedata.normalize("NFC", text) for text in texts
  ]
  assert ids[:5] == [pythia.encode(text) for text in texts[:5]]
  assert pythia.encode_all([]) == []


# --- special tokens


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|padding|>"])
def test_special_text_is_refused_and_its_pairs_counted(
  pythia, trained, special
):
  for words in (pythia, trained[0]):
    assert words.special_in(f"a {special} b") == special
    assert words.special_in("a b") is None
    with pytest.raises(ValueError, match="special token") as error:
      words.encode(f"a{special}")
    assert special in str(error.value)
  rows = [
    comparisons.Comparison("0", "p", " a", " b"),
    comparisons.Comparison("1", f"p{special}", " a", " b"),
    comparisons.Comparison("2", "p", f" {special}", " b"),
    comparisons.Comparison("3", "p", " a", f"{special} b"),
  ]
  counts = {}
  kept = tokenizer.tokenize(
    pythia, rows, max_length=9, max_prompt_length=4, counts=counts
  )
  assert [pair.id for pair in kept] == ["0"]
  assert counts == {"holds a special token": 3}


def test_padding_is_special_though_the_config_does_not_name_it(
  copy, pythia, edit
):
  # As in the files that EleutherAI publishes.
  edit("tokenizer_config.json", {"pad_token": None})
  words = tokenizer.load(copy)
  assert (words.eos_id, words.pad_id) == (0, 1)
  with pytest.raises(ValueError, match="special token"):
    words.encode("a<|padding|>")


# --- loading


@pytest.fixture
def copy(shared, tmp_path):
  """A writable copy of the real tokenizer."""
  directory = tmp_path / "tokenizer"
  directory.mkdir()
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(shared / "tokenizer" / "pythia" / name, directory / name)
  return directory


@pytest.fixture
def edit(copy):
  """Changes fields of a JSON file of the copy; None removes one."""

  def change(name, fields):
    values = json.loads((copy / name).read_text("utf-8")) | fields
    kept = {key: value for key, value in values.items() if value is not None}
    (copy / name).write_text(json.dumps(kept), "utf-8")

  return change


@pytest.mark.parametrize(
  "path", ["", "/no/such/dir", "../no", "no/such", "a b"]
)
def test_a_missing_tokenizer_is_refused(path):
  with pytest.raises(ValueError, match=r"tokenizer"):
    tokenizer.load(path)


def test_a_directory_without_tokenizer_json_is_refused(copy, tmp_path):
  (copy / "tokenizer.json").unlink()
  for path in (copy, tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer.json"):
      tokenizer.load(path)


@pytest.mark.parametrize("text", ["", "{}", '{"version": "1.0"', "[]"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_are_refused(copy, name, text):
  (copy / name).write_text(text)
  with pytest.raises(ValueError, match=str(copy)):
    tokenizer.load(copy)


def test_without_an_end_of_text_it_is_refused(copy, edit):
  edit("tokenizer_config.json", {"eos_token": None})
  with pytest.raises(ValueError, match="end of text is id None"):
    tokenizer.load(copy)


def test_padding_with_the_end_of_text_is_refused(copy, edit):
  edit("tokenizer_config.json", {"pad_token": "<|endoftext|>"})
  with pytest.raises(ValueError, match="padding id 0; both must exist and"):
    tokenizer.load(copy)


def test_code_beside_a_tokenizer_is_never_run(copy, edit, monkeypatch):
  def never(*_):
    raise AssertionError("asked at the terminal")

  monkeypatch.setattr("builtins.input", never)
  (copy / "custom.py").write_text("raise SystemExit('was run')\n")
  edit(
    "tokenizer_config.json",
    {
      "tokenizer_class": "Custom",
      "auto_map": {"AutoTokenizer": [None, "custom.Custom"]},
    },
  )
  with pytest.raises(ValueError, match="no tokenizer at"):
    tokenizer.load(copy)


# --- training one


def test_a_trained_tokenizer_has_pythias_control_ids(trained):
  words, directory = trained
  assert (words.eos_id, words.pad_id) == (0, 1)
  assert words.encode("the pen") == words.encode("the pen")
  # 256 bytes and two control tokens are there whatever the texts hold.
  assert 258 <= words.vocab_size <= 300
  again = tokenizer.load(directory)
  assert again.vocab_size == words.vocab_size
  assert again.encode("ink 👋 is") == words.encode("ink 👋 is")


def test_saving_changes_nothing(pythia, tmp_path):
  pythia.save(tmp_path)
  again = tokenizer.load(tmp_path)
  assert (again.eos_id, again.pad_id, again.vocab_size) == (0, 1, 50277)
  for text in TEXTS:
    assert again.encode(text) == pythia.encode(text)


# --- the cut rule


def cut(trained, lengths, max_length, max_prompt_length):
  """Tokenises a pair of given lengths, in tokens and without EOS."""
  # One byte is one token: none of these letters occurs in the training texts.
  prompt, chosen, rejected = lengths
  row = comparisons.Comparison(
    "i",
    ("QRSTUVWX" * 9)[:prompt],
    ("YZ" * 30)[:chosen],
    ("JK" * 30)[:rejected],
  )
  counts = {}
  (pair,) = tokenizer.tokenize(
    trained[0],
    [row],
    max_length=max_length,
    max_prompt_length=max_prompt_length,
    counts=counts,
  )
  return row, pair, counts


# prompt, chosen and rejected in tokens, EOS not counted; max_length 20,
# max_prompt_length 8; what is left of each, EOS counted.
@pytest.mark.parametrize(
  ("lengths", "left", "counts"),
  [
    # 12 + 8 = 20: fits.
    ((12, 7, 3), (12, 8, 4), {}),
    # One more: the prompt keeps its last 8, which is enough.
    ((12, 8, 3), (8, 9, 4), {"prompt cut": 1}),
    ((13, 3, 7), (8, 4, 8), {"prompt cut": 1}),
    # 8 + 12 = 20 after the cut: fits exactly.
    ((30, 11, 2), (8, 12, 3), {"prompt cut": 1}),
    # 8 + 13 > 20: both responses keep their first 12; the shorter is whole.
    ((30, 12, 2), (8, 12, 3), {"prompt cut": 1, "response cut": 1}),
    ((30, 40, 50), (8, 12, 12), {"prompt cut": 1, "response cut": 1}),
    # A short prompt is not cut, and leaves the responses no more room.
    ((4, 40, 2), (4, 12, 3), {"response cut": 1}),
    ((8, 12, 2), (8, 12, 3), {"response cut": 1}),
    # 9 + 12 > 20 and the prompt is over its 8, though by one.
    ((9, 11, 2), (8, 12, 3), {"prompt cut": 1}),
  ],
)
def test_the_cut_rule_of_the_paper(trained, lengths, left, counts):
  row, pair, found = cut(trained, lengths, 20, 8)
  assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == left
  assert found == counts
  decode = trained[0].decode
  assert row.prompt.endswith(decode(pair.prompt))
  assert (row.chosen + "<|endoftext|>").startswith(decode(pair.chosen))
  assert (row.rejected + "<|endoftext|>").startswith(decode(pair.rejected))


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(
  st.tuples(*[st.integers(1, 60)] * 3), st.integers(2, 50), st.data()
)
def test_what_a_cut_may_do(trained, lengths, max_length, data):
  max_prompt = data.draw(st.integers(1, max_length - 1))
  row, pair, counts = cut(trained, lengths, max_length, max_prompt)
  texts = (row.prompt, row.chosen, row.rejected)
  whole = [trained[0].encode(text) for text in texts]
  assert list(pair.prompt) == whole[0][-len(pair.prompt) :]
  sizes = []
  for ids, encoded in zip((pair.chosen, pair.rejected), whole[1:]):
    assert list(ids) == [*encoded, 0][: len(ids)]
    assert len(ids) >= 1
    sizes.append(len(ids))
  assert len(pair.prompt) + max(sizes) <= max_length
  # Nothing is cut without need, and each cut is counted once.
  needed = lengths[0] + max(lengths[1:]) + 1 > max_length
  is_cut = len(pair.prompt) < lengths[0]
  assert is_cut == (needed and lengths[0] > max_prompt)
  assert counts.get("prompt cut", 0) == is_cut
  responses_cut = sizes != [lengths[1] + 1, lengths[2] + 1]
  assert counts.get("response cut", 0) == responses_cut
  if not needed:
    assert not counts


@pytest.mark.parametrize("prompt", [0, -1, 20, 21])
def test_lengths_that_leave_no_room_are_refused(trained, prompt):
  with pytest.raises(ValueError, match=f"max_prompt_length={prompt} must be"):
    cut(trained, (3, 3, 3), 20, prompt)


def test_responses_are_tokenised_apart_from_their_prompt(pythia):
  row = comparisons.Comparison("i", "Human: go\n\nAssistant:", " Yes.", "  No")
  (pair,) = tokenizer.tokenize(
    pythia, [row], max_length=64, max_prompt_length=32, counts={}
  )
  assert list(pair.chosen) == [*pythia.encode(" Yes."), 0]
  assert list(pair.rejected) == [*pythia.encode("  No"), 0]
  assert pythia.decode(pair.prompt) == row.prompt
