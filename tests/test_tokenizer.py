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
  rows = sourcing.harmless(shared, "eval")
  texts = [row.prompt + row.chosen for row in rows]
  ids = pythia.encode_all(texts)
  assert [pythia.decode(i) for i in ids] == [
    unicodedata.normalize("NFC", text) for text in texts
  ]
  assert ids[:5] == [pythia.encode(text) for text in texts[:5]]
  assert pythia.encode_all([]) == []


# --- special tokens


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|padding|>"])
def test_special_text_is_refused(pythia, trained, special):
  for words in (pythia, trained[0]):
    assert words.special_in(f"a {special} b") == special
    assert words.special_in("a b") is None
    with pytest.raises(ValueError, match="special token") as error:
      words.encode(f"a{special}")
    assert special in str(error.value)


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


def content(backend):
  """All by which two of transformers' tokenizers could give other ids."""
  return (
    backend.backend_tokenizer.to_str(),
    backend.special_tokens_map,
    {i: repr(token) for i, token in backend.added_tokens_decoder.items()},
    len(backend),
  )


@pytest.mark.parametrize("config", [None, {"model_type": "gpt_neox"}])
def test_our_own_are_read_as_transformers_would(copy, config, monkeypatch):
  if config:
    (copy / "config.json").write_text(json.dumps(config))
  wanted = content(transformers.AutoTokenizer.from_pretrained(copy))

  def no(*_, **options):
    raise AssertionError("it would import PyTorch")

  with monkeypatch.context() as patch:
    patch.setattr(transformers.AutoTokenizer, "from_pretrained", no)
    found = content(tokenizer.load(copy).backend)
  assert found == wanted


@pytest.mark.parametrize(
  ("file", "change"),
  [
    ("tokenizer_config.json", {"tokenizer_class": "GPTNeoXTokenizer"}),
    ("tokenizer_config.json", {"tokenizer_class": None}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
    ("config.json", {"model_type": "llama"}),
  ],
)
def test_where_a_class_has_a_say_transformers_decides(
  copy, file, change, monkeypatch
):
  path = copy / file
  before = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(before | change))
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


def test_no_torch_is_imported_to_read_pythias(shared):
  code = (
    "import sys\nfrom dpo_jax.data import tokenizer\n"
    "tokenizer.load(sys.argv[1])\nprint('torch' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, shared / "tokenizer" / "pythia"],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parent.parent,
  )
  assert done.stdout == "False\n"


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


def test_the_fingerprint_is_of_the_ids_not_of_the_path(
  pythia, trained, copy, tmp_path
):
  words, directory = trained
  assert tokenizer.load(copy).fingerprint == pythia.fingerprint
  assert tokenizer.load(directory).fingerprint == words.fingerprint
  words.save(tmp_path / "again")
  assert tokenizer.load(tmp_path / "again").fingerprint == words.fingerprint
  assert words.fingerprint != pythia.fingerprint
  assert len(pythia.fingerprint) == 16
  # Another end of text or padding, though the vocabulary is the same.
  for change in ({"eos_id": 5}, {"pad_id": 5}):
    other = dataclasses.replace(pythia, **change)
    assert other.fingerprint != pythia.fingerprint


def test_one_merge_less_is_another_fingerprint(copy, pythia, edit):
  model = json.loads((copy / "tokenizer.json").read_text("utf-8"))["model"]
  edit("tokenizer.json", {"model": model | {"merges": model["merges"][:-1]}})
  assert tokenizer.load(copy).fingerprint != pythia.fingerprint


def test_a_file_that_asks_for_cutting_and_padding_gets_neither(copy, edit):
  edit(
    "tokenizer.json",
    {
      "truncation": {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
      },
      "padding": {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|padding|>",
      },
    },
  )
  words = tokenizer.load(copy)
  assert words.decode(words.encode("one two three four")) == (
    "one two three four"
  )


def test_ids_end_to_end(pythia):
  texts = ["one two", "", "three \u2028"]
  ids, lengths = pythia.encode_flat(texts)
  assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
  assert lengths.tolist() == [len(pythia.encode(text)) for text in texts]
  assert ids.tolist() == [i for text in texts for i in pythia.encode(text)]
  assert [len(part) for part in pythia.encode_flat([])] == [0, 0]


def test_tokens_around_every_text_are_seen(copy, pythia, edit):
  assert pythia.adds_nothing
  edit(
    "tokenizer.json",
    {
      "post_processor": {
        "type": "TemplateProcessing",
        "single": [
          {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
          {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
          {"Sequence": {"id": "A", "type_id": 0}},
          {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {
          "<|endoftext|>": {
            "id": "<|endoftext|>",
            "ids": [0],
            "tokens": ["<|endoftext|>"],
          }
        },
      }
    },
  )
  # transformers sets its own around Pythia's class, so take the plain one.
  edit("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
  assert not tokenizer.load(copy).adds_nothing
