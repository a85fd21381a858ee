"""SIGTERM, SIGINT and SIGHUP as requests to stop.

Training (`watching`) stops at a step boundary. Outside the training loop,
where nothing would be lost, a signal raises `Interrupted` at once; within
`deferred` it sets a flag that the loop polls with `requested`. Sampling and
judging commit each row as they get it and are `interruptible` anywhere.

Several processes must stop at the same step. There SIGTERM is left to jax's
preemption service, which also learns of the maintenance of a Cloud TPU host and
chooses the step; a Python handler would replace its native one. SIGINT and
SIGHUP are forwarded to it as SIGTERM.

A signal that is ignored at the start, such as SIGHUP under nohup, stays so.
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
  """A run stopped by a signal, `everywhere` if all processes stopped with it.

  The exit code is 128 plus the signal's number: 143, 130 or 129.
  """

  def __init__(self, number: int, where: str, everywhere: bool = False):
    name = signal.Signals(number).name
    super().__init__(
      f"stopped by {name} {where}; run the same command again to resume"
    )
    self.code, self.everywhere = 128 + number, everywhere


class Watch:
  """Stop requests of a run; see `watching`."""

  def __init__(self, alone: bool):
    self._alone = alone
    self._number: int | None = None
    self._deferring = False
    self._polls = 0

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """A block that polls `requested`, and is interrupted at its end at most."""
    self._deferring = True
    try:
      yield
    finally:
      self._deferring = False
    if self._number is not None and self._alone:
      raise self.interrupted("at the end of training")

  def requested(self) -> bool:
    """Whether to stop; all processes must call it at the same points."""
    if self._alone:
      return self._number is not None
    from jax.experimental import multihost_utils

    self._polls += 1
    return multihost_utils.reached_preemption_sync_point(self._polls)

  def interrupted(self, where: str) -> Interrupted:
    """The exception to raise; `where` describes the state that is saved."""
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
  """Handles the signals; exits the process `grace_s` after the first."""
  import jax

  alone = jax.process_count() == 1
  watch = Watch(alone)
  with _handled(watch.handle, SIGNALS if alone else SIGNALS[1:], grace_s):
    yield watch


@contextlib.contextmanager
def interruptible(grace_s: float = 25.0) -> Iterator[None]:
  """Lets SIGTERM and SIGHUP interrupt the block as SIGINT does."""
  received = []

  def handle(number, frame):
    received.append(number)
    # asyncio's own handler of SIGINT cancels its main task.
    interrupt = signal.getsignal(signal.SIGINT)
    if not callable(interrupt):
      interrupt = signal.default_int_handler
    interrupt(number, frame)

  try:
    with _handled(handle, (signal.SIGTERM, signal.SIGHUP), grace_s):
      yield
  except KeyboardInterrupt:
    number = received[0] if received else signal.SIGINT
    raise Interrupted(number, "with every whole row kept") from None


@contextlib.contextmanager
def _handled(
  handle: Callable[[int, Any], None], numbers: tuple[int, ...], grace_s: float
) -> Iterator[None]:
  """Installs handlers, and a watchdog thread, from the main thread only."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  # The wakeup descriptor gets a signal's number at once, even while Python's
  # handlers wait for the main thread to return from native code.
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  left = threading.Event()
  watchdog = (reader, left, grace_s)
  threading.Thread(target=_exit_late, args=watchdog, daemon=True).start()
  wakeup = signal.set_wakeup_fd(writer)
  before = {number: signal.getsignal(number) for number in numbers}
  try:
    for number, handler in before.items():
      if handler != signal.SIG_IGN:
        signal.signal(number, handle)
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(wakeup)
    left.set()
    os.close(writer)


def _exit_late(reader: int, left: threading.Event, grace_s: float) -> None:
  """Exits the process unless the block is `left` in time after a signal."""
  with open(reader, "rb", buffering=0) as signals:
    while (number := signals.read(1)) and number[0] not in SIGNALS:
      pass
  if number and not left.wait(grace_s):
    name = signal.Signals(number[0]).name
    text = f"error: not stopped {grace_s:g} s after {name}; exiting now"
    # Python's stderr may be locked by another thread.
    os.write(2, f"{text}, with everything committed kept\n".encode())
    os._exit(128 + number[0])
