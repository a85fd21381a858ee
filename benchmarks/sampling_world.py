"""A Pythia with random weights on both sides: transformers' and ours.

Both read one model directory and are asked for the same prompts by the same
parameters; no token ends an answer, so that all are as long as asked for.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers

from configs import models
from dpo_jax.data import sources
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.model import gpt_neox, hf
from dpo_jax.sampling import sampler

TOP_K, TOP_P = 50, 0.9
LONGEST_PROMPT = LONGEST_ANSWER = 128


class Endless:
  """A tokenizer in which no token ends an answer."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    self._tokenizer = tokenizer
    self.eos_id = 2**30

  def __getattr__(self, name):
    return getattr(self._tokenizer, name)


@dataclasses.dataclass(frozen=True)
class World:
  """One model on both sides, and the prompts."""

  network: Any
  config: gpt_neox.ModelConfig
  base: Any
  tokenizer: Any
  prompts: list[tuple[int, ...]]
  lengths: list[int]
  chunk: int
  span: int


def load(
  flags: argparse.Namespace, directory: pathlib.Path, count: int
) -> World:
  """Makes the weights and reads them on both sides, with so many prompts."""
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
  if len(kept) < count:
    raise ValueError(
      f"{flags.prompts} has {len(kept)} prompts of at most {LONGEST_PROMPT}"
      f" tokens; {count} are needed"
    )
  prompts, lengths = zip(*kept[:count], strict=True)
  network = network.eval()
  return World(
    network,
    config,
    base,
    Endless(words),
    list(prompts),
    list(lengths),
    32,
    flags.span,
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
) -> list[sampler.Request]:
  return [
    sampler.Request(
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
) -> list[sampler.Sample]:
  """Samples in the order of the requests, `rows` decoded at once."""
  engine = sampler.Engine(
    batch_size=rows,
    length_multiple=64,
    prefill_tokens=4096,
    chunk=world.chunk,
    span=world.span,
    cache="float32",
    cache_gib=4.0,
    seed=0,
  )
  tree, config = adapters or (None, world.config)
  found = {}
  for ended in sampler.generate(
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
