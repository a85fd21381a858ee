"""The cache of token ids: the same as without it, or written again loudly."""

import dataclasses
import logging
import os
import resource
import types
from concurrent import futures

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


def assert_same(one, other):
  assert one.table.ids == other.table.ids
  assert one.counts == other.counts
  for name in ("tokens", "starts", "lengths"):
    arrays = [getattr(x.table, name) for x in (one, other)]
    assert arrays[0].dtype == arrays[1].dtype
    assert np.array_equal(*arrays)
  assert one.cut.dtype == other.cut.dtype == bool
  assert np.array_equal(one.cut, other.cut)


@pytest.fixture
def filled(tmp_path, words):
  """The path of a directory's one entry, and its content."""
  done = token_cache.tokenize(tmp_path, words, rows(), **LENGTHS)
  (name,) = entries(tmp_path)
  return tmp_path / name, done


def never(words):
  """A tokenizer that has a fingerprint and cannot tokenize."""
  return types.SimpleNamespace(fingerprint=words.fingerprint)


def test_an_entry_is_what_tokenization_gives(filled, words, caplog):
  path, done = filled
  fresh = tokenization.tokenize(words, rows(), **LENGTHS)
  assert fresh.counts["prompt cut"] > 0
  assert_same(done, fresh)
  again = token_cache.tokenize(path.parent, never(words), rows(), **LENGTHS)
  assert_same(again, fresh)
  assert entries(path.parent) == [path.name]
  assert not caplog.records


def test_without_a_directory_nothing_is_kept(tmp_path, words, monkeypatch):
  monkeypatch.chdir(tmp_path)
  done = token_cache.tokenize("", words, rows(), **LENGTHS)
  assert_same(done, tokenization.tokenize(words, rows(), **LENGTHS))
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
    lambda _: {"prompt_keeps": "start"},
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
  assert_same(done, tokenization.tokenize(words, given, **settings))
  assert len(entries(path.parent)) == 2


def test_another_tokenizer_is_another_entry(filled, tmp_path_factory, words):
  path, _ = filled
  other = tokenizer.train(["wet wet"], 260, tmp_path_factory.mktemp("other"))
  done = token_cache.tokenize(path.parent, other, rows(), **LENGTHS)
  assert_same(done, tokenization.tokenize(other, rows(), **LENGTHS))
  assert len(entries(path.parent)) == 2


def test_no_pair_left_is_an_entry_too(tmp_path, words):
  given = [preferences.Comparison("x", "<|padding|>", "a", "b")]
  for _ in range(2):
    done = token_cache.tokenize(tmp_path, words, given, **LENGTHS)
    assert (done.table.ids, len(done.table)) == ((), 0)
    assert done.counts == {"holds a special token": 1}
  assert len(entries(tmp_path)) == 1


# --- damaged entries


def foreign(path, words):
  """An entry of other rows under the name of these."""
  token_cache.tokenize(path.parent, words, rows(3), **LENGTHS)
  (other,) = {*entries(path.parent)} - {path.name}
  os.replace(path.parent / other, path)


def weights(path, words):
  from safetensors import numpy as library

  library.save_file({"w": np.zeros(3, np.float32)}, path)


def other_type(path, words):
  whole = path.read_bytes()
  assert whole.count(b'"I32"') == 1
  path.write_bytes(whole.replace(b'"I32"', b'"U32"'))


def cut_to(size):
  def cut(path, words):
    path.write_bytes(path.read_bytes()[:size])

  return cut


def flipped(place):
  def flip(path, words):
    whole = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    at = {"length": 2, "about": whole.index(b'"about"') + 30}
    at |= {"hash": whole.index(b'"sha256"') + 12, "last": len(whole) - 1}
    whole[at.get(place, header)] ^= 1
    path.write_bytes(whole)

  return flip


@pytest.mark.parametrize(
  "damage",
  [
    *(foreign, weights, other_type),
    *map(cut_to, (0, 7, 100, -1)),
    *map(flipped, ("length", "about", "hash", "first", "last")),
  ],
)
def test_a_damaged_entry_is_named_and_written_again(
  filled, words, caplog, damage
):
  path, done = filled
  whole = path.read_bytes()
  damage(path, words)
  caplog.set_level(logging.WARNING)
  assert_same(token_cache.tokenize(path.parent, words, rows(), **LENGTHS), done)
  (record,) = caplog.records
  assert str(path) in record.getMessage()
  assert "written again" in record.getMessage()
  assert path.read_bytes() == whole
  assert entries(path.parent) == [path.name]


# --- writing


# /proc is there and takes no files, whatever the user.
@pytest.mark.parametrize("below", ["file", "file/deeper", "/proc"])
def test_a_directory_that_cannot_be_written_is_named_and_nothing_is_kept(
  tmp_path, words, below, caplog
):
  (tmp_path / "file").write_text("")
  found = token_cache.tokenize(tmp_path / below, words, rows(), **LENGTHS)
  assert_same(found, tokenization.tokenize(words, rows(), **LENGTHS))
  (record,) = caplog.records
  assert f"data.token_cache={tmp_path / below} cannot" in record.getMessage()


def test_a_full_disk_leaves_nothing_behind(tmp_path, words, caplog):
  # The system refuses this process any file of more than 2,000 bytes.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
  directory = tmp_path / "a" / "b"
  try:
    token_cache.tokenize(directory, words, rows(), **LENGTHS)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  (record,) = caplog.records
  assert "File too large" in record.getMessage()
  assert entries(directory) == []


def test_several_writers_write_one_whole_entry(tmp_path, words):
  expected = tokenization.tokenize(words, rows(), **LENGTHS)

  def many_times():
    """Writes, and removes what either has written meanwhile."""
    for _ in range(30):
      found = token_cache.tokenize(tmp_path, words, rows(), **LENGTHS)
      assert_same(found, expected)
      for name in entries(tmp_path):
        if name.startswith("tokens-"):
          (tmp_path / name).unlink(missing_ok=True)

  with futures.ThreadPoolExecutor() as pool:
    for writer in [pool.submit(many_times) for _ in range(3)]:
      writer.result()
  found = token_cache.tokenize(tmp_path, words, rows(), **LENGTHS)
  assert_same(found, expected)
  assert len(entries(tmp_path)) == 1
