"""Pairs a second of a DPO step: this package, a plain JAX step, and TRL.

  python -m benchmarks.dpo_step --model=DIR --pairs=FILE --output=OUT.jsonl \
    --variant=pythia-14m --trl=1.16=PYTHON --trl=0.24=PYTHON

DIR is a model in Hugging Face form with its tokenizer, FILE a JSONL of pairs
(HH's own files do), PYTHON that of an environment with TRL. `--trl` may stand
several times, each with a label of its own; without it TRL is left out. What
`--only` names is measured, or with `--all` every layout of this package and the
plain step; by default the first layout and TRL.

TRL gets its best settings: before anything is compared, each TRL makes two
updates with several (dpo_step_table.next_attempt), each in a process of its
own, and the fastest is taken; of TRL 0.x also the fastest that is padding-free.

All contenders make the same updates of the same float32 LoRA adapters on the
same token ids, with the reference's log-probs computed beforehand (but for the
one that says otherwise). Each runs in a process of its own, one after the
other, and the whole sequence is repeated, so that a change of the machine's
speed meets all of them. Nothing is reported unless every loss at step 0 is ln 2
and all loss curves are the same.

glibc's allocator gives large blocks back to the system as soon as they are
freed, and every page of the next one is a fault again: half of a small model's
step in torch. This package keeps freed memory by itself
(training/setup.keep_freed_memory); the others run with variables that keep it,
unless `--malloc=default` leaves them out.

`--output` is appended to, one JSON line a process, and what it already has is
not measured again: where a call may not take long, `--at_most=N` ends it after
N processes, and the same call goes on. `--summarise=FILE` prints the table and
draws it with `--figure=PNG`.
"""

import argparse
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile

from benchmarks import dpo_step_figure, dpo_step_table

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Contenders in JAX, by the names of dpo_step_jax; the first is the default.
OURS = ("shared", "shared, reference computed", "packed", "padded")
PLAIN = "plain JAX, padded"
# Environment of every child. Memory that was freed is used again instead of
# being mapped and faulted in anew (malloc(3), mallopt(3); no other libc reads
# these).
MALLOC = {
  "default": {},
  "keeping": {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**28),
  },
}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--model")
  parser.add_argument("--pairs")
  parser.add_argument("--output", type=pathlib.Path)
  parser.add_argument("--variant", default="pythia-14m")
  parser.add_argument("--trl", action="append", default=[])
  parser.add_argument("--only", action="append", default=[])
  parser.add_argument("--all", action="store_true")
  parser.add_argument("--rounds", type=int, default=1)
  parser.add_argument("--steps", type=int, default=5)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--sizes", default="1,4,8,16", help="TRL's, to try")
  parser.add_argument("--malloc", choices=tuple(MALLOC), default="keeping")
  parser.add_argument("--at_most", type=int, default=10**6)
  parser.add_argument("--threads", type=int, default=os.cpu_count())
  parser.add_argument("--set", default="{}", help="settings, as JSON")
  parser.add_argument("--summarise", type=pathlib.Path)
  parser.add_argument("--figure", type=pathlib.Path)
  flags = parser.parse_args()
  if flags.summarise:
    return show(flags.summarise, flags.figure)
  for name in ("model", "pairs", "output"):
    if not getattr(flags, name):
      parser.error(f"--{name} is missing")
  if flags.steps <= dpo_step_table.WARM:
    parser.error(f"--steps={flags.steps} must be over {dpo_step_table.WARM}")
  with tempfile.TemporaryDirectory() as directory:
    measure(flags, pathlib.Path(directory))
  show(flags.output, flags.figure)


def show(path: pathlib.Path, figure: pathlib.Path | None) -> None:
  rows = dpo_step_table.read(path)
  print(dpo_step_table.table(rows, OURS[0]))
  if figure:
    dpo_step_figure.draw(dpo_step_table.bars(rows), figure)


def measure(flags: argparse.Namespace, case: pathlib.Path) -> None:
  """Runs what the results lack, `at_most` processes, and appends their rows."""
  shared = [
    f"--case={case}",
    f"--model={pathlib.Path(flags.model).resolve()}",
    f"--pairs={pathlib.Path(flags.pairs).resolve()}",
    f"--variant={flags.variant}",
    f"--steps={flags.steps}",
    f"--batch_size={flags.batch_size}",
    f"--set={flags.set}",
  ]
  mine = [sys.executable, "-m", "benchmarks.dpo_step_jax", *shared]
  spawn([*mine, "--child=case"], MALLOC["default"])
  text = json.loads((case / "case.json").read_text())
  about = {
    "model": pathlib.Path(flags.model).name,
    "malloc": flags.malloc,
    "batch_size": flags.batch_size,
    "tokens_a_pair": tokens(text),
    "machine": f"{os.cpu_count()} x {processor()}",
    "set": flags.set,
  }
  ours = (*OURS, PLAIN) if flags.all else OURS[:1]
  ours = [name for name in flags.only if name in (*OURS, PLAIN)] or ours
  commands = {name: [*mine, f"--child={name}"] for name in ours}
  # The product sets its allocator by itself, as `train.py` does.
  malloc = {name: MALLOC["default"] for name in ours if name != PLAIN}
  for text in flags.trl:
    label, python = text.split("=", 1)
    script = str(ROOT / "benchmarks" / "dpo_step_trl.py")
    common = [f"--case={case}", f"--threads={flags.threads}"]
    if not flags.only or f"TRL {label}" in flags.only:
      commands[f"TRL {label}"] = [python, script, *common]
  for _ in range(flags.at_most):
    row = missing(flags, about, list(commands))
    if row is None:
      return
    base = row["name"].removesuffix(dpo_step_table.FREE)
    command = [*commands[base], *settings_flags(row)]
    output = case / "output.json"
    used = spawn(
      [*command, f"--output={output}"],
      malloc.get(base, MALLOC[flags.malloc]),
    )
    row |= used | json.loads(output.read_text())
    with flags.output.open("a") as file:
      file.write(json.dumps(row) + "\n")
    print(row["name"], row.get("settings", ""), row.get("seconds"), flush=True)


def missing(
  flags: argparse.Namespace, about: dict, names: list[str]
) -> dict | None:
  """The next process to run, as the beginning of its row, or None.

  TRL's attempts come first, then the rounds, every contender in each.
  """
  rows = dpo_step_table.read(flags.output)
  rows = [row for row in rows if about.items() <= row.items()]
  tried = {
    name: [r for r in rows if r["name"] == name and "settings" in r]
    for name in names
    if name.startswith("TRL ")
  }
  sizes = [int(size) for size in flags.sizes.split(",")]
  for name, attempts in tried.items():
    settings = dpo_step_table.next_attempt(attempts, sizes)
    if settings is not None:
      return about | {"name": name, "settings": settings}
  contenders = {}
  for name in names:
    if name in tried:
      contenders |= dpo_step_table.contenders(tried[name])
    else:
      contenders[name] = {}
  done = dpo_step_table.measured(rows)
  for number in range(flags.rounds):
    for name, best in contenders.items():
      if len(done.get(name, [])) <= number:
        return about | {"name": name} | best
  return None


def settings_flags(row: dict) -> list[str]:
  """TRL's flags for an attempt, or for a measurement at its best settings."""
  settings = row.get("settings") or row.get("best")
  if settings is None:
    return []
  taken = [f"--{key}={settings[key]}" for key in ("micro_batch", "attention")]
  for key in ("padding_free", "logits_to_keep"):
    taken += [f"--{key}"] * settings[key]
  return taken + ["--search"] * ("settings" in row)


def spawn(command: list[str], malloc: dict[str, str]) -> dict[str, float]:
  """Runs a child to its end and gives what the system says that it used."""
  environment = os.environ | malloc
  environment |= {
    "JAX_PLATFORMS": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
  }
  with tempfile.TemporaryFile() as log:
    child = subprocess.Popen(
      command, stdout=log, stderr=log, cwd=ROOT, env=environment
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
      log.seek(0)
      sys.stderr.write(log.read().decode(errors="replace")[-4000:])
      raise SystemExit(f"exit {child.returncode}: {shlex.join(command)}")
  return {
    # Kilobytes on Linux, bytes on macOS.
    "peak_rss_bytes": usage.ru_maxrss
    * (1 if sys.platform == "darwin" else 1024),
    "page_faults": usage.ru_minflt,
    "user_seconds": usage.ru_utime,
    "system_seconds": usage.ru_stime,
  }


def tokens(case: dict) -> dict[str, float]:
  """Mean tokens of a pair with one copy of its prompt, and with two."""
  pairs = [[len(part) for part in pair] for s in case["steps"] for pair in s]
  return {
    "shared": statistics.mean(p + c + r for p, c, r in pairs),
    "apart": statistics.mean(2 * p + c + r for p, c, r in pairs),
    "completion": statistics.mean(c + r for p, c, r in pairs),
  }


def processor() -> str:
  """The processor's name."""
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  return platform.processor() or platform.machine()


if __name__ == "__main__":
  main()
