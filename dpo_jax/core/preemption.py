"""SIGTERM and SIGINT as requests to stop, at the next step boundary.

While nothing would be lost, a signal raises `Interrupted` at once: in data
preparation, in exporting. In a `deferred` block it is only noted, and the block
asks `requested` where it can stop. A process that is still there `grace_s`
later is ended; Python hears of a signal when the main thread comes back from
native code, and the time is counted from then.

With several processes they must stop at the same point, or the others would
wait for ever: SIGTERM is left to jax's preemption service, which also learns of
the maintenance of a Cloud TPU host, tells all of them of a signal to any, and
names the point. It has a native handler, which one of Python would replace.

A second SIGINT, a second or more after the first, ends the process at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import jax

from dpo_jax.core import errors

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(errors.Stopped):
  """A signal asked the run to stop; running it again goes on.

  Its exit code is 128 and the signal's number: 143 for SIGTERM, 130 for SIGINT.
  """

  def __init__(self, number: int, where: str):
    name = signal.Signals(number).name
    super().__init__(
      f"stopped by {name} {where}; run the same command again to go on"
    )
    self.code = 128 + number


class Watch:
  """Takes the signals over while it is entered; a context manager.

  Outside the main thread, where Python has no handlers, it does nothing.
  """

  def __init__(self, grace_s: float):
    """`grace_s`: how long after a signal the process may go on to live."""
    self._grace_s = grace_s
    self._number: int | None = None
    self._came_s = 0.0
    self._watchdog: threading.Timer | None = None
    self._deferring = False
    self._asked = 0
    self._before = {}

  def __enter__(self) -> "Watch":
    if threading.current_thread() is threading.main_thread():
      taken = SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
      self._before = {number: signal.getsignal(number) for number in taken}
      for number in taken:
        signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc_info) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if self._watchdog is not None:
      self._watchdog.cancel()

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """A block that is not interrupted, but asks `requested`.

    Raises:
      Interrupted: at its end, if a signal came and the block did not stop.
    """
    self._deferring = True
    try:
      yield
    finally:
      self._deferring = False
    if self._number is not None and jax.process_count() == 1:
      raise self.interrupted("at the end of training")

  def requested(self) -> bool:
    """Whether to stop here.

    All processes ask at the same points, and get the same answer.
    """
    if jax.process_count() == 1:
      return self._number is not None
    from jax.experimental import multihost_utils

    self._asked += 1
    stop = multihost_utils.reached_preemption_sync_point(self._asked)
    if stop and self._number is None:
      self._note(signal.SIGTERM)
    return stop

  def interrupted(self, where: str) -> Interrupted:
    """The error to raise; `where` says what was done and kept."""
    return Interrupted(self._number or signal.SIGTERM, where)

  def _handle(self, number: int, frame) -> None:
    if self._number is None:
      self._note(number)
      if jax.process_count() > 1:
        signal.raise_signal(signal.SIGTERM)
      if not self._deferring:
        raise self.interrupted("before or after training")
    elif number == signal.SIGINT and time.monotonic() - self._came_s > 1:
      os._exit(128 + number)

  def _note(self, number: int) -> None:
    self._number, self._came_s = number, time.monotonic()
    self._watchdog = threading.Timer(self._grace_s, self._end)
    self._watchdog.daemon = True
    self._watchdog.start()

  def _end(self) -> None:
    """Ends the process, whatever its main thread is at."""
    name = signal.Signals(self._number).name
    text = (
      f"error: not stopped {self._grace_s:g} s after {name}: ending at once;"
      " what was committed is whole\n"
    )
    # Past Python's buffers, whose locks another thread may hold.
    os.write(2, text.encode())
    os._exit(128 + self._number)
