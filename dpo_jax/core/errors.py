"""The exception that a command reports without a traceback."""


class Stopped(RuntimeError):
  """A run that ended early; everything committed is kept.

  Invalid input is a ValueError instead, raised before any work.
  """

  # Exit code of the process.
  code = 1
