"""Tokenization rules: how a pair of texts becomes ids, and what is truncated.

Three rules are in use for the same texts. They give different ids, so results
are comparable under one rule only:

paper: the official DPO code. Prompt and responses are tokenized apart, so that
  a response's ids never depend on its prompt, and EOS is appended to both
  responses. If the prompt and the longer response exceed `max_length`, the
  prompt keeps `max_prompt_length` tokens: the last of a dialogue, the first of
  a post (SHP, StackExchange). If that is still too long, both responses keep
  their first `max_length - max_prompt_length`.
trl: TRL 1.16 (Hugging Face's DPOTrainer, prompt and responses given as
  strings). The prompt is tokenized alone and together with each response; the
  common prefix of the three token sequences is the prompt, the rest are the
  responses. Each sequence keeps its first `max_length` tokens. A pair whose
  prompt takes all of them is dropped, as is one with an empty common prefix:
  TRL keeps that, though nothing predicts its first token. The same holds from
  1.14.2 on. Before, down to 0.29, responses began after as many tokens as the
  prompt has, which is the same unless tokens merge across the border, and
  before 1.9 pairs without room were kept.
dpo-replication: the dpo-replication system, which strips both responses and
  then uses TRL of its time (0.28 and before). All three texts are tokenized
  apart, the prompt always keeps its last `max_prompt_length` tokens, and a
  sequence that is still too long loses more of its start. TRL truncated chosen
  and rejected each by its own length; here they share their prompt, which loses
  what the longer one needs. A pair without room for any token of its prompt is
  dropped.

Dropped under every rule: a pair with the text of a special token, which as text
cannot be distinguished from control, and a pair whose responses have the same
tokens once stripped, normalized and truncated, of which nothing can be learned
(TRL keeps those).

Letters: N pairs of three parts, prompt, chosen and rejected.

References:
  Rafailov et al., Direct Preference Optimization, 2023 (arXiv 2305.18290),
  official code; TRL, trl/trainer/dpo_trainer.py, versions 0.24 and 1.16.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from dpo_jax.data import preferences, token_table
from dpo_jax.data import tokenizer as tokenizer_lib

Rules = Literal["paper", "trl", "dpo-replication"]
Keep = Literal["end", "start"]

# Part of every cache key: increase it when a rule gives other ids or counts.
VERSION = 3

# Rows tokenized at a time, which bounds the memory of Python lists of ids.
_BATCH = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenized:
  """Token ids of the kept pairs, with counts by reason.

  Attributes:
    table: the N pairs that are kept, in the rows' order.
    cut: whether the prompt or a response of a pair was truncated, bool [N].
    counts: pairs dropped, truncated, or otherwise notable, by reason.
  """

  table: token_table.Table
  cut: np.ndarray
  counts: dict[str, int]


def check_lengths(
  rules: Rules, max_length: int, max_prompt_length: int
) -> None:
  """Checks tokenization rules and their lengths.

  Raises:
    ValueError: the rules are unknown, a length leaves a prompt or a response no
      room, or the rules ignore it.
  """
  if rules not in get_args(Rules):
    raise ValueError(
      f"tokenization={rules!r} must be one of {', '.join(get_args(Rules))}"
    )
  if max_length < 2:
    raise ValueError(
      f"max_length={max_length} must be at least 2: a token of the prompt and"
      " one of a response"
    )
  if rules == "trl":
    if max_prompt_length != 0:
      raise ValueError(
        f"max_prompt_length={max_prompt_length} has no meaning in"
        " tokenization='trl', which truncates prompt and response together; set"
        " it to 0"
      )
  elif not 0 < max_prompt_length < max_length:
    raise ValueError(
      f"max_prompt_length={max_prompt_length} must be between 1 and"
      f" max_length - 1 ({max_length - 1})"
    )


def tokenize(
  tokenizer: tokenizer_lib.Tokenizer,
  rows: Sequence[preferences.Comparison],
  *,
  rules: Rules,
  max_length: int,
  max_prompt_length: int,
  prompt_keeps: Keep = "end",
) -> Tokenized:
  """Token ids of comparisons under one of the three rules.

  Every kept pair has at least one token of its prompt and of each response.

  Args:
    tokenizer: the model's own.
    rows: comparisons in order.
    rules: see above.
    max_length: tokens of a prompt with a response, EOS included.
    max_prompt_length: tokens of a truncated prompt; 0 for "trl".
    prompt_keeps: which end of a truncated prompt is kept under "paper".

  Raises:
    ValueError: the lengths do not fit the rules, or the tokenizer adds tokens
      of its own, which TRL would keep.
  """
  check_lengths(rules, max_length, max_prompt_length)
  if rules == "trl" and not tokenizer.adds_nothing:
    raise ValueError(
      "this tokenizer adds tokens to a text, or drops white space before its"
      " end of text, which TRL's rule does not; set tokenization='paper'"
    )
  done = [
    _batch(
      tokenizer,
      rows[start : start + _BATCH],
      rules,
      max_length,
      max_prompt_length,
      prompt_keeps,
    )
    for start in range(0, max(len(rows), 1), _BATCH)
  ]
  counts: collections.Counter[str] = collections.Counter()
  for batch in done:
    counts.update(batch.counts)
  return Tokenized(
    token_table.join(batch.table for batch in done),
    np.concatenate([batch.cut for batch in done]),
    {reason: number for reason, number in counts.items() if number},
  )


def _batch(tokenizer, rows, rules, max_length, max_prompt_length, prompt_keeps):
  kept, columns = _texts(tokenizer, rows, rules)
  tokens, starts, whole = _encode(tokenizer, columns)
  counts = {"holds a special token": len(rows) - len(kept)}
  if rules == "trl":
    shared = _common_prefix(tokens, starts, whole)
    merged = shared < whole[:, 0]
    counts["prompt's end merges with a response"] = int(merged.sum())
    starts[:, 1:] += shared[:, None]
    whole[:, 1:] -= shared[:, None]
    whole[:, 0] = shared
  left = _RULES[rules](whole, max_length, max_prompt_length)
  equal = _equal_responses(tokens, starts, left)
  # Responses lose their end, and prompts their start but for posts.
  if rules != "paper" or prompt_keeps == "end":
    starts[:, 0] += whole[:, 0] - left[:, 0]
  fits = (left > 0).all(1)
  room = fits & ~equal
  dropped = {
    "dropped: the prompt has no token of its own": whole[:, 0] == 0,
    "dropped: no room for prompt and response": (whole[:, 0] > 0) & ~fits,
    "dropped: both responses have the same tokens": fits & equal,
  }
  prompt_cut = room & (left[:, 0] < whole[:, 0])
  response_cut = room & (left[:, 1:] < whole[:, 1:]).any(1)
  table = _table([row.id for row in kept], tokens, starts, left, room)
  reasons = dropped | {"prompt cut": prompt_cut, "response cut": response_cut}
  counts |= {reason: int(which.sum()) for reason, which in reasons.items()}
  return Tokenized(table, (prompt_cut | response_cut)[room], counts)


def _paper(whole, max_length, max_prompt_length):
  """Lengths of the parts after truncation, int64 [N, 3]."""
  longer = whole[:, 1:].max(1)
  too_long = whole[:, 0] + longer > max_length
  left = whole.copy()
  left[too_long, 0] = np.minimum(whole[too_long, 0], max_prompt_length)
  still = left[:, 0] + longer > max_length
  left[still, 1:] = np.minimum(left[still, 1:], max_length - max_prompt_length)
  return left


def _trl(whole, max_length, _):
  left = whole.copy()
  left[:, 1:] = np.minimum(left[:, 1:], max_length - whole[:, :1])
  return np.maximum(left, 0)


def _dpo_replication(whole, max_length, max_prompt_length):
  left = whole.copy()
  room = np.minimum(max_prompt_length, max_length - whole[:, 1:].max(1))
  left[:, 0] = np.minimum(left[:, 0], np.maximum(room, 0))
  return left


_RULES = {"paper": _paper, "trl": _trl, "dpo-replication": _dpo_replication}


def _texts(tokenizer, rows, rules):
  """Rows without special tokens, and three columns of texts to encode."""
  kept, texts = [], []
  for row in rows:
    parts = (row.prompt, row.chosen, row.rejected)
    if rules == "trl":
      parts = (row.prompt, row.prompt + row.chosen, row.prompt + row.rejected)
    elif rules == "dpo-replication":
      parts = (row.prompt, row.chosen.strip(), row.rejected.strip())
    # In the texts as they are encoded: a special token may cross the border of
    # prompt and response.
    if not any(tokenizer.special_in(text) for text in parts):
      kept.append(row)
      texts.append(parts)
  return kept, [[parts[column] for parts in texts] for column in range(3)]


def _encode(tokenizer, columns):
  """Ids of all texts, and the start and length of each, int64 [N, 3].

  EOS follows the texts of the second and third column.
  """
  flat, starts, lengths, offset = [], [], [], 0
  for number, texts in enumerate(columns):
    ids, sizes = tokenizer.encode_flat(texts)
    if number:
      ids = np.insert(ids, np.cumsum(sizes), tokenizer.eos_id)
      sizes = sizes + 1
    starts.append(offset + np.cumsum(sizes) - sizes)
    flat.append(ids)
    lengths.append(sizes)
    offset += len(ids)
  return np.concatenate(flat), np.stack(starts, 1), np.stack(lengths, 1)


def _common_prefix(tokens, starts, lengths):
  """Tokens of the common prefix of a row's three sequences, int64 [N]."""
  sizes = lengths[:, 0]
  owner = np.repeat(np.arange(len(sizes)), sizes)
  place = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  mine = tokens[starts[owner, 0] + place]
  prefix = sizes.copy()
  for part in (1, 2):
    # Clipped to its EOS, which is no token of a prompt.
    clipped = np.minimum(place, lengths[owner, part] - 1)
    unlike = mine != tokens[starts[owner, part] + clipped]
    np.minimum.at(prefix, owner[unlike], place[unlike])
  return prefix


def _table(ids, tokens, starts, lengths, room):
  """The rows that have room, with their tokens alone, in order."""
  starts, lengths = starts[room], lengths[room]
  contiguous = token_table.contiguous_starts(lengths)
  shift = np.repeat((starts - contiguous).reshape(-1), lengths.reshape(-1))
  return token_table.Table(
    tuple(ids[i] for i in np.flatnonzero(room)),
    tokens[shift + np.arange(len(shift))],
    contiguous,
    lengths,
  )


def _equal_responses(tokens, starts, lengths):
  """Whether both responses of a row have the same tokens, bool [N]."""
  equal = lengths[:, 1] == lengths[:, 2]
  for row in np.flatnonzero(equal):
    chosen, rejected = starts[row, 1:, None] + np.arange(lengths[row, 1])
    equal[row] = np.array_equal(tokens[chosen], tokens[rejected])
  return equal
