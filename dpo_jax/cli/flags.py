"""Flags, help and exit codes of the commands that take --config.

Exit codes:
  0  done
  1  failed on the way; what was committed is kept, and the same command goes on
  2  refused because of flags, settings or input, before any work began
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; the same command goes on
"""

import difflib
import faulthandler
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpo_jax.cli import help as help_lib
from dpo_jax.core import console, errors, redaction
from dpo_jax.io import remote

Main = Callable[..., int]

_DEFINE = {
  bool: flags.DEFINE_boolean,
  int: flags.DEFINE_integer,
  str: flags.DEFINE_string,
}
_FLAGS = {
  "config": ("", "FILE or FILE:VARIANT of configs/; --config.FIELD=VALUE too"),
  "workdir": ("", "where to write; runs/NAME for configs/NAME.py by default"),
  "log": (
    "auto",
    "auto (bar on a terminal, else plain), bar, plain, json (each line an"
    " object) or quiet",
  ),
  "help": ("", "this; --help=loss: only the fields of config.loss"),
}


def run(main: Main, example: str, **options: tuple[Any, str]) -> None:
  """Parses the flags, calls `main`, exits with its code.

  Args:
    main: takes the config as a plain dict and the working directory, which is
      runs/NAME for configs/NAME.py unless --workdir says otherwise.
    example: the config whose fields --help shows when no --config is given.
    **options: further flags that `main` takes by their names, each with its
      default (a bool, int or str) and its help.
  """
  redaction.install()
  faulthandler.enable()
  given = flags.FlagValues()
  given.set_gnu_getopt(True)
  for name, (default, text) in (_FLAGS | options).items():
    short = "h" if name == "help" else None
    _DEFINE[type(default)](
      name, default, text, flag_values=given, short_name=short
    )
  # So that it needs no value.
  given["help"].boolean = True
  try:
    try:
      rest = given(sys.argv, known_only=True)
    finally:
      console.set_mode(given["log"].value)
    name = given["config"].value
    if given["help"].value:
      _print_help(given, name or example)
      sys.exit()
    config = _config(name, rest, list(given))
    stem = pathlib.Path(name.partition(":")[0]).stem
    workdir = _directory(given["workdir"].value or f"runs/{stem}")
    code = main(config, workdir, **{key: given[key].value for key in options})
  except (flags.Error, ValueError) as error:
    console.error(str(error))
    code = 2
  except errors.Stopped as error:
    console.error(str(error))
    code = error.code
  sys.exit(code)


def _config(name: str, arguments: list[str], others: list[str]) -> dict:
  """The config of a name, changed by the arguments.

  Raises:
    ValueError: there is no such config, field or flag; a hint names a near
      field, or one of the `others`, which are flags. Or a value is wrong.
  """
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
    # Of an unknown field ml_collections names the last part alone.
    known = [*others, *help_lib.names(config)]
    raise ValueError(_unknown(arguments, known) or str(error)) from None
  if rest:
    raise ValueError(f"unexpected arguments: {rest}")
  values = config.to_dict()
  redaction.refuse(values)
  return values


def _unknown(arguments: list[str], known: list[str]) -> str:
  """What to say of the first flag that is not known; "" if all are."""
  for argument in arguments[1:]:
    found = re.match(r"--?([a-zA-Z][\w.]*)", argument)
    if found and not {found[1], found[1].removeprefix("no")} & {*known}:
      return f"--{found[1]}: no such flag or field; {_near(found[1], known)}"
  return ""


def _near(name: str, known: list[str]) -> str:
  """A hint at known names like one that is not."""
  leaf = name.rpartition(".")[2]
  same = [one for one in known if one.rpartition(".")[2] == leaf]
  near = difflib.get_close_matches(name, same, 3, cutoff=0)
  near = near or difflib.get_close_matches(name, known, 1)
  return f"did you mean {' or '.join(near)}?" if near else "see --help"


def _directory(name: str) -> pathlib.Path:
  """The path of --workdir; ValueError if no file system could hold it."""
  remote.refuse_address("--workdir", name)
  path = pathlib.Path(name).absolute()
  parts = [part.encode("utf-8", "surrogateescape") for part in path.parts]
  if "\0" in name or max(map(len, parts)) > 255:
    raise ValueError(
      f"--workdir={name!r:.80} is no path: a name in it has more than 255"
      " bytes or a NUL"
    )
  return path


def _print_help(given: flags.FlagValues, config: str) -> None:
  """Prints what --help asks for: all, or the fields of a section."""
  section = given["help"].value.removeprefix("config.")
  name = "config" if section == "true" else f"config.{section}"
  fields = help_lib.fields(config)
  found = [one for one in fields if f"{one.name}.".startswith(f"{name}.")]
  if not found:
    known = list(help_lib.names(help_lib.load(config)))
    raise ValueError(f"--help={section}: no such section; {_near(name, known)}")
  lines = [f"Fields of {config}:", help_lib.page(found)]
  if name == "config":
    text = (sys.modules["__main__"].__doc__ or "").strip()
    codes = __doc__.partition("\n\n")[2]
    lines = [text, given.get_help(include_special_flags=False), codes, *lines]
  try:
    print("\n".join(lines), flush=True)
  except BrokenPipeError:
    # Whoever read it has seen enough, as `head` has. What Python would still
    # write as it exits goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
