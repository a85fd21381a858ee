"""Errors that a command reports without a traceback."""

import errno
import pathlib
import shutil

# What to do where the system refuses to write or to open a file.
_FIXES = {
  errno.ENOSPC: "make room",
  errno.EDQUOT: "make room",
  errno.EFBIG: "raise the largest size of a file (ulimit -f)",
  errno.EMFILE: "raise the number of open files (ulimit -n)",
  errno.ENFILE: "close other programs' files",
}


class Stopped(RuntimeError):
  """A run that ended early; everything committed is kept.

  Invalid input is a ValueError instead, raised before any work.
  """

  # Exit code of the process.
  code = 1


def limit(error: OSError, workdir: pathlib.Path) -> Stopped | None:
  """The error to raise for a limit of the disk or the system; else None."""
  fix = _FIXES.get(error.errno or 0)
  if fix is None:
    return None
  free = shutil.disk_usage(workdir if workdir.exists() else ".").free
  return Stopped(
    f"{error.filename or workdir}: {error.strerror}; {free:,} bytes are free."
    f" What was committed is whole: {fix} and run the same command again"
  )
