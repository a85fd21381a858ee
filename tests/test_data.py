"""From files to items: what is refused before any model is read."""

import dataclasses
import json

import pytest

from configs import data as data_config
from dpo_jax.core import settings as settings_lib
from dpo_jax.data import dataset, packing, sources, token_table, tokenizer

PROMPT = "\n\nHuman: {}\n\nAssistant:"


def row(number, chosen=" yes", rejected=" no"):
  prompt = PROMPT.format(f"question {number}")
  return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
  return path


def build(cls, config, **changed):
  """Settings of a config, with some fields replaced."""
  return settings_lib.build(cls, config.to_dict() | changed)


def files(train, held_out, **changed):
  config = data_config.pairs(str(train), str(held_out))
  return build(sources.SourceSettings, config, **changed)


FILTERS = build(sources.FilterSettings, data_config.filters())


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  texts = [PROMPT.format(f"question {i}") + " yes no" for i in range(40)]
  return tokenizer.train(texts, 320, tmp_path_factory.mktemp("words"))


@pytest.fixture
def settings(tmp_path):
  """Settings that read two small files; fields may be replaced."""
  write(tmp_path / "train.jsonl", [row(i) for i in range(6)])
  write(tmp_path / "test.jsonl", [row(i) for i in range(10, 13)])
  values = dataset.DataSettings(
    use=("files",),
    sources={"files": files(tmp_path / "train.jsonl", tmp_path / "test.jsonl")},
    filters=FILTERS,
    max_train=0,
    max_eval=0,
    allow_leakage=False,
    max_length=48,
    max_prompt_length=32,
    tokenization="paper",
    token_cache="",
    responses="chosen",
    loss_on_prompt=False,
    layout="packed",
    row_length=96,
    shapes=4,
  )
  return lambda **changed: dataclasses.replace(values, **changed)


def texts(words, items):
  return [words.decode(item.prompt + item.response) for item in items]


def test_sft_learns_the_chosen_or_both(words, settings):
  prepared = dataset.prepare(settings(), "sft", words)
  prompts = [PROMPT.format(f"question {i}") for i in range(6)]
  assert texts(words, prepared.train.table) == [
    f"{prompt} yes<|endoftext|>" for prompt in prompts
  ]
  assert len(prepared.held_out.table) == 3
  both = dataset.prepare(settings(responses="both"), "sft", words)
  assert texts(words, both.train.table) == [
    f"{prompt} {answer}<|endoftext|>"
    for prompt in prompts
    for answer in ("yes", "no")
  ]


def test_dpo_learns_pairs(words, settings):
  prepared = dataset.prepare(settings(layout="shared"), "dpo", words)
  pair = prepared.train.table[0]
  assert isinstance(pair, token_table.Pair)
  assert words.decode(pair.chosen) == " yes<|endoftext|>"
  assert words.decode(pair.rejected) == " no<|endoftext|>"
  loaded = sources.load(settings().sources["files"], "train", FILTERS, 0)
  assert [item.id for item in prepared.train.table] == [
    r.id for r in loaded.rows
  ]
  report = prepared.report["train"]
  assert report["counts"] == {"read": 6, "kept": 6}
  assert report["held-out prompts also trained on"] == 0
  (source,) = report["sources"].values()
  assert source == {
    "counts": report["counts"],
    "fingerprint": loaded.fingerprint,
  }
  # The rows are the same, but not what is trained on.
  cut = dataset.prepare(
    settings(max_length=6, max_prompt_length=3), "dpo", words
  )
  assert cut.report["train"]["sources"]["files"]["fingerprint"] == (
    loaded.fingerprint
  )
  assert cut.report["train"]["tokens"] != report["tokens"]


def test_limits_and_single_turns(words, settings, tmp_path):
  two = row(20)
  two = {
    key: text + "\n\nHuman: why\n\nAssistant: so " + key
    for key, text in two.items()
  }
  two["rejected"] = two["chosen"][:-6] + "other"
  write(tmp_path / "train.jsonl", [two, *[row(i) for i in range(6)]])
  prepared = dataset.prepare(
    settings(
      filters=dataclasses.replace(FILTERS, single_turn=True),
      max_train=4,
      max_eval=2,
    ),
    "dpo",
    words,
  )
  assert (len(prepared.train.table), len(prepared.held_out.table)) == (4, 2)
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
  lenient = dataclasses.replace(FILTERS, skip_bad=1)
  prepared = dataset.prepare(settings(filters=lenient), "dpo", words)
  assert prepared.report["train"]["counts"] == {
    "read": 5,
    "quarantined: empty chosen response": 1,
    "malformed: field 'chosen' is not a string": 1,
    "kept": 3,
    "holds a special token": 1,
    "response cut": 1,
  }
  assert len(prepared.train.table) == 2


def test_leakage_is_refused_unless_allowed(words, settings, tmp_path):
  # The same prompt with other answers is leakage too.
  leaked = [row(10), row(3, " maybe"), row(4)]
  write(tmp_path / "test.jsonl", leaked)
  with pytest.raises(ValueError, match=r"2 held-out prompts .*allow_leakage"):
    dataset.prepare(settings(), "dpo", words)
  prepared = dataset.prepare(settings(allow_leakage=True), "dpo", words)
  for name in ("train", "held_out"):
    assert prepared.report[name]["held-out prompts also trained on"] == 2


@pytest.mark.parametrize("side", ["train", "test"])
def test_nothing_left_after_tokenisation_is_refused(
  words, settings, tmp_path, side
):
  write(tmp_path / f"{side}.jsonl", [row(30, chosen=" <|padding|>")])
  with pytest.raises(ValueError, match="nothing is left after tokenisation"):
    dataset.prepare(settings(), "dpo", words)


def test_a_missing_file_is_refused(words, settings, tmp_path):
  there, nothing = tmp_path / "train.jsonl", tmp_path / "nothing.jsonl"
  for paths in ((nothing, there), (there, nothing)):
    with pytest.raises(ValueError, match=r"nothing.jsonl"):
      dataset.prepare(settings(sources={"files": files(*paths)}), "sft", words)


def test_a_row_that_cannot_hold_a_pair_is_refused(words, settings, tmp_path):
  long = row("on and" * 20, chosen=" yes" * 70, rejected=" no" * 70)
  write(tmp_path / "train.jsonl", [long])
  # Cut to 48 tokens a sequence; a pair shares the prompt.
  pair = dataset.prepare(settings(), "dpo", words).train.table[0]
  size = len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
  assert len(pair.prompt) + len(pair.chosen) <= 48 < size
  dataset.prepare(settings(layout="shared", row_length=size), "dpo", words)
  with pytest.raises(ValueError, match=f"takes {size} tokens.*data.row_length"):
    dataset.prepare(
      settings(layout="shared", row_length=size - 1), "dpo", words
    )
  dataset.prepare(settings(layout="packed", row_length=48), "dpo", words)


def test_settings_of_the_other_objective_are_refused(words, settings):
  with pytest.raises(ValueError, match=r"data.layout='shared' is for pairs"):
    dataset.prepare(settings(layout="shared"), "sft", words)
  with pytest.raises(ValueError, match=r"data.loss_on_prompt=True"):
    dataset.prepare(settings(loss_on_prompt=True), "dpo", words)
  with pytest.raises(ValueError, match=r"data.responses='both' is for SFT"):
    dataset.prepare(settings(responses="both"), "dpo", words)


@pytest.mark.parametrize(
  ("changed", "words"),
  [
    ({"max_prompt_length": 48}, "max_prompt_length=48"),
    ({"max_prompt_length": 0}, "max_prompt_length=0"),
    ({"tokenization": "trl"}, "max_prompt_length=32 has no meaning"),
    ({"use": ()}, r"data.use=\(\) must name one or more .*\['files'\]"),
    ({"use": ("hh",)}, r"data.use=\('hh',\) must name"),
    ({"use": ("files", "files")}, "each once"),
    ({"shapes": 0}, "data.shapes=0"),
    ({"row_length": 47}, "data.row_length=47 .*max_length=48"),
    ({"max_train": -1}, "data.max_train=-1"),
    ({"max_eval": -5}, "data.max_eval=-5"),
  ],
)
def test_numbers_that_make_no_sense_are_refused(settings, changed, words):
  with pytest.raises(ValueError, match=words):
    settings(**changed)


def test_several_sources_are_mixed_and_counted_apart(words, settings, tmp_path):
  write(tmp_path / "more.jsonl", [row(i) for i in range(20, 24)])
  write(tmp_path / "more_test.jsonl", [row(40), row(41), {"chosen": 1}])
  more = files(
    tmp_path / "more.jsonl", tmp_path / "more_test.jsonl", weight=0.5
  )
  both = settings(
    use=("more", "files"),
    sources=settings().sources | {"more": more},
    filters=dataclasses.replace(FILTERS, skip_bad=1),
    max_train=5,
  )
  prepared = dataset.prepare(both, "dpo", words)
  # In the order of `use`; the limit is of each source.
  assert (prepared.train.sizes, prepared.weights) == ((4, 5), (0.5, 1.0))
  assert prepared.held_out.sizes == (2, 3)
  firsts = [pair.id for pair in prepared.train.table][:4]
  alone = sources.load(more, "train", FILTERS, 0)
  assert firsts == [r.id for r in alone.rows]
  report = prepared.report["held_out"]
  assert report["counts"]["read"] == 6
  assert report["sources"]["more"]["counts"]["read"] == 3
  assert report["sources"]["files"]["counts"]["read"] == 3
  plan = prepared.schedule(batch_size=7, seed=0, epochs=2)
  assert plan.shares == (2, 5)


def test_a_leak_between_sources_is_a_leak(words, settings, tmp_path):
  more = files(tmp_path / "test.jsonl", tmp_path / "train.jsonl")
  both = settings(
    use=("files", "more"), sources=settings().sources | {"more": more}
  )
  with pytest.raises(ValueError, match="9 held-out prompts of files, more"):
    dataset.prepare(both, "dpo", words)


@pytest.mark.parametrize("tokenization", ["paper", "trl", "dpo-replication"])
def test_a_kept_table_is_the_same_table(
  words, settings, tmp_path, tokenization
):
  lengths = {
    "tokenization": tokenization,
    "max_prompt_length": 0 if tokenization == "trl" else 32,
  }
  fresh = dataset.prepare(settings(**lengths), "dpo", words)
  kept = [
    dataset.prepare(
      settings(token_cache=str(tmp_path / "cache"), **lengths), "dpo", words
    )
    for _ in range(2)
  ]
  assert len(list((tmp_path / "cache").iterdir())) == 2
  for prepared in kept:
    assert prepared.report == fresh.report
    assert list(prepared.train.table) == list(fresh.train.table)
  # As in the seed, responses are stripped: a real difference.
  first = words.decode(fresh.train.table[0].chosen)
  assert first.startswith(
    "yes" if tokenization == "dpo-replication" else " yes"
  )


def test_real_rows_fit_their_rows(shared):
  directory = str(shared / "data" / "hh-rlhf")
  hh = data_config.hh(directory)
  real = dataset.DataSettings(
    use=("hh",),
    sources={
      "hh": build(sources.SourceSettings, hh, subsets=("harmless-base",))
    },
    filters=FILTERS,
    max_train=0,
    max_eval=0,
    allow_leakage=False,
    tokenization="paper",
    max_length=512,
    max_prompt_length=256,
    token_cache="",
    responses="chosen",
    loss_on_prompt=False,
    layout="shared",
    row_length=1024,
    shapes=4,
  )
  words = tokenizer.load(shared / "tokenizer" / "pythia")
  prepared = dataset.prepare(real, "dpo", words)
  assert prepared.train.sizes == (1551,)
  assert prepared.held_out.sizes == (255,)
  for pair in prepared.train.table:
    assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 512
    assert min(len(pair.prompt), len(pair.chosen), len(pair.rejected)) > 0
  # A prompt that starts a text does so with "\n\nHuman:" unless it was cut.
  cut = prepared.report["train"]["counts"].get("prompt cut", 0)
  whole = sum(
    words.decode(pair.prompt).startswith("\n\nHuman:")
    for pair in prepared.train.table
  )
  assert 1551 - cut <= whole <= 1551
  assert packing.longest_segment(prepared.train.table, "shared") <= 1024


def test_a_post_keeps_its_start_and_a_dialogue_its_end(
  words, settings, tmp_path
):
  post = {
    "history": "first " + "question " * 60 + "last",
    "human_ref_A": "yes",
    "human_ref_B": "no",
    "labels": 1,
    "score_A": 9,
    "score_B": 2,
    "score_ratio": 4.5,
  }
  other = post | {"history": "another question"}
  path = write(tmp_path / "posts.jsonl", [post])
  held_out = write(tmp_path / "others.jsonl", [other])
  shp = files(path, held_out, kind="shp")
  prepared = dataset.prepare(
    settings(use=("shp",), sources={"shp": shp}), "dpo", words
  )
  prompt = words.decode(prepared.train.table[0].prompt)
  assert prompt.startswith("\n\nHuman: first")
  assert len(prepared.train.table[0].prompt) == 32
  dialogue = "\n\nHuman: first " + "question " * 60 + "last\n\nAssistant:"
  write(
    tmp_path / "train.jsonl",
    [{"prompt": dialogue, "chosen": " yes", "rejected": " no"}],
  )
  prepared = dataset.prepare(settings(), "dpo", words)
  prompt = words.decode(prepared.train.table[0].prompt)
  assert prompt.endswith("last\n\nAssistant:")
  assert len(prepared.train.table[0].prompt) == 32
