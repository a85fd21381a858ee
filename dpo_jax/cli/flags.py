"""Flags, help and exit codes of the commands that take --config.

Exit codes:
  0  done
  1  failed; what was committed is kept, and the same command resumes
  2  refused because of flags, settings or input, before any work
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; the same command resumes
"""

import faulthandler
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpo_jax.cli import help as help_lib
from dpo_jax.core import console, errors, preemption, redaction
from dpo_jax.io import remote

_DEFINE = {
  bool: flags.DEFINE_boolean,
  int: flags.DEFINE_integer,
  str: flags.DEFINE_string,
}
_FLAGS = {
  "config": ("", "FILE or FILE:VARIANT of configs/; --config.FIELD=VALUE too"),
  "workdir": ("", "output directory; default runs/NAME for configs/NAME.py"),
  "log": (
    "auto",
    "auto (bar on a terminal, else plain), bar, plain, json (each line an"
    " object) or quiet",
  ),
  "help": ("", "this help; --help=loss: only the fields of config.loss"),
}


def run(
  main: Callable[..., int], example: str, **options: tuple[Any, str]
) -> None:
  """Parses the flags, calls `main` and exits with its code.

  `main` takes the config, the working directory and, by name, the `options`:
  further flags, each with its default (a bool, int or str) and help. --help
  shows the config `example` by default.
  """
  redaction.install()
  faulthandler.enable()
  code = checked(lambda: _run(main, example, options))
  sys.stdout.flush()
  sys.stderr.flush()
  if code and any(
    not thread.daemon and thread is not threading.main_thread()
    for thread in threading.enumerate()
  ):
    # After a failed save a thread of Orbax may wait for ever.
    os._exit(code)
  sys.exit(code)


def checked(
  call: Callable[[], int], workdir: pathlib.Path = pathlib.Path()
) -> int:
  """Exit code of a command; logs what needs no traceback."""
  try:
    for text in (*sys.argv, os.getcwd()):
      if text != text.encode(errors="ignore").decode():
        raise ValueError(
          f"{text!a} is not in the encoding of this environment,"
          f" {sys.getfilesystemencoding()}: set PYTHONUTF8=1"
        )
    return call()
  except (flags.Error, ValueError) as error:
    said, code = str(error), 2
  except errors.Stopped as error:
    said, code = str(error), error.code
  except OSError as error:
    limit = errors.limit(error, workdir)
    if not limit and not error.filename:
      raise
    said, code = str(limit or error), 1
  except KeyboardInterrupt:
    stopped = preemption.Interrupted(signal.SIGINT, "with nothing half-written")
    said, code = str(stopped), stopped.code
  console.error(said)
  return code


def _run(
  main: Callable[..., int], example: str, options: dict[str, tuple[Any, str]]
) -> int:
  given = flags.FlagValues()
  given.set_gnu_getopt(True)
  for name, (default, text) in (_FLAGS | options).items():
    short = "h" if name == "help" else None
    _DEFINE[type(default)](
      name, default, text, flag_values=given, short_name=short
    )
  # Its value is optional.
  given["help"].boolean = True
  try:
    rest = given(sys.argv, known_only=True)
  finally:
    console.set_mode(given["log"].value)
  name = given["config"].value
  if given["help"].value:
    _print_help(given, name or example)
    return 0
  config = _config(name, rest, given)
  stem = pathlib.Path(name.partition(":")[0]).stem
  workdir = given["workdir"].value or f"runs/{stem}"
  remote.refuse_address("--workdir", workdir)
  workdir = pathlib.Path(workdir).resolve()
  values = {key: given[key].value for key in options}
  return checked(lambda: main(config, workdir, **values), workdir)


def _config(name: str, arguments: list[str], others: Iterable[str]) -> dict:
  """The config `name` with values of arguments; `others` are known flags."""
  if not name:
    raise ValueError("--config is missing: name a file of configs/")
  file = help_lib.find(name)
  if file != name:
    path = file.partition(":")[0]
    console.say(
      f"--config={name} is no file here: taking {path}", "config", path=path
    )
  config = help_lib.load(file)
  fields = flags.FlagValues()
  fields.set_gnu_getopt(True)
  try:
    config_flags.DEFINE_config_dict(
      "config", config, flag_values=fields, sys_argv=arguments
    )
    rest = fields(arguments)[1:]
  except (flags.Error, ValueError, LookupError, AttributeError) as error:
    # ml_collections reports only the last part of an unknown field's name.
    known = [*others, *help_lib.names(config)]
    raise ValueError(_unknown(arguments, known) or str(error)) from None
  if rest:
    raise ValueError(f"unexpected arguments: {rest}")
  values = config.to_dict()
  redaction.refuse(values)
  return values


def _unknown(arguments: list[str], known: list[str]) -> str:
  """The error for the first flag that is not known, or ""."""
  for argument in arguments[1:]:
    found = re.match(r"--?([a-zA-Z][\w.]*)", argument)
    if found and not {found[1], found[1].removeprefix("no")} & {*known}:
      near = help_lib.near(found[1], known)
      return f"--{found[1]}: no such flag or field; {near}"
  return ""


def _print_help(given: flags.FlagValues, config: str) -> None:
  """Prints all of the help, or the fields of the section that it names."""
  section = given["help"].value.removeprefix("config.")
  name = "config" if section == "true" else f"config.{section}"
  lines = [f"Fields of {config}:", help_lib.page(config, name)]
  if name == "config":
    text = (sys.modules["__main__"].__doc__ or "").strip()
    codes = __doc__.partition("\n\n")[2]
    lines = [text, given.get_help(include_special_flags=False), codes, *lines]
  # As other Unix programs do when `| head` closes the pipe.
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)
  print("\n".join(lines))
