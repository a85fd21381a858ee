"""The pairs that `score` is given: read whole, cut as training cuts them."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dpo_jax import comparisons, hf
from dpo_jax import tokenizer as tokenizer_lib
from dpo_jax.rows import profiles, tables
from dpo_jax.sources import files
from dpo_jax.storage import buckets

# How many bad lines an error lists.
_LISTED = 20


def read(
  path: str, tokenizer: tokenizer_lib.Tokenizer
) -> list[comparisons.Comparison]:
  """The comparisons of a file, all of them.

  Raises:
    ValueError: lines that cannot be scored, each with file, number and cause.
  """
  rows, bad = [], []
  for where, raw in lines(path):
    try:
      if isinstance(raw, ValueError):
        raise raw
      row = comparisons.parse(raw)
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


def lines(path: str) -> Iterator[tuple[str, Any]]:
  """Where each row of a file stands, and the row or what is wrong with it."""
  try:
    local = buckets.fetch(path, ()) if buckets.is_address(path) else path
    yield from files.rows(pathlib.Path(local), {})
  except OSError as error:
    raise ValueError(f"pairs={path} cannot be read: {error}") from error


def tokenized(settings, tokenizer, rows) -> tuple[tables.Table, np.ndarray]:
  """A table of pairs in order, and which of them were cut, bool [N].

  Args:
    settings: a `score.ScoreSettings`.
    tokenizer: of the model.
    rows: from `read`.

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
  half = 0 if settings.profile == "trl" else max_length // 2
  found = profiles.tokenize(
    tokenizer,
    rows,
    profile=settings.profile,
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
