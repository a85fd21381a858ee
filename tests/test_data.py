"""From files to items: what is refused before any model is read."""

import dataclasses
import json

import pytest

from dpo_jax import batches, comparisons, data, tokenizer

PROMPT = "\n\nHuman: {}\n\nAssistant:"


def row(number, chosen=" yes", rejected=" no"):
  prompt = PROMPT.format(f"question {number}")
  return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
  return path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  texts = [PROMPT.format(f"question {i}") + " yes no" for i in range(40)]
  return tokenizer.train(texts, 320, tmp_path_factory.mktemp("words"))


@pytest.fixture
def settings(tmp_path):
  """Settings that read two small files; fields may be replaced."""
  write(tmp_path / "train.jsonl", [row(i) for i in range(6)])
  write(tmp_path / "test.jsonl", [row(i) for i in range(10, 13)])
  values = data.DataSettings(
    train_path=str(tmp_path / "train.jsonl"),
    train_split="train",
    eval_path=str(tmp_path / "test.jsonl"),
    eval_split="test",
    subsets=(),
    skip_bad=0,
    single_turn=False,
    max_train=0,
    max_eval=0,
    allow_leakage=False,
    max_length=48,
    max_prompt_length=32,
    responses="chosen",
    loss_on_prompt=False,
    layout="packed",
    row_length=96,
  )
  return lambda **changed: dataclasses.replace(values, **changed)


def texts(words, items):
  return [words.decode(item.prompt + item.response) for item in items]


def test_sft_learns_the_chosen_or_both(words, settings):
  prepared = data.prepare(settings(), "sft", words)
  prompts = [PROMPT.format(f"question {i}") for i in range(6)]
  assert texts(words, prepared.train) == [
    f"{prompt} yes<|endoftext|>" for prompt in prompts
  ]
  assert len(prepared.held_out) == 3
  both = data.prepare(settings(responses="both"), "sft", words)
  assert texts(words, both.train) == [
    f"{prompt} {answer}<|endoftext|>"
    for prompt in prompts
    for answer in ("yes", "no")
  ]


def test_dpo_learns_pairs(words, settings):
  prepared = data.prepare(settings(layout="shared"), "dpo", words)
  pair = prepared.train[0]
  assert isinstance(pair, tokenizer.TokenizedPair)
  assert words.decode(pair.chosen) == " yes<|endoftext|>"
  assert words.decode(pair.rejected) == " no<|endoftext|>"
  loaded = comparisons.load(settings().train_path, split="train")
  assert [item.id for item in prepared.train] == [r.id for r in loaded.rows]
  report = prepared.report["train"]
  assert report["counts"] == {
    "read": 6,
    "kept": 6,
    "held-out prompts also trained on": 0,
  }
  assert report["fingerprint"] == loaded.fingerprint
  # The rows are the same, but not what is trained on.
  cut = data.prepare(settings(max_length=6, max_prompt_length=3), "dpo", words)
  assert cut.report["train"]["fingerprint"] == loaded.fingerprint
  assert cut.report["train"]["tokens"] != report["tokens"]


def test_limits_and_single_turns(words, settings, tmp_path):
  two = row(20)
  two = {
    key: text + "\n\nHuman: why\n\nAssistant: so " + key
    for key, text in two.items()
  }
  two["rejected"] = two["chosen"][:-6] + "other"
  write(tmp_path / "train.jsonl", [two, *[row(i) for i in range(6)]])
  prepared = data.prepare(
    settings(single_turn=True, max_train=4, max_eval=2), "dpo", words
  )
  assert (len(prepared.train), len(prepared.held_out)) == (4, 2)
  assert prepared.report["train"]["counts"]["filtered: several turns"] == 1


def test_what_is_dropped_is_counted(words, settings, tmp_path):
  rows = [
    row(0),
    row(1, chosen=""),
    row(2, chosen=" a <|endoftext|> b"),
    row(3, chosen=" long" * 60),
    {"chosen": 3},
  ]
  write(tmp_path / "train.jsonl", rows)
  prepared = data.prepare(settings(skip_bad=1), "dpo", words)
  assert prepared.report["train"]["counts"] == {
    "read": 5,
    "quarantined: empty chosen response": 1,
    "malformed: field 'chosen' is not a string": 1,
    "kept": 3,
    "holds a special token": 1,
    "response cut": 1,
    "held-out prompts also trained on": 0,
  }
  assert len(prepared.train) == 2


def test_leakage_is_refused_unless_allowed(words, settings, tmp_path):
  # The same prompt with other answers is leakage too.
  leaked = [row(10), row(3, " maybe"), row(4)]
  write(tmp_path / "test.jsonl", leaked)
  with pytest.raises(ValueError, match=r"2 held-out prompts .*allow_leakage"):
    data.prepare(settings(), "dpo", words)
  prepared = data.prepare(settings(allow_leakage=True), "dpo", words)
  for name in ("train", "held_out"):
    counts = prepared.report[name]["counts"]
    assert counts["held-out prompts also trained on"] == 2


@pytest.mark.parametrize("side", ["train", "test"])
def test_nothing_left_after_tokenisation_is_refused(
  words, settings, tmp_path, side
):
  write(tmp_path / f"{side}.jsonl", [row(30, chosen=" <|padding|>")])
  with pytest.raises(ValueError, match="nothing is left after tokenisation"):
    data.prepare(settings(), "dpo", words)


def test_a_missing_file_is_refused(words, settings, tmp_path):
  for name in ("train_path", "eval_path"):
    with pytest.raises(ValueError, match=r"nothing.jsonl"):
      data.prepare(
        settings(**{name: str(tmp_path / "nothing.jsonl")}), "sft", words
      )


def test_a_row_that_cannot_hold_a_pair_is_refused(words, settings, tmp_path):
  long = row("on and" * 20, chosen=" yes" * 70, rejected=" no" * 70)
  write(tmp_path / "train.jsonl", [long])
  # Cut to 48 tokens a sequence; a pair shares the prompt.
  pair = data.prepare(settings(), "dpo", words).train[0]
  size = len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
  assert len(pair.prompt) + len(pair.chosen) <= 48 < size
  data.prepare(settings(layout="shared", row_length=size), "dpo", words)
  with pytest.raises(ValueError, match=f"takes {size} tokens.*data.row_length"):
    data.prepare(settings(layout="shared", row_length=size - 1), "dpo", words)
  data.prepare(settings(layout="packed", row_length=48), "dpo", words)


def test_settings_of_the_other_objective_are_refused(words, settings):
  with pytest.raises(ValueError, match=r"data.layout='shared' is for pairs"):
    data.prepare(settings(layout="shared"), "sft", words)
  with pytest.raises(ValueError, match=r"data.loss_on_prompt=True"):
    data.prepare(settings(loss_on_prompt=True), "dpo", words)


@pytest.mark.parametrize(
  ("changed", "words"),
  [
    ({"max_prompt_length": 48}, "data.max_prompt_length=48"),
    ({"max_prompt_length": 0}, "data.max_prompt_length=0"),
    ({"row_length": 47}, "data.row_length=47 .*max_length=48"),
    ({"skip_bad": -1}, "data.skip_bad=-1"),
    ({"max_train": -1}, "data.max_train=-1"),
    ({"max_eval": -5}, "data.max_eval=-5"),
  ],
)
def test_numbers_that_make_no_sense_are_refused(settings, changed, words):
  with pytest.raises(ValueError, match=words):
    settings(**changed)


def test_real_rows_fit_their_rows(shared):
  directory = str(shared / "data" / "hh-rlhf")
  real = data.DataSettings(
    train_path=directory,
    train_split="train",
    eval_path=directory,
    eval_split="test",
    subsets=("harmless-base",),
    skip_bad=0,
    single_turn=False,
    max_train=0,
    max_eval=0,
    allow_leakage=False,
    max_length=512,
    max_prompt_length=256,
    responses="chosen",
    loss_on_prompt=False,
    layout="shared",
    row_length=1024,
  )
  words = tokenizer.load(shared / "tokenizer" / "pythia")
  prepared = data.prepare(real, "dpo", words)
  assert (len(prepared.train), len(prepared.held_out)) == (1551, 255)
  for pair in prepared.train:
    assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 512
    assert min(len(pair.prompt), len(pair.chosen), len(pair.rejected)) > 0
  # A prompt that starts a text does so with "\n\nHuman:" unless it was cut.
  cut = prepared.report["train"]["counts"].get("prompt cut", 0)
  whole = sum(
    words.decode(pair.prompt).startswith("\n\nHuman:")
    for pair in prepared.train
  )
  assert 1551 - cut <= whole <= 1551
  assert batches.longest_piece(prepared.train, "shared") <= 1024
