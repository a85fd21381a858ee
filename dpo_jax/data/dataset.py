"""Training and held-out items: sources read, checked, tokenized and joined.

Rows that are dropped, truncated or repeated are counted by reason; the counts
go into the run's manifest and from there into the report.
"""

import collections
import dataclasses
from typing import Any, Literal

import numpy as np

from dpo_jax.core import settings as settings_lib
from dpo_jax.data import (
  loader,
  packing,
  preferences,
  sources,
  token_cache,
  token_table,
  tokenization,
  unpaired,
)
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.io import remote

# Kinds whose prompts are posts: a truncated post keeps its start, a dialogue
# its end, as in the official DPO code.
_POSTS = ("shp", "se")


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """Sources, tokenization and packing of a run; see configs/common.py."""

  use: tuple[str, ...]
  sources: dict[str, sources.SourceSettings]
  filters: sources.FilterSettings
  max_train: int
  max_eval: int
  allow_leakage: bool
  tokenization: tokenization.Rules
  max_length: int
  max_prompt_length: int
  token_cache: str
  responses: Literal["chosen", "both"]
  loss_on_prompt: bool
  layout: packing.Layout
  row_length: int
  shapes: int

  def __post_init__(self):
    unknown = [name for name in self.use if name not in self.sources]
    if unknown or not self.use or len(set(self.use)) < len(self.use):
      raise ValueError(
        f"data.use={self.use} must name one or more of data.sources, each"
        f" once: {sorted(self.sources)}"
      )
    tokenization.check_lengths(
      self.tokenization, self.max_length, self.max_prompt_length
    )
    if self.row_length < self.max_length:
      raise ValueError(
        f"data.max_length={self.max_length} is more than data.row_length="
        f"{self.row_length}: lower it, or raise row_length"
      )
    settings_lib.check(self, "data.")
    remote.refuse_address("data.token_cache", self.token_cache)


@dataclasses.dataclass(frozen=True)
class Side:
  """Training or held-out items of all sources.

  Attributes:
    table: the items, source after source, in file order.
    sizes: items of each source.
    report: counts by source and reason, and fingerprints, as JSON values.
  """

  table: token_table.Table
  sizes: tuple[int, ...]
  report: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Training and held-out items, and the sources' weights."""

  train: Side
  held_out: Side
  weights: tuple[float, ...]

  @property
  def labeled(self) -> bool:
    return self.train.table.desirable is not None

  @property
  def report(self) -> dict[str, Any]:
    return {"train": self.train.report, "held_out": self.held_out.report}

  def schedule(
    self, *, batch_size: int, seed: int, epochs: int
  ) -> loader.Schedule:
    """The order of the training items."""
    return loader.Schedule(
      self.train.sizes, self.weights, batch_size, seed, epochs
    )


def prepare(
  settings: DataSettings,
  objective: Literal["sft", "dpo"],
  tokenizer: tokenizer_lib.Tokenizer,
  labeled: bool = False,
) -> Prepared:
  """Reads, checks and tokenizes the training and the held-out rows.

  With `labeled` items are those of `unpaired.items`, of any source.

  Raises:
    ValueError: a file is missing or malformed, no pair is left, a held-out
      prompt is trained on, or a segment is longer than a row; or a source has
      labels, which the objective does not take.
  """
  kinds = [settings.sources[name].kind for name in settings.use]
  if "unpaired" in kinds and not labeled:
    raise ValueError(
      f"data.use={settings.use} has a source of kind 'unpaired', whose labels"
      " only objective='dpo' with loss.kind='kto' takes"
    )
  if objective == "sft" and settings.layout == "shared":
    raise ValueError(
      "data.layout='shared' is for pairs; SFT takes 'packed' or 'padded'"
    )
  if objective == "dpo" and settings.loss_on_prompt:
    raise ValueError(
      "data.loss_on_prompt=True changes nothing in a preference loss, where"
      " the prompt cancels; set it to False"
    )
  if objective == "dpo" and settings.responses != "chosen":
    raise ValueError(
      f"data.responses={settings.responses!r} is for SFT: a preference loss"
      " takes pairs; set it to 'chosen'"
    )
  loaded = {
    side: load(settings, side, limit)
    for side, limit in (
      ("train", settings.max_train),
      ("eval", settings.max_eval),
    )
  }
  rows = {
    side: [row for part in parts.values() for row in part.rows]
    for side, parts in loaded.items()
  }
  leaks = preferences.leaks(rows["train"], rows["eval"])
  if leaks and not settings.allow_leakage:
    raise ValueError(
      f"{leaks} held-out prompts of {', '.join(settings.use)} are also trained"
      " on; correct the split, or set data.allow_leakage=True"
    )
  sides = {}
  for side, parts in loaded.items():
    sides[side] = _side(settings, side, objective, tokenizer, labeled, parts)
    sides[side].report["held-out prompts also trained on"] = leaks
  return Prepared(
    sides["train"],
    sides["eval"],
    tuple(settings.sources[name].weight for name in settings.use),
  )


def load(
  settings: DataSettings, side: sources.Side, limit: int
) -> dict[str, preferences.Loaded]:
  """Comparisons by source, for the sources in use."""
  return {
    name: sources.load(settings.sources[name], side, settings.filters, limit)
    for name in settings.use
  }


def _side(
  settings: DataSettings,
  side: sources.Side,
  objective: Literal["sft", "dpo"],
  tokenizer: tokenizer_lib.Tokenizer,
  labeled: bool,
  loaded: dict[str, preferences.Loaded],
) -> Side:
  parts, by_source = [], {}
  for name, source in loaded.items():
    rows, labels = source.rows, {}
    if labeled:
      rows, labels = unpaired.items(rows)
    tokenized = token_cache.tokenize(
      settings.token_cache,
      tokenizer,
      rows,
      rules=settings.tokenization,
      max_length=settings.max_length,
      max_prompt_length=settings.max_prompt_length,
      prompt_keeps="start" if settings.sources[name].kind in _POSTS else "end",
    )
    counts = {**source.counts, **tokenized.counts}
    by_source[name] = {"counts": counts, "fingerprint": source.fingerprint}
    if not len(tokenized.table):
      raise ValueError(
        f"{side} of {name}: no pair is left after tokenization: {counts}"
      )
    table = tokenized.table
    if objective == "sft":
      table = table.examples(settings.responses)
    elif labeled:
      desirable = np.array([labels[x] for x in table.ids])
      table = dataclasses.replace(table, desirable=desirable)
    parts.append(table)
  table = token_table.join(parts)
  longest = packing.longest_segment(table, settings.layout)
  if longest > settings.row_length:
    raise ValueError(
      f"{side}: the longest segment takes {longest} tokens in layout"
      f" {settings.layout!r}, more than data.row_length={settings.row_length};"
      f" set it to {longest} or more"
    )
  counts: collections.Counter[str] = collections.Counter()
  for source in by_source.values():
    counts.update(source["counts"])
  report = {
    "counts": dict(counts),
    "sources": by_source,
    "tokens": table.fingerprint(),
  }
  return Side(table, tuple(map(len, parts)), report)
