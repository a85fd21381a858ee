"""Tokenized pairs kept on disk, so that the same rows are tokenized once.

An entry is one safetensors file named by a hash of everything that makes its
ids: the rows' texts, the tokenizer, the rules and its lengths. It is written
whole or not at all, so that processes may write it at the same time, and it
carries a hash of its content, which every reading compares.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from dpo_jax.data import preferences, token_table, tokenization
from dpo_jax.data import tokenizer as tokenizer_lib
from dpo_jax.io import atomic, safetensors, strict_json

_log = logging.getLogger(__name__)

# Raise it when the form of an entry changes; tokenization.VERSION is for the
# rules.
FORMAT = 1

# The arrays of an entry, in the order of its hash.
_ARRAYS = {
  "lengths": np.dtype(np.int64),
  "id_lengths": np.dtype(np.int64),
  "tokens": np.dtype(np.int32),
  "cut": np.dtype(np.uint8),
  "ids": np.dtype(np.uint8),
}


def tokenize(
  directory: str | os.PathLike,
  tokenizer: tokenizer_lib.Tokenizer,
  rows: Sequence[preferences.Comparison],
  *,
  rules: tokenization.Rules,
  max_length: int,
  max_prompt_length: int,
  prompt_keeps: tokenization.Keep = "end",
) -> tokenization.Tokenized:
  """`tokenization.tokenize`, or what it gave before for the same arguments.

  A broken entry is named in a warning and made again.

  Args:
    directory: where entries are; made if it is missing. "" keeps none.
    tokenizer: the model's own.
    rows: comparisons in order.
    rules: as in `tokenization.tokenize`; so are the lengths and
      `prompt_keeps`.

  Raises:
    ValueError: as `tokenization.tokenize`, or an entry cannot be written.
  """
  settings = {
    "rules": rules,
    "max_length": max_length,
    "max_prompt_length": max_prompt_length,
    "prompt_keeps": prompt_keeps,
  }
  if not os.fspath(directory):
    return tokenization.tokenize(tokenizer, rows, **settings)
  tokenization.check_lengths(rules, max_length, max_prompt_length)
  key = settings | {
    "format": FORMAT,
    "rules": tokenization.VERSION,
    "tokenizer": tokenizer.fingerprint,
    "rows": _fingerprint(rows),
  }
  name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
  path = pathlib.Path(directory, f"tokens-{name[:32]}.safetensors")
  if path.exists():
    try:
      return _read(path, key)
    except (OSError, ValueError) as error:
      _log.warning("%s: %s; it is made again", path, error)
  with contextlib.ExitStack() as stack:
    # What cannot be written is found out before the minutes, not after.
    with _naming(directory):
      path.parent.mkdir(parents=True, exist_ok=True)
      temporary = stack.enter_context(atomic.replacing(path))
    done = tokenization.tokenize(tokenizer, rows, **settings)
    with _naming(directory):
      _write(temporary, done, key)
      stack.close()
  return done


@contextlib.contextmanager
def _naming(directory):
  try:
    yield
  except OSError as error:
    raise ValueError(
      f"tokenized rows cannot be kept in data.token_cache={directory}: {error};"
      " name a directory that can be written and has room, or '' to keep none"
    ) from error


def _fingerprint(rows: Iterable[preferences.Comparison]) -> str:
  """A hash of ids and texts, with their borders."""
  digest = hashlib.sha256()
  for row in rows:
    for text in (row.id, row.prompt, row.chosen, row.rejected):
      data = text.encode()
      digest.update(len(data).to_bytes(8, "little"))
      digest.update(data)
  return digest.hexdigest()


def _write(path, done: tokenization.Tokenized, key) -> None:
  table = done.table
  ids = [name.encode() for name in table.ids]
  arrays = {
    "lengths": table.lengths,
    "id_lengths": np.fromiter(map(len, ids), np.int64, len(ids)),
    "tokens": table.tokens,
    "cut": done.cut.astype(np.uint8),
    "ids": np.frombuffer(b"".join(ids), np.uint8),
  }
  about = json.dumps({"key": key, "counts": done.counts})
  safetensors.write(
    path,
    arrays,
    arrays.values(),
    {"about": about, "sha256": _digest(about, arrays)},
  )


def _read(path, key) -> tokenization.Tokenized:
  """The entry of a file.

  Raises:
    ValueError: the file is cut, changed, or not this key's.
  """
  arrays, metadata = safetensors.read(path)
  if set(arrays) != set(_ARRAYS):
    raise ValueError(f"holds {sorted(arrays)}, not tokenized pairs")
  for name, dtype in _ARRAYS.items():
    if arrays[name].dtype != dtype:
      raise ValueError(f"its {name} are {arrays[name].dtype}, not {dtype}")
  about = metadata.get("about", "")
  if metadata.get("sha256") != _digest(about, arrays):
    raise ValueError("its content is not what was written")
  about = strict_json.parse(about.encode())
  if about["key"] != key:
    raise ValueError("it belongs to other rows, tokenizer or lengths")
  lengths = arrays["lengths"]
  sizes = lengths.reshape(-1)
  ends = np.cumsum(arrays["id_lengths"]).tolist()
  joined = arrays["ids"].tobytes()
  table = token_table.Table(
    tuple(joined[a:b].decode() for a, b in zip([0, *ends], ends)),
    arrays["tokens"],
    (np.cumsum(sizes) - sizes).reshape(lengths.shape),
    lengths,
  )
  return tokenization.Tokenized(
    table, arrays["cut"].view(bool), about["counts"]
  )


def _digest(about: str, arrays) -> str:
  digest = hashlib.sha256(about.encode())
  for name, dtype in _ARRAYS.items():
    digest.update(f"|{name} {dtype} {arrays[name].shape}|".encode())
    digest.update(np.ascontiguousarray(arrays[name]))
  return digest.hexdigest()
