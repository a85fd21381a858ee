"""Pairs a second of a DPO step: this package, a plain JAX step, and TRL.

  python -m benchmarks.dpo_step --model=DIR --pairs=FILE --output=OUT.jsonl \
    --variant=pythia-14m --trl=1.16=PYTHON --trl=0.24=PYTHON

DIR is a model in Hugging Face form with its tokenizer, FILE a JSONL of pairs
(HH's own files do), PYTHON that of an environment with TRL. `--trl` may stand
several times, each with a label of its own; without it TRL is left out. What
`--only` names is measured, or with `--all` every layout of this package and the
plain step; by default the first layout and TRL.

TRL gets its best settings: before anything is compared, each TRL makes an
update with several (see dpo_step_trl), and the fastest is taken.

All contenders make the same updates of the same float32 LoRA adapters on the
same token ids, with the reference's log-probs computed beforehand (but for the
one that says otherwise). Each runs in a process of its own, one after the
other, and the whole sequence is repeated, so that a change of the machine's
speed meets all of them. Nothing is reported unless every loss at step 0 is ln 2
and all loss curves are the same.

`--output` is appended to, one JSON line a process: a long measurement can be
made in several calls, of which only the first searches, and `--summarise=FILE`
prints the table of all of them and draws it with `--figure=PNG`.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile

from benchmarks import dpo_step_figure

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Contenders in JAX, by the names of dpo_step_jax; the first is the default.
OURS = ("shared", "shared, reference computed", "packed", "padded")
PLAIN = "plain JAX, padded"
# Updates left out of the times: first ones compile, or warm caches up.
WARM = 2
# How far two loss curves may be apart. Both sides compute in float32; sums of
# 400 nats a response round at 3e-5, times beta, and updates carry it on.
TOLERANCE = 2e-4


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
  if flags.steps <= WARM:
    parser.error(f"--steps={flags.steps} must be more than {WARM}")
  with tempfile.TemporaryDirectory() as directory:
    measure(flags, pathlib.Path(directory))
  show(flags.output, flags.figure)


def show(path: pathlib.Path, figure: pathlib.Path | None) -> None:
  rows = read(path)
  print(table(rows))
  if figure:
    dpo_step_figure.draw(bars(rows), figure)


def measure(flags: argparse.Namespace, case: pathlib.Path) -> None:
  """Runs all contenders in turn, `rounds` times, and appends what they gave."""
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
  spawn([*mine, "--child=case"])
  ours = (*OURS, PLAIN) if flags.all else OURS[:1]
  ours = [name for name in flags.only if name in (*OURS, PLAIN)] or ours
  commands = {name: [*mine, f"--child={name}"] for name in ours}
  for text in flags.trl:
    label, python = text.split("=", 1)
    script = str(ROOT / "benchmarks" / "dpo_step_trl.py")
    common = [f"--case={case}", f"--threads={flags.threads}"]
    command = [python, script, *common]
    name = f"TRL {label}"
    if not flags.only or name in flags.only:
      commands[name] = [*command, *searched(flags, case, name, command)]
  counts = tokens(json.loads((case / "case.json").read_text()))
  for _ in range(flags.rounds):
    for name, command in commands.items():
      output = case / "output.json"
      peak = spawn([*command, f"--output={output}"])
      row = {
        "name": name,
        "model": pathlib.Path(flags.model).name,
        "batch_size": flags.batch_size,
        "peak_rss_bytes": peak,
        "tokens_a_pair": counts,
        "machine": f"{os.cpu_count()} x {processor()}",
        "settings": flags.set,
      }
      row |= json.loads(output.read_text())
      with flags.output.open("a") as file:
        file.write(json.dumps(row) + "\n")
      print(f"{name}: {speed(row):.2f} pairs/s", flush=True)


def searched(
  flags: argparse.Namespace, case: pathlib.Path, name: str, command: list[str]
) -> list[str]:
  """The flags of a TRL's fastest settings, looked for once a results file."""
  model = pathlib.Path(flags.model).name
  rows = read(flags.output) if flags.output.exists() else []
  found = [r for r in rows if (r["name"], r["model"]) == (name, model)]
  found = [r["tried"] for r in found if "tried" in r]
  if not found:
    output = case / "search.json"
    spawn([*command, f"--search={flags.sizes}", f"--output={output}"])
    row = {"name": name, "model": model} | json.loads(output.read_text())
    with flags.output.open("a") as file:
      file.write(json.dumps(row) + "\n")
    found = [row["tried"]]
  best = fastest(found[0])
  print(f"{name}: {best}", flush=True)
  taken = [f"--{key}={best[key]}" for key in ("micro_batch", "attention")]
  return taken + ["--padding_free"] * best["padding_free"]


def fastest(tried: list[dict]) -> dict:
  """The settings of the most pairs a second with the gradient of all."""
  able = [t for t in tried if t.get("same")]
  return max(able, key=lambda t: t["speed"])["settings"]


def spawn(command: list[str]) -> int:
  """Runs a child to its end and gives its peak memory in bytes."""
  environment = os.environ | {
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
  # Kilobytes on Linux, bytes on macOS.
  return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def read(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def speed(row: dict) -> float:
  """Pairs a second over the measured updates of one process."""
  seconds = row["seconds"][WARM:]
  return row["batch_size"] * len(seconds) / sum(seconds)


def check(rows: list[dict]) -> float:
  """The greatest distance of two loss curves.

  Raises:
    ValueError: a loss of step 0 is not ln 2, or curves differ.
  """
  for row in rows:
    if abs(row["losses"][0] - math.log(2)) > TOLERANCE:
      raise ValueError(f"{row['name']}: loss {row['losses'][0]} at step 0")
  far = 0.0
  for values in zip(*(row["losses"] for row in rows), strict=True):
    far = max(far, max(values) - min(values))
  if far > TOLERANCE:
    curves = "\n".join(f"{row['name']}: {row['losses']}" for row in rows)
    raise ValueError(f"loss curves differ by {far}:\n{curves}")
  return far


def table(rows: list[dict]) -> str:
  """Medians over processes of the same name, and ratios of medians."""
  models = list(dict.fromkeys(row["model"] for row in rows))
  return "\n\n".join(
    _table([row for row in rows if row["model"] == name]) for name in models
  )


def bars(rows: list[dict]) -> dict[str, dict[str, tuple[float, float]]]:
  """{model: {contender: (pairs a second, peak GiB)}}, medians of both."""
  found: dict[str, dict[str, tuple[float, float]]] = {}
  for name, group in grouped(rows):
    found.setdefault(group[0]["model"], {})[name] = (
      statistics.median(map(speed, group)),
      statistics.median(row["peak_rss_bytes"] for row in group) / 2**30,
    )
  return found


def grouped(rows: list[dict]) -> list[tuple[str, list[dict]]]:
  """Measured rows by contender and model, in the order they first came in."""
  groups = collections.defaultdict(list)
  for row in rows:
    if "seconds" in row:
      groups[row["model"], row["name"]].append(row)
  return [(name, group) for (_, name), group in groups.items()]


def _table(rows: list[dict]) -> str:
  searches = [row for row in rows if "tried" in row]
  rows = [row for row in rows if "seconds" in row]
  far = check(rows)
  groups = dict(grouped(rows))
  first = OURS[0] if OURS[0] in groups else next(iter(groups))
  middle = {
    name: statistics.median(map(speed, group)) for name, group in groups.items()
  }
  counts = rows[0]["tokens_a_pair"]
  lines = [
    f"{rows[0]['model']}: {len(rows[0]['losses'])} updates of"
    f" {rows[0]['batch_size']} pairs, of which the last"
    f" {len(rows[0]['losses']) - WARM} are timed; tokens a pair"
    f" {counts['shared']:.1f} ({counts['apart']:.1f} with two prompts),"
    f" completions {counts['completion']:.1f}; loss curves equal to {far:.1e};"
    f" {rows[0]['machine']}",
    "",
    f"| | pairs a second | {first} is so many times as fast | peak memory |"
    f" memory of {first} |",
    "|---|---|---|---|---|",
  ]
  peaks = {
    name: statistics.median(row["peak_rss_bytes"] for row in group)
    for name, group in groups.items()
  }
  for name, group in groups.items():
    speeds = [speed(row) for row in group]
    lines.append(
      f"| {name} | {middle[name]:.2f} [{min(speeds):.2f}, {max(speeds):.2f}]"
      f" | {middle[first] / middle[name]:.2f} | {peaks[name] / 2**30:.2f} GiB"
      f" | {peaks[first] / peaks[name]:.0%} |"
    )
  for row in searches:
    lines += ["", f"{row['name']} ({versions(row)}), pairs a second tried:"]
    lines += [f"- {_tried(one)}" for one in row["tried"]]
  return "\n".join(lines)


def versions(row: dict) -> str:
  return ", ".join(f"{name} {v}" for name, v in row["versions"].items())


def _tried(one: dict) -> str:
  settings = one["settings"]
  padding = "padding-free" if settings["padding_free"] else "padded"
  text = (
    f"micro-batches of {settings['micro_batch']}, {settings['attention']},"
    f" {padding}: "
  )
  if "refused" in one:
    return text + "refused: " + one["refused"].splitlines()[0]
  wrong = "" if one["same"] else ", with another gradient: not taken"
  return f"{text}{one['speed']:.2f}{wrong}"


if __name__ == "__main__":
  main()
