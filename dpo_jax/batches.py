"""Token pairs laid out in rows: padded, packed, or with a shared prompt.

A step holds exactly `batch_size` pairs in data order, however they are laid
out, so that the layout changes the speed and never the numbers. A piece is
what must stand together: one sequence (prompt and response), or a whole pair
`[prompt | chosen | rejected]` whose responses both see the prompt and do not
see each other. The mask that does this is one line, in `attention_mask`.

Letters: M micro-batches, B rows, T tokens of a row, C completion tokens of a
row.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import tokenizer as tokenizer_lib

Layout = Literal["padded", "packed", "shared"]
PROMPT, CHOSEN, REJECTED = 0, 1, 2

# Beyond the settled shape, row counts grow by about a fifth: few compilations.
_GROWTH = 1.2
# Random batches from which `settled` takes the shape of a run.
_TRIALS = 48


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One optimizer step's data, int32 throughout.

  Attributes:
    tokens: token ids, [M, B, T].
    positions: position in the token's own sequence, [M, B, T].
    pieces: which piece of its row a token belongs to, from 1; 0 is padding,
      [M, B, T].
    parts: 0 prompt, 1 chosen (or the only response), 2 rejected, [M, B, T].
    source: row position whose hidden state predicts, [M, B, C].
    target: the token to predict, [M, B, C].
    owner: sequence that the predicted token counts for, -1 for padding. In a
      micro-batch of pairs, pair i owns sequences 2i (chosen) and 2i + 1;
      [M, B, C].
  """

  tokens: np.ndarray | jax.Array
  positions: np.ndarray | jax.Array
  pieces: np.ndarray | jax.Array
  parts: np.ndarray | jax.Array
  source: np.ndarray | jax.Array
  target: np.ndarray | jax.Array
  owner: np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a batch holds: its pairs' or examples' ids and its real tokens."""

  ids: tuple[str, ...]
  tokens: int
  completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Example:
  """One sequence to fine-tune on, as token ids."""

  id: str
  prompt: tuple[int, ...]
  response: tuple[int, ...]


Item = Example | tokenizer_lib.TokenizedPair


@dataclasses.dataclass(frozen=True)
class Packing:
  """How a batch is laid out; `pack` does it.

  Attributes:
    layout: "padded" (a sequence a row), "packed" (several sequences a row) or
      "shared" (pairs with one copy of their prompt, several a row).
    row_length: T.
    row_multiple: every row count is a multiple of it: the data shards.
    microbatches: M; the batch size is a multiple of it.
    loss_on_prompt: predict the prompt's tokens too (examples only).
    pad_id: the token of padding.
    rows: a batch has at least so many rows; see `settled`.
    width: and room for at least so many completion tokens a row.
  """

  layout: Layout
  row_length: int
  row_multiple: int
  microbatches: int
  loss_on_prompt: bool
  pad_id: int
  rows: int = 0
  width: int = 0


@dataclasses.dataclass(frozen=True)
class _Piece:
  tokens: list[int]
  positions: list[int]
  parts: list[int]
  source: list[int]
  target: list[int]
  owner: list[int]


def attention_mask(pieces: jax.Array, parts: jax.Array) -> jax.Array:
  """Who sees whom, bool [B, T, T]: same piece, causal, prompt or own part.

  Args:
    pieces: piece of each token, 0 for padding, [B, T].
    parts: part of each token, [B, T].
  """
  size = pieces.shape[-1]
  causal = jnp.tril(jnp.ones((1, size, size), bool))
  same_piece = pieces[:, :, None] == pieces[:, None, :]
  key_part, query_part = parts[:, None, :], parts[:, :, None]
  visible = (key_part == PROMPT) | (key_part == query_part)
  return causal & same_piece & visible & (pieces > 0)[:, None, :]


def pack(items: Sequence[Item], how: Packing) -> tuple[Batch, Counts]:
  """Lays out one step's items.

  Args:
    items: pairs, or examples; a multiple of `how.microbatches`.
    how: the layout.

  Raises:
    ValueError: a piece is longer than a row, or the items do not divide into
      the micro-batches.
  """
  if len(items) % how.microbatches:
    raise ValueError(
      f"{len(items)} items do not divide into {how.microbatches} micro-batches"
    )
  share = len(items) // how.microbatches
  groups = [
    _rows(items[i : i + share], how) for i in range(0, len(items), share)
  ]
  rows = max(how.rows, *(len(group) for group in groups))
  if rows > how.rows:
    # Padded rows are as many as the sequences; packed ones vary.
    growth = 1.0 if how.layout == "padded" else _GROWTH
    rows = _rounded(rows, how.row_multiple, growth)
  width = max(
    sum(len(piece.target) for piece in row) for group in groups for row in group
  )
  # Completion positions come in eighths of a row: at most eight shapes.
  eighth = -(-how.row_length // 8)
  width = max(how.width, -(-width // eighth) * eighth)
  batch = _empty((how.microbatches, rows), how.row_length, width, how.pad_id)
  for m, group in enumerate(groups):
    for r, row in enumerate(group):
      _fill(batch, (m, r), row)
  return batch, Counts(
    ids=tuple(item.id for item in items),
    tokens=int((batch.pieces > 0).sum()),
    completion_tokens=int((batch.owner >= 0).sum()),
  )


def settled(
  items: Sequence[Item], how: Packing, *, batch_size: int, seed: int
) -> Packing:
  """`how` with the shape that nearly every batch of these items fits in.

  A few dozen random batches are laid out; the largest shape met is what every
  batch is then given at least, so that a run mostly compiles one.
  """
  rng = np.random.default_rng((seed, len(items), batch_size))
  size = min(batch_size, len(items))
  trials = [
    pack([items[i] for i in rng.permutation(len(items))[:size]], how)[0]
    for _ in range(_TRIALS)
  ]
  rows = max(trial.tokens.shape[1] for trial in trials)
  width = max(trial.target.shape[2] for trial in trials)
  return dataclasses.replace(how, rows=rows, width=width)


def longest_piece(items: Sequence[Item], layout: Layout) -> int:
  """Tokens of the longest piece: the least row length that will do."""
  return max(
    len(piece.tokens) for item in items for piece in _pieces(item, 0, layout)
  )


def stream(
  items: Sequence[Item],
  how: Packing,
  *,
  batch_size: int,
  seed: int,
  epochs: int,
  start_step: int,
) -> Iterator[tuple[Batch, Counts]]:
  """Batches from `start_step` on, in an order that only the seed decides.

  Step s holds the same items wherever the run was interrupted: the order is a
  function of (seed, epoch), not of a state. An epoch's last incomplete batch
  is left out. Packing runs in grain's threads, ahead of the step.
  """
  import grain

  per_epoch = len(items) // batch_size
  if not per_epoch:
    raise ValueError(
      f"{len(items)} items are fewer than batch_size={batch_size}"
    )

  def epoch_order(epoch):
    return np.random.default_rng((seed, epoch)).permutation(len(items))

  def at(step):
    epoch, index = divmod(step, per_epoch)
    order = epoch_order(epoch)[index * batch_size : (index + 1) * batch_size]
    return pack([items[i] for i in order], how)

  steps = grain.MapDataset.range(start_step, per_epoch * epochs).map(at)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  return iter(steps.to_iter_dataset(options))


def in_order(
  items: Sequence[Item], how: Packing, *, batch_size: int
) -> Iterator[tuple[Batch, Counts]]:
  """All items in order, for evaluation; the last batch may hold fewer."""
  for start in range(0, len(items), batch_size):
    yield pack(items[start : start + batch_size], how)


def _pieces(item: Item, first_owner: int, layout: Layout) -> list[_Piece]:
  if isinstance(item, Example):
    return [_sequence(item.prompt, item.response, first_owner, CHOSEN)]
  if layout == "shared":
    return [_pair(item, first_owner)]
  return [
    _sequence(item.prompt, item.chosen, first_owner, CHOSEN),
    _sequence(item.prompt, item.rejected, first_owner + 1, CHOSEN),
  ]


def _sequence(prompt, response, owner, part) -> _Piece:
  start, size = len(prompt), len(prompt) + len(response)
  return _Piece(
    tokens=[*prompt, *response],
    positions=list(range(size)),
    parts=[PROMPT] * start + [part] * len(response),
    source=list(range(start - 1, size - 1)),
    target=list(response),
    owner=[owner] * len(response),
  )


def _pair(item, first_owner) -> _Piece:
  """[prompt | chosen | rejected], positions restarting after the prompt."""
  start, middle = len(item.prompt), len(item.prompt) + len(item.chosen)
  end = middle + len(item.rejected)
  return _Piece(
    tokens=[*item.prompt, *item.chosen, *item.rejected],
    positions=[*range(middle), *range(start, start + len(item.rejected))],
    parts=[PROMPT] * start
    + [CHOSEN] * len(item.chosen)
    + [REJECTED] * len(item.rejected),
    # The prompt's last token predicts the first token of both responses.
    source=[*range(start - 1, middle - 1), start - 1, *range(middle, end - 1)],
    target=[*item.chosen, *item.rejected],
    owner=[first_owner] * len(item.chosen)
    + [first_owner + 1] * len(item.rejected),
  )


def _with_prompt_loss(piece: _Piece, prompt_length: int) -> _Piece:
  """Adds the prompt's own tokens, but its first, to what is predicted."""
  extra = range(prompt_length - 1)
  return dataclasses.replace(
    piece,
    source=[*extra, *piece.source],
    target=[*piece.tokens[1:prompt_length], *piece.target],
    owner=[piece.owner[0]] * len(extra) + piece.owner,
  )


def _rows(items: Sequence[Item], how: Packing) -> list[list[_Piece]]:
  """One micro-batch's pieces in rows: first fit, the longest piece first."""
  pieces = []
  for i, item in enumerate(items):
    if not item.prompt:
      raise ValueError(
        f"{item.id} has an empty prompt: nothing predicts its first token"
      )
    per_item = 1 if isinstance(item, Example) else 2
    for piece in _pieces(item, i * per_item, how.layout):
      if len(piece.tokens) > how.row_length:
        raise ValueError(
          f"{item.id} takes {len(piece.tokens)} tokens in layout"
          f" {how.layout!r}, but row_length={how.row_length}"
        )
      if how.loss_on_prompt:
        piece = _with_prompt_loss(piece, len(item.prompt))
      pieces.append(piece)
  if how.layout == "padded":
    return [[piece] for piece in pieces]
  rows: list[list[_Piece]] = []
  room: list[int] = []
  for piece in sorted(pieces, key=lambda piece: -len(piece.tokens)):
    size = len(piece.tokens)
    at = next((i for i, free in enumerate(room) if free >= size), None)
    if at is None:
      rows.append([])
      room.append(how.row_length)
      at = len(rows) - 1
    rows[at].append(piece)
    room[at] -= size
  return rows


def _rounded(rows: int, multiple: int, growth: float) -> int:
  """The least of a short list of row counts that holds `rows`."""
  count = multiple
  while count < rows:
    count = max(count + 1, math.ceil(count * growth))
    count = -(-count // multiple) * multiple
  return count


def _empty(lead: tuple[int, int], length: int, width: int, pad_id: int):
  tokens = (*lead, length)
  completions = (*lead, width)
  return Batch(
    tokens=np.full(tokens, pad_id, np.int32),
    positions=np.zeros(tokens, np.int32),
    pieces=np.zeros(tokens, np.int32),
    parts=np.zeros(tokens, np.int32),
    source=np.zeros(completions, np.int32),
    target=np.zeros(completions, np.int32),
    owner=np.full(completions, -1, np.int32),
  )


def _fill(batch: Batch, at: tuple[int, int], row: list[_Piece]) -> None:
  start = first = 0
  for number, piece in enumerate(row, 1):
    here = (*at, slice(start, start + len(piece.tokens)))
    there = (*at, slice(first, first + len(piece.target)))
    batch.tokens[here] = piece.tokens
    batch.positions[here] = piece.positions
    batch.pieces[here] = number
    batch.parts[here] = piece.parts
    batch.source[there] = np.asarray(piece.source) + start
    batch.target[there] = piece.target
    batch.owner[there] = piece.owner
    start += len(piece.tokens)
    first += len(piece.target)
