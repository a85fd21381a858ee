"""Report on a training run's data: python -m dpo_jax inspect_data --config=...

Reads and tokenizes the data of a training config as the run would, and prints
rows by reason of rejection, lengths, truncation, the fill of rows under each
layout, and a few items as the model sees them:

  python -m dpo_jax inspect_data --config=configs/dpo.py:pythia-2.8b

No model is read and nothing is compiled. In the items, tags around the text
name the part: [prompt], and with a loss [chosen] or [rejected].
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dpo_jax.cli import flags
from dpo_jax.core import console, settings
from dpo_jax.data import (
  batch,
  batch_shapes,
  dataset,
  loader,
  packing,
  token_table,
)
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.training import config as config_lib

_PERCENTILES = (5, 50, 90, 95, 99, 100)
# Steps that are packed to measure the fill.
_STEPS = 256


def run(config: config_lib.TrainSettings, rows: int, shards: int) -> str:
  """The report.

  Args:
    config: of a training run.
    rows: items to show.
    shards: data shards of the target mesh.

  Raises:
    ValueError: as in `dataset.prepare`.
  """
  if rows < 0 or shards < 1:
    raise ValueError(
      f"rows={rows} must be 0 or more, shards={shards} 1 or more"
    )
  tokenizer = tokenizer_lib.load(config.tokenizer)
  prepared = dataset.prepare(config.data, config.objective, tokenizer)
  plan = prepared.schedule(
    batch_size=config.batch_size, seed=config.seed, epochs=config.epochs
  )
  parts = [
    _heading(config, plan),
    _counts(prepared),
    _lengths(prepared),
    _packing(config, prepared.train.table, plan, tokenizer.pad_id, shards),
    _items(config, prepared.train.table, tokenizer, rows),
  ]
  return "\n\n".join(part for part in parts if part)


def _heading(config: config_lib.TrainSettings, plan: loader.Schedule) -> str:
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
  return "\n".join(lines)


def _counts(prepared: dataset.Prepared) -> str:
  """Rows of each source by outcome."""
  sides = (prepared.train.report, prepared.held_out.report)
  lines: list[Sequence[Any]] = [("", "train", "held out")]
  for name in sides[0]["sources"]:
    counts = [side["sources"][name]["counts"] for side in sides]
    lines.append((name, "", ""))
    for reason in dict.fromkeys(key for count in counts for key in count):
      lines.append((f"  {reason}", *(c.get(reason, 0) for c in counts)))
    prints = [side["sources"][name]["fingerprint"] for side in sides]
    lines.append(("  fingerprint", *prints))
  leaks = sides[1]["held-out prompts also trained on"]
  lines.append(("held-out prompts also trained on", "", leaks))
  lines.append(("items' fingerprint", *(side["tokens"] for side in sides)))
  return "Rows by outcome\n" + _columns(lines)


def _lengths(prepared: dataset.Prepared) -> str:
  """Percentiles of lengths, and shares of items that were cut."""
  lines: list[Sequence[Any]] = [
    ("", *(f"{p}%" for p in _PERCENTILES[:-1]), "most", "mean")
  ]
  for side in (prepared.train, prepared.held_out):
    table = side.table
    names = ("prompt", "chosen", "rejected")
    if table.parts == 2:
      names = ("prompt", "response")
    columns = dict(zip(names, table.lengths.T)) | {
      "all parts": table.lengths.sum(1)
    }
    lines.append(("train" if side is prepared.train else "held out",))
    for name, values in columns.items():
      marks = np.percentile(values, _PERCENTILES, method="inverted_cdf")
      numbers = [*(int(mark) for mark in marks), f"{values.mean():.1f}"]
      lines.append((f"  {name}", *numbers))
    counts = side.report["counts"]
    kept = counts["kept"]
    for reason in ("prompt cut", "response cut"):
      share = counts.get(reason, 0) / kept
      lines.append((f"  {reason}", f"{share:.1%}"))
  return "Tokens\n" + _columns(lines)


def _packing(
  config: config_lib.TrainSettings,
  table: token_table.Table,
  plan: loader.Schedule,
  pad_id: int,
  shards: int,
) -> str:
  """Tokens an item, fill, shapes and speed of each layout."""
  steps = [plan.items(step) for step in range(min(plan.steps, _STEPS))]
  layouts: list[packing.Layout] = ["padded", "packed"]
  if table.parts == 3:
    layouts.append("shared")
  lines: list[Sequence[Any]] = [
    ("layout", "tokens an item", "slots an item", "fill", "items/s", "rows")
  ]
  for layout in layouts:
    how = packing.Packing(
      layout=layout,
      # A padded row holds one sequence.
      row_length=config.data.max_length
      if layout == "padded"
      else config.row_length,
      shards=shards,
      microbatches=config.microbatches,
      loss_on_prompt=config.data.loss_on_prompt,
      pad_id=pad_id,
      spans_rows=config.spans_rows and layout != "padded",
    )
    longest = packing.longest_segment(table, layout)
    if longest > how.row_length and not how.spans_rows:
      # Not the layout in use, which `dataset.prepare` has checked.
      rows = f"a segment has {longest} > {how.row_length} tokens"
      lines.append((layout, "-", "-", "-", "-", rows))
      continue
    how = batch_shapes.choose(table, how, steps, config.data.shapes)
    tokens = slots = 0
    started = time.perf_counter()
    for indices in steps:
      _, counts = batch.pack(table.take(indices), how)
      tokens, slots = tokens + counts.tokens, slots + counts.slots
    seconds = time.perf_counter() - started
    items = len(steps) * config.batch_size
    mark = " (in use)" if layout == config.data.layout else ""
    lines.append(
      (
        layout + mark,
        f"{tokens / items:.1f}",
        f"{slots / items:.1f}",
        f"{tokens / slots:.1%}",
        f"{items / seconds:,.0f}",
        f"{'/'.join(str(s.rows) for s in how.shapes)} x {how.row_length}",
      )
    )
  note = f"over {len(steps)} steps, {shards} data shard(s), on this machine"
  return f"Packing, {note}\n" + _columns(lines)


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
    parts = dataclasses.asdict(table[int(index)])
    lines = [f"{source} {parts.pop('id')}"]
    for part, ids in parts.items():
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


def main(
  config: dict[str, Any], workdir: pathlib.Path, rows: int, shards: int
) -> int:
  del workdir  # Nothing is written.
  built = settings.build(config_lib.TrainSettings, config)
  console.result(run(built, rows, shards))
  return 0


if __name__ == "__main__":
  flags.run(
    main,
    example="configs/dpo.py",
    rows=(3, "items to show"),
    shards=(1, "data shards of the target mesh"),
  )
