"""The one class of failures that a user is told about without a traceback."""


class Stopped(RuntimeError):
  """Work had to end on the way; everything that was committed is kept.

  Wrong input is a ValueError instead, raised before the work begins.

  Attributes:
    code: what the process exits with.
  """

  code = 1
