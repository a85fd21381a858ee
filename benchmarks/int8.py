"""What a frozen base in bfloat16 or int8 costs in quality, where we can tell.

  python -m benchmarks.int8 --demo=runs/demo --workdir=runs/int8
  python -m benchmarks.int8 --model=DIR --pairs=FILE

The first trains the demo's DPO run again for each `model.param_dtype` and seed,
all else alike, from the SFT model of a replication of configs/demo.py. Its
held-out pairs are scored by the exported models, its test prompts answered by
them once, and the answers given their true reward. Differences to float32 are
taken pair by pair and prompt by prompt, as means over the seeds, with
intervals over pairs or prompts. A run that is finished is not
repeated; with --limit=N only N more are made.

The second compares log-probs of the pairs' responses under the weights of any
model as they are and as the other two keep them. DIR is a model in Hugging Face
form with its tokenizer, FILE a JSONL of pairs.
"""

import argparse
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from configs import demo, sample
from dpo_jax.core import settings
from dpo_jax.data import tokenizer
from dpo_jax.demo import world
from dpo_jax.io import records
from dpo_jax.model import hf, quantization
from dpo_jax.sampling import generate, jobs
from dpo_jax.training import config, score
from dpo_jax.training import train as train_lib
from dpo_jax.winrates import intervals

KEPT = ("float32", "bfloat16", "int8")
TEMPERATURE = 0.75
# The most by which two of them can differ; a reward lies between -18 and 6.
BOUNDS = {"accuracy": 1.0, "true reward": 24.0}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--demo", type=pathlib.Path, help="a replication")
  parser.add_argument("--workdir", type=pathlib.Path)
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--limit", type=int, default=0, help="new runs; 0: all")
  parser.add_argument("--model")
  parser.add_argument("--pairs")
  flags = parser.parse_args()
  if flags.model and flags.pairs:
    return log_probs(flags.model, flags.pairs)
  if not (flags.demo and flags.workdir):
    parser.error("give --demo and --workdir, or --model and --pairs")
  flags.workdir.mkdir(parents=True, exist_ok=True)
  if train(flags):
    report(flags)


def filled(values, paths):
  """A demo's settings with its placeholders replaced."""
  text = json.dumps(values)
  for name, path in paths.items():
    text = text.replace("{" + name + "}", str(path))
  return json.loads(text)


def places(flags) -> dict[str, pathlib.Path]:
  there = flags.demo
  return {
    "world": there / "world",
    "tokenizer": there / "tokenizer",
    "workdir": there,
  }


def run_of(flags, kept: str, seed: int) -> pathlib.Path:
  return flags.workdir / f"{kept}-{seed}"


def train(flags) -> bool:
  """Makes the runs that are missing; False if some still are."""
  left = flags.limit or 3 * flags.seeds
  for seed in range(flags.seeds):
    for kept in KEPT:
      run = run_of(flags, kept, seed)
      if (run / "finished.json").exists():
        continue
      if not left:
        return False
      left -= 1
      c = demo.dpo()
      c.seed, c.model.param_dtype = seed, kept
      # int8 refuses "none"; the numbers are those of "none".
      c.model.remat = "save_projections"
      c.data.max_eval, c.eval_every = 0, 0
      c.checkpoint_every, c.export_adapters = 0, False
      values = filled(c.to_dict(), places(flags))
      train_lib.run(settings.build(config.TrainSettings, values), run)
  return True


def report(flags) -> None:
  """Prints the table of means, and that of differences to float32."""
  answered = answer(flags)
  found = {
    kept: {
      "as trained": as_trained(flags, kept),
      **as_exported(flags, kept),
      "true reward": answered[kept],
    }
    for kept in KEPT
  }
  print(f"as they are, means of {flags.seeds} seeds (and their range)")
  for kept in KEPT:
    rows = found[kept]
    for name, value in rows.pop("as trained").items():
      print(f"{kept}, {name}: {value}")
    for name, values in rows.items():
      each = values.mean(1)
      print(
        f"{kept}, {name}: {each.mean():.4f} ({each.min():.4f} to"
        f" {each.max():.4f})"
      )
  for kept in KEPT[1:]:
    for name, values in found[kept].items():
      gap = (values - found["float32"][name]).mean(0)
      low, high, how = interval(gap, name)
      print(
        f"{kept} less float32, {name}: {gap.mean():+.5f} [{low:+.5f},"
        f" {high:+.5f}] ({how}), {np.count_nonzero(gap)} of {len(gap)} differ"
      )


def interval(gap: np.ndarray, name: str) -> tuple[float, float, str]:
  """Ends and method of the 95% interval of a mean; few may differ from 0."""
  how = intervals.Settings()
  if name in BOUNDS:
    found = intervals.of_mean(gap, how, bound=BOUNDS[name])
  else:
    found = intervals.bca(gap, how)
  return found.low, found.high, found.method


def as_trained(flags, kept: str) -> dict[str, str]:
  """The last evaluation: adapters on the base that they were trained on."""
  rows = []
  for seed in range(flags.seeds):
    lines = (run_of(flags, kept, seed) / "metrics.jsonl").read_text()
    parsed = map(json.loads, lines.splitlines())
    rows.append([row for row in parsed if "eval_loss" in row][-1])
  names = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
  return {
    f"as trained, {name}": " ".join(f"{row[name]:.4f}" for row in rows)
    for name in names
  }


def as_exported(flags, kept: str) -> dict[str, np.ndarray]:
  """Loss, accuracy and margin of each held-out pair, [seeds, pairs].

  Policies are the exports, whose adapters are merged into the weights as they
  were read; the reference is the SFT model in float32 for all.
  """
  margins = []
  reference = str(flags.demo / "sft" / "export")
  pairs = str(flags.demo / "world" / "test.jsonl")
  for seed in range(flags.seeds):
    run = run_of(flags, kept, seed)
    how = scoring(run / "export", pairs, run / "scores.jsonl", reference, 128)
    margins.append([row["margin"] for row in score.run(how)])
  margin = np.asarray(margins)
  return {
    "loss": np.logaddexp(0, -margin),
    "accuracy": (margin > 0).astype(float),
    "margin": margin,
  }


def answer(flags) -> dict[str, np.ndarray]:
  """True reward of one answer of each export to each prompt, [seeds, n]."""
  c = demo.sampling()
  c.policies = {
    f"{kept}_{seed}": sample.policy(
      f"{kept}-{seed}",
      str(run_of(flags, kept, seed) / "export"),
      (TEMPERATURE,),
    )
    for kept in KEPT
    for seed in range(flags.seeds)
  }
  values = filled(c.to_dict(), places(flags))
  paths = generate.run(
    settings.build(jobs.SamplingSettings, values), flags.workdir
  )
  rewards = {}
  for path in paths:
    rows = records.read(path, records.Response)
    rewards[path.stem] = {
      row.prompt_id: world.reward(row.prompt, row.response) for row in rows
    }
  prompts = sorted(next(iter(rewards.values())))
  return {
    kept: np.asarray(
      [
        [rewards[f"{kept}-{seed}"][prompt] for prompt in prompts]
        for seed in range(flags.seeds)
      ]
    )
    for kept in KEPT
  }


def scoring(path, pairs, output, reference, length) -> argparse.Namespace:
  return score.parse(
    [
      f"--model={path}",
      f"--reference={reference}",
      f"--pairs={pairs}",
      f"--output={output}",
      f"--beta={demo.dpo().loss.beta}",
      f"--tokenization={demo.dpo().data.tokenization}",
      f"--max_length={length}",
      "--batch_size=32",
    ]
  )


def log_probs(path: str, pairs: str) -> None:
  """Prints how far log-probs in float32 are off with the weights as kept."""
  shape, base = hf.load(
    path, dtype="float32", remat="none", lora=None, param_dtype="float32"
  )
  words = tokenizer.load(path)
  length = min(512, shape.max_positions)
  rows = {}
  with tempfile.TemporaryDirectory() as directory:
    for kept in KEPT:
      here = pathlib.Path(directory, kept)
      hf.export(here, shape, as_kept(base, kept), words)
      rows[kept] = score.run(
        scoring(here, pairs, here.with_suffix(".jsonl"), "", length)
      )
  sides = ("chosen", "rejected")
  ((tokens, sums), *others) = (
    (
      np.concatenate([r[f"{s}_token_logps"] for r in of for s in sides]),
      np.array([[r[f"{s}_logps"] for s in sides] for r in of]),
    )
    for of in rows.values()
  )
  print(
    f"{len(sums)} pairs, {len(tokens)} response tokens; in float32 a token has"
    f" {-tokens.mean():.3f} nats, |chosen - rejected| is"
    f" {np.abs(sums[:, 0] - sums[:, 1]).mean():.2f} in the mean"
  )
  for kept, (other, other_sums) in zip(KEPT[1:], others, strict=True):
    off = np.abs(other - tokens)
    gap = np.abs(other_sums - sums)
    margin = (other_sums - sums) @ [1, -1]
    print(
      f"{kept}: a token's log-prob is off by {off.mean():.5f} in the mean,"
      f" {np.quantile(off, 0.99):.5f} at the 99th percentile, {off.max():.4f}"
      f" at most; their mean by {other.mean() - tokens.mean():+.6f}; a"
      f" response's by {gap.mean():.4f}; a pair's difference by"
      f" {np.abs(margin).mean():.4f} ({np.abs(margin).max():.3f} at most)"
    )


def as_kept(base, kept: str):
  """Weights in float32 after having been kept as `model.param_dtype` says."""
  if kept == "int8":
    base = quantization.restore(jax.jit(quantization.base)(base), jnp.float32)
  return jax.tree.map(
    lambda x: x.astype(kept if kept == "bfloat16" else x.dtype).astype(
      jnp.float32
    ),
    base,
  )


if __name__ == "__main__":
  main()
