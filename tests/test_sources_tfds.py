"""HH written once as a TensorFlow dataset, and read with random access."""

import pathlib
import re
import signal
import subprocess
import sys

import pytest
from sourcing import ASSISTANT, GOOD, HUMAN, PROMPT, line, load

from dpo_jax.data.sources import files, hh_tfds

SUBSET = "harmless-base"


@pytest.fixture(scope="module")
def written(shared, tmp_path_factory):
  """The real rows as a dataset."""
  data_dir = tmp_path_factory.mktemp("tfds")
  path = shared / "data" / "hh-rlhf"
  assert hh_tfds.write(path, data_dir, subsets=(SUBSET,)) == {SUBSET: 1812}
  return data_dir


@pytest.fixture
def layout(tmp_path):
  """Writes HH's layout of two small subsets; `more` goes into the second."""

  def to(more=b""):
    for subset, text in (("a", " one"), ("b", " two")):
      (tmp_path / "hh" / subset).mkdir(parents=True)
      rows = line(GOOD | {"chosen": PROMPT + text})
      for split in hh_tfds.SPLITS:
        (tmp_path / "hh" / subset / f"{split}.jsonl").write_bytes(rows)
    with (tmp_path / "hh" / "b" / "test.jsonl").open("ab") as file:
      file.write(more)
    return tmp_path / "hh"

  return to


@pytest.mark.parametrize(
  "changes",
  [
    {"side": "train"},
    {"limit": 7},
    {"eval_path": "", "held_out": 0.3, "filtered": {"single_turn": True}},
  ],
)
def test_it_is_the_same_source_as_the_files(shared, written, changes):
  options = {"side": "eval", "subsets": (SUBSET,)} | changes
  files = load(shared / "data" / "hh-rlhf", kind="hh", **options)
  dataset = load(written, kind="tfds", **options)
  # Rows, ids, counts and fingerprint.
  assert dataset == files
  assert len(files.rows) > 5


def test_rows_are_read_in_any_order(written, shared):
  rows = hh_tfds.open_rows(written, SUBSET, "test")
  file = shared / "data" / "hh-rlhf" / SUBSET / "test.jsonl.gz"
  raw = [row for _, row in files.rows(file, {})]
  assert len(rows) == len(raw) == 256
  for i in (255, 0, 131, 7, 131):
    assert {name: text.decode() for name, text in rows[i].items()} == raw[i]


def test_tfds_itself_reads_what_was_written(written):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(hh_tfds.folder(written, SUBSET))
  assert builder.info.splits["train"].num_examples == 1556
  row = builder.as_data_source(split="train")[0]
  assert (
    row["chosen"]
    .decode()
    .startswith(f"{HUMAN} what are some pranks with a pen i can do?{ASSISTANT}")
  )
  assert "tensorflow" not in sys.modules


def test_texts_survive_and_subsets_keep_their_order(layout, tmp_path):
  odd = {
    "chosen": f"{PROMPT} a\0\u2028\r\x85👩‍👩‍👧 שלום\ufeff",
    "rejected": f"{PROMPT} e\u0301 ",
  }
  path = layout(line(odd))
  hh_tfds.write(path, tmp_path / "out", subsets=("a", "b"))
  options = {"side": "eval", "subsets": ("b", "a")}
  dataset = load(tmp_path / "out", kind="tfds", **options)
  assert dataset == load(path, kind="hh", **options)
  assert [row.chosen for row in dataset.rows] == [
    " two",
    odd["chosen"].removeprefix(PROMPT),
    " one",
  ]
  assert [row.subset for row in dataset.rows] == ["b", "b", "a"]


def test_a_subset_is_written_once(layout, tmp_path):
  path, out = layout(), tmp_path / "out"
  hh_tfds.write(path, out, subsets=("a",))
  before = sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*"))
  with pytest.raises(ValueError, match=r"hh_rlhf/a/1.0.0 is already there"):
    hh_tfds.write(path, out, subsets=("b", "a"))
  assert sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*")) == before
  hh_tfds.write(path, out, subsets=("b",))
  assert len(load(out, kind="tfds", subsets=("a", "b")).rows) == 2


@pytest.mark.parametrize(
  ("more", "words"),
  [
    (b"{\n", r"test.jsonl:2: not JSON: .*; fix or remove the line"),
    (line({"chosen": PROMPT}), r"test.jsonl:2: field 'rejected' is missing"),
    (
      line(GOOD | {"prompt": PROMPT}),
      r"test.jsonl:2: field 'prompt' in a row of transcripts",
    ),
  ],
)
def test_a_malformed_row_is_not_written(layout, tmp_path, more, words):
  with pytest.raises(ValueError, match=words):
    hh_tfds.write(layout(more), tmp_path / "out", subsets=("b",))
  assert not hh_tfds.folder(tmp_path / "out", "b").exists()


def test_a_killed_write_leaves_no_subset_behind(tmp_path):
  (tmp_path / "hh" / "a").mkdir(parents=True)
  rows = b"".join(
    line(GOOD | {"chosen": f"{PROMPT} {i}"}) for i in range(4_000)
  )
  (tmp_path / "hh" / "a" / "train.jsonl").write_bytes(rows)
  out = tmp_path / "out"
  command = [sys.executable, "-m", "dpo_jax.data.sources.hh_tfds"]
  command += [f"--path={tmp_path / 'hh'}", f"--data_dir={out}"]
  command += ["--subsets=a", "--splits=train"]
  child = subprocess.Popen(
    command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  while not list(out.rglob("*incomplete*")):
    assert child.poll() is None
  child.kill()
  assert child.wait() == -signal.SIGKILL
  assert not hh_tfds.folder(out, "a").exists()
  with pytest.raises(ValueError, match="holds no dataset"):
    load(out, kind="tfds", subsets=("a",))
  hh_tfds.write(tmp_path / "hh", out, subsets=("a",), splits=("train",))
  kept = load(out, kind="tfds", subsets=("a",)).rows
  assert [row.chosen for row in kept] == [f" {i}" for i in range(4_000)]


def test_a_missing_subset_is_named_with_the_command(written):
  with pytest.raises(
    ValueError,
    match=r"helpful-base/1.0.0 holds no dataset: write it with python -m"
    rf" dpo_jax.data.sources.hh_tfds .*--data_dir={re.escape(str(written))}",
  ):
    load(written, kind="tfds", subsets=("helpful-base",))
  with pytest.raises(ValueError, match=r"no split 'dev'; it has \['train', 't"):
    load(written, kind="tfds", subsets=(SUBSET,), train_split="dev")


def test_a_broken_file_is_an_error(layout, tmp_path):
  hh_tfds.write(layout(), tmp_path / "out", subsets=("a",))
  folder = hh_tfds.folder(tmp_path / "out", "a")
  (file,) = folder.glob("*train*")
  data = file.read_bytes()
  used = [i for i, byte in enumerate(data) if byte]
  at = used[len(used) // 2]
  flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
  for broken in (flipped, data[: len(data) // 2], b""):
    file.write_bytes(broken)
    with pytest.raises(ValueError, match="write it again"):
      load(tmp_path / "out", kind="tfds", subsets=("a",))


def test_the_command_writes_without_tensorflow(layout, tmp_path):
  out = tmp_path / "out"
  command = [
    sys.executable,
    "-W",
    "error",
    "-m",
    "dpo_jax.data.sources.hh_tfds",
  ]
  command += [f"--path={layout()}", f"--data_dir={out}", "--subsets=a,b"]
  first, second = (
    subprocess.run(command, capture_output=True, text=True) for _ in range(2)
  )
  assert first.returncode == 0, first.stderr
  assert first.stdout.splitlines()[-2:] == [
    f"2 rows in {out}/hh_rlhf/a/1.0.0",
    f"2 rows in {out}/hh_rlhf/b/1.0.0",
  ]
  assert len(load(out, kind="tfds", subsets=("a", "b")).rows) == 2
  assert second.returncode == 2
  assert "error: " in second.stderr
  assert "is already there" in second.stderr
  assert not list(pathlib.Path(out).rglob("*incomplete*"))
