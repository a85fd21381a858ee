"""The real tokenizer and a trained one: round trips, refusals, fingerprints."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import unicodedata

import hypothesis
import numpy as np
import pytest
import sourcing
import transformers
from hypothesis import strategies as st

from dpo_jax.data import tokenizer

TEXTS = [
  "  runs of   spaces\t\tand tabs ",
  "line\nline\r\nline\r",
  "emoji 👩🏽‍🚀 👨‍👩‍👧‍👦 🇫🇷",
  "שלום عليكم ‏mixed‎ left 汉字 한국어 ไทย",
  "nul \0 bell \a escape \x1b \u2028 \u2029 \x85 \x0b \x0c \ufeff",
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
  # Unicode's NFC composes accents.
  assert pythia.decode(pythia.encode("cafe\u0301")) == "caf\u00e9"


@pytest.mark.parametrize("text", TEXTS)
def test_texts_round_trip(pythia, trained, text):
  assert pythia.decode(pythia.encode(text)) == text
  assert trained[0].decode(trained[0].encode(text)) == text
  assert 0 not in pythia.encode(text)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_any_text_round_trips(pythia, trained, text):
  # Pythia's tokenizer normalizes to NFC; a trained one changes nothing.
  normal = unicodedata.normalize("NFC", text)
  assert pythia.decode(pythia.encode(text)) == normal
  assert trained[0].decode(trained[0].encode(text)) == text


def test_real_rows_round_trip_and_batches_are_single_texts(pythia, shared):
  rows = sourcing.harmless(shared, "eval")
  texts = ["", *(row.prompt + row.chosen for row in rows)]
  ids = pythia.encode_all(texts)
  assert [pythia.decode(i) for i in ids] == [
    unicodedata.normalize("NFC", text) for text in texts
  ]
  assert ids[:5] == [pythia.encode(text) for text in texts[:5]]
  flat, lengths = pythia.encode_flat(texts[:5])
  assert (flat.dtype, lengths.dtype) == (np.int32, np.int64)
  assert lengths.tolist() == [len(i) for i in ids[:5]]
  assert flat.tolist() == [token for i in ids[:5] for token in i]
  assert [len(part) for part in pythia.encode_flat([])] == [0, 0]


# --- special tokens


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|padding|>"])
def test_special_text_is_refused(pythia, trained, special):
  for words in (pythia, trained[0]):
    assert words.special_in(f"a {special} b") == special
    assert words.special_in("a b") is None
    with pytest.raises(ValueError, match="special token") as error:
      words.encode(f"a{special}")
    assert special in str(error.value)


# --- loading


@pytest.fixture
def copy(trained, tmp_path):
  """A writable copy of the trained tokenizer."""
  return pathlib.Path(shutil.copytree(trained[1], tmp_path / "tokenizer"))


@pytest.fixture
def edit(copy):
  """Changes fields of a JSON file of the copy; None removes one."""

  def change(name, fields):
    path = copy / name
    values = json.loads(path.read_text()) if path.exists() else {}
    values |= fields
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(kept), "utf-8")

  return change


CONFIG = "tokenizer_config.json"


def test_padding_is_special_though_the_config_does_not_name_it(copy, edit):
  # As in the files that EleutherAI publishes.
  edit(CONFIG, {"pad_token": None})
  words = tokenizer.load(copy)
  assert (words.eos_id, words.pad_id) == (0, 1)
  with pytest.raises(ValueError, match="special token"):
    words.encode("a<|padding|>")


@pytest.mark.parametrize(
  "path", ["", "/no/such/dir", "../no", "no/such", "a b"]
)
def test_a_missing_tokenizer_is_refused(path):
  with pytest.raises(ValueError, match=r"tokenizer"):
    tokenizer.load(path)


def test_a_directory_without_tokenizer_json_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"holds no tokenizer.json"):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"version": "1.0"', "[]"])
@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG])
def test_broken_files_are_refused(copy, name, text):
  (copy / name).write_text(text)
  with pytest.raises(ValueError, match=str(copy)):
    tokenizer.load(copy)


def test_a_tokenizer_without_end_of_text_is_refused(copy, edit):
  edit(CONFIG, {"eos_token": None})
  with pytest.raises(ValueError, match="no end of text; set eos_token"):
    tokenizer.load(copy)


def test_padding_saved_as_end_of_text_is_the_vocabularys_own(copy, edit):
  edit(CONFIG, {"pad_token": "<|endoftext|>"})
  words = tokenizer.load(copy)
  assert (words.eos_id, words.pad_id) == (0, 1)


def test_without_a_padding_token_the_end_of_text_pads(copy, edit):
  # The vocabulary of a tokenizer that has none, as SmolLM2's.
  edit(CONFIG, {"pad_token": "<|endoftext|>"})
  path = copy / "tokenizer.json"
  path.write_text(path.read_text("utf-8").replace("<|padding|>", "<|other|>"))
  words = tokenizer.load(copy)
  assert (words.eos_id, words.pad_id) == (0, 0)


def test_code_beside_a_tokenizer_is_never_run(copy, edit, monkeypatch):
  def never(*_):
    raise AssertionError("asked at the terminal")

  monkeypatch.setattr("builtins.input", never)
  (copy / "custom.py").write_text("raise SystemExit('was run')\n")
  auto_map = {"AutoTokenizer": [None, "custom.Custom"]}
  edit(CONFIG, {"tokenizer_class": "Custom", "auto_map": auto_map})
  with pytest.raises(ValueError, match="no tokenizer at"):
    tokenizer.load(copy)


def content(backend):
  """All by which two of transformers' tokenizers could give other ids."""
  return (
    backend.backend_tokenizer.to_str(),
    backend.special_tokens_map,
    {i: repr(token) for i, token in backend.added_tokens_decoder.items()},
    len(backend),
  )


@pytest.mark.parametrize("config", [None, {"model_type": "gpt_neox"}])
def test_our_own_are_read_as_transformers_would(
  copy, edit, config, monkeypatch
):
  if config:
    edit("config.json", config)
  wanted = content(transformers.AutoTokenizer.from_pretrained(copy))

  def no(*_, **options):
    raise AssertionError("it would import PyTorch")

  monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", no)
  assert content(tokenizer.load(copy).backend) == wanted


@pytest.mark.parametrize(
  ("file", "change"),
  [
    (CONFIG, {"tokenizer_class": "GPTNeoXTokenizer"}),
    (CONFIG, {"tokenizer_class": None}),
    (CONFIG, {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
    ("config.json", {"model_type": "llama"}),
  ],
)
def test_where_a_class_has_a_say_transformers_decides(
  copy, edit, file, change, monkeypatch
):
  edit(file, change)
  asked = []

  def from_pretrained(name, **options):
    asked.append(options)
    raise OSError("asked")

  monkeypatch.setattr(
    transformers.AutoTokenizer, "from_pretrained", from_pretrained
  )
  with pytest.raises(ValueError, match="asked"):
    tokenizer.load(copy)
  assert asked == [{"use_fast": True, "trust_remote_code": False}]


def test_no_torch_is_imported_to_read_our_own(trained):
  code = (
    "import sys\nfrom dpo_jax.data import tokenizer\n"
    "tokenizer.load(sys.argv[1])\nprint('torch' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, trained[1]],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parent.parent,
  )
  assert done.stdout == "False\n"


# --- training and saving one


def test_a_trained_tokenizer_has_pythias_control_ids(trained):
  words, directory = trained
  assert (words.eos_id, words.pad_id) == (0, 1)
  # 256 bytes and two control tokens are there whatever the texts hold.
  assert 258 <= words.vocab_size <= 300
  again = tokenizer.load(directory)
  assert again.vocab_size == words.vocab_size
  assert again.encode("ink 👋 is") == words.encode("ink 👋 is")
  assert len(words.decode_each()) == words.vocab_size
  assert words.decode_each()[words.encode("a")[0]] == "a"


def test_saving_changes_nothing_and_the_fingerprint_is_of_the_ids(
  pythia, trained, tmp_path
):
  pythia.save(tmp_path)
  again = tokenizer.load(tmp_path)
  assert (again.eos_id, again.pad_id, again.vocab_size) == (0, 1, 50277)
  for text in TEXTS:
    assert again.encode(text) == pythia.encode(text)
  assert again.fingerprint == pythia.fingerprint != trained[0].fingerprint
  assert len(pythia.fingerprint) == 16
  # Another end of text or padding, though the vocabulary is the same.
  for change in ({"eos_id": 5}, {"pad_id": 5}):
    other = dataclasses.replace(pythia, **change)
    assert other.fingerprint != pythia.fingerprint


def test_one_merge_less_is_another_fingerprint(copy, edit, trained):
  assert tokenizer.load(copy).fingerprint == trained[0].fingerprint
  model = json.loads((copy / "tokenizer.json").read_text("utf-8"))["model"]
  edit("tokenizer.json", {"model": model | {"merges": model["merges"][:-1]}})
  assert tokenizer.load(copy).fingerprint != trained[0].fingerprint


def test_a_file_that_asks_for_cutting_and_padding_gets_neither(copy, edit):
  truncation = {
    "direction": "Right",
    "max_length": 2,
    "strategy": "LongestFirst",
    "stride": 0,
  }
  padding = {
    "strategy": {"Fixed": 9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<|padding|>",
  }
  edit("tokenizer.json", {"truncation": truncation, "padding": padding})
  words = tokenizer.load(copy)
  assert words.decode(words.encode("one two three")) == "one two three"


def test_tokens_around_every_text_are_seen(copy, edit, trained):
  assert trained[0].adds_nothing
  eos = "<|endoftext|>"
  before = {"SpecialToken": {"id": eos, "type_id": 0}}
  text, second = ({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
  around = {
    "type": "TemplateProcessing",
    "single": [before, text],
    "pair": [text, second],
    "special_tokens": {eos: {"id": eos, "ids": [0], "tokens": [eos]}},
  }
  edit("tokenizer.json", {"post_processor": around})
  assert not tokenizer.load(copy).adds_nothing
