"""Tokenized rows on disk: the same as made afresh, or made again loudly."""

import dataclasses
import logging
import multiprocessing
import os
import resource

import numpy as np
import pytest

from dpo_jax.data import preferences, token_cache, tokenization, tokenizer

LENGTHS = {"rules": "paper", "max_length": 24, "max_prompt_length": 8}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  texts = ["a pen is a tool", "ink is wet"] * 4
  return tokenizer.train(texts, 280, tmp_path_factory.mktemp("words"))


def rows(count=40):
  return [
    preferences.Comparison(
      f"row-{i}-é", "is ink" * (1 + i % 9), " pen" * (1 + i % 5), f" {i} \u2028"
    )
    for i in range(count)
  ]


def entries(directory):
  return sorted(os.listdir(directory))


def same(one, other):
  assert one.table.ids == other.table.ids
  assert list(one.table) == list(other.table)
  assert one.table.fingerprint() == other.table.fingerprint()
  assert one.counts == other.counts
  assert one.cut.dtype == other.cut.dtype == bool
  assert np.array_equal(one.cut, other.cut)
  for name in ("tokens", "starts", "lengths"):
    arrays = [getattr(x.table, name) for x in (one, other)]
    assert arrays[0].dtype == arrays[1].dtype
    assert np.array_equal(*arrays)


@pytest.fixture
def filled(tmp_path, words, caplog):
  """A directory with one entry, which is known to be read without a word."""
  made = token_cache.tokenize(tmp_path, words, rows(), **LENGTHS)
  (name,) = entries(tmp_path)
  return tmp_path / name, made


class Never:
  """A tokenizer that only has a fingerprint: it cannot tokenize again."""

  def __init__(self, words):
    self.fingerprint = words.fingerprint


def test_an_entry_is_what_tokenising_gives(filled, words, caplog):
  path, made = filled
  fresh = tokenization.tokenize(words, rows(), **LENGTHS)
  same(made, fresh)
  assert fresh.counts["prompt cut"] > 0
  same(
    token_cache.tokenize(path.parent, Never(words), rows(), **LENGTHS), fresh
  )
  assert entries(path.parent) == [path.name]
  assert not caplog.records


def test_without_a_directory_nothing_is_kept(tmp_path, words, monkeypatch):
  monkeypatch.chdir(tmp_path)
  done = token_cache.tokenize("", words, rows(), **LENGTHS)
  same(done, tokenization.tokenize(words, rows(), **LENGTHS))
  assert entries(tmp_path) == []


def changed_text(row):
  return dataclasses.replace(row, rejected=row.rejected + "!")


@pytest.mark.parametrize(
  "other",
  [
    lambda _: {"rules": "dpo-replication"},
    lambda _: {"max_length": 25},
    lambda _: {"max_prompt_length": 9},
    lambda _: {"rules": "trl", "max_prompt_length": 0},
    lambda rows: {"rows": rows[:-1]},
    lambda rows: {"rows": rows[::-1]},
    # Of the same id: what counts is the text.
    lambda rows: {"rows": [changed_text(rows[0]), *rows[1:]]},
    lambda rows: {"rows": [dataclasses.replace(rows[0], id="x"), *rows[1:]]},
  ],
)
def test_whatever_changes_the_ids_is_another_entry(filled, words, other):
  path, _ = filled
  settings = {"rows": rows()} | LENGTHS | other(rows())
  given = settings.pop("rows")
  done = token_cache.tokenize(path.parent, words, given, **settings)
  same(done, tokenization.tokenize(words, given, **settings))
  assert len(entries(path.parent)) == 2


def test_another_tokenizer_is_another_entry(filled, tmp_path_factory, words):
  path, _ = filled
  other = tokenizer.train(["wet wet"], 260, tmp_path_factory.mktemp("other"))
  done = token_cache.tokenize(path.parent, other, rows(), **LENGTHS)
  same(done, tokenization.tokenize(other, rows(), **LENGTHS))
  assert len(entries(path.parent)) == 2


def test_a_pair_dropped_and_no_pair_left(tmp_path, words):
  given = [preferences.Comparison("x", "<|padding|>", "a", "b")]
  for _ in range(2):
    done = token_cache.tokenize(tmp_path, words, given, **LENGTHS)
    assert len(done.table) == 0
    assert done.counts == {"holds a special token": 1}
  assert len(entries(tmp_path)) == 1


# --- broken entries


def is_made_again(path, made, words, caplog):
  caplog.set_level(logging.WARNING)
  caplog.clear()
  same(token_cache.tokenize(path.parent, words, rows(), **LENGTHS), made)
  (record,) = caplog.records
  assert str(path) in record.getMessage()
  assert "made again" in record.getMessage()
  # And it is whole now.
  caplog.clear()
  same(token_cache.tokenize(path.parent, Never(words), rows(), **LENGTHS), made)
  assert not caplog.records
  assert entries(path.parent) == [path.name]


def test_any_flipped_byte_is_found(filled, words, caplog):
  path, made = filled
  whole = path.read_bytes()
  header = 8 + int.from_bytes(whole[:8], "little")
  about = whole.index(b'"about"')
  # The header's length, what the entry is about, its hash, the tensors' names,
  # types and shapes, and every array.
  offsets = [2, *range(about, header, 41), *range(header, len(whole), 97)]
  for offset in offsets:
    if header - 8 < offset < header and whole[offset] == ord(" "):
      continue  # Padding of the header.
    path.write_bytes(
      whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :]
    )
    caplog.clear()
    same(token_cache.tokenize(path.parent, words, rows(), **LENGTHS), made)
    assert [str(path) in r.getMessage() for r in caplog.records] == [True], (
      offset
    )
    assert path.read_bytes() == whole


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1, -500])
def test_a_cut_entry_is_made_again(filled, words, caplog, keep):
  path, made = filled
  path.write_bytes(path.read_bytes()[:keep])
  is_made_again(path, made, words, caplog)


def test_a_foreign_entry_is_made_again(filled, words, caplog):
  path, made = filled
  token_cache.tokenize(path.parent, words, rows(3), **LENGTHS)
  (other,) = {*entries(path.parent)} - {path.name}
  # Whole, and of another key.
  os.replace(path.parent / other, path)
  is_made_again(path, made, words, caplog)


def test_weights_in_its_place_are_made_again(filled, words, caplog):
  from safetensors import numpy as library

  path, made = filled
  library.save_file({"w": np.zeros(3, np.float32)}, path)
  is_made_again(path, made, words, caplog)


def test_an_array_of_another_type_is_made_again(filled, words, caplog):
  path, made = filled
  whole = path.read_bytes()
  assert whole.count(b'"I32"') == 1
  path.write_bytes(whole.replace(b'"I32"', b'"U32"'))
  is_made_again(path, made, words, caplog)


# --- where nothing can be written


# /proc is there and takes no files, whoever asks.
@pytest.mark.parametrize("below", ["file", "file/deeper", "/proc"])
def test_a_directory_that_cannot_be_is_named_at_once(tmp_path, words, below):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"data\.token_cache=/.*: .*''"):
    # It has no `encode`: the error comes before the work.
    token_cache.tokenize(tmp_path / below, Never(words), rows(), **LENGTHS)


def test_missing_directories_are_made(tmp_path, words):
  token_cache.tokenize(tmp_path / "a" / "b", words, rows(), **LENGTHS)
  assert len(entries(tmp_path / "a" / "b")) == 1


def test_a_full_disk_leaves_nothing_behind(tmp_path, words):
  # The system refuses this process any file of more than 2,000 bytes.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
  try:
    with pytest.raises(ValueError, match="File too large") as error:
      token_cache.tokenize(tmp_path, words, rows(), **LENGTHS)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert f"data.token_cache={tmp_path}" in str(error.value)
  assert entries(tmp_path) == []


def _many_times(directory, saved, queue):
  words = tokenizer.load(saved)
  for _ in range(30):
    done = token_cache.tokenize(directory, words, rows(), **LENGTHS)
    queue.put((done.counts, done.table.fingerprint()))


def test_two_processes_write_one_whole_entry(tmp_path, words, caplog):
  words.save(tmp_path / "words")
  directory = tmp_path / "cache"
  context = multiprocessing.get_context("spawn")
  queue = context.Queue()
  child = context.Process(
    target=_many_times, args=(directory, tmp_path / "words", queue)
  )
  child.start()
  expected = tokenization.tokenize(words, rows(), **LENGTHS)
  found = []
  # This process writes too, and takes away what either has written, under the
  # other's eyes.
  while len(found) < 30:
    assert child.is_alive() or not queue.empty()
    same(token_cache.tokenize(directory, words, rows(), **LENGTHS), expected)
    for name in entries(directory):
      if name.startswith("tokens-"):
        (directory / name).unlink()
    while not queue.empty():
      found.append(queue.get())
  child.join()
  assert child.exitcode == 0
  assert found == [(expected.counts, expected.table.fingerprint())] * 30
  same(token_cache.tokenize(directory, words, rows(), **LENGTHS), expected)
  assert len(entries(directory)) == 1
  assert not caplog.records
