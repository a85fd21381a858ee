"""What the `datasets` library reads: real parquet and JSON, without a network.

The library takes a directory where it takes a hub id, and reads both by the
same code.
"""

import gc
import json
import os
import shutil
import subprocess
import sys

import hub_server
import pytest
from sourcing import GOOD, PROMPT, apart, line, load, texts

from dpo_jax.data.sources import files, hub


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """A cache of the test's own, and no bars."""
  import datasets

  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  datasets.disable_progress_bars()


@pytest.fixture
def parquet(tmp_path):
  """Writes shards of rows below a directory of parquet files."""
  import pyarrow
  from pyarrow import parquet

  def write(shards, folder="data", split="train"):
    target = tmp_path / "set" / folder
    target.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(shards):
      name = f"{split}-{number:05}-of-{len(shards):05}.parquet"
      parquet.write_table(pyarrow.Table.from_pylist(rows), target / name)
    return tmp_path / "set"

  return write


def numbered(*numbers):
  return [apart(f"p{i}", f" a{i}\u2028\0👩‍👩‍👧", f" b{i}") for i in numbers]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_is_read_in_order(parquet, streaming):
  parquet([numbered(3)], split="test")
  path = parquet([numbered(0, 1), numbered(2)])
  loaded = load(path, streaming=streaming)
  assert texts(loaded) == [tuple(row.values()) for row in numbered(0, 1, 2)]
  assert loaded.counts == {"read": 3, "kept": 3}
  held_out = load(path, side="eval", streaming=streaming)
  assert [row.prompt for row in held_out.rows] == ["p3"]


def test_streaming_reads_no_further_than_the_limit(parquet):
  path = parquet([numbered(0, 1), numbered(2, 3)])
  second = path / "data" / "train-00001-of-00002.parquet"
  second.write_bytes(b"not parquet at all")
  loaded = load(path, streaming=True, limit=2)
  assert [row.prompt for row in loaded.rows] == ["p0", "p1"]
  with pytest.raises(ValueError, match=r"split 'train' was not read \("):
    load(path, streaming=True, limit=3)
  with pytest.raises(ValueError, match=r"split 'train' was not read \("):
    load(path, limit=2)
  gc.collect()


@pytest.mark.parametrize("streaming", [False, True])
def test_subsets_of_parquet_are_directories(parquet, streaming):
  parquet([numbered(1)], folder="one")
  path = parquet([numbered(2)], folder="two")
  loaded = load(path, subsets=("two", "one"), streaming=streaming)
  assert [row.prompt for row in loaded.rows] == ["p2", "p1"]
  assert [row.subset for row in loaded.rows] == ["two", "one"]
  with pytest.raises(ValueError, match=r"/three holds none of .*no parquet"):
    load(path, subsets=("one", "three"), streaming=streaming)


def test_a_split_that_is_not_there_is_named(parquet):
  path = parquet([numbered(0)])
  with pytest.raises(
    ValueError, match=r"split 'test' was not read .*check its"
  ):
    load(path, side="eval")


def test_nested_rows_come_as_dicts_and_lists(parquet):
  row = {
    "question": "<p>Why?</p>",
    "answers": [{"text": "a", "pm_score": 1}, {"text": "b", "pm_score": 2}],
  }
  wanted = [("\n\nHuman: Why?\n\nAssistant:", " b", " a")]
  assert texts(load(parquet([[row]]), kind="se", streaming=True)) == wanted


def test_a_bad_row_is_named_by_its_number(parquet):
  rows = [*numbered(0), {"prompt": "p", "chosen": None, "rejected": " b"}]
  path = parquet([rows])
  with pytest.raises(ValueError, match=r"/set/:train:2: field 'chosen' is not"):
    load(path)
  loaded = load(path, filtered={"skip_bad": 1})
  assert loaded.counts["malformed: field 'chosen' is not a string"] == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_the_real_files_are_the_same_through_datasets(
  shared, tmp_path, streaming
):
  # A copy without the other files.
  path = tmp_path / "hh"
  folder = shared / "data" / "hh-rlhf" / "harmless-base"
  shutil.copytree(folder, path / "harmless-base")
  through = hub.rows(str(path), "test", "harmless-base", "data_dir", streaming)
  direct = files.rows(folder / "test.jsonl.gz", {})
  assert [row for _, row in through] == [row for _, row in direct]


def test_named_configurations_are_subsets(tmp_path):
  for name in ("comparisons", "axis"):
    (tmp_path / f"{name}.jsonl").write_bytes(
      line(GOOD | {"chosen": f"{PROMPT} {name}"})
    )
  (tmp_path / "README.md").write_text(
    "---\nconfigs:\n"
    + "".join(
      f"- config_name: {name}\n  data_files:\n"
      f"  - split: validation\n    path: {name}.jsonl\n"
      for name in ("comparisons", "axis")
    )
    + "---\n"
  )
  rows = hub.rows(str(tmp_path), "validation", "axis", "name", False)
  assert [row["chosen"] for _, row in rows] == [PROMPT + " axis"]


@pytest.mark.parametrize(
  ("path", "is_id"),
  [
    ("Anthropic/hh-rlhf", True),
    ("openai/summarize_from_feedback@refs/convert/parquet", True),
    ("Anthropic/hh-rlhf@09be8c5", True),
    ("Anthropic/hh-rlhf@", False),
    ("Anthropic", False),
    ("a/b/c", False),
    ("/a/b", False),
    ("../b", False),
    ("data/train.jsonl@1", False),
  ],
)
def test_what_has_the_form_of_a_hub_id(path, is_id):
  assert hub.is_id(path) == is_id


# Threads of the client may outlive the failed request.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ["nobody/nothing", "nobody/nothing@abc"])
def test_a_hub_id_that_cannot_be_read_is_refused_with_advice(path, streaming):
  # conftest.py switches the hub off.
  with pytest.raises(
    ValueError,
    match=rf"'{path}', subset 'harmless-base', split 'train' was not read.*"
    "HF_HUB_OFFLINE.*local copy",
  ):
    load(path, kind="hh", subsets=("harmless-base",), streaming=streaming)


def test_a_dataset_defined_by_a_script_is_never_run(tmp_path):
  folder = tmp_path / "scripted"
  folder.mkdir()
  mark = tmp_path / "ran"
  (folder / "scripted.py").write_text(f"open({str(mark)!r}, 'w')\n")
  with pytest.raises(ValueError, match=r"add @refs/convert/parquet to the id"):
    list(hub.rows(str(folder), "train", "", "name", False))
  assert not mark.exists()


# --- over HTTP

# The library reads HF_ENDPOINT when it is imported: hence another process.
CHILD = """
import json, sys
import sourcing

for path, options in json.loads(sys.argv[1]):
  try:
    loaded = sourcing.load(path, **{"kind": "tldr"} | options)
    print(json.dumps([sourcing.texts(loaded), loaded.counts]), flush=True)
  except ValueError as error:
    print(json.dumps(str(error)), flush=True)
"""


def summary(number):
  info = {"subreddit": "cats", "title": "T", "post": f"P{number}"}
  texts = [{"text": " a"}, {"text": " b"}]
  return {"info": info, "summaries": texts, "choice": number % 2}


def flat(number):
  prompt = f"SUBREDDIT: r/cats\n\nTITLE: T\n\nPOST: P{number}\n\nTL;DR:"
  return [prompt, *([" a", " b"], [" b", " a"])[number % 2]]


def test_a_dataset_of_the_hub_is_read_at_its_revision(parquet, tmp_path):
  # As the hub's own conversion lays them out.
  parquet([[summary(0), summary(1)], [summary(2)]], "one/train", "0")
  parquet([[summary(3)]], "one/validation", "0")
  root = parquet([[summary(4)], [summary(5)]], "two/train", "0")
  parquet([[GOOD]], "hh/train", "0")
  path = "user/tldr@refs/convert/parquet"
  loads = [
    (path, {"subsets": ["one"], "streaming": True, "limit": 2}),
    (
      path,
      {
        "subsets": ["one"],
        "streaming": True,
        "side": "eval",
        "eval_split": "validation",
      },
    ),
    (path, {"subsets": ["two"], "streaming": True}),
    (path, {"subsets": ["two"]}),
    (path, {"subsets": ["three"]}),
    ("user/tldr@lacking", {"subsets": ["one"]}),
    # HH's subsets are directories; those of summaries are named, but for the
    # hub's conversion.
    ("user/tldr@v1", {"subsets": ["hh"], "kind": "hh"}),
    ("user/tldr@v1", {"subsets": ["one"]}),
  ]
  revisions = ("refs/convert/parquet", "v1")
  with hub_server.serve(root, "user/tldr", revisions) as (address, asked):
    environment = os.environ | {
      "HF_ENDPOINT": address,
      "HF_HUB_OFFLINE": "0",
      "HF_HOME": str(tmp_path / "home"),
      "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
      [sys.executable, "-c", CHILD, json.dumps(loads)],
      capture_output=True,
      text=True,
      env=environment,
      timeout=100,
    )
  assert done.returncode == 0, done.stderr
  few, held_out, streamed, fetched, *lacking, hh, unnamed = map(
    json.loads, done.stdout.splitlines()
  )
  assert few == [[flat(0), flat(1)], {"read": 2, "kept": 2}]
  assert held_out == [[flat(3)], {"read": 1, "kept": 1}]
  assert streamed == fetched == [[flat(4), flat(5)], {"read": 2, "kept": 2}]
  # Behind the limit, nothing was read.
  shards = [f"one/train/0-{i:05}-of-00002.parquet" for i in (0, 1)]
  assert shards[0] in asked
  assert shards[1] not in asked
  assert hh == [[[PROMPT, " A tool.", " No."]], {"read": 1, "kept": 1}]
  assert "BuilderConfig 'one' not found" in unnamed
  for error in (*lacking, unnamed):
    assert "split 'train' was not read" in error
    assert "give the path of a local copy" in error
