"""Whether freed memory is faulted in again, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from dpo_jax.running import allocator
print(allocator.keep_freed() if "keep" in sys.argv else None)
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]

def touch():
  block = library.malloc(ctypes.c_size_t(96 * 2**20))
  ctypes.memset(block, 1, 96 * 2**20)
  library.free(block)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
  touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
# Of four blocks of 96 MiB, were each of their pages faulted in.
ALL = 4 * 96 * 2**20 // os.sysconf("SC_PAGE_SIZE")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
CLEAN.pop("GLIBC_TUNABLES", None)

pytestmark = pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="only glibc has these settings"
)


def run(*flags, **environment):
  """What `keep_freed` said, and page faults of blocks after the first."""
  process = subprocess.run(
    [sys.executable, "-c", SCRIPT, *flags],
    env=CLEAN | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  said, faults = process.stdout.split()
  return said, int(faults)


def test_freed_memory_is_not_faulted_in_again():
  said, faults = run("keep")
  assert said == "True"
  assert faults < 0.01 * ALL
  assert run()[1] > 0.9 * ALL


@pytest.mark.parametrize(
  ("name", "value", "kept"),
  [
    ("GLIBC_TUNABLES", "glibc.malloc.top_pad=0", "False"),
    # A block of 96 MiB is over any threshold that glibc finds by itself.
    ("MALLOC_MMAP_MAX_", "65536", "True"),
  ],
)
def test_settings_of_the_environment_are_left_alone(name, value, kept):
  said, faults = run("keep", **{name: value})
  assert said == kept
  assert faults > 0.9 * ALL


HOLES = """
import ctypes, os
from dpo_jax.running import allocator
allocator.keep_freed()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
size = 2**20

def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [library.malloc(ctypes.c_size_t(size)) for _ in range(65)]
for block in blocks:
  ctypes.memset(block, 1, size)
before = resident()
# The last stays, so that the others are a hole below it.
for block in blocks[:-1]:
  library.free(block)
print(before - resident())
allocator.release()
print(before - resident())
"""


def check_kept_then_released(code):
  """`code` prints how far memory fell: not by 64 MiB at first, then by that."""
  process = subprocess.run(
    [sys.executable, "-c", code],
    env=CLEAN,
    capture_output=True,
    text=True,
    check=True,
  )
  kept, released = map(int, process.stdout.split())
  assert kept < 0.1 * 64 * 2**20
  assert released > 0.9 * 64 * 2**20


def test_memory_that_is_free_now_is_given_back():
  check_kept_then_released(HOLES)


ROOM = """
import ctypes, os
from dpo_jax.running import allocator
allocator.keep_freed()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
size = 64 * 2**20

def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

room = allocator.Room()
room.make(size)
block = library.malloc(ctypes.c_size_t(size))
ctypes.memset(block, 1, size)
# Stays, so that the block is a hole below it.
above = library.malloc(ctypes.c_size_t(2**20))
before = resident()
library.free(block)
room.make(size // 2)
print(before - resident())
room.make(2 * size)
print(before - resident())
"""


def test_what_is_free_is_given_back_where_a_block_lies_elsewhere():
  check_kept_then_released(ROOM)
