"""SIGTERM and SIGINT as requests to stop, in bounded time, in every phase.

While nothing would be lost, a signal raises `Interrupted` at once: in data
preparation, in compiling, in exporting. In a `deferred` block it is only noted,
and the block asks `requested` where it can stop. Python runs a handler when the
main thread comes back from native code, which may take long; so a thread, woken
by the signal itself, ends the process if it is still there after `grace_s`.

With several processes they must stop at the same point, or the others would
wait for ever: jax's preemption service, which also learns of the maintenance
of a Cloud TPU host, tells all of them of a signal to any, and names the point.

A second SIGINT, a second or more after the first, ends the process at once.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax

from dpo_jax.interface import errors

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
  """Takes both signals over while it is entered; a context manager.

  Outside the main thread, where Python has no handlers, it does nothing.
  """

  def __init__(self, grace_s: float):
    """`grace_s`: how long after a signal the process may go on to live."""
    self._grace_s = grace_s
    self._number: int | None = None
    self._came_s = 0.0
    self._deferring = False
    self._asked = 0

  def __enter__(self) -> "Watch":
    self._installed = threading.current_thread() is threading.main_thread()
    if not self._installed:
      return self
    self._ended = threading.Event()
    self._service = _native_handler() if jax.process_count() > 1 else None
    self._before = {number: signal.getsignal(number) for number in SIGNALS}
    self._read_fd, self._write_fd = os.pipe()
    os.set_blocking(self._write_fd, False)
    self._fd_before = signal.set_wakeup_fd(
      self._write_fd, warn_on_full_buffer=False
    )
    self._thread = threading.Thread(target=self._guard, daemon=True)
    self._thread.start()
    # Last, so that whatever signal a handler takes, the thread bounds its time.
    try:
      for number in SIGNALS:
        signal.signal(number, self._handle)
    except Interrupted:
      self.__exit__()
      raise
    return self

  def __exit__(self, *exc_info) -> None:
    if not self._installed:
      return
    self._ended.set()
    signal.set_wakeup_fd(self._fd_before)
    for number, handler in self._before.items():
      signal.signal(number, handler)
    os.write(self._write_fd, b"\0")
    self._thread.join()
    os.close(self._write_fd)
    os.close(self._read_fd)

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
    return multihost_utils.reached_preemption_sync_point(self._asked)

  def interrupted(self, where: str) -> Interrupted:
    """The error to raise; `where` says what was done and kept."""
    return Interrupted(self._number or signal.SIGTERM, where)

  def _handle(self, number: int, frame) -> None:
    if self._number is None:
      self._number, self._came_s = number, time.monotonic()
      if self._service is not None:
        self._service(signal.SIGTERM)
      if not self._deferring:
        raise self.interrupted("before or after training")
    elif number == signal.SIGINT and time.monotonic() - self._came_s > 1:
      os._exit(128 + number)

  def _guard(self) -> None:
    """Ends the process if a signal does not."""
    while not self._ended.is_set():
      number = os.read(self._read_fd, 1)[0]
      if number in SIGNALS and not self._ended.wait(self._grace_s):
        print(
          f"error: not stopped {self._grace_s:g} s after"
          f" {signal.Signals(number).name}: ending at once; what was committed"
          " is whole",
          file=sys.stderr,
          flush=True,
        )
        os._exit(128 + number)


def _native_handler():
  """The handler of SIGTERM of jax's preemption service, to be passed on to.

  It only notes the signal for a thread of the service.
  """
  libc = ctypes.CDLL(None)
  libc.signal.restype = ctypes.c_void_p
  libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
  address = libc.signal(signal.SIGTERM, None)
  # 0 and 1 are the default action and none.
  if not address or address <= 1:
    return None
  return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
