"""Console output of all commands, in the form that `--log` selects.

  auto   `bar` if stderr is a terminal, else `plain`
  bar    progress bars
  plain  a line of progress every 10 seconds, for log files
  json   each line of stdout and stderr is a JSON object with an "event"
  quiet  results, warnings and errors only

Results (paths of files written, summaries) go to stdout in every mode; all else
goes through `logging` to stderr, warnings of any library included.
"""

import argparse
import io
import json
import logging
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tqdm

MODES = ("auto", "bar", "plain", "json", "quiet")
# Seconds between lines of progress.
EVERY_S = 10.0

_mode = "auto"


class _Formatter(logging.Formatter):
  """Log records as text or JSON, by the mode."""

  def format(self, record: logging.LogRecord) -> str:
    level = record.levelname.lower()
    if mode() != "json":
      text = super().format(record).rstrip()
      return text if record.levelno < logging.WARNING else f"{level}: {text}"
    fields = {"event": "log", "level": level, "logger": record.name}
    fields = getattr(record, "fields", fields) | {"text": record.getMessage()}
    if record.exc_info:
      fields["traceback"] = self.formatException(record.exc_info)
    return json.dumps(fields, default=str)


class _Handler(logging.Handler):
  """Writes log records to stderr, above progress bars."""

  def emit(self, record: logging.LogRecord) -> None:
    try:
      tqdm.tqdm.write(self.format(record), file=sys.stderr)
    except Exception:
      self.handleError(record)


def _record(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
  """A log record, after removal of the library's own stderr handler.

  transformers, datasets and huggingface_hub add one when they are imported,
  later than `set_mode`; it would break bars and repeat what reaches the root.
  """
  library = logging.getLogger(name.partition(".")[0])
  for handler in [*library.handlers]:
    if getattr(handler, "stream", None) in (sys.stderr, sys.__stderr__):
      library.removeHandler(handler)
      library.propagate = True
  return logging.LogRecord(name, *args, **kwargs)


_handler = _Handler()
_handler.setFormatter(_Formatter())
# With its own handler it is shown, once, in a notebook too, where no mode is
# set and the root may have any handlers.
_log = logging.getLogger(__name__)
_log.addHandler(_handler)
_log.propagate = False
_log.setLevel(logging.INFO)


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Adds the flag `--log`, which sets the mode as it is parsed."""

  class Set(argparse.Action):
    def __call__(self, parser, namespace, value, option=None):
      set_mode(value)

  set_mode("auto")
  parser.add_argument(
    "--log",
    action=Set,
    choices=MODES,
    default=argparse.SUPPRESS,
    help="form of the output (default: auto)",
  )


def set_mode(mode: str) -> None:
  """Sets the mode, for logs and warnings of libraries and exceptions too.

  C++ libraries that write to stderr directly are beyond its reach.
  """
  global _mode
  if mode not in MODES:
    raise ValueError(f"log={mode!r} must be one of {list(MODES)}")
  _mode = mode
  _log.setLevel(logging.WARNING if mode == "quiet" else logging.INFO)
  logging.getLogger().handlers[:] = [_handler]
  logging.captureWarnings(True)
  logging.setLogRecordFactory(_record)
  sys.excepthook = _excepthook if mode == "json" else sys.__excepthook__


def mode() -> str:
  """The mode in force, never "auto"."""
  if _mode != "auto":
    return _mode
  return "bar" if sys.stderr.isatty() else "plain"


def mute() -> None:
  """Hides messages and bars, for processes other than 0."""
  _log.setLevel(logging.WARNING)


def say(text: str, event: str = "note", **fields: Any) -> None:
  """Logs a message to stderr; in JSON with its event and further fields."""
  _log.info(text, extra={"fields": {"event": event} | fields})


def result(text: str, event: str = "result", **fields: Any) -> None:
  """Prints a command's result to stdout, in every mode."""
  if mode() == "json":
    fields = {"event": event} | fields | {"text": text}
    text = json.dumps(fields, default=str)
  tqdm.tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


def visible(text: str) -> str:
  """The text with control characters escaped, safe to print on a terminal."""
  return "".join(
    char
    if char == "\n" or unicodedata.category(char)[0] != "C"
    else char.encode("unicode_escape").decode()
    for char in text
  )


def error(text: str) -> None:
  """Logs why a command fails, in every mode."""
  _log.error(visible(text), extra={"fields": {"event": "error"}})


def _excepthook(kind, value, trace) -> None:
  _log.error(
    f"{kind.__name__}: {value}",
    exc_info=(kind, value, trace),
    extra={"fields": {"event": "error"}},
  )


class Bar(tqdm.tqdm):
  """tqdm's progress bar; outside of "bar" mode, log lines in its place."""

  monitor_interval = 0  # no thread: `update` alone redraws it

  def __init__(self, total: int, what: str, unit: str, done: int = 0):
    """Begins at `done` units, such as "step", that an earlier run completed."""
    drawn = mode() == "bar"
    self._drawn, self._logged = drawn, done
    self._values: Mapping[str, Any] = {}
    super().__init__(
      total=total,
      initial=done,
      desc=what,
      unit=unit,
      # tqdm clears bars on stderr before a message; there is none to clear.
      file=sys.stderr if drawn else io.StringIO(),
      miniters=0,
      mininterval=0.1 if drawn else EVERY_S,
      smoothing=0.3 if drawn else 0.0,
      disable=not (total and _log.isEnabledFor(logging.INFO)),
    )

  def update(
    self, count: int = 1, values: Mapping[str, Any] | None = None
  ) -> None:
    """Adds completed units, and replaces the values shown after the count."""
    if values is not None and not self.disable:
      self._values = dict(values)
      words = (f"{name} {_number(value)}" for name, value in values.items())
      self.set_postfix_str(", ".join(words), refresh=False)
    super().update(count)

  def display(self, *args: Any, **kwargs: Any) -> None:
    if self._drawn:
      super().display(*args, **kwargs)
      return
    # tqdm also displays as it begins, and as it ends.
    if self.n == self._logged:
      return
    self._logged = self.n
    shown = self.format_dict
    rate = (self.n - self.initial) / max(shown["elapsed"], 1e-9)
    fields = {
      "what": self.desc,
      "unit": self.unit,
      "done": self.n,
      "total": self.total,
      "per_second": rate,
      "eta_s": (self.total - self.n) / rate if rate else None,
    }
    line = self.format_meter(**(shown | {"ncols": 0}))
    say(line, "progress", **(fields | self._values))


def track(items: Iterable, total: int, what: str, unit: str) -> Iterator:
  """The items, with a bar that counts them."""
  with Bar(total, what, unit) as bar:
    for item in items:
      yield item
      bar.update()


def _number(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
