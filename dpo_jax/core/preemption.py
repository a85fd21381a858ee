"""SIGTERM, SIGINT and SIGHUP as requests to stop.

Training (`watching`) stops at a step boundary. Where nothing would be lost, in
data preparation and export, a signal raises `Interrupted` at once; in a
`deferred` block it sets a flag, and the block asks `requested`. Sampling and
judging keep each row as it is made, and are `interruptible` anywhere.

Several processes must stop at the same step. There SIGTERM is left to jax's
preemption service, which tells all of them, also of the maintenance of a Cloud
TPU host, and chooses the step; a handler of Python would replace its native
one. SIGINT and SIGHUP are passed on to it.

A signal that is ignored as the process starts, SIGHUP under nohup, stays so.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dpo_jax.core import errors

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(errors.Stopped):
  """A signal asked the run to stop; running it again goes on.

  Its exit code is 128 and the signal's number: 143, 130 or 129. `everywhere`
  tells that all processes stopped at the same point.
  """

  def __init__(self, number: int, where: str, everywhere: bool = False):
    name = signal.Signals(number).name
    super().__init__(
      f"stopped by {name} {where}; run the same command again to go on"
    )
    self.code, self.everywhere = 128 + number, everywhere


class Watch:
  """What came; see `watching`."""

  def __init__(self, alone: bool):
    self._alone = alone
    self._number: int | None = None
    self._deferring = False
    self._asked = 0

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
    if self._number is not None and self._alone:
      raise self.interrupted("at the end of training")

  def requested(self) -> bool:
    """Whether to stop; to be asked by all processes at the same points."""
    if self._alone:
      return self._number is not None
    from jax.experimental import multihost_utils

    self._asked += 1
    return multihost_utils.reached_preemption_sync_point(self._asked)

  def interrupted(self, where: str) -> Interrupted:
    """The error to raise; `where` says what was done and kept."""
    return Interrupted(self._number or signal.SIGTERM, where, not self._alone)

  def handle(self, number: int, frame: Any) -> None:
    if self._number is None:
      self._number = number
      if not self._alone:
        signal.raise_signal(signal.SIGTERM)
      elif not self._deferring:
        raise self.interrupted("before or after training")


@contextlib.contextmanager
def watching(grace_s: float) -> Iterator[Watch]:
  """Takes the signals over; `grace_s` after one the process is ended."""
  import jax

  alone = jax.process_count() == 1
  watch = Watch(alone)
  with _handled(watch.handle, SIGNALS if alone else SIGNALS[1:], grace_s):
    yield watch


@contextlib.contextmanager
def interruptible(grace_s: float = 25.0) -> Iterator[None]:
  """SIGTERM and SIGHUP interrupt the block as SIGINT does.

  Raises:
    Interrupted: a signal came, and the block has ended.
  """
  came = []

  def handle(number, frame):
    came.append(number)
    # asyncio has a handler of its own, which cancels what it runs.
    interrupt = signal.getsignal(signal.SIGINT)
    known = callable(interrupt)
    (interrupt if known else signal.default_int_handler)(number, frame)

  try:
    with _handled(handle, (signal.SIGTERM, signal.SIGHUP), grace_s):
      yield
  except KeyboardInterrupt:
    number = came[0] if came else signal.SIGINT
    raise Interrupted(number, "with every whole row kept") from None


@contextlib.contextmanager
def _handled(
  handle: Callable[[int, Any], None], numbers: tuple[int, ...], grace_s: float
) -> Iterator[None]:
  """Handles signals in the main thread; in others Python cannot."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  # The numbers of signals are written as they come, also while Python's
  # handlers wait for the main thread to return from native code.
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  left = threading.Event()
  watchdog = (reader, left, grace_s)
  threading.Thread(target=_end_late, args=watchdog, daemon=True).start()
  woken = signal.set_wakeup_fd(writer)
  before = {number: signal.getsignal(number) for number in numbers}
  try:
    for number, handler in before.items():
      if handler != signal.SIG_IGN:
        signal.signal(number, handle)
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(woken)
    left.set()
    os.close(writer)


def _end_late(reader: int, left: threading.Event, grace_s: float) -> None:
  """Ends the process if it is not `left` in time after a signal."""
  with open(reader, "rb", buffering=0) as signals:
    while (number := signals.read(1)) and number[0] not in SIGNALS:
      pass
  if number and not left.wait(grace_s):
    name = signal.Signals(number[0]).name
    text = f"error: not stopped {grace_s:g} s after {name}: ending at once"
    # Past Python's buffers, whose locks another thread may hold.
    os.write(2, f"{text}; what was committed is whole\n".encode())
    os._exit(128 + number[0])
