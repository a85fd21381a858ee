"""Keys of the environment, kept out of all that is printed, logged or written.

A server may echo the key that it was sent, and a library may put it into an
error. So whatever comes from outside is cleaned before it is kept (`clean`),
and a command cleans everything on its way to the terminal (`install`), where
tracebacks and the logs of all libraries end too.
"""

import logging
import os
import re
import sys
import traceback
import urllib.parse
from collections.abc import Mapping
from typing import Any, TextIO

# Names under which secrets are exported: OPENAI_API_KEY, HF_TOKEN, ...
_SECRET = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)\Z")
# A shorter value could be part of any word, and keeps no secret.
_SHORTEST = 8


def secrets() -> dict[str, str]:
  """The environment's secrets, each with its variable's name.

  A secret stands there as it is and as it is written into an address.
  """
  found = {}
  for name, value in os.environ.items():
    value = value.strip()
    if _SECRET.search(name.upper()) and len(value) >= _SHORTEST:
      found[value] = name
      found[urllib.parse.quote(value, safe="")] = name
  return found


def clean(text: str) -> str:
  """The text with "[NAME]" in the place of each secret's value."""
  # The longest first: one secret may be the beginning of another.
  for value, name in sorted(secrets().items(), key=lambda x: -len(x[0])):
    text = text.replace(value, f"[{name}]")
  return text


def refuse(values: Any, name: str = "config") -> None:
  """Refuses settings that hold a secret: they are written into files.

  Raises:
    ValueError: naming the setting and the variable, not the value.
  """
  if isinstance(values, Mapping):
    for key, value in values.items():
      refuse(value, f"{name}.{key}")
  elif isinstance(values, list | tuple):
    for index, value in enumerate(values):
      refuse(value, f"{name}[{index}]")
  elif isinstance(values, str):
    for secret, variable in secrets().items():
      if secret in values:
        raise ValueError(
          f"{name} holds the value of the environment variable {variable},"
          " and settings are written into files: leave it to the environment"
        )


def install() -> None:
  """Cleans what this process prints and logs from now on."""
  if logging.getLogRecordFactory() is not _record:
    logging.setLogRecordFactory(_record)
  for stream in ("stdout", "stderr"):
    inner = getattr(sys, stream)
    if inner is not None and not isinstance(inner, _Cleaned):
      setattr(sys, stream, _Cleaned(inner))


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
  """A log record without secrets, whatever stream its handler has."""
  record = logging.LogRecord(*args, **kwargs)
  try:
    record.msg, record.args = clean(record.getMessage()), ()
  except (TypeError, ValueError):
    return record  # its arguments do not fit: the handler will say so
  if record.exc_info and record.exc_info[0]:
    lines = traceback.format_exception(*record.exc_info)
    record.exc_text = clean("".join(lines).rstrip())
  return record


class _Cleaned:
  """A stream of text whose every write is cleaned."""

  def __init__(self, inner: TextIO):
    self._inner = inner

  def write(self, text: str) -> int:
    self._inner.write(clean(text))
    return len(text)

  def writelines(self, lines) -> None:
    for line in lines:
      self.write(line)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._inner, name)
