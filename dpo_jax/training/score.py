"""Log-probs and rewards of given pairs: python -m dpo_jax score.

One row comes out for each row that goes in, in the same order:

  id                    hash of the row's three texts
  prompt_token_count, chosen_token_count, rejected_token_count
  cut                   whether prompt or responses passed max_length
  chosen_logps, rejected_logps              sums, in nats
  chosen_token_logps, rejected_token_logps  one a response token and EOS
  chosen_reward, rejected_reward, margin    with a reference

A reward is beta * (log p under the model - log p under the reference). The
reference is --reference; with --adapter alone it is the model without the
adapter, as in training; with neither there are no rewards. Policy and reference
are in memory one after the other, never together.

Texts are tokenized and cut by one of the rules that training uses, with EOS
behind each response that is not cut. `--tokenization` names it, as
`data.tokenization` of
the run did: "paper", or "dpo-replication" for the LoRA recipes of
configs/dpo.py, whose
responses begin with another token.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np

from dpo_jax.core import console, redaction, sharding
from dpo_jax.core import settings as settings_lib
from dpo_jax.data import (
  batch_shapes,
  loader,
  packing,
  preferences,
  token_table,
  tokenization,
)
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.data.sources import files
from dpo_jax.io import atomic, remote
from dpo_jax.model import hf
from dpo_jax.training import reference as reference_lib

# Rows are a multiple of this many tokens, so that near lengths share a shape.
_ROW_MULTIPLE = 64

# Shapes that are compiled at most.
_SHAPES = 2

# How many bad lines an error lists.
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
  """What is scored, and by what.

  Attributes:
    model: directory or hub id of the policy.
    reference: directory or hub id of the reference, or "".
    adapter: directory or hub id of a PEFT adapter on `model`, or "".
    tokenizer: directory or hub id; "" takes the model's own.
    pairs: a .jsonl file of {"prompt", "chosen", "rejected"} or of HH's
      {"chosen", "rejected"} transcripts.
    output: the .jsonl file to write.
    beta: strength of the KL penalty in the rewards.
    tokenization: how texts become ids, and what is cut; see `tokenization`.
    max_length: tokens of a prompt with a response; 0 takes the model's own.
    max_prompt_length: tokens of a prompt that is cut; 0 takes half of it, or
      none under "trl".
    batch_size: pairs in one call.
    dtype: what weights are kept in and computed in.
    fsdp: devices over which weights are split by width.
    tensor: devices over which heads, MLP and vocabulary are split.
  """

  model: str
  reference: str
  adapter: str
  tokenizer: str
  pairs: str
  output: str
  beta: float
  tokenization: tokenization.Rules
  max_length: int
  max_prompt_length: int
  batch_size: int
  dtype: Literal["float32", "bfloat16"]
  fsdp: int
  tensor: int

  def __post_init__(self):
    settings_lib.check(self)


def run(settings: ScoreSettings) -> list[dict[str, Any]]:
  """Scores every pair, writes the output file, and returns its rows.

  Raises:
    ValueError: a line is no comparison (file and line are named), holds a
      special token, or a setting does not fit the model; all before weights
      are read.
  """
  remote.refuse_address("output", settings.output)
  output = pathlib.Path(settings.output)
  if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
    raise ValueError(f"output={output}: its directory cannot be written")
  if (
    output.is_dir()
    or output.resolve() == pathlib.Path(settings.pairs).resolve()
  ):
    raise ValueError(f"output={output} must be a file other than the pairs")
  tokenizer = tokenizer_lib.load(settings.tokenizer or settings.model)
  rows = read_pairs(settings.pairs, tokenizer)
  pairs, cut = _tokenized(settings, tokenizer, rows)
  mesh = sharding.make_mesh(-1, settings.fsdp, settings.tensor)
  policy, reference = _score_policy(settings, mesh, pairs)
  if settings.reference:
    config, base = _load(settings, settings.reference, mesh)
    reference = _token_logps(
      settings, mesh, config, base, None, pairs, "reference"
    )
  scored = [
    _row(settings, pair, bool(cut[i]), policy[i], reference and reference[i])
    for i, pair in enumerate(pairs)
  ]
  lines = (json.dumps(row, allow_nan=False) + "\n" for row in scored)
  atomic.write_text(output, "".join(lines))
  return scored


def read_pairs(
  path: str, tokenizer: tokenizer_lib.Tokenizer
) -> list[preferences.Comparison]:
  """The comparisons of a file, all of them.

  Raises:
    ValueError: lines that cannot be scored, each with file, number and cause.
  """
  rows, bad = [], []
  for where, raw in _lines(path):
    try:
      if isinstance(raw, ValueError):
        raise raw
      row = preferences.parse(raw)
      for name in ("prompt", "chosen", "rejected"):
        if special := tokenizer.special_in(getattr(row, name)):
          raise ValueError(f"{name} holds the special token {special!r}")
      rows.append(row)
    except ValueError as error:
      bad.append(f"\n  {where}: {error}")
  if bad:
    more = len(bad) - _LISTED
    listed = "".join(bad[:_LISTED]) + (f"\n  and {more} more" * (more > 0))
    raise ValueError(
      f"{len(bad)} lines cannot be scored; mend or remove them:{listed}"
    )
  if not rows:
    raise ValueError(f"pairs={path} holds no row")
  return rows


def _lines(path: str) -> Iterator[tuple[str, Any]]:
  """Where each row of a file stands, and the row or what is wrong with it."""
  try:
    local = remote.fetch_objects(path, ()) if remote.is_address(path) else path
    yield from files.rows(pathlib.Path(local), {})
  except OSError as error:
    raise ValueError(f"pairs={path} cannot be read: {error}") from error


def _tokenized(
  settings, tokenizer, rows
) -> tuple[token_table.Table, np.ndarray]:
  """A table of pairs in order, and which of them were cut, bool [N].

  Raises:
    ValueError: tokenizer or lengths do not fit the model or its reference, or
      a pair cannot be scored.
  """
  sizes = [hf.read_config(settings.model)]
  if settings.reference:
    sizes.append(hf.read_config(settings.reference))
    own = pathlib.Path(settings.reference, "tokenizer.json")
    if own.is_file() and tokenizer.backend.get_vocab() != (
      tokenizer_lib.load(own.parent).backend.get_vocab()
    ):
      raise ValueError(
        f"reference={settings.reference} has another tokenizer than the model;"
        " its log-probs cannot be compared"
      )
  room = min(config.max_positions for config in sizes)
  vocabulary = min(config.vocab_size for config in sizes)
  if tokenizer.vocab_size > vocabulary:
    raise ValueError(
      f"the tokenizer has {tokenizer.vocab_size} tokens, but the model or its"
      f" reference has vocab_size={vocabulary}; give the model's own tokenizer"
    )
  max_length = settings.max_length or room
  if max_length > room:
    raise ValueError(
      f"max_length={max_length} is more than the model's {room} positions"
    )
  half = 0 if settings.tokenization == "trl" else max_length // 2
  found = tokenization.tokenize(
    tokenizer,
    rows,
    rules=settings.tokenization,
    max_length=max_length,
    max_prompt_length=settings.max_prompt_length or half,
  )
  if len(found.table) < len(rows):
    kept = set(found.table.ids)
    lost = [row.id for row in rows if row.id not in kept]
    raise ValueError(
      f"pairs={settings.pairs}: {len(lost)} pairs cannot be scored"
      f" ({found.counts}), the first is {lost[0]}; mend or remove them"
    )
  return found.table, found.cut


def _load(settings: ScoreSettings, path: str, mesh: Any):
  return hf.load(
    path,
    dtype=settings.dtype,
    remat="none",
    lora=None,
    param_dtype=settings.dtype,
    mesh=mesh,
  )


def _score_policy(settings, mesh, pairs):
  """Token log-probs under the policy, and without its adapter if asked."""
  config, base = _load(settings, settings.model, mesh)
  score = functools.partial(_token_logps, settings, mesh)
  if not settings.adapter:
    return score(config, base, None, pairs, "model"), None
  lora_config, lora = hf.load_adapter(settings.adapter, config, base)
  lora = jax.device_put(lora, sharding.shardings(lora, mesh))
  adapted = dataclasses.replace(config, lora=lora_config)
  policy = score(adapted, base, lora, pairs, "model")
  if settings.reference:
    return policy, None
  return policy, score(config, base, None, pairs, "without adapter")


def _token_logps(
  settings, mesh, config, base, lora, pairs: token_table.Table, name
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Log-probs of the chosen and of the rejected tokens of every pair."""
  longest = packing.longest_segment(pairs, "shared")
  steps_ = loader.consecutive(len(pairs), settings.batch_size)
  layout = packing.Packing(
    layout="shared",
    row_length=-(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE,
    shards=sharding.data_shards(mesh),
    microbatches=1,
    loss_on_prompt=False,
    pad_id=0,
  )
  how = batch_shapes.choose(pairs, layout, steps_, _SHAPES)
  packed = loader.in_order(pairs, how, batch_size=settings.batch_size)
  bar = console.track(packed, len(steps_), name, "batch")
  logps = reference_lib.token_logps(config, base, lora, bar, mesh)
  ends = np.cumsum(pairs.lengths[:, 1:])
  responses = np.split(logps, ends[:-1])
  return list(zip(responses[::2], responses[1::2]))


def _row(settings, pair, cut, policy, reference) -> dict[str, Any]:
  row: dict[str, Any] = {
    "id": pair.id,
    "prompt_token_count": len(pair.prompt),
    "chosen_token_count": len(pair.chosen),
    "rejected_token_count": len(pair.rejected),
    "cut": cut,
  }
  sums = [_sum(logps) for logps in policy]
  row |= {"chosen_logps": sums[0], "rejected_logps": sums[1]}
  if reference is not None:
    rewards = [
      settings.beta * (logp - _sum(other))
      for logp, other in zip(sums, reference, strict=True)
    ]
    row |= {
      "chosen_reward": rewards[0],
      "rejected_reward": rewards[1],
      "margin": rewards[0] - rewards[1],
    }
  return row | {
    "chosen_token_logps": policy[0].tolist(),
    "rejected_token_logps": policy[1].tolist(),
  }


def _sum(logps: np.ndarray) -> float:
  return float(logps.sum(dtype=np.float64))


def parse(arguments: Sequence[str] | None = None) -> ScoreSettings:
  """The settings of a command line."""
  parser = argparse.ArgumentParser(
    prog="python -m dpo_jax score",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  text = functools.partial(parser.add_argument, type=str)
  number = functools.partial(parser.add_argument, type=int)
  text("--model", required=True, help="directory or hub id of the policy")
  text("--reference", default="", help="directory or hub id of the reference")
  text("--adapter", default="", help="PEFT adapter on the model")
  text("--tokenizer", default="", help="where it is, if not with the model")
  text("--pairs", required=True, help="the .jsonl file to score")
  text("--output", required=True, help="the .jsonl file to write")
  parser.add_argument(
    "--beta", type=float, default=0.1, help="of the rewards (default: 0.1)"
  )
  text(
    "--tokenization",
    default="paper",
    choices=get_args(tokenization.Rules),
    help="how texts become ids, as in training (default: paper)",
  )
  number("--max_length", default=0, help="default: the model's positions")
  number("--max_prompt_length", default=0, help="default: half of max_length")
  number("--batch_size", default=16, help="pairs in one call")
  text("--dtype", default="float32", choices=("float32", "bfloat16"))
  number("--fsdp", default=1, help="devices that split the width")
  number("--tensor", default=1, help="devices that split heads and vocabulary")
  console.add_flag(parser)
  return ScoreSettings(**vars(parser.parse_args(arguments)))


def main() -> int:
  redaction.install()
  try:
    settings = parse()
    rows = run(settings)
  except ValueError as error:
    console.error(str(error))
    return 2
  text = f"{len(rows)} rows in {settings.output}"
  console.result(text, path=settings.output, rows=len(rows))
  return 0


if __name__ == "__main__":
  sys.exit(main())
