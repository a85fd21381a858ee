"""What the scripts share: flags, one call, an exit code.

Exit codes: 0 done; 1 failed on the way, with what was committed kept; 2 refused
because of settings or input, before any of the work began.
"""

import pathlib
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from dpo_jax import errors

Main = Callable[..., int]


def run(main: Main, **numbers: tuple[int, str]) -> None:
  """Parses --config and --workdir, calls `main`, exits with its code.

  Args:
    main: takes the config as a plain dict and the working directory, which is
      runs/NAME for configs/NAME.py unless --workdir says otherwise.
    **numbers: further flags that `main` takes by their names, each with its
      default and its help.
  """
  config = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py or configs/NAME.py:VARIANT"
  )
  workdir = flags.DEFINE_string(
    "workdir", None, "Where to write; runs/NAME by default."
  )
  flags.mark_flag_as_required("config")
  options = {
    name: flags.DEFINE_integer(name, default, text)
    for name, (default, text) in numbers.items()
  }

  def call(arguments):
    if len(arguments) > 1:
      raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    logging.set_verbosity(logging.WARNING)
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    name = pathlib.Path(file.partition(":")[0]).stem
    path = pathlib.Path(workdir.value or f"runs/{name}").absolute()
    try:
      values = {name: option.value for name, option in options.items()}
      return main(config.value.to_dict(), path, **values)
    except ValueError as error:
      print(f"error: {error}", file=sys.stderr)
      return 2
    except errors.Stopped as error:
      print(f"error: {error}", file=sys.stderr)
      return 1

  app.run(call)
