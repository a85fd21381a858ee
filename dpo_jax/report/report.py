"""The report of a working directory: report.md, its numbers, and figures.

Nothing is stored that could be recomputed: every number is made from the rows
of verdicts/, responses/ and the runs' metrics, and `verify` makes them
again and compares.

  python -m dpo_jax report runs/hh --strict

Exit codes: 0 written; 1 flagged, with --strict; 2 nothing to be written from.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from dpo_jax.core import console, errors, settings
from dpo_jax.io import strict_json
from dpo_jax.report import compose, load

ReportSettings = load.ReportSettings


def write(
  report_settings: ReportSettings, workdir: str | os.PathLike
) -> pathlib.Path:
  """Makes the report of the rows beneath `workdir`.

  Returns:
    The path of report.md, which is written last.

  Raises:
    ValueError: there are no verdicts, responses or metrics to report, a row
      is malformed, stands twice, or rows of several judges are mixed.
    errors.Stopped: the report was written, is flagged, and settings are
      strict.
  """
  workdir = pathlib.Path(workdir)
  made = compose.compose(report_settings, workdir)
  directory = workdir / report_settings.directory
  directory.mkdir(exist_ok=True)
  path = compose.save(made, directory)
  if made.flags and report_settings.strict:
    names = ", ".join(dict.fromkeys(flag.name for flag in made.flags))
    raise errors.Stopped(f"{path} is flagged: {names}; see its top")
  return path


def of(path: str | os.PathLike) -> compose.Report:
  """The report of a run, with nothing written.

  Args:
    path: a working directory, whose report is made with the settings of the
      one that is there, or with defaults.

  Raises:
    ValueError: there is nothing to report, or a row is malformed.
  """
  path = pathlib.Path(path)
  numbers = path / _DEFAULTS.directory / compose.NUMBERS
  found = recorded(numbers) if numbers.is_file() else _DEFAULTS
  return compose.compose(found, path)


def main(arguments: Sequence[str] | None = None) -> int:
  flags = _parser().parse_args(arguments)
  try:
    path = write(_settings(flags), flags.directory)
  except (ValueError, OSError) as error:
    console.error(str(error))
    return 2
  except errors.Stopped as error:
    console.error(str(error))
    return 1
  console.result(str(path), path=str(path))
  return 0


_DEFAULTS = ReportSettings(
  title="Win rates against chosen",
  runs=(),
  verdicts="verdicts",
  seed=0,
  resamples=2000,
  confidence=0.95,
  examples=5,
  aa_alpha=0.01,
  first_slot_limit=0.65,
  gold_floor=0.8,
  strict=False,
)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax report",
    description="Makes DIRECTORY/report from the rows beneath DIRECTORY. What"
    " is not given is as in the report that is there, or as said here.",
  )
  parser.add_argument("directory", help="of a run")
  console.add_flag(parser)
  for field in dataclasses.fields(ReportSettings):
    default = getattr(_DEFAULTS, field.name)
    flag = f"--{field.name}"
    if field.name == "strict":
      parser.add_argument(flag, action="store_true", help="flags are failures")
    elif field.name == "runs":
      parser.add_argument(
        flag, nargs="*", help="training runs in DIRECTORY (default: none)"
      )
    else:
      text = f"see configs/demo.py (default: {default})"
      parser.add_argument(flag, type=type(default), help=text)
  return parser


def _settings(flags: argparse.Namespace) -> ReportSettings:
  """The flags over the settings of the report that is there, or defaults."""
  given = {
    field.name: getattr(flags, field.name)
    for field in dataclasses.fields(ReportSettings)
    if getattr(flags, field.name) is not None
  }
  values = dataclasses.asdict(_DEFAULTS) | given
  made = settings.build(ReportSettings, values, "report")
  path = pathlib.Path(flags.directory) / made.directory / compose.NUMBERS
  if path.is_file():
    values = dataclasses.asdict(recorded(path)) | given
  return settings.build(ReportSettings, values, "report")


def recorded(path: pathlib.Path) -> ReportSettings:
  """The settings that a report was made with, from its numbers.json."""
  found = strict_json.read(path)
  if not isinstance(found, dict) or "settings" not in found:
    raise ValueError(f"{path} has no field 'settings'")
  return settings.build(ReportSettings, found["settings"], f"{path}: settings")


if __name__ == "__main__":
  sys.exit(main())
