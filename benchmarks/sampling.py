"""Tokens a second of the sampler, against transformers' generate and itself.

  python -m benchmarks.sampling --size=14m --tokenizer=DIR --prompts=FILE \
    [--rounds=3] [--new_tokens=128,256] [--only=even,uneven,grid] \
    [--grid_prompts=1,4] [--span=128]

DIR is a directory with Pythia's tokenizer.json, FILE rows of HH. Weights of the
size are random and saved as a model directory that both sides read; both are
float32, on as many threads as there are cores, top_k 50, top_p 0.9. Nothing is
measured unless both give the same greedy tokens.

All is in one process and in turn, as many rounds as told after one that
compiles and is not counted; what is printed are medians of seconds, and ratios
of them.

  even    16 prompts, all answers of one length (EOS ends none): one
          temperature, and four that share one reading of the prompts.
  uneven  48 prompts, answers as long as the chosen ones of the same rows (at
          most 128 tokens), 16 at a time; generate goes on until the longest of
          each batch has ended, as it does with EOS. Tokens counted are those
          asked for.
  grid    17 adapters x 2 temperatures of each prompt in one call, against one
          adapter at one temperature, and against all 34 one after another;
          for each number of prompts of --grid_prompts.
  chunks  the answers of `uneven` in 16 slots by the sampler alone, looking for
          ended ones every 8, 16, 32 or 64 steps at most.

--span is the setting of that name in configs/sample.py.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

# First: it says on which platform.
from benchmarks import sampling_world  # isort: skip

import jax
import torch
import transformers

from benchmarks import dpo_step
from dpo_jax.model import gpt_neox, lora

BATCH = 16
TEMPERATURES = (0.25, 0.5, 0.75, 1.0)
UNEVEN = 48
ADAPTERS, TWO = 17, (0.7, 1.0)
# New tokens of each of the grid's answers.
GRID_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed: a name, the tokens that it gives, and how."""

  name: str
  tokens: int
  call: Callable[[], int]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--size", default="14m")
  parser.add_argument("--tokenizer", required=True, type=pathlib.Path)
  parser.add_argument("--prompts", required=True)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--new_tokens", default="128,256")
  parser.add_argument("--only", default="even,uneven,grid")
  parser.add_argument("--grid_prompts", default="1,4")
  parser.add_argument("--span", type=int, default=128)
  flags = parser.parse_args()
  new_tokens = [int(text) for text in flags.new_tokens.split(",")]
  grid_prompts = [int(text) for text in flags.grid_prompts.split(",")]
  torch.set_num_threads(os.cpu_count() or 1)
  with tempfile.TemporaryDirectory() as directory:
    world = sampling_world.load(flags, pathlib.Path(directory), UNEVEN)
  sampling_world.check(world)
  print(
    f"pythia-{flags.size}, random weights, float32; medians of {flags.rounds}"
    f" rounds; {os.cpu_count()} x {dpo_step.processor()}; jax"
    f" {jax.__version__}, torch {torch.__version__}, transformers"
    f" {transformers.__version__}",
    flush=True,
  )
  for name in flags.only.split(","):
    counts = grid_prompts if name == "grid" else new_tokens
    for cases, base in GROUPS[name](world, counts):
      print("\n" + table(measure(cases, flags.rounds), base), flush=True)


def even(
  world: sampling_world.World, new_tokens
) -> Iterator[tuple[list[Case], str]]:
  places = range(BATCH)
  for new in new_tokens:
    lengths = [new] * BATCH
    one = sampling_world.ask(world, places, (0.7,), lengths)
    four = sampling_world.ask(world, places, TEMPERATURES, lengths)
    name = f"generate, 16 rows, {new} tokens"
    yield (
      [
        Case(
          name,
          BATCH * new,
          lambda new=new: sampling_world.theirs(world, places, new, 0.7),
        ),
        Case(
          f"sampler, 16 rows, {new} tokens",
          BATCH * new,
          lambda one=one: sampling_world.ours(world, None, one, BATCH),
        ),
        Case(
          f"sampler, 16 prompts at four temperatures, {new} tokens",
          4 * BATCH * new,
          lambda four=four: sampling_world.ours(world, None, four, 4 * BATCH),
        ),
      ],
      name,
    )


def uneven(
  world: sampling_world.World, new_tokens
) -> Iterator[tuple[list[Case], str]]:
  del new_tokens
  asked = sum(world.lengths)

  def batches() -> int:
    for at in range(0, UNEVEN, BATCH):
      places = range(at, at + BATCH)
      new = max(world.lengths[place] for place in places)
      sampling_world.theirs(world, places, new, 0.7)
    return asked

  one = sampling_world.ask(world, range(UNEVEN), (0.7,), world.lengths)
  four = sampling_world.ask(world, range(UNEVEN), TEMPERATURES, world.lengths)
  name = "generate, batches of 16, uneven lengths"
  yield (
    [
      Case(name, asked, batches),
      Case(
        "sampler, 16 slots, uneven lengths",
        asked,
        lambda: sampling_world.ours(world, None, one, BATCH),
      ),
      Case(
        "sampler, 64 slots, four temperatures, uneven lengths",
        4 * asked,
        lambda: sampling_world.ours(world, None, four, 4 * BATCH),
      ),
    ],
    name,
  )


def chunks(
  world: sampling_world.World, new_tokens
) -> Iterator[tuple[list[Case], str]]:
  del new_tokens
  requests = sampling_world.ask(world, range(UNEVEN), (0.7,), world.lengths)
  cases = []
  for chunk in (8, 16, 32, 64):
    own = dataclasses.replace(world, chunk=chunk)
    name = f"a look every {chunk} steps"
    cases.append(
      Case(
        name,
        sum(world.lengths),
        lambda own=own: sampling_world.ours(own, None, requests, BATCH),
      )
    )
  yield cases, cases[2].name


def grid(
  world: sampling_world.World, counts
) -> Iterator[tuple[list[Case], str]]:
  config = dataclasses.replace(
    world.config, lora=gpt_neox.LoraConfig(16, 32.0, 0.0, gpt_neox.TARGETS)
  )
  own = [adapter(config, seed) for seed in range(ADAPTERS)]
  stack = (lora.stack(config, own), config)
  for prompts in counts:
    places, lengths = range(prompts), [GRID_TOKENS] * prompts
    everything = sampling_world.ask(
      world, places, TWO, lengths, range(ADAPTERS)
    )
    one = sampling_world.ask(world, places, TWO[:1], lengths)

    def alone(one=one, prompts=prompts) -> int:
      return sampling_world.ours(world, (own[0], config), one, prompts)

    def in_turn(places=places, lengths=lengths, prompts=prompts) -> int:
      return sum(
        sampling_world.ours(
          world,
          (own[place], config),
          sampling_world.ask(world, places, (temperature,), lengths),
          prompts,
        )
        for place in range(ADAPTERS)
        for temperature in TWO
      )

    tokens = prompts * GRID_TOKENS
    many = ADAPTERS * len(TWO)
    name = f"one adapter at one temperature, {prompts} prompts"
    yield (
      [
        Case(name, tokens, alone),
        Case(
          f"17 adapters x 2 temperatures, {prompts} prompts",
          many * tokens,
          lambda e=everything: sampling_world.ours(world, stack, e, len(e)),
        ),
        Case(
          f"the same, one after another, {prompts} prompts",
          many * tokens,
          in_turn,
        ),
      ],
      name,
    )


def adapter(config: gpt_neox.ModelConfig, seed: int) -> Any:
  """Adapters that change answers: those of `init_lora` have B = 0."""
  key = jax.random.key(seed)
  return jax.tree.map(
    lambda leaf: 0.02 * jax.random.normal(key, leaf.shape),
    gpt_neox.init_lora(config, key),
  )


GROUPS = {"even": even, "uneven": uneven, "grid": grid, "chunks": chunks}


def measure(cases: list[Case], rounds: int) -> dict[Case, list[float]]:
  """Seconds of each case, in turn; the first round is not counted."""
  seconds = collections.defaultdict(list)
  for number in range(rounds + 1):
    for case in cases:
      started = time.perf_counter()
      tokens = case.call()
      taken = time.perf_counter() - started
      if tokens != case.tokens:
        raise ValueError(f"{case.name}: {tokens} tokens, not {case.tokens}")
      if number:
        seconds[case].append(taken)
  return seconds


def table(seconds: dict[Case, list[float]], base: str) -> str:
  """Medians, and how many times the tokens a second and seconds of `base`."""
  middle = {case: statistics.median(own) for case, own in seconds.items()}
  (first,) = (case for case in middle if case.name == base)
  lines = [
    "| | seconds | tokens a second | x tokens a second | x seconds |",
    "|---|---|---|---|---|",
  ]
  for case, own in seconds.items():
    speed = case.tokens / middle[case]
    lines.append(
      f"| {case.name} | {middle[case]:.2f} [{min(own):.2f}, {max(own):.2f}]"
      f" | {speed:.0f} | {speed / (first.tokens / middle[first]):.2f}"
      f" | {middle[case] / middle[first]:.2f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main()
