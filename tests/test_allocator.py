"""Whether freed memory is faulted in again, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from dpo_jax import allocator
print(allocator.keep_freed() if "keep" in sys.argv else None)
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]

def touch():
  block = library.malloc(ctypes.c_size_t(64 * 2**20))
  ctypes.memset(block, 1, 64 * 2**20)
  library.free(block)

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
  touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
# Of four blocks of 64 MiB, were each of their pages faulted in.
ALL = 4 * 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
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


def test_settings_of_the_environment_are_left_alone():
  said, faults = run("keep", MALLOC_TOP_PAD_="0")
  assert said == "False"
  assert faults > 0.9 * ALL
