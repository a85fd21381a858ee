"""DPO with LoRA and sampling on one accelerator, against what it can do.

  python -m benchmarks.gpu --output=gpu.json
  python -m benchmarks.gpu --size=tiny --output=tiny.json

The second is a check of this script on any machine. Nothing is downloaded, see
gpu_case.py. What is measured, one after the other, each in a process of its own
that gives the device's memory back:

- the rate of a dense bfloat16 matrix product and of copying memory, the best of
  several: the peaks that the rest is compared with;
- updates of configs/dpo.py's LoRA recipe with the reference's log-probs kept,
  through the product's own step, packing and feed, for each of --attention in
  turn: pairs and tokens a second, and MFU: useful flops of unpadded tokens over
  the measured rate. The first loss must be ln 2;
- answers of 256 tokens to real prompt lengths through the product's own
  sampler: tokens a second, against the time to read all weights but the
  embedding and every row's keys and values once a step at the measured rate;
- with --trl=PYTHON, the same updates by TRL in that Python (that of an
  environment with trl, peft and a GPU build of torch): each of --trl_settings
  is tried for two updates, and the quickest makes all of them;
- with --torch=PYTHON, the same answers by transformers' generate, with either
  cache, and by vLLM if that Python has it.

What is refused or fails is reported in its place, with the last line that it
wrote, and the rest goes on. Every ratio is of numbers of this one run.

--profile=DIR also writes traces of our updates and of a wave of answers.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks import gpu_answers, gpu_case, gpu_step
from configs import models

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Padded or not, and in micro-batches that may or may not fit.
TRL_SETTINGS = ";".join(
  f"--micro_batch={size}{rest}"
  for rest in (
    " --attention=flash_attention_2 --padding_free",
    " --attention=sdpa --padding_free",
    " --attention=sdpa",
  )
  for size in (4, 8, 16)
)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument(
    "--size", default="2.8b", choices=["tiny", *models.PYTHIA]
  )
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--microbatches", type=int, default=4)
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--rows", type=int, default=128, help="answers at once")
  parser.add_argument("--new_tokens", type=int, default=256)
  parser.add_argument("--attention", default="dense,blocks,flash,cudnn")
  parser.add_argument("--set", default="{}", help="settings, as JSON")
  parser.add_argument("--trl", default="")
  parser.add_argument("--trl_settings", default=TRL_SETTINGS)
  parser.add_argument("--torch", default="")
  parser.add_argument("--others_device", default="gpu", choices=("cpu", "gpu"))
  parser.add_argument("--profile", type=pathlib.Path)
  parser.add_argument(
    "--limit_s", type=float, default=1800, help="of each part"
  )
  # Of the processes that it starts.
  parser.add_argument("--part", default="", choices=["", *PARTS])
  parser.add_argument("--case", type=pathlib.Path)
  flags = parser.parse_args()
  if flags.steps <= gpu_step.WARM:
    parser.error(f"--steps={flags.steps} must be more than {gpu_step.WARM}")
  if flags.part:
    found = PARTS[flags.part](flags) or {}
    flags.output.write_text(json.dumps(found) + "\n")
    return 0
  found = measure(flags)
  flags.output.write_text(json.dumps(found, indent=2) + "\n")
  print(json.dumps(found, indent=2))
  ours = [found["answers"], *found["updates"].values()]
  return 0 if any("refused" not in one for one in ours) else 1


def measure(flags: argparse.Namespace) -> dict:
  """All parts, and what they are to each other."""
  found = {"flags": {key: str(value) for key, value in vars(flags).items()}}
  with tempfile.TemporaryDirectory() as directory:
    case = pathlib.Path(directory)
    found["peaks"] = part(flags, case, "peaks")
    found["updates"] = {
      name: part(flags, case, "updates", f"--attention={name}")
      for name in flags.attention.split(",")
    }
    found["answers"] = part(flags, case, "answers")
    if flags.trl or flags.torch:
      found["case"] = part(flags, case, "case")
    if flags.trl:
      found["trl"] = trl(flags, case)
    if flags.torch:
      found["others"] = others(flags, case)
  found["ratios"] = ratios(found)
  return found


def part(
  flags: argparse.Namespace, case: pathlib.Path, name: str, *more: str
) -> dict:
  """One of `PARTS`, with the flags of this process, in a process of its own."""
  command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
  return child(flags, case, [*command, f"--part={name}", *more])


def child(
  flags: argparse.Namespace, case: pathlib.Path, command: list[str]
) -> dict:
  """What a process wrote, or {"refused": its last words}."""
  output = case / "part.json"
  output.unlink(missing_ok=True)
  command = [*command, f"--case={case}", f"--output={output}"]
  try:
    subprocess.run(
      command,
      cwd=ROOT,
      check=True,
      timeout=flags.limit_s,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
  except subprocess.TimeoutExpired:
    return {"refused": f"took more than {flags.limit_s} s"}
  except subprocess.CalledProcessError as error:
    lines = [x for x in error.stderr.splitlines() if x.strip()] or [str(error)]
    print(error.stderr[-4000:], file=sys.stderr)
    return {"refused": lines[-1][:300]}
  return json.loads(output.read_text())


def trl(flags: argparse.Namespace, case: pathlib.Path) -> dict:
  """The same updates by TRL, at the settings that made the first quickest."""
  command = [
    *shlex.split(flags.trl),
    str(ROOT / "benchmarks" / "dpo_step_trl.py"),
    f"--threads={os.cpu_count()}",
    f"--device={flags.others_device}",
  ]
  tried, best = {}, ""
  for text in flags.trl_settings.split(";"):
    tried[text] = child(flags, case, [*command, *shlex.split(text), "--search"])
    took = {k: v["seconds"][-1] for k, v in tried.items() if "seconds" in v}
    best = min(took, key=took.__getitem__, default="")
  if not best:
    return {"refused": "all settings were", "tried": tried}
  found = child(flags, case, [*command, *shlex.split(best)])
  if "seconds" in found:
    took = found["seconds"][gpu_step.WARM :]
    found["pairs_per_second"] = flags.batch_size * len(took) / sum(took)
  return found | {"settings": best, "tried": tried}


def others(flags: argparse.Namespace, case: pathlib.Path) -> dict:
  """The same answers by what is not ours."""
  command = [
    *shlex.split(flags.torch),
    str(ROOT / "benchmarks" / "gpu_torch.py"),
    f"--device={flags.others_device}",
  ]
  ways = {
    "generate": ["--engine=generate", "--cache=dynamic"],
    "generate, static cache": ["--engine=generate", "--cache=static"],
    "vllm": ["--engine=vllm"],
  }
  return {
    name: child(flags, case, [*command, *more]) for name, more in ways.items()
  }


def ratios(found: dict) -> dict[str, float]:
  """MFU, the share of the floor, and ours over others', of what was measured.

  A ratio that lacks one of its two is left out.
  """
  peaks, answers = found["peaks"], found["answers"]
  ours = {k: v for k, v in found["updates"].items() if "refused" not in v}
  made = {}
  if "matmul_flops" in peaks:
    for name, one in ours.items():
      rate = one["useful_flops_per_second"]
      made[f"mfu, {name}"] = rate / peaks["matmul_flops"]
  if "copy_bytes" in peaks and "floor_bytes" in answers:
    floor = answers["floor_bytes"] / peaks["copy_bytes"]
    made["share of the floor"] = floor / answers["median_seconds"]
  best = max((one["pairs_per_second"] for one in ours.values()), default=0)
  speed = found.get("trl", {}).get("pairs_per_second")
  if best and speed:
    made["updates, ours over trl"] = best / speed
  for name, one in found.get("others", {}).items():
    if "tokens_per_second" in one and "tokens_per_second" in answers:
      made[f"answers, ours over {name}"] = (
        answers["tokens_per_second"] / one["tokens_per_second"]
      )
  return made


def peaks(flags: argparse.Namespace) -> dict:
  """What the device is, and the rates that the rest is compared with."""
  small = flags.size == "tiny"
  return {
    "device": jax.devices()[0].device_kind,
    "versions": {
      name: importlib.metadata.version(name) for name in ("jax", "jaxlib")
    },
    "matmul_flops": matmul_rate(512 if small else 8192),
    "copy_bytes": copy_rate(2**20 if small else 2**31),
  }


def best(run, repeats: int = 5) -> float:
  """The least seconds of one call, the first left out."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - started)
  return min(times)


def matmul_rate(size: int) -> float:
  """Flops a second of [size, size] products in bfloat16, ten in one call."""
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

  @jax.jit
  def many(x):
    return jax.lax.fori_loop(0, 10, lambda _, y: (x @ y) * 0.01, x)

  return 10 * 2 * size**3 / best(lambda: many(x))


def copy_rate(size: int) -> float:
  """Bytes a second, read and written, of copying `size` bytes."""
  x = jnp.zeros((size // 2,), jnp.bfloat16)
  copy = jax.jit(lambda x: x + 1)
  return 2 * size / best(lambda: copy(x))


# Each in a process of its own.
PARTS = {
  "peaks": peaks,
  "updates": gpu_step.measure,
  "answers": gpu_answers.measure,
  "case": gpu_case.write,
}


if __name__ == "__main__":
  sys.exit(main())
