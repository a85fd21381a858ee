"""Every reader of foreign bytes, given mutated valid files.

Only a ValueError with a message may come of it, in bounded time and memory.
Each reader is given a few files, always the same ones; to search for further
ones, give FILES another number.
"""

import contextlib
import pathlib
import random
import resource
import signal

import pytest
import readers

# Those of a reader; of a slow one an eighth.
FILES = 32
# A reader of a small file that takes longer hangs, even on a busy machine.
DEADLINE_S = 20
# Memory of a small file beyond the process's own; a forged header asks for far
# more.
ROOM_BYTES = 2 * 2**30


@contextlib.contextmanager
def bounded():
  """Limits time and memory of the block."""

  def late(*_):
    raise TimeoutError(f"more than {DEADLINE_S} s")

  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  before = resource.getrlimit(resource.RLIMIT_AS)
  limit = pages * resource.getpagesize() + ROOM_BYTES
  old = signal.signal(signal.SIGALRM, late)
  resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
  signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="module")
def files(tmp_path_factory, shared):
  return readers.Files(tmp_path_factory.mktemp("fuzz"), shared)


@pytest.mark.parametrize("name", readers.READERS)
def test_valid_files_are_read(files, name):
  """Without this, a reader that refuses everything would pass."""
  reader = readers.READERS[name]
  for seed in reader.seeds(files):
    reader.read(files, seed)


@pytest.mark.parametrize("name", readers.READERS)
def test_some_wrong_files(files, name):
  rng = random.Random(name)
  with bounded():
    for _ in range(FILES // 8 if readers.READERS[name].slow else FILES):
      data = readers.mutant(files, name, rng)
      try:
        readers.READERS[name].check(files, data)
      except BaseException as error:
        error.add_note(f"{name}: {data[:5000]!r}")
        raise
