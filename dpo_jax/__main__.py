"""Runs a command by its name, from a clone or an installed wheel.

  dpo-jax NAME ...   or   python -m dpo_jax NAME ...

train, sample and judge are the scripts of those names; the rest are modules.
"""

import runpy
import sys

from dpo_jax.cli import help as help_lib

_SCRIPTS = ("train", "sample", "judge")
_MODULES = {
  "replicate": "dpo_jax.replicate",
  "report": "dpo_jax.report.report",
  "verify": "dpo_jax.report.verify",
  "score": "dpo_jax.training.score",
  "plan": "dpo_jax.plan.plan",
  "inspect_data": "dpo_jax.training.inspect_data",
  "checkpoint": "dpo_jax.cli.checkpoint",
}


def main() -> None:
  """Runs the command that the first argument names."""
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  names = (*_SCRIPTS, *_MODULES)
  if name not in names:
    asked = name in ("-h", "--help")
    print(
      f"{__doc__.strip()}\n\nNames: {', '.join(names)}\nEach takes --help.",
      file=sys.stdout if asked else sys.stderr,
    )
    sys.exit(0 if asked else 2)
  sys.argv[:2] = [f"dpo-jax {name}"]
  if name in _SCRIPTS:
    path = str(help_lib.root() / f"{name}.py")
    runpy.run_path(path, run_name="__main__")
  else:
    runpy.run_module(_MODULES[name], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
