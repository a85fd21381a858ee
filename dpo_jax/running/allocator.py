"""What the C library's allocator does with memory that was freed.

XLA on a CPU takes the temporary memory of every step from malloc. glibc gives
large blocks back to the system as they are freed, so that each page of the next
step is mapped, zeroed and faulted in again: a quarter of a small model's step
(benchmarks/dpo_step.md).

References:
  mallopt(3), M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX;
  malloc_trim(3).
"""

import ctypes
import os

# By the environment's name for it: glibc's number (malloc.h) and a value, an
# int, so that a threshold is at most 2 GiB less one. Two arenas: with one, what
# threads keep lies between the steps' large blocks, and the heap has grown by a
# half in some runs; with many, more of what is freed waits where nobody asks.
_SETTINGS = {
  "MALLOC_MMAP_MAX_": (-4, 0),
  "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
  "MALLOC_TOP_PAD_": (-2, 2**28),
  "MALLOC_ARENA_MAX": (-8, 2),
}

# Bytes that XLA asks for beside a block, to align it, and then some.
_BESIDE = 2**12
# Of the smaller of two blocks, what they share if they lie in one place.
_COMMON = 7 / 8


def release() -> None:
  """Gives back to the system the pages of all memory that is free now.

  glibc's allocator alone has it; elsewhere nothing is done.
  """
  library = ctypes.CDLL(None)
  if hasattr(library, "malloc_trim"):
    library.malloc_trim(ctypes.c_size_t(0))


class Room:
  """Where the large blocks of a thread lie, one at a time, again and again.

  A block that lies elsewhere than the last one would be new memory beside it:
  often it does not fit where the last one was, but for some small thing that
  was put there since.
  """

  def __init__(self):
    # First byte of what is kept, and the first one after it.
    self._kept = (0, 0)

  def make(self, size: int) -> None:
    """Gives back what is free unless a block of `size` bytes lies in it.

    To be called by the thread that will ask for the block, just before.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
      return
    library.malloc.restype = ctypes.c_void_p
    block = library.malloc(ctypes.c_size_t(size + _BESIDE))
    if block is None:
      return
    library.free(ctypes.c_void_p(block))
    (first, end), last = self._kept, block + size
    common = min(last, end) - max(block, first)
    if common >= _COMMON * min(size, end - first):
      self._kept = (min(block, first), max(last, end))
    else:
      release()
      self._kept = (block, last)


def keep_freed() -> bool:
  """From now on this process keeps freed memory and uses it again.

  To be called before there are threads: those that are there keep their arenas.
  What the environment sets, each by its variable or all by GLIBC_TUNABLES, is
  left alone.

  Returns:
    Whether it does: not under another C library than glibc.
  """
  library = ctypes.CDLL(None)
  if not hasattr(library, "gnu_get_libc_version"):
    return False
  if "GLIBC_TUNABLES" in os.environ:
    return False
  wanted = [_SETTINGS[name] for name in _SETTINGS if name not in os.environ]
  return all(library.mallopt(*setting) == 1 for setting in wanted)
