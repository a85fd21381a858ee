"""Every command by its name: `dpo-jax NAME ...`, or python -m dpo_jax NAME ...

`dpo-jax train` is train.py, and so on for sample and judge; any other name is
a module, so that `dpo-jax report` is python -m dpo_jax.report.
"""

import runpy
import sys

from dpo_jax.interface import config_files

_SCRIPTS = ("train", "sample", "judge")
_MODULES = (
  "replicate",
  "report",
  "verify",
  "score",
  "plan",
  "inspect_data",
  "checkpoint",
  "mirror",
  "hub",
)


def main() -> None:
  """Runs the command that the first argument names; exits as it does."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name not in _SCRIPTS + _MODULES:
    asked = name in ("-h", "--help")
    print(
      f"{__doc__.strip()}\n\nNames: {', '.join(_SCRIPTS + _MODULES)}\n"
      "Each takes --help.",
      file=sys.stdout if asked else sys.stderr,
    )
    sys.exit(0 if asked else 2)
  sys.argv[:2] = [f"dpo-jax {name}"]
  if name in _SCRIPTS:
    path = str(config_files.root() / f"{name}.py")
    runpy.run_path(path, run_name="__main__")
  else:
    runpy.run_module(f"dpo_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
