"""Columnar token ids: one array of tokens, and starts and lengths of parts.

An item is a prompt with one response (an example to fine-tune on) or two (a
pair). Selecting and repeating items copies starts and lengths, never tokens.
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
  """One preference pair as token ids; responses end with EOS unless cut."""

  id: str
  prompt: tuple[int, ...]
  chosen: tuple[int, ...]
  rejected: tuple[int, ...]


Item = Example | Pair


@dataclasses.dataclass(frozen=True, eq=False)
class Table(collections.abc.Sequence):
  """Items by column; a sequence of `Pair`s or of `Example`s.

  Letters: N items of P parts, 2 of an example, 3 of a pair.

  Attributes:
    ids: the items' ids.
    tokens: the token ids of all parts, int32, in any order.
    starts: first token of each part, int64 [N, P].
    lengths: tokens of each part, int64 [N, P].
    desirable: of labeled responses, bool [N]; None of other items.
  """

  ids: tuple[str, ...]
  tokens: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  desirable: np.ndarray | None = None

  @property
  def parts(self) -> int:
    return self.starts.shape[1]

  def __len__(self) -> int:
    return len(self.ids)

  def __getitem__(self, index):
    if not -len(self) <= index < len(self):
      raise IndexError(f"item {index} of {len(self)}")
    kind = Pair if self.parts == 3 else Example
    return kind(
      self.ids[index], *(self._part(index, p) for p in range(self.parts))
    )

  def take(self, indices: Sequence[int] | np.ndarray) -> "Table":
    """The items at `indices`, in their order; tokens are shared."""
    indices = np.asarray(indices, np.int64)
    return Table(
      tuple(self.ids[i] for i in indices),
      self.tokens,
      self.starts[indices],
      self.lengths[indices],
      None if self.desirable is None else self.desirable[indices],
    )

  def examples(self, responses: Literal["chosen", "both"]) -> "Table":
    """Examples of each pair's chosen response, or of both, chosen first."""
    columns = [[0, 1]] if responses == "chosen" else [[0, 1], [0, 2]]
    return Table(
      tuple(name for name in self.ids for _ in columns),
      self.tokens,
      self.starts[:, columns].reshape(-1, 2),
      self.lengths[:, columns].reshape(-1, 2),
    )

  def fingerprint(self) -> str:
    """Sixteen hex digits: hash of ids and tokens in the items' order."""
    digest = hashlib.sha256()
    for i, name in enumerate(self.ids):
      data = name.encode()
      digest.update(b"%d:%s" % (len(data), data))
      for p in range(self.parts):
        part = self.tokens[self._where(i, p)]
        digest.update(b"%d:" % len(part))
        digest.update(np.ascontiguousarray(part, "<i4"))
    if self.desirable is not None:
      digest.update(self.desirable.tobytes())
    return digest.hexdigest()[:16]

  def _where(self, index: int, part: int) -> slice:
    start = self.starts[index, part]
    return slice(start, start + self.lengths[index, part])

  def _part(self, index: int, part: int) -> tuple[int, ...]:
    return tuple(self.tokens[self._where(index, part)].tolist())


def from_items(items: Sequence[Item]) -> Table:
  """The table of items; a table is returned unchanged.

  Raises:
    ValueError: pairs and examples are mixed.
  """
  if isinstance(items, Table):
    return items
  if len({type(item) for item in items}) > 1:
    raise ValueError("a table holds either pairs or examples, not both")
  parts = [dataclasses.astuple(item)[1:] for item in items]
  count = len(parts[0]) if parts else 3
  lengths = np.array([[len(part) for part in row] for row in parts], np.int64)
  lengths = lengths.reshape(-1, count)
  tokens = itertools.chain.from_iterable(itertools.chain.from_iterable(parts))
  return Table(
    tuple(item.id for item in items),
    np.fromiter(tokens, np.int32, int(lengths.sum())),
    contiguous_starts(lengths),
    lengths,
  )


def contiguous_starts(lengths: np.ndarray) -> np.ndarray:
  """Starts of parts whose tokens follow each other, [N, P]."""
  sizes = lengths.reshape(-1)
  return (np.cumsum(sizes) - sizes).reshape(lengths.shape)


def join(tables: Iterable[Table]) -> Table:
  """The items of all tables, one table after the other.

  Raises:
    ValueError: pairs and examples are mixed.
  """
  tables = list(tables)
  if len({table.parts for table in tables}) > 1:
    raise ValueError("a table holds either pairs or examples, not both")
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
    None
    if tables[0].desirable is None
    else np.concatenate([table.desirable for table in tables]),
  )
