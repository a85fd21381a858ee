"""What a run shows: bars on a terminal, lines in a log, JSON, or nothing.

Every stage speaks through this module, so that one flag, `--log`, decides the
form of all of it:

  auto   `bar` where stderr is a terminal, `plain` elsewhere
  bar    progress bars, redrawn in place
  plain  a line of progress now and then, for log files
  json   each line of stdout and stderr is one JSON object with an "event"
  quiet  results, warnings and errors only

Results (the path of what was written, a summary) go to stdout in every mode.
All else is a log record on stderr, as warnings of any library are.
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
# Between two lines of progress where no bar is drawn.
EVERY_S = 10.0

_mode = "auto"


class _Formatter(logging.Formatter):
  """Log records as text, or as JSON objects in that mode."""

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
  """Writes log records to stderr, above the bars, which are redrawn."""

  def emit(self, record: logging.LogRecord) -> None:
    try:
      tqdm.tqdm.write(self.format(record), file=sys.stderr)
    except Exception:
      self.handleError(record)


_make_record = logging.getLogRecordFactory()


def _record(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
  """A log record, of which a library's own handler shows nothing.

  transformers, datasets and huggingface_hub have one on stderr, which would
  break a bar, and show a second time what reaches the root. They get it when
  they are imported, which is later than the mode is chosen.
  """
  library = logging.getLogger(name.partition(".")[0])
  for handler in [*library.handlers]:
    if getattr(handler, "stream", None) in (sys.stderr, sys.__stderr__):
      library.removeHandler(handler)
      library.propagate = True
  return _make_record(name, *args, **kwargs)


_handler = _Handler()
_handler.setFormatter(_Formatter())
# Has a handler of its own, so that a notebook, which chooses no mode, sees it
# too, and sees it once, whatever handlers it gives the root.
_log = logging.getLogger(__name__)
_log.addHandler(_handler)
_log.propagate = False
_log.setLevel(logging.INFO)


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Gives a parser the flag `--log`, which sets the mode as it is parsed."""

  class Set(argparse.Action):
    def __call__(self, parser, namespace, value, option=None):
      set_mode(value)

  set_mode("auto")
  parser.add_argument(
    "--log",
    action=Set,
    choices=MODES,
    default=argparse.SUPPRESS,
    help="what is shown (default: auto)",
  )


def set_mode(mode: str) -> None:
  """Chooses the form for this process, warnings and log records included.

  "json" also turns uncaught exceptions into lines; what libraries in C++ write
  to stderr by themselves stays as it is.

  Raises:
    ValueError: there is no such mode.
  """
  global _mode, _make_record
  if mode not in MODES:
    raise ValueError(f"log={mode!r} must be one of {list(MODES)}")
  _mode = mode
  _log.setLevel(logging.WARNING if mode == "quiet" else logging.INFO)
  logging.getLogger().handlers[:] = [_handler]
  logging.captureWarnings(True)
  if (factory := logging.getLogRecordFactory()) is not _record:
    _make_record = factory
    logging.setLogRecordFactory(_record)
  sys.excepthook = _excepthook if mode == "json" else sys.__excepthook__


def mode() -> str:
  """The mode in force; never "auto"."""
  if _mode != "auto":
    return _mode
  return "bar" if sys.stderr.isatty() else "plain"


def mute() -> None:
  """Leaves all but errors and results to another process of the same run."""
  _log.setLevel(logging.WARNING)


def say(text: str, event: str = "note", **fields: Any) -> None:
  """A line for whoever watches the run, on stderr.

  Args:
    text: the line; in JSON it is the field "text".
    event: what kind of line it is, in JSON only.
    **fields: further JSON values that `text` puts into words.
  """
  _log.info(text, extra={"fields": {"event": event} | fields})


def result(text: str, event: str = "result", **fields: Any) -> None:
  """What a command was asked for, on stdout, in every mode."""
  if mode() == "json":
    fields = {"event": event} | fields | {"text": text}
    text = json.dumps(fields, default=str)
  tqdm.tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


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
  _log.error(visible(text), extra={"fields": {"event": "error"}})


def _excepthook(kind, value, trace) -> None:
  _log.error(
    f"{kind.__name__}: {value}",
    exc_info=(kind, value, trace),
    extra={"fields": {"event": "error"}},
  )


class Bar(tqdm.tqdm):
  """Progress through `total` units; a context manager.

  tqdm's bar; its line now and then, and at the end, where no bar is drawn.
  """

  # No thread that redraws: a line is due when a unit is done.
  monitor_interval = 0

  def __init__(self, total: int, what: str, unit: str, done: int = 0):
    """Begins to show.

    Args:
      total: units there are.
      what: name of the work, such as "dpo runs/dpo".
      unit: singular, such as "step".
      done: units that an earlier run has done.
    """
    drawn = mode() == "bar"
    self._values: Mapping[str, Any] = {}
    super().__init__(
      total=total,
      initial=done,
      desc=what,
      unit=unit,
      # One that tqdm need not clear before a message.
      file=sys.stderr if drawn else io.StringIO(),
      gui=not drawn,
      miniters=0,
      mininterval=0.1 if drawn else EVERY_S,
      smoothing=0.3 if drawn else 0.0,
      disable=not (total and _log.isEnabledFor(logging.INFO)),
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
    if self.disable:
      return
    if values is not None:
      self._values = dict(values)
      self.set_postfix_str(_words(values), refresh=False)
    shown = super().update(count)
    if self.gui and not shown and count and self.n >= self.total:
      self.refresh()

  def refresh(self, *args: Any, **kwargs: Any) -> None:
    if not self.gui:
      super().refresh(*args, **kwargs)
      return
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
