"""Report on a training run's data: python -m dpo_jax inspect_data --config=...

Reads and tokenizes the data of a training config as the run would, and prints
rows by reason of rejection, lengths, truncation, the fill of rows, and a few
items as the model sees them:

  python -m dpo_jax inspect_data --config=configs/dpo.py:pythia-2.8b

No model is read and nothing is compiled. In the items, tags around the text
name the part: [prompt], and with a loss [chosen] or [rejected].
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import flags
from dpo_jax.core import console, settings, sharding
from dpo_jax.data import batch, dataset, token_table
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.training import config as config_lib
from dpo_jax.training import input_pipeline

_PERCENTILES = (5, 50, 90, 95, 99, 100)
# Steps that are packed to measure the fill.
_STEPS = 256


def run(config: config_lib.TrainSettings, rows: int) -> str:
  """The report, with so many items as `rows`.

  Raises:
    ValueError: as in `input_pipeline.make`.
  """
  if rows < 0:
    raise ValueError(f"rows={rows} must be 0 or more")
  tokenizer = tokenizer_lib.load(config.tokenizer)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  pipeline = input_pipeline.make(config, tokenizer, mesh)
  parts = [
    _heading(config, pipeline),
    _counts(pipeline.items),
    _lengths(pipeline.items),
    _items(config, pipeline.items.train.table, tokenizer, rows),
  ]
  return "\n\n".join(part for part in parts if part)


def _heading(
  config: config_lib.TrainSettings, pipeline: input_pipeline.InputPipeline
) -> str:
  """Steps, sources, and how full rows are on one device."""
  plan = pipeline.schedule
  lines = [
    f"{config.objective} on {', '.join(config.data.use)}, tokenization"
    f" {config.data.tokenization!r}: {plan.per_epoch} steps of"
    f" {config.batch_size} in an epoch, {plan.left_out} items left out of each"
  ]
  total = sum(plan.shares)
  for name, size, share in zip(config.data.use, plan.sizes, plan.shares):
    lines.append(
      f"  {name}: {size} items, {share} in an epoch ({share / total:.1%})"
    )
  packed = [
    batch.pack(
      pipeline.items.train.table.take(plan.items(step)), pipeline.train
    )
    for step in range(min(pipeline.steps, _STEPS))
  ]
  tokens = sum(counts.tokens for _, counts in packed)
  slots = sum(counts.slots for _, counts in packed)
  items = len(packed) * config.batch_size
  lines.append(
    f"  layout {config.data.layout!r}: {tokens / items:.1f} tokens and"
    f" {slots / items:.1f} slots an item, rows {tokens / slots:.1%} full"
  )
  return "\n".join(lines)


def _counts(prepared: dataset.Prepared) -> str:
  """Rows of each source by outcome."""
  sides = (prepared.train.report, prepared.held_out.report)
  lines: list[Sequence[Any]] = [("", "train", "held out")]
  for name in sides[0]["sources"]:
    counts = [side["sources"][name]["counts"] for side in sides]
    lines.append((name,))
    for reason in dict.fromkeys(key for count in counts for key in count):
      lines.append((f"  {reason}", *(c.get(reason, 0) for c in counts)))
  leaks = sides[1]["held-out prompts also trained on"]
  lines.append(("held-out prompts also trained on", "", leaks))
  return "Rows by outcome\n" + _columns(lines)


def _lengths(prepared: dataset.Prepared) -> str:
  """Percentiles of lengths, and shares of items that were cut."""
  lines: list[Sequence[Any]] = [
    ("", *(f"{p}%" for p in _PERCENTILES[:-1]), "most", "mean")
  ]
  for side in (prepared.train, prepared.held_out):
    table = side.table
    columns = dict(zip(_names(table), table.lengths.T)) | {
      "all parts": table.lengths.sum(1)
    }
    lines.append(("train" if side is prepared.train else "held out",))
    for name, values in columns.items():
      marks = np.percentile(values, _PERCENTILES, method="inverted_cdf")
      numbers = [*(int(mark) for mark in marks), f"{values.mean():.1f}"]
      lines.append((f"  {name}", *numbers))
    counts = side.report["counts"]
    kept = counts["kept"] if table.desirable is None else len(table)
    for reason in ("prompt cut", "response cut"):
      share = counts.get(reason, 0) / kept
      lines.append((f"  {reason}", f"{share:.1%}"))
  return "Tokens\n" + _columns(lines)


def _names(table: token_table.Table) -> tuple[str, ...]:
  """What the parts of an item are; KTO's last is of another prompt."""
  if table.desirable is not None:
    return ("prompt", "response", "mismatched")
  return ("prompt", "response" if table.parts == 2 else "chosen", "rejected")


def _items(
  config: config_lib.TrainSettings,
  table: token_table.Table,
  tokenizer: tokenizer_lib.Tokenizer,
  rows: int,
) -> str:
  """Items spread over the table, decoded, with their loss masks."""
  if not rows:
    return ""
  shown = []
  source = config.data.use[0] if len(config.data.use) == 1 else "item"
  indices = np.linspace(0, len(table) - 1, min(rows, len(table)))
  for index in indices.astype(int):
    (name, *parts) = dataclasses.astuple(table[int(index)])
    label = ""
    if table.desirable is not None:
      label = ", desirable" if table.desirable[int(index)] else ", undesirable"
    lines = [f"{source} {name}{label}"]
    for part, ids in zip(_names(table), parts):
      tag = "chosen" if part == "response" else part
      if part == "prompt" and config.data.loss_on_prompt:
        tag = "chosen"
      text = console.visible(tokenizer.decode(ids))
      lines += [f"{part}, {len(ids)} tokens:", f"[{tag}]{text}[/{tag}]"]
    shown.append("\n".join(lines))
  return "Items\n" + "\n\n".join(shown)


def _columns(lines: Iterable[Sequence[Any]]) -> str:
  """Lines with aligned columns, all but the first to the right."""
  cells = [[str(cell) for cell in line] for line in lines]
  count = max(map(len, cells))
  widths = [
    max(len(line[i]) for line in cells if i < len(line)) for i in range(count)
  ]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths))
    ).rstrip()
    for line in cells
  )


def main(config: dict[str, Any], workdir: pathlib.Path, rows: int) -> int:
  del workdir  # Nothing is written.
  built = settings.build(config_lib.TrainSettings, config)
  console.result(run(built, rows))
  return 0


if __name__ == "__main__":
  flags.run(main, example="configs/dpo.py", rows=(3, "items to show"))
