"""Secrets of the environment, replaced by their names in all output.

A server may echo the key that it received, and a library may put it into an
exception. Text from outside is cleaned before it is stored (`clean`), and
commands clean stdout and stderr (`install`), which carry tracebacks and logs.
"""

import os
import re
import sys
import urllib.parse
from collections.abc import Mapping
from typing import Any

# Variables that hold secrets: OPENAI_API_KEY, HF_TOKEN, ...
_SECRET = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)\Z")
# A shorter value is no secret and could be part of any word.
_MIN_LENGTH = 8


def secrets() -> dict[str, str]:
  """Variable names by secret value, plain and percent-encoded as in a URL."""
  found = {}
  for name, value in os.environ.items():
    value = value.strip()
    if _SECRET.search(name.upper()) and len(value) >= _MIN_LENGTH:
      found[value] = name
      found[urllib.parse.quote(value, safe="")] = name
  return found


def clean(text: str) -> str:
  """The text with "[NAME]" in place of each secret."""
  # Longest first: a secret may be a prefix of another.
  for value, name in sorted(secrets().items(), key=lambda x: -len(x[0])):
    text = text.replace(value, f"[{name}]")
  return text


def refuse(values: Any, name: str = "config") -> None:
  """Raises ValueError if settings, which are stored, contain a secret."""
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
  """Cleans all that this process writes to stdout and stderr from now on."""
  streams: list[Any] = [sys.stdout, sys.stderr]
  for stream in streams:
    # Patched, not replaced: log handlers may hold the stream already.
    if stream is not None and not hasattr(stream, "cleaned"):
      stream.cleaned = True
      stream.write = lambda text, write=stream.write: write(clean(text))
