"""What the scripts share: flags, one call, an exit code.

Exit codes: 0 done, 1 failed on the way, 2 refused before any work began or
because of its input.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

Main = Callable[[dict[str, Any], pathlib.Path], int]


def run(main: Main, default_workdir: str) -> None:
  """Parses --config and --workdir, calls `main`, exits with its code.

  Args:
    main: takes the config as a plain dict and the working directory.
    default_workdir: where to work without --workdir.
  """
  config = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py or configs/NAME.py:VARIANT"
  )
  workdir = flags.DEFINE_string("workdir", default_workdir, "Where to write.")
  flags.mark_flag_as_required("config")

  def call(arguments):
    if len(arguments) > 1:
      raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    logging.set_verbosity(logging.WARNING)
    path = pathlib.Path(workdir.value).absolute()
    try:
      return main(config.value.to_dict(), path)
    except ValueError as error:
      print(f"error: {error}", file=sys.stderr)
      return 2

  app.run(call)
