"""Training and held-out items of sources: counts, limits, and refusals."""

import dataclasses

import pytest
import sourcing
from sourcing import ASSISTANT, HUMAN

from dpo_jax.data import dataset, packing, sources, token_table, tokenizer

PROMPT = f"{HUMAN} {{}}{ASSISTANT}"


def row(number, chosen=" yes", rejected=" no"):
  prompt = PROMPT.format(f"question {number}")
  return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def write(path, rows):
  path.write_bytes(b"".join(sourcing.line(row) for row in rows))
  return path


def files(train, held_out, **changed):
  return sourcing.source(train, eval_path=str(held_out), **changed)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  texts = [PROMPT.format(f"question {i}") + " yes no" for i in range(40)]
  return tokenizer.train(texts, 320, tmp_path_factory.mktemp("words"))


@pytest.fixture
def settings(tmp_path):
  """Settings that read two small files; fields may be replaced."""
  train = write(tmp_path / "train.jsonl", [row(i) for i in range(6)])
  test = write(tmp_path / "test.jsonl", [row(i) for i in range(10, 13)])
  values = dataset.DataSettings(
    use=("files",),
    sources={"files": files(train, test)},
    filters=sourcing.filters(),
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


def test_sft_learns_the_chosen_or_both(words, settings):
  prompts = [PROMPT.format(f"question {i}") for i in range(6)]
  for responses, wanted in (("chosen", ["yes"]), ("both", ["yes", "no"])):
    prepared = dataset.prepare(settings(responses=responses), "sft", words)
    found = [words.decode(x.prompt + x.response) for x in prepared.train.table]
    assert found == [
      f"{prompt} {response}<|endoftext|>"
      for prompt in prompts
      for response in wanted
    ]
    assert len(prepared.held_out.table) == 3 * len(wanted)


def test_dpo_learns_pairs(words, settings):
  prepared = dataset.prepare(settings(layout="shared"), "dpo", words)
  pair = prepared.train.table[0]
  assert isinstance(pair, token_table.Pair)
  assert words.decode(pair.chosen) == " yes<|endoftext|>"
  assert words.decode(pair.rejected) == " no<|endoftext|>"
  filters = sourcing.filters()
  loaded = sources.load(settings().sources["files"], "train", filters, 0)
  assert prepared.train.table.ids == tuple(r.id for r in loaded.rows)
  report = prepared.report["train"]
  assert report["counts"] == {"read": 6, "kept": 6}
  assert report["held-out prompts also trained on"] == 0
  source = {"counts": report["counts"], "fingerprint": loaded.fingerprint}
  assert report["sources"] == {"files": source}
  # The rows are the same, but not what is trained on.
  short = settings(max_length=6, max_prompt_length=3)
  cut = dataset.prepare(short, "dpo", words).report["train"]
  assert cut["sources"]["files"]["fingerprint"] == loaded.fingerprint
  assert cut["tokens"] != report["tokens"]


def test_dropped_rows_are_counted_and_limits_are_of_kept_ones(
  words, settings, tmp_path
):
  rows = [
    row(1, chosen=""),
    row(0),
    {"chosen": 3},
    row(2, chosen=" a <|endoftext|> b"),
    row(3, chosen=" long" * 60),
    row(4),
  ]
  write(tmp_path / "train.jsonl", rows)
  lenient = settings(
    filters=sourcing.filters(skip_bad=1), max_train=3, max_eval=2
  )
  prepared = dataset.prepare(lenient, "dpo", words)
  assert prepared.report["train"]["counts"] == {
    "read": 5,
    "quarantined: empty chosen response": 1,
    "malformed: field 'chosen' is not a string": 1,
    "kept": 3,
    "holds a special token": 1,
    "response cut": 1,
  }
  assert (len(prepared.train.table), len(prepared.held_out.table)) == (2, 2)


def test_labeled_responses_meet_those_of_other_prompts(
  words, settings, tmp_path
):
  rows = [
    {"prompt": PROMPT.format(f"question {i}"), "completion": x, "label": good}
    for i, x, good in (
      (0, " yes", True),
      (0, " no", False),
      (1, " maybe", True),
      (2, " yes", False),
    )
  ]
  train = write(tmp_path / "labels.jsonl", rows)
  unpaired = files(train, tmp_path / "test.jsonl", kind="unpaired")
  test = [
    row | {"prompt": PROMPT.format(f"q {i}")} for i, row in enumerate(rows)
  ]
  write(tmp_path / "test.jsonl", test)
  used = settings(sources={"files": unpaired})
  prepared = dataset.prepare(used, "dpo", words, labeled=True)

  def texts(table):
    return [
      tuple(words.decode(x) for x in (one.prompt, one.chosen, one.rejected))
      for one in table
    ]

  end = "<|endoftext|>"
  questions = [row["prompt"] for row in rows]
  # The next response to another prompt that is another text.
  assert texts(prepared.train.table) == [
    (questions[0], f" yes{end}", f" maybe{end}"),
    (questions[1], f" no{end}", f" maybe{end}"),
    (questions[2], f" maybe{end}", f" yes{end}"),
    (questions[3], f" yes{end}", f" no{end}"),
  ]
  labels = prepared.train.table.desirable
  assert labels.tolist() == [True, False, True, False]
  assert prepared.train.table.take([3, 0]).desirable.tolist() == [False, True]
  for objective in ("sft", "dpo"):
    with pytest.raises(ValueError, match="only objective='dpo' with"):
      dataset.prepare(used, objective, words)


def test_pairs_are_two_labeled_responses(words, settings):
  pairs = dataset.prepare(settings(), "dpo", words).train.table
  table = dataset.prepare(settings(), "dpo", words, labeled=True).train.table
  assert table.desirable.tolist() == [True, False] * 6
  assert len({*table.ids}) == 12
  for i, pair in enumerate(pairs):
    good, bad = table[2 * i], table[2 * i + 1]
    assert good.prompt == bad.prompt == pair.prompt
    assert (good.chosen, bad.chosen) == (pair.chosen, pair.rejected)
    # Of another question.
    assert (good.rejected, bad.rejected) == (pair.rejected, pair.chosen)


def test_leakage_is_refused_unless_allowed(words, settings, tmp_path):
  # The same prompt with other responses is leakage too.
  write(tmp_path / "test.jsonl", [row(10), row(3, " maybe"), row(4)])
  with pytest.raises(ValueError, match=r"2 held-out prompts .*allow_leakage"):
    dataset.prepare(settings(), "dpo", words)
  prepared = dataset.prepare(settings(allow_leakage=True), "dpo", words)
  for name in ("train", "held_out"):
    assert prepared.report[name]["held-out prompts also trained on"] == 2


def test_a_leak_between_sources_is_a_leak(words, settings, tmp_path):
  more = files(tmp_path / "test.jsonl", tmp_path / "train.jsonl")
  known = settings().sources | {"more": more}
  with pytest.raises(ValueError, match="9 held-out prompts of files, more"):
    dataset.prepare(
      settings(use=("files", "more"), sources=known), "dpo", words
    )


@pytest.mark.parametrize("side", ["train", "test"])
def test_no_pair_left_is_refused(words, settings, tmp_path, side):
  write(tmp_path / f"{side}.jsonl", [row(30, chosen=" <|padding|>")])
  with pytest.raises(ValueError, match="no pair is left after tokenization"):
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
  short = settings(layout="shared", row_length=size - 1)
  with pytest.raises(ValueError, match=f"takes {size} tokens.*data.row_length"):
    dataset.prepare(short, "dpo", words)
  dataset.prepare(settings(layout="packed", row_length=48), "dpo", words)


@pytest.mark.parametrize(
  ("objective", "changed", "message"),
  [
    ("sft", {"layout": "shared"}, r"data.layout='shared' is for pairs"),
    ("dpo", {"loss_on_prompt": True}, r"data.loss_on_prompt=True"),
    ("dpo", {"responses": "both"}, r"data.responses='both' is for SFT"),
  ],
)
def test_settings_of_the_other_objective_are_refused(
  words, settings, objective, changed, message
):
  with pytest.raises(ValueError, match=message):
    dataset.prepare(settings(**changed), objective, words)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"max_prompt_length": 48}, "max_prompt_length=48"),
    ({"tokenization": "trl"}, "max_prompt_length=32 has no meaning"),
    ({"use": ()}, r"data.use=\(\) must name one or more .*\['files'\]"),
    ({"use": ("hh",)}, r"data.use=\('hh',\) must name"),
    ({"use": ("files", "files")}, "each once"),
    ({"shapes": 0}, "data.shapes=0"),
    ({"row_length": 47}, "max_length=48 .*row_length=47"),
    ({"max_train": -1}, "data.max_train=-1"),
  ],
)
def test_settings_that_contradict_are_refused(settings, changed, message):
  with pytest.raises(ValueError, match=message):
    settings(**changed)


def test_several_sources_are_mixed_and_counted_apart(words, settings, tmp_path):
  more = files(
    write(tmp_path / "more.jsonl", [row(i) for i in range(20, 24)]),
    write(tmp_path / "more_test.jsonl", [row(40), row(41), {"chosen": 1}]),
    weight=0.5,
  )
  filters = sourcing.filters(skip_bad=1)
  both = settings(
    use=("more", "files"),
    sources=settings().sources | {"more": more},
    filters=filters,
    max_train=5,
  )
  prepared = dataset.prepare(both, "dpo", words)
  # In the order of `use`; the limit is of each source.
  assert (prepared.train.sizes, prepared.weights) == ((4, 5), (0.5, 1.0))
  assert prepared.held_out.sizes == (2, 3)
  alone = sources.load(more, "train", filters, 0)
  assert prepared.train.table.ids[:4] == tuple(r.id for r in alone.rows)
  report = prepared.report["held_out"]
  counts = {name: x["counts"]["read"] for name, x in report["sources"].items()}
  assert counts == {"more": 3, "files": 3}
  assert report["counts"]["read"] == 6
  order = prepared.schedule(batch_size=7, seed=0, epochs=2)
  assert order.shares == (2, 5)


@pytest.mark.parametrize("tokenization", ["paper", "trl", "dpo-replication"])
def test_a_cached_table_is_the_same_table(
  words, settings, tmp_path, tokenization
):
  cached = settings(
    tokenization=tokenization,
    max_prompt_length=0 if tokenization == "trl" else 32,
    token_cache=str(tmp_path / "cache"),
  )
  fresh = dataset.prepare(
    dataclasses.replace(cached, token_cache=""), "dpo", words
  )
  for _ in range(2):
    prepared = dataset.prepare(cached, "dpo", words)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert prepared.report == fresh.report
    assert list(prepared.train.table) == list(fresh.train.table)
  # dpo-replication strips responses.
  first = words.decode(fresh.train.table[0].chosen)
  assert first.startswith(" yes") == (tokenization != "dpo-replication")


def test_real_rows_fit_their_rows(settings, shared):
  hh = sourcing.source(
    shared / "data" / "hh-rlhf", kind="hh", subsets=("harmless-base",)
  )
  real = settings(
    use=("hh",),
    sources={"hh": hh},
    max_length=512,
    max_prompt_length=256,
    layout="shared",
    row_length=1024,
  )
  words = tokenizer.load(shared / "tokenizer" / "pythia")
  prepared = dataset.prepare(real, "dpo", words)
  assert prepared.train.sizes == (1551,)
  assert prepared.held_out.sizes == (255,)
  lengths = prepared.train.table.lengths
  assert (lengths[:, 0] + lengths[:, 1:].max(1)).max() <= 512
  assert lengths.min() > 0
  # A prompt starts with "\n\nHuman:" unless it was cut.
  cut = prepared.report["train"]["counts"].get("prompt cut", 0)
  whole = sum(
    words.decode(pair.prompt).startswith(HUMAN) for pair in prepared.train.table
  )
  assert 1551 - cut <= whole <= 1551
  assert packing.longest_segment(prepared.train.table, "shared") <= 1024


def test_a_post_keeps_its_start_and_a_dialogue_its_end(
  words, settings, tmp_path
):
  text = "first " + "question " * 60 + "last"
  post = {
    "history": text,
    "human_ref_A": "yes",
    "human_ref_B": "no",
    "labels": 1,
    "score_A": 9,
    "score_B": 2,
  }
  posts = write(tmp_path / "posts.jsonl", [post])
  others = [post | {"history": "another"}]
  shp = files(posts, write(tmp_path / "others.jsonl", others), kind="shp")
  dialogue = sourcing.apart(PROMPT.format(text), " yes", " no")
  write(tmp_path / "train.jsonl", [dialogue])
  post, turn = (
    dataset.prepare(settings(**changed), "dpo", words).train.table[0].prompt
    for changed in ({"use": ("shp",), "sources": {"shp": shp}}, {})
  )
  assert len(post) == len(turn) == 32
  assert words.decode(post).startswith(f"{HUMAN} first")
  assert words.decode(turn).endswith(f"last{ASSISTANT}")
