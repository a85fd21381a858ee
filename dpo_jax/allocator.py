"""What the C library's allocator does with memory that was freed.

XLA on a CPU takes the temporary memory of every step from malloc. glibc gives
large blocks back to the system as they are freed, so that each page of the next
step is mapped, zeroed and faulted in again: a quarter of a small model's step
(benchmarks/dpo_step.md).

References:
  mallopt(3), M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD.
"""

import ctypes
import os

# From glibc's malloc.h; ints, so that a threshold is at most 2 GiB less one.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SETTINGS = (
  (_MMAP_MAX, 0),
  (_TRIM_THRESHOLD, 2**31 - 1),
  (_TOP_PAD, 2**28),
)
# What a user who has set one of these wants is left alone.
_VARIABLES = (
  "MALLOC_MMAP_MAX_",
  "MALLOC_MMAP_THRESHOLD_",
  "MALLOC_TRIM_THRESHOLD_",
  "MALLOC_TOP_PAD_",
  "GLIBC_TUNABLES",
)


def keep_freed() -> bool:
  """From now on this process keeps freed memory and uses it again.

  Returns:
    Whether it does: not under another C library than glibc, nor where the
    environment has settings of its own.
  """
  if any(name in os.environ for name in _VARIABLES):
    return False
  library = ctypes.CDLL(None)
  if not hasattr(library, "gnu_get_libc_version"):
    return False
  return all(library.mallopt(*setting) == 1 for setting in _SETTINGS)
