"""What a run shows: bars on a terminal, lines in a log, JSON, or nothing.

Every stage speaks through this module, so that one flag, `--log`, decides the
form of all of it:

  auto   `bar` where stderr is a terminal, `plain` elsewhere
  bar    progress bars, redrawn in place
  plain  a line of progress now and then, for log files
  json   each line of stdout and stderr is one JSON object with an "event"
  quiet  results, warnings and errors only

Results (the path of what was written, a summary) go to stdout in every mode,
and all else to stderr.
"""

import argparse
import datetime
import json
import logging
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tqdm

MODES = ("auto", "bar", "plain", "json", "quiet")
# Between two lines of progress where no bar is drawn.
EVERY_S = 10.0

_mode = "auto"
_muted = False


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Gives a parser the flag `--log`, which sets the mode as it is parsed."""

  class Set(argparse.Action):
    def __call__(self, parser, namespace, value, option=None):
      set_mode(value)

  parser.add_argument(
    "--log",
    action=Set,
    choices=MODES,
    default=argparse.SUPPRESS,
    help="what is shown (default: auto)",
  )


def set_mode(mode: str) -> None:
  """Chooses the form for this process.

  "json" also turns warnings, log records and tracebacks of Python into lines;
  what libraries in C++ write to stderr by themselves stays as it is.

  Raises:
    ValueError: there is no such mode.
  """
  global _mode
  if mode not in MODES:
    raise ValueError(f"log={mode!r} must be one of {list(MODES)}")
  _mode = mode
  if mode == "json":
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    root = logging.getLogger()
    for old in list(root.handlers):
      root.removeHandler(old)
    root.addHandler(handler)
    logging.captureWarnings(True)
    sys.excepthook = _excepthook


def mode() -> str:
  """The mode in force; never "auto"."""
  if _mode != "auto":
    return _mode
  return "bar" if sys.stderr.isatty() else "plain"


def mute() -> None:
  """Leaves all but errors and results to another process of the same run."""
  global _muted
  _muted = True


def say(text: str, event: str = "note", **fields: Any) -> None:
  """A line for whoever watches the run, on stderr.

  Args:
    text: the line; in JSON it is the field "text".
    event: what kind of line it is, in JSON only.
    **fields: further JSON values that `text` puts into words.
  """
  if _muted:
    return
  if mode() == "json":
    _emit(sys.stderr, event, fields | {"text": text})
  elif mode() != "quiet":
    # Above the bars, which are redrawn beneath it.
    tqdm.tqdm.write(text, file=sys.stderr)


def result(text: str, event: str = "result", **fields: Any) -> None:
  """What a command was asked for, on stdout, in every mode."""
  if mode() == "json":
    _emit(sys.stdout, event, fields | {"text": text})
  else:
    tqdm.tqdm.write(text, file=sys.stdout)


def visible(text: str) -> str:
  """Text that cannot steer a terminal: control characters are spelled out."""
  return "".join(
    char
    if char == "\n" or unicodedata.category(char)[0] != "C"
    else char.encode("unicode_escape").decode()
    for char in text
  )


def error(text: str) -> None:
  """Why a command ends without its result, on stderr, in every mode."""
  text = visible(text)
  if mode() == "json":
    _emit(sys.stderr, "error", {"text": text})
  else:
    print(f"error: {text}", file=sys.stderr)


class Bar:
  """Progress through `total` units; a context manager.

  A bar that is drawn shows rate and ETA by itself; a line holds what has been
  done, the units a second since the start, and the seconds that are left.
  """

  def __init__(self, total: int, what: str, unit: str, done: int = 0):
    """Begins to show.

    Args:
      total: units there are.
      what: name of the work, such as "dpo runs/dpo".
      unit: singular, such as "step".
      done: units that an earlier run has done.
    """
    self._what, self._unit, self._total = what, unit, total
    self._done = self._start = done
    self._shown = ""
    self._values: dict[str, Any] = {}
    self._began = self._spoken = time.monotonic()
    self._bar = None
    if mode() == "bar" and total and not _muted:
      self._bar = tqdm.tqdm(
        total=total, initial=done, desc=what, unit=unit, file=sys.stderr
      )

  def update(
    self, count: int = 1, values: Mapping[str, Any] | None = None
  ) -> None:
    """`count` units more are done.

    Args:
      count: of units.
      values: what to show beside them, {"tokens/s": 1234.5}; stays until the
        next values are given.
    """
    self._done += count
    if values is not None:
      self._values = dict(values)
    if self._bar is not None:
      self._bar.set_postfix_str(_words(self._values), refresh=False)
      self._bar.update(count)
      return
    now = time.monotonic()
    if _muted:
      return
    ended = count and self._done >= self._total
    if ended or now - self._spoken >= EVERY_S:
      self._spoken = now
      self._speak(now)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> "Bar":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _speak(self, now: float) -> None:
    rate = (self._done - self._start) / max(now - self._began, 1e-9)
    left = (self._total - self._done) / rate if rate else None
    if mode() == "json":
      fields = {
        "what": self._what,
        "unit": self._unit,
        "done": self._done,
        "total": self._total,
        "per_second": rate,
        "eta_s": left,
      }
      _emit(sys.stderr, "progress", fields | self._values)
    elif mode() == "plain":
      words = [
        f"{self._what}: {self._done}/{self._total} {_plural(self._unit)}",
        f"{rate:.3g}/s",
      ]
      if left:
        words.append(f"{datetime.timedelta(seconds=round(left))} left")
      if self._values:
        words.append(_words(self._values))
      print(", ".join(words), file=sys.stderr, flush=True)


def _plural(unit: str) -> str:
  return f"{unit}es" if unit.endswith("ch") else f"{unit}s"


def track(items: Iterable, total: int, what: str, unit: str) -> Iterator:
  """Each of `items`, with a bar that counts them."""
  with Bar(total, what, unit) as bar:
    for item in items:
      yield item
      bar.update()


def _words(values: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {_number(x)}" for name, x in values.items())


def _number(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
  return f"{value:,}" if type(value) is int else str(value)


def _emit(stream, event: str, fields: Mapping[str, Any]) -> None:
  """One JSON object on one line; what JSON cannot hold becomes its text."""
  line = json.dumps({"event": event} | dict(fields), default=str)
  stream.write(line + "\n")
  stream.flush()


class _Lines(logging.Formatter):
  """Log records as JSON objects."""

  def format(self, record: logging.LogRecord) -> str:
    fields = {
      "event": "log",
      "level": record.levelname.lower(),
      "logger": record.name,
      "text": record.getMessage(),
    }
    if record.exc_info:
      fields["traceback"] = self.formatException(record.exc_info)
    return json.dumps(fields)


def _excepthook(kind, value, trace) -> None:
  text = "".join(traceback.format_exception(kind, value, trace))
  fields = {"text": f"{kind.__name__}: {value}", "traceback": text}
  _emit(sys.stderr, "error", fields)
