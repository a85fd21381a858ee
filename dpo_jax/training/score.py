"""Log-probs and rewards of given pairs: python -m dpo_jax score.

One output row for each input row, in the same order:

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

Texts are tokenized as in training, with EOS after each response that is not
cut. --tokenization is the run's `data.tokenization`: "paper", or
"dpo-replication" for the LoRA recipes of configs/dpo.py.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, get_args

import jax
import numpy as np

from dpo_jax.cli import flags
from dpo_jax.core import console, redaction, sharding
from dpo_jax.core import settings as settings_lib
from dpo_jax.data import packing, sources, token_table, tokenization
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.io import atomic, remote
from dpo_jax.model import hf
from dpo_jax.training import reference as reference_lib

# Row lengths are multiples of this, so that similar lengths share a shape.
_ROW_MULTIPLE = 64


def run(settings: argparse.Namespace) -> list[dict[str, Any]]:
  """Scores every pair, writes the output file, and returns its rows.

  `settings` are those of `parse`.

  Raises:
    ValueError: a row cannot be scored, or a setting does not fit the model; all
      before weights are read.
  """
  settings_lib.check(settings)
  remote.refuse_address("output", settings.output)
  output = pathlib.Path(settings.output)
  if not os.access(output.parent, os.W_OK) or output.is_dir():
    raise ValueError(f"output={output} cannot be written: name another file")
  if output.resolve() == pathlib.Path(settings.pairs).resolve():
    raise ValueError(f"output={output} must be a file other than the pairs")
  tokenizer = tokenizer_lib.load(settings.tokenizer or settings.model)
  pairs, cut = _tokenized(settings, tokenizer)
  mesh = sharding.make_mesh(-1, settings.fsdp, settings.tensor)
  policy, reference = _token_logps(settings, mesh, pairs)
  scored = [
    _row(settings.beta, pair, bool(cut[i]), policy[i], reference[i])
    for i, pair in enumerate(pairs)
  ]
  lines = (json.dumps(row, allow_nan=False) + "\n" for row in scored)
  atomic.write_text(output, "".join(lines))
  return scored


def _tokenized(
  settings: argparse.Namespace, tokenizer: tokenizer_lib.Tokenizer
) -> tuple[token_table.Table, np.ndarray]:
  """A table of the pairs in order, and which of them were cut, bool [N].

  Raises:
    ValueError: tokenizer or lengths do not fit the model or its reference, or
      a row cannot be scored.
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
  loaded = sources.read_file(settings.pairs)
  found = tokenization.tokenize(
    tokenizer,
    loaded.rows,
    rules=settings.tokenization,
    max_length=max_length,
    max_prompt_length=settings.max_prompt_length or half,
  )
  kept = set(found.table.ids)
  lost = [row.id for row in loaded.rows if row.id not in kept]
  if len(found.table) < loaded.counts["read"]:
    raise ValueError(
      f"pairs={settings.pairs}: rows cannot be scored, fix or remove them:"
      f" {loaded.counts}, {found.counts}; ids {lost[:20]}"
    )
  return found.table, found.cut


def _token_logps(settings, mesh, pairs: token_table.Table):
  """Token log-probs of chosen and rejected under policy and reference.

  Two lists with an entry for each pair: (chosen, rejected); the second list has
  None without a reference.
  """
  longest = packing.longest_segment(pairs, "shared")
  layout = packing.Packing(
    layout="shared",
    row_length=-(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE,
    shards=sharding.data_shards(mesh),
    microbatches=1,
    loss_on_prompt=False,
    pad_id=0,
  )

  def load(path):
    return hf.load(
      path,
      dtype=settings.dtype,
      remat="none",
      lora=None,
      param_dtype=settings.dtype,
      mesh=mesh,
    )

  def score(config, base, lora, name, path):
    logps = reference_lib.token_logps(
      config, base, lora, pairs, layout, settings.batch_size, mesh, name
    )
    ends = np.cumsum(pairs.lengths[:, 1:])
    if (bad := np.flatnonzero(~np.isfinite(logps))).size:
      # By its weights, which are finite, or `hf.load` had refused them.
      pair = pairs.ids[np.searchsorted(ends, bad[0], "right") // 2]
      raise ValueError(
        f"{path}: log-probs of {bad.size} tokens are not finite, the first in"
        f" pair {pair}: its weights are too large for dtype={settings.dtype!r}"
      )
    responses = np.split(logps, ends[:-1])
    return list(zip(responses[::2], responses[1::2]))

  config, base = load(settings.model)
  without: list[Any] = [None] * len(pairs)
  if settings.adapter:
    lora_config, lora = hf.load_adapter(settings.adapter, config, base)
    lora = jax.device_put(lora, sharding.shardings(lora, mesh))
    adapted = dataclasses.replace(config, lora=lora_config)
    policy = score(adapted, base, lora, "model", settings.adapter)
    if not settings.reference:
      without = score(config, base, None, "without adapter", settings.model)
  else:
    policy = score(config, base, None, "model", settings.model)
  if settings.reference:
    del base
    path = settings.reference
    without = score(*load(path), None, "reference", path)
  return policy, without


def _row(beta, pair, cut, policy, reference) -> dict[str, Any]:
  chosen, rejected = sums = [_sum(logps) for logps in policy]
  row: dict[str, Any] = {
    "id": pair.id,
    "prompt_token_count": len(pair.prompt),
    "chosen_token_count": len(pair.chosen),
    "rejected_token_count": len(pair.rejected),
    "cut": cut,
    "chosen_logps": chosen,
    "rejected_logps": rejected,
  }
  if reference is not None:
    good, bad = (beta * (x - _sum(y)) for x, y in zip(sums, reference))
    row |= {"chosen_reward": good, "rejected_reward": bad, "margin": good - bad}
  return row | {
    "chosen_token_logps": policy[0].tolist(),
    "rejected_token_logps": policy[1].tolist(),
  }


def _sum(logps: np.ndarray) -> float:
  return float(logps.sum(dtype=np.float64))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
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
  text("--adapter", default="", help="PEFT adapter on the model, likewise")
  text("--tokenizer", default="", help="likewise (default: the model's own)")
  text("--pairs", required=True, help="the .jsonl file of pairs or transcripts")
  text("--output", required=True, help="the .jsonl file to write")
  parser.add_argument(
    "--beta", type=float, default=0.1, help="of the rewards (default: 0.1)"
  )
  text(
    "--tokenization",
    default="paper",
    choices=get_args(tokenization.Rules),
    help="data.tokenization of the training run (default: paper)",
  )
  number("--max_length", default=0, help="default: the model's positions")
  number("--max_prompt_length", default=0, help="default: half of max_length")
  number("--batch_size", default=16, help="pairs in one call")
  text("--dtype", default="float32", choices=("float32", "bfloat16"))
  number("--fsdp", default=1, help="devices that split the width")
  number("--tensor", default=1, help="devices that split heads and vocabulary")
  console.add_flag(parser)
  return parser.parse_args(arguments)


def main() -> int:
  redaction.install()

  def call():
    settings = parse()
    rows = run(settings)
    text = f"{len(rows)} rows in {settings.output}"
    console.result(text, path=settings.output, rows=len(rows))
    return 0

  return flags.checked(call)


if __name__ == "__main__":
  sys.exit(main())
