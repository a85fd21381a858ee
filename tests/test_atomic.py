"""What a writer that is killed leaves, and who may remove it."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from dpo_jax import comparisons, tokenizer
from dpo_jax.rows import token_cache
from dpo_jax.storage import atomic

ROOT = pathlib.Path(__file__).resolve().parent.parent
LENGTHS = {"profile": "paper", "max_length": 24, "max_prompt_length": 8}

# The temporary of an entry stands, half-written, until the input ends.
WRITER = """
import sys
from dpo_jax import comparisons
from dpo_jax.rows import profiles, token_cache
from dpo_jax.weights import safetensors_files

class Words:
  fingerprint = sys.argv[2]

def half(path, *_):
  path.write_bytes(b"half of it")
  print("half", flush=True)
  sys.stdin.read()
  raise ValueError("asked to end")

profiles.tokenize = lambda *_, **__: None
token_cache._write = half
token_cache.tokenize(
  sys.argv[1], Words(), [], profile="paper", max_length=24, max_prompt_length=8
)
"""


def writer(directory, mark):
  child = subprocess.Popen(
    [sys.executable, "-c", WRITER, directory, mark],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  assert child.stdout.readline() == "half\n"
  return child


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(
  tmp_path,
):
  cache = tmp_path / "cache"
  dead = writer(cache, "one")
  (left,) = cache.iterdir()
  living = writer(cache, "two")
  try:
    # Two live ones leave each other alone.
    assert len(set(cache.iterdir())) == 2
    (written,) = set(cache.iterdir()) - {left}
    dead.send_signal(signal.SIGKILL)
    assert dead.wait(60) == -signal.SIGKILL
    assert left.read_bytes() == b"half of it"
    texts = ["a pen is a tool", "ink is wet"] * 4
    words = tokenizer.train(texts, 280, tmp_path / "words")
    row = comparisons.Comparison("a", "is ink", " pen", " wet")
    made = token_cache.tokenize(cache, words, [row], **LENGTHS)
    (entry,) = set(cache.iterdir()) - {written}
    assert entry.suffix == ".safetensors"
    assert written.read_bytes() == b"half of it"
    again = token_cache.tokenize(cache, words, [row], **LENGTHS)
    assert again.table.fingerprint() == made.table.fingerprint()
  finally:
    dead.kill()
    dead.communicate(timeout=60)
    living.communicate(timeout=60)
  # One that fails cleans up after itself.
  assert living.returncode == 1
  assert list(cache.iterdir()) == [entry]


def test_only_temporaries_of_this_host_are_removed(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  name = f".a.json.{atomic._host()}.0123456789ab.tmp"
  with monkeypatch.context() as patch:
    patch.setattr(atomic.socket, "gethostname", lambda: "elsewhere")
    other = f".a.json.{atomic._host()}.0123456789ab.tmp"
  kept = [other, ".a.json.tmp", f"{name}.txt", "a.json.tmp", "link"]
  for left in (name, *kept):
    (tmp_path / left).write_text("half")
  os.symlink(tmp_path / "link", tmp_path / name.replace("a.json", "b.json"))
  atomic.write_text(path, "whole")
  assert path.read_text() == "whole"
  kept += [path.name, name.replace("a.json", "b.json")]
  assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_one_that_is_taken_for_left_is_begun_again(tmp_path, monkeypatch):
  """As if another process had swept between creating and locking."""
  lock, swept = atomic.fcntl.flock, []

  def late(handle, how):
    if not swept:
      swept.append(os.listdir(tmp_path))
      (tmp_path / swept[0][0]).unlink()
    lock(handle, how)

  monkeypatch.setattr(atomic.fcntl, "flock", late)
  with atomic.replacing(tmp_path / "a") as temporary:
    # Another one, whose lock is held.
    assert os.listdir(tmp_path) == [temporary.name]
    temporary.write_text("whole")
  assert len(swept[0]) == 1
  assert os.listdir(tmp_path) == ["a"]
  assert (tmp_path / "a").read_text() == "whole"


def test_what_fails_leaves_what_was_there(tmp_path):
  path = tmp_path / "a"
  atomic.write_text(path, "before")

  def fails():
    with atomic.replacing(path) as temporary:
      temporary.write_text("half")
      raise KeyError

  with pytest.raises(KeyError):
    fails()
  assert os.listdir(tmp_path) == ["a"]
  assert path.read_text() == "before"
