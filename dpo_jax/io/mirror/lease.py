"""One process at a time writes below an address of a bucket.

No lock of a bucket ends with its holder. So the holder renews an object, and
whoever finds one watches it: if it stays as it is for as long as a lease lasts,
its holder is gone, whatever the clocks of the two machines say, and it is taken
over on the condition that it is still that one. A holder that was taken for
gone, since its machine or network stood still, finds that out by the same
condition before it next writes.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid

from dpo_jax.core import console, errors
from dpo_jax.io import strict_json
from dpo_jax.io.mirror import objects

_log = logging.getLogger(__name__)

NAME = "owner.json"
LASTING_S = 60.0


class Lost(errors.Stopped):
  """Another process has taken the address over."""


class Held(errors.Stopped):
  """Another process holds the address, and lives."""


class Lease:
  """Holds a store for one process; a context manager.

  Raises:
    Held: on entering, when another holder renews it.
    objects.Failed: on entering, when the bucket cannot be written.
  """

  def __init__(self, store: objects.Store, lasting_s: float = LASTING_S):
    """`lasting_s`: the same for all who may hold it."""
    self._store, self._lasting_s = store, lasting_s
    self._mark = {
      "token": uuid.uuid4().hex,
      "pid": os.getpid(),
      "host": socket.gethostname(),
      "boot": _boot(),
    }
    self._generation = b""
    # By this process's clock, before the renewal was sent.
    self._renewed_s = 0.0
    self._lost = ""
    self._renewing = threading.Lock()
    self._ended = threading.Event()

  def __enter__(self) -> "Lease":
    content, generation = self._store.read(NAME)
    if content is not None and not _is_gone(content):
      generation = self._outwait(content, generation)
    if not self._put(generation):
      raise Held(
        f"{self._store.address} was taken at this moment by"
        f" {self._holder()}: give each run a path of its own"
      )
    self._thread = threading.Thread(target=self._renew, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *exc_info) -> None:
    self._ended.set()
    self._thread.join()
    if not self._lost:
      # What is not given back is taken over, a little later.
      with contextlib.suppress(objects.Failed):
        self._store.swap(NAME, None, self._generation)

  def check(self) -> None:
    """Makes sure that this process holds the store, for half a lease at least.

    Raises:
      Lost: another does.
      objects.Failed: the bucket does not say.
    """
    with self._renewing:
      past_s = time.monotonic() - self._renewed_s
      if not self._lost and past_s > self._lasting_s / 2:
        self._put(self._generation)
    self.told()

  def told(self) -> None:
    """Raises Lost if it is known that another process holds the store."""
    if self._lost:
      raise Lost(
        f"{self._store.address} was taken over by {self._lost}, so nothing more"
        " is written there by this process: let one of the two go on alone"
      )

  def _outwait(self, content: bytes, generation: bytes) -> bytes:
    """The generation of a lease that was not renewed as long as it lasts."""
    holder = _named(content)
    console.say(
      f"{self._store.address} was held by {holder}; looking for"
      f" {self._lasting_s:.0f} s whether it still is",
      "bucket",
    )
    end = time.monotonic() + self._lasting_s
    while time.monotonic() < end:
      time.sleep(self._lasting_s / 20)
      content, found = self._store.read(NAME)
      if content is None:
        return found
      if found != generation:
        raise Held(
          f"{self._store.address} is held by {_named(content)}: wait for it to"
          " end, or use another path"
        )
    return generation

  def _renew(self) -> None:
    while not self._ended.wait(self._lasting_s / 4):
      try:
        with self._renewing:
          if not self._put(self._generation):
            return
      except objects.Failed as error:
        _log.warning("not renewed, and tried again: %s", error)

  def _put(self, generation: bytes) -> bool:
    """Writes the mark in place of a generation; False if that is gone."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    began_s = time.monotonic()
    content = json.dumps(self._mark | {"utc": now}).encode()
    made = self._store.swap(NAME, content, generation)
    if made is None:
      # Unless it was this process, whose answer got lost.
      found, made = self._store.read(NAME)
      if found is None or self._mark["token"].encode() not in found:
        gone = "somebody who removed its owner.json"
        self._lost = gone if found is None else _named(found)
        return False
    self._generation, self._renewed_s = made, began_s
    return True

  def _holder(self) -> str:
    content, _ = self._store.read(NAME)
    return "nobody" if content is None else _named(content)


def _read(content: bytes) -> dict:
  try:
    found = strict_json.parse(content)
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def _named(content: bytes) -> str:
  mark = _read(content)
  host = console.visible(str(mark.get("host"))[:80])
  return f"pid {mark.get('pid')!s:.20} on {host} ({mark.get('utc')!s:.40})"


def _is_gone(content: bytes) -> bool:
  """Whether a holder was a process of this machine that is no more."""
  mark = _read(content)
  pid = mark.get("pid")
  here = (socket.gethostname(), _boot())
  if (
    (mark.get("host"), mark.get("boot")) != here
    or type(pid) is not int
    or pid < 1
  ):
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except (OSError, OverflowError):
    return False
  return False


def _boot() -> str:
  """What tells this machine, since it was started, from all others."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:
    # Unlike any: nothing is taken for gone without looking.
    return uuid.uuid4().hex
