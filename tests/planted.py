"""Keys planted in a command's environment, and the search for them after."""

import os
import pathlib
import subprocess
import threading

KEYS = {
  "OPENAI_API_KEY": "sk-planted-9f3b6c1e7a2d",
  "HF_TOKEN": "hf_plantedQwErTyUiOp",
  "WANDB_API_KEY": "planted0123456789abcdef0123456789abcdef",
}


def run(command, *, env, cwd, timeout):
  """The finished process, and every argv that it and its children had.

  Raises:
    AssertionError: a key was printed, or stood in an argv.
  """
  process = subprocess.Popen(
    command,
    cwd=cwd,
    env=env | KEYS,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  found: set[bytes] = set()
  over = threading.Event()

  def watch():
    while not over.wait(0.02):
      found.update(_arguments(process.pid))

  watcher = threading.Thread(target=watch)
  watcher.start()
  try:
    out, err = process.communicate(timeout=timeout)
  except BaseException:
    process.kill()
    process.communicate()
    raise
  finally:
    over.set()
    watcher.join()
  absent(out.encode(), "stdout")
  absent(err.encode(), "stderr")
  for arguments in found:
    absent(arguments, "an argv")
  return subprocess.CompletedProcess(command, process.returncode, out, err)


def _arguments(pid):
  """The command lines of a process and of all below it."""
  waiting = [str(pid)]
  while waiting:
    root = pathlib.Path("/proc", waiting.pop())
    try:
      yield (root / "cmdline").read_bytes()
      for thread in (root / "task").iterdir():
        waiting += (thread / "children").read_text().split()
    except OSError:
      continue  # it has ended


def absent(data, where):
  for name, key in KEYS.items():
    assert key.encode() not in data, f"{name} is in {where}"


def search(directory):
  """Looks for the keys in every file and every name; gives the files' number.

  Raises:
    AssertionError: naming the file that holds one.
  """
  count = 0
  for folder, folders, files in os.walk(directory):
    for name in (*folders, *files):
      absent(os.fsencode(name), f"a name in {folder}")
    for name in files:
      path = pathlib.Path(folder, name)
      absent(path.read_bytes(), path)
      count += 1
  return count
