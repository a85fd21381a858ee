"""Token items in columns: what packing reads without touching Python objects.

A table holds the token ids of all its items in one array, and for each item
where its parts begin and how long they are: a prompt and one response
(an example to fine-tune on) or two (a pair). Choosing, repeating and splitting
items moves only those numbers, never the tokens.
"""

import collections.abc
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
  """One sequence to fine-tune on, as token ids."""

  id: str
  prompt: tuple[int, ...]
  response: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
  """One comparison as token ids; both responses end with EOS unless cut."""

  id: str
  prompt: tuple[int, ...]
  chosen: tuple[int, ...]
  rejected: tuple[int, ...]


Item = Example | Pair


@dataclasses.dataclass(frozen=True, eq=False)
class Table(collections.abc.Sequence):
  """Items by column; indexing and iterating gives `Pair`s or `Example`s.

  Letters: N items; P parts of an item, 2 of an example, 3 of a pair.

  Attributes:
    ids: the items' ids.
    tokens: the token ids of all parts, int32, in any order.
    starts: where each part begins in `tokens`, int64 [N, P].
    lengths: tokens of each part, int64 [N, P].
  """

  ids: tuple[str, ...]
  tokens: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray

  @property
  def parts(self) -> int:
    return self.starts.shape[1]

  def __len__(self) -> int:
    return len(self.ids)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.take(np.arange(len(self))[index])
    if not -len(self) <= index < len(self):
      raise IndexError(f"item {index} of {len(self)}")
    kind = Pair if self.parts == 3 else Example
    return kind(
      self.ids[index], *(self._part(index, p) for p in range(self.parts))
    )

  def take(self, indices: Sequence[int] | np.ndarray) -> "Table":
    """The items of these indices, in their order; tokens are shared.

    Raises:
      ValueError: a mask is given instead of indices.
    """
    indices = np.asarray(indices)
    if indices.dtype == bool:
      raise ValueError("items are taken by their indices, not by a mask")
    indices = indices.astype(np.int64)
    return Table(
      tuple(self.ids[i] for i in indices),
      self.tokens,
      self.starts[indices],
      self.lengths[indices],
    )

  def examples(self, responses: Literal["chosen", "both"]) -> "Table":
    """Pairs as examples: of their chosen responses, or of both in turn."""
    if self.parts != 3:
      raise ValueError("only a table of pairs can be made into examples")
    columns = [[0, 1]] if responses == "chosen" else [[0, 1], [0, 2]]
    return Table(
      tuple(name for name in self.ids for _ in columns),
      self.tokens,
      self.starts[:, columns].reshape(-1, 2),
      self.lengths[:, columns].reshape(-1, 2),
    )

  def fingerprint(self) -> str:
    """Sixteen hex digits of ids and tokens, in the items' order."""
    digest = hashlib.sha256()
    for i, name in enumerate(self.ids):
      data = name.encode()
      digest.update(b"%d:%s" % (len(data), data))
      for p in range(self.parts):
        part = self.tokens[self._where(i, p)]
        digest.update(b"%d:" % len(part))
        digest.update(np.ascontiguousarray(part, "<i4"))
    return digest.hexdigest()[:16]

  def _where(self, index: int, part: int) -> slice:
    start = self.starts[index, part]
    return slice(start, start + self.lengths[index, part])

  def _part(self, index: int, part: int) -> tuple[int, ...]:
    return tuple(self.tokens[self._where(index, part)].tolist())


def from_items(items: Sequence[Item]) -> Table:
  """A table of items; one that is a table already is returned as it is.

  Raises:
    ValueError: pairs and examples are mixed.
  """
  if isinstance(items, Table):
    return items
  kinds = {type(item) for item in items}
  if len(kinds) > 1:
    raise ValueError("pairs and examples cannot stand in one table")
  if kinds == {Example}:
    columns = [[x.prompt for x in items], [x.response for x in items]]
  else:
    names = ("prompt", "chosen", "rejected")
    columns = [[getattr(x, name) for x in items] for name in names]
  return from_columns([item.id for item in items], columns)


def from_columns(
  ids: Sequence[str], columns: Sequence[Sequence[Sequence[int]]]
) -> Table:
  """A table of the parts' token ids, one column a part.

  Args:
    ids: N ids.
    columns: P columns of N sequences of token ids.
  """
  count = len(ids)
  lengths = np.asarray(
    [[len(part) for part in column] for column in columns], np.int64
  ).reshape(len(columns), count)
  ends = np.cumsum(lengths.T.reshape(-1))
  flat = np.fromiter(
    (
      token
      for item in zip(*columns, strict=True)
      for part in item
      for token in part
    ),
    np.int32,
    count=int(ends[-1]) if count else 0,
  )
  starts = (ends - lengths.T.reshape(-1)).reshape(count, len(columns))
  return Table(tuple(ids), flat, starts, lengths.T.copy())


def join(tables: Iterable[Table]) -> Table:
  """The items of all tables, one table after the other.

  Raises:
    ValueError: pairs and examples are mixed.
  """
  tables = list(tables)
  if len({table.parts for table in tables}) > 1:
    raise ValueError("pairs and examples cannot stand in one table")
  if len(tables) == 1:
    # Without a copy of the tokens.
    return tables[0]
  offsets = np.cumsum([0, *(len(table.tokens) for table in tables)])
  return Table(
    tuple(itertools.chain.from_iterable(table.ids for table in tables)),
    np.concatenate([table.tokens for table in tables]),
    np.concatenate(
      [table.starts + offset for table, offset in zip(tables, offsets)]
    ),
    np.concatenate([table.lengths for table in tables]),
  )
