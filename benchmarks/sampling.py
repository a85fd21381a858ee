"""Tokens a second of the sampler, against transformers' generate and itself.

  python -m benchmarks.sampling --size=14m --tokenizer=DIR --prompts=FILE \
    [--rounds=3] [--new_tokens=128,256] [--only=even,uneven,grid] \
    [--grid_prompts=1,4]

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
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import torch
import transformers

from benchmarks import dpo_step
from configs import models
from dpo_jax import hf, lora, model, sampling, sources
from dpo_jax import tokenizer as tokenizer_lib

BATCH, TOP_K, TOP_P = 16, 50, 0.9
TEMPERATURES = (0.25, 0.5, 0.75, 1.0)
LONGEST_PROMPT = LONGEST_ANSWER = 128
UNEVEN = 48
ADAPTERS, TWO = 17, (0.7, 1.0)
# New tokens of each of the grid's answers.
GRID_TOKENS = 64


class Endless:
  """A tokenizer in which no token ends an answer."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    self._tokenizer = tokenizer
    self.eos_id = 2**30

  def __getattr__(self, name):
    return getattr(self._tokenizer, name)


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed: a name, the tokens that it gives, and how."""

  name: str
  tokens: int
  call: Callable[[], int]


@dataclasses.dataclass(frozen=True)
class World:
  """One model on both sides, and the prompts."""

  network: Any
  config: model.ModelConfig
  base: Any
  tokenizer: Any
  prompts: list[tuple[int, ...]]
  lengths: list[int]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--size", default="14m")
  parser.add_argument("--tokenizer", required=True, type=pathlib.Path)
  parser.add_argument("--prompts", required=True)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--new_tokens", default="128,256")
  parser.add_argument("--only", default=",".join(GROUPS))
  parser.add_argument("--grid_prompts", default="1,4")
  flags = parser.parse_args()
  new_tokens = [int(text) for text in flags.new_tokens.split(",")]
  grid_prompts = [int(text) for text in flags.grid_prompts.split(",")]
  torch.set_num_threads(os.cpu_count() or 1)
  with tempfile.TemporaryDirectory() as directory:
    world = load(flags, pathlib.Path(directory))
  check(world)
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


def load(flags: argparse.Namespace, directory: pathlib.Path) -> World:
  """Makes the weights and reads them on both sides."""
  shape = models.pythia(flags.size)
  torch.manual_seed(0)
  network = transformers.GPTNeoXForCausalLM(
    transformers.GPTNeoXConfig(
      vocab_size=shape.vocab_size,
      hidden_size=shape.width,
      num_hidden_layers=shape.layers,
      num_attention_heads=shape.heads,
      intermediate_size=shape.mlp_width,
      rotary_pct=shape.rotary_fraction,
      max_position_embeddings=shape.max_positions,
      bos_token_id=0,
      eos_token_id=0,
    )
  )
  network.save_pretrained(directory)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(flags.tokenizer / name, directory)
  config, base = hf.load(
    directory,
    dtype="float32",
    remat="none",
    lora=None,
    param_dtype="float32",
  )
  words = tokenizer_lib.load(directory)
  rows = list(
    {r.prompt: r for r in sources.read_file(flags.prompts).rows}.values()
  )
  prompts = words.encode_all([row.prompt for row in rows])
  chosen = words.encode_all([row.chosen for row in rows])
  kept = [
    (tuple(prompt), min(len(answer), LONGEST_ANSWER))
    for prompt, answer in zip(prompts, chosen, strict=True)
    if len(prompt) <= LONGEST_PROMPT
  ]
  if len(kept) < UNEVEN:
    raise ValueError(
      f"{flags.prompts} has {len(kept)} prompts of at most {LONGEST_PROMPT}"
      f" tokens; {UNEVEN} are needed"
    )
  prompts, lengths = zip(*kept[:UNEVEN], strict=True)
  network = network.eval()
  return World(
    network, config, base, Endless(words), list(prompts), list(lengths)
  )


def check(world: World) -> None:
  """Both sides give the same greedy tokens, or nothing is measured."""
  requests = ask(world, range(4), (0.0,), [16] * 4)
  ours = [list(sample.tokens) for sample in answered(world, None, requests, 4)]
  theirs = [
    generate(world, [place], new=16, do_sample=False)[0].tolist()
    for place in range(4)
  ]
  if ours != theirs:
    raise ValueError(f"greedy tokens differ:\n{ours}\n{theirs}")


def generate(world: World, places, new: int, **settings) -> torch.Tensor:
  """New tokens of transformers' generate, [B, new], padded on the left."""
  prompts = [world.prompts[place] for place in places]
  longest = max(map(len, prompts))
  ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
  mask = torch.tensor(
    [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
  )
  with torch.inference_mode():
    out = world.network.generate(
      ids,
      attention_mask=mask,
      max_new_tokens=new,
      min_new_tokens=new,
      pad_token_id=0,
      **settings,
    )
  return out[:, longest:]


def theirs(world: World, places, new: int, temperature: float) -> int:
  """Tokens that generate gave."""
  return generate(
    world,
    places,
    new,
    do_sample=True,
    temperature=temperature,
    top_k=TOP_K,
    top_p=TOP_P,
  ).numel()


def ask(
  world: World, places, temperatures, lengths, adapters=(-1,)
) -> list[sampling.Request]:
  return [
    sampling.Request(
      prompt=world.prompts[place],
      stream=place,
      sample_id=0,
      temperature=temperature,
      top_k=TOP_K,
      top_p=TOP_P,
      max_new_tokens=length,
      adapter=adapter,
    )
    for place, length in zip(places, lengths, strict=True)
    for adapter in adapters
    for temperature in temperatures
  ]


def answered(
  world: World, adapters, requests, rows: int
) -> list[sampling.Sample]:
  """Samples in the order of the requests, `rows` decoded at once."""
  engine = sampling.Engine(
    batch_size=rows,
    length_multiple=64,
    prefill_tokens=4096,
    chunk=32,
    span=128,
    cache="float32",
    cache_gib=4.0,
    seed=0,
  )
  tree, config = adapters or (None, world.config)
  found = {}
  for ended in sampling.generate(
    config, world.base, tree, world.tokenizer, requests, engine
  ):
    found.update(ended)
  return [found[index] for index in range(len(requests))]


def ours(world: World, adapters, requests, rows: int) -> int:
  """Tokens that the sampler gave: all that were asked for."""
  samples = answered(world, adapters, requests, rows)
  for request, sample in zip(requests, samples, strict=True):
    if len(sample.tokens) != request.max_new_tokens:
      raise ValueError(f"an answer ended by itself: {sample}")
  return sum(len(sample.tokens) for sample in samples)


def even(world: World, new_tokens) -> Iterator[tuple[list[Case], str]]:
  places = range(BATCH)
  for new in new_tokens:
    lengths = [new] * BATCH
    one = ask(world, places, (0.7,), lengths)
    four = ask(world, places, TEMPERATURES, lengths)
    name = f"generate, 16 rows, {new} tokens"
    yield (
      [
        Case(
          name,
          BATCH * new,
          lambda new=new: theirs(world, places, new, 0.7),
        ),
        Case(
          f"sampler, 16 rows, {new} tokens",
          BATCH * new,
          lambda one=one: ours(world, None, one, BATCH),
        ),
        Case(
          f"sampler, 16 prompts at four temperatures, {new} tokens",
          4 * BATCH * new,
          lambda four=four: ours(world, None, four, 4 * BATCH),
        ),
      ],
      name,
    )


def uneven(world: World, new_tokens) -> Iterator[tuple[list[Case], str]]:
  del new_tokens
  asked = sum(world.lengths)

  def batches() -> int:
    for at in range(0, UNEVEN, BATCH):
      places = range(at, at + BATCH)
      new = max(world.lengths[place] for place in places)
      theirs(world, places, new, 0.7)
    return asked

  one = ask(world, range(UNEVEN), (0.7,), world.lengths)
  four = ask(world, range(UNEVEN), TEMPERATURES, world.lengths)
  name = "generate, batches of 16, uneven lengths"
  yield (
    [
      Case(name, asked, batches),
      Case(
        "sampler, 16 slots, uneven lengths",
        asked,
        lambda: ours(world, None, one, BATCH),
      ),
      Case(
        "sampler, 64 slots, four temperatures, uneven lengths",
        4 * asked,
        lambda: ours(world, None, four, 4 * BATCH),
      ),
    ],
    name,
  )


def grid(world: World, counts) -> Iterator[tuple[list[Case], str]]:
  config = dataclasses.replace(
    world.config, lora=model.LoraConfig(16, 32.0, 0.0, model.TARGETS)
  )
  own = [adapter(config, seed) for seed in range(ADAPTERS)]
  stack = (lora.stack(config, own), config)
  for prompts in counts:
    places, lengths = range(prompts), [GRID_TOKENS] * prompts
    everything = ask(world, places, TWO, lengths, range(ADAPTERS))
    one = ask(world, places, TWO[:1], lengths)

    def alone(one=one, prompts=prompts) -> int:
      return ours(world, (own[0], config), one, prompts)

    def in_turn(places=places, lengths=lengths, prompts=prompts) -> int:
      return sum(
        ours(
          world,
          (own[place], config),
          ask(world, places, (temperature,), lengths),
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
          lambda e=everything: ours(world, stack, e, len(e)),
        ),
        Case(
          f"the same, one after another, {prompts} prompts",
          many * tokens,
          in_turn,
        ),
      ],
      name,
    )


def adapter(config: model.ModelConfig, seed: int) -> Any:
  """Adapters that change answers: those of `init_lora` have B = 0."""
  key = jax.random.key(seed)
  return jax.tree.map(
    lambda leaf: 0.02 * jax.random.normal(key, leaf.shape),
    model.init_lora(config, key),
  )


GROUPS = {"even": even, "uneven": uneven, "grid": grid}


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
