"""What the scripts share: flags, help, one call, an exit code.

Exit codes:
  0  done
  1  failed on the way; what was committed is kept, and the same command goes on
  2  refused because of flags, settings or input, before any work began
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; the same command goes on
"""

import difflib
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from dpo_jax.cli import config_files
from dpo_jax.cli import help as help_lib
from dpo_jax.core import console, errors, redaction
from dpo_jax.io import remote

Main = Callable[..., int]

_DEFINE = {
  bool: flags.DEFINE_boolean,
  int: flags.DEFINE_integer,
  str: flags.DEFINE_string,
}


def run(main: Main, example: str = "", **options: tuple[Any, str]) -> None:
  """Parses --config and --workdir, calls `main`, exits with its code.

  Args:
    main: takes the config as a plain dict and the working directory, which is
      runs/NAME for configs/NAME.py unless --workdir says otherwise.
    example: the config whose fields --help shows when no --config is given.
    **options: further flags that `main` takes by their names, each with its
      default (a bool, int or str) and its help.
  """
  redaction.install()
  if _asks_for_help(sys.argv[1:]):
    _print_help(_config_of(sys.argv[1:]) or example, options)
    sys.exit(0)
  config = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py or configs/NAME.py:VARIANT"
  )
  workdir = flags.DEFINE_string("workdir", None, _FLAGS["workdir=DIR"])
  flags.DEFINE_enum("log", "auto", console.MODES, _FLAGS["log=MODE"])
  flags.mark_flag_as_required("config")
  found = {
    name: _DEFINE[type(default)](name, default, text)
    for name, (default, text) in options.items()
  }

  def call(arguments):
    console.set_mode(flags.FLAGS.log)
    _say_where(sys.argv[1:])
    logging.set_verbosity(logging.WARNING)
    if len(arguments) > 1:
      return _refused(f"unexpected arguments: {arguments[1:]}")
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    name = pathlib.Path(file.partition(":")[0]).stem
    try:
      path = _directory(workdir.value or f"runs/{name}")
      values = {name: option.value for name, option in found.items()}
      settings = config.value.to_dict()
      redaction.refuse(settings)
      return main(settings, path, **values)
    except ValueError as error:
      return _refused(str(error))
    except errors.Stopped as error:
      console.error(str(error))
      return error.code

  app.run(call, flags_parser=_parsed)


_FLAGS = {
  "config=FILE:VARIANT": "A file of configs/, and one of its variants.",
  "config.FIELD=VALUE": "Changes a field; all of them stand below.",
  "workdir=DIR": "Where to write; runs/NAME for configs/NAME.py by default.",
  "log=MODE": "What is shown: auto (bar on a terminal, else plain), bar, plain,"
  " json (each line an object) or quiet.",
  "help": "This; with --config, the fields and values of that config.",
}


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


def _refused(text: str) -> int:
  console.error(text)
  return 2


def _parsed(arguments: list[str]) -> list[str]:
  """What is left of the arguments after flags; exits with 2 on wrong ones."""
  try:
    file = _config_of(arguments)
    if not file:
      raise ValueError("--config is missing: name a file of configs/")
    # Once more than needed, for messages without a library's traceback.
    _check_fields(help_lib.load(file), arguments[1:])
    return flags.FLAGS(_with_config(arguments, config_files.find(file)))
  except (flags.Error, ValueError, OSError) as error:
    if "--log=json" in arguments:
      console.set_mode("json")
    sys.exit(_refused(str(error)))


def _check_fields(config: Any, arguments: list[str]) -> None:
  """ValueError for a --config.FIELD that does not exist, naming near ones."""
  names = list(help_lib.names(config))
  for argument in arguments:
    _check_bare(argument, names)
    found = re.match(r"--?(?:no)?(config\.[^=]*)", argument)
    if not found or found[1] in names:
      continue
    parent, _, leaf = found[1].rpartition(".")
    leaves = {name: name.rpartition(".") for name in names}
    siblings = [last for up, _, last in leaves.values() if up == parent]
    near = [name for name, (_, _, last) in leaves.items() if last == leaf]
    near = (
      [f"{parent}.{n}" for n in difflib.get_close_matches(leaf, siblings, 1)]
      or near[:3]
      or difflib.get_close_matches(found[1], names, 3)
    )
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
    raise ValueError(f"--{found[1]}: the config has no such field; {hint}")


def _check_bare(argument: str, names: list[str]) -> None:
  """ValueError for --FIELD that is no flag, but a field of the config."""
  found = re.match(r"--?([\w.]+)", argument)
  if not found or found[1] in flags.FLAGS:
    return
  near = [name for name in names if name.endswith(f".{found[1]}")]
  if near:
    raise ValueError(
      f"--{found[1]} is no flag; did you mean --{' or --'.join(near[:3])}?"
    )


def _asks_for_help(arguments: list[str]) -> bool:
  known = ("-h", "--help", "-help", "--helpshort", "--helpfull")
  return any(argument in known for argument in arguments)


def _config_of(arguments: list[str]) -> str:
  """The value of --config, or ""."""
  for number, argument in enumerate(arguments):
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config"):
      return value if equals else "".join(arguments[number + 1 : number + 2])
  return ""


def _with_config(arguments: list[str], file: str) -> list[str]:
  """The arguments with another value of --config."""
  names = ("--config", "-config")
  found = []
  for before, argument in zip(["", *arguments], arguments):
    name, equals, _ = argument.partition("=")
    if name in names and equals:
      argument = f"{name}={file}"
    elif before in names:
      argument = file
    found.append(argument)
  return found


def _say_where(arguments: list[str]) -> None:
  """Says which file --config means, where it is not the one that it names."""
  given = _config_of(arguments)
  found = config_files.find(given)
  if found != given:
    path = found.partition(":")[0]
    console.say(
      f"--config={given} is no file here: taking {path}", "config", path=path
    )


def _print_help(config: str, options: dict[str, tuple[Any, str]]) -> None:
  lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
  own = {f"{name}={default}": text for name, (default, text) in options.items()}
  for name, text in (_FLAGS | own).items():
    lines.append(f"  --{name}\n      {text}")
  lines += ["", __doc__.partition("\n\n")[2].strip()]
  if config:
    try:
      fields = help_lib.fields(lambda: help_lib.load(config))
    except (ValueError, OSError) as error:
      sys.exit(_refused(f"--config={config}: {error}"))
    lines += ["", f"Fields of {config}:", help_lib.page(fields)]
  try:
    print("\n".join(lines), flush=True)
  except BrokenPipeError:
    # Whoever read it has seen enough, as `head` has. What Python would still
    # write as it exits goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
