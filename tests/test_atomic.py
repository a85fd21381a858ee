"""Files that are there whole or not at all, and what a killed writer leaves."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dpo_jax.io import atomic

ROOT = pathlib.Path(__file__).resolve().parent.parent
DAY_S = 24 * 3600

WRITER = """
import pathlib, sys
from dpo_jax.io import atomic
with atomic.replacing(pathlib.Path(sys.argv[1])) as temporary:
  temporary.write_text("half")
  print("half", flush=True)
  sys.stdin.read()
"""


def test_a_killed_writer_leaves_the_file_and_what_it_began_goes(tmp_path):
  path = tmp_path / "a.json"
  atomic.write_text(path, "before")
  with subprocess.Popen(
    [sys.executable, "-c", WRITER, path],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
  (left,) = set(tmp_path.iterdir()) - {path}
  assert (path.read_text(), left.read_text()) == ("before", "half")
  # It might belong to a living writer: for a day it stays.
  atomic.write_text(path, "after")
  assert left.exists()
  others = [tmp_path / name for name in (".a.json.tmp", "b.tmp", ".c.txt")]
  for file in (left, *others):
    file.touch()
    os.utime(file, (time.time() - DAY_S - 60,) * 2)
  atomic.write_text(tmp_path / "b", "other")
  assert set(tmp_path.iterdir()) == {path, tmp_path / "b", *others}
  assert path.read_text() == "after"


def test_a_written_text_is_the_old_or_the_new_one(tmp_path):
  path = tmp_path / "report.md"
  atomic.write_text(path, "first\r\n\u2028")
  assert path.read_bytes() == "first\r\n\u2028".encode()
  with pytest.raises(UnicodeEncodeError):
    atomic.write_text(path, "\ud83d")
  path.with_name("sub").mkdir()
  with pytest.raises(IsADirectoryError):
    atomic.write_text(path.with_name("sub"), "text")
  assert path.read_bytes() == "first\r\n\u2028".encode()
  assert sorted(os.listdir(tmp_path)) == ["report.md", "sub"]


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
