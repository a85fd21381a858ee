"""A script in a process that sends itself a signal at a point of the run.

  python tests/signalled.py SCRIPT MODULE:NAME TIMES SIGNAL PROCESS FLAGS...

It comes as NAME, a function of the module or a method of a class of it, is
called for the nth time, in the process of that number.
"""

import functools
import importlib
import operator
import os
import pathlib
import runpy
import signal
import sys
import time


def plant(where, times, number):
  module, _, name = where.partition(":")
  parent, _, last = name.rpartition(".")
  owner = importlib.import_module(module)
  if parent:
    owner = operator.attrgetter(parent)(owner)
  original = getattr(owner, last)
  left = [times]

  @functools.wraps(original)
  def call(*arguments, **options):
    left[0] -= 1
    if left[0] == 0:
      print(f"signalled at {time.time()}", flush=True)
      os.kill(os.getpid(), number)
    return original(*arguments, **options)

  setattr(owner, last, call)


if __name__ == "__main__":
  root = pathlib.Path(__file__).resolve().parent.parent
  script, where, times, name, process, *flags = sys.argv[1:]
  if os.environ.get("JAX_PROCESS_ID", "0") == process:
    plant(where, int(times), signal.Signals[name])
  sys.argv = [script, *flags]
  runpy.run_path(str(root / script), run_name="__main__")
