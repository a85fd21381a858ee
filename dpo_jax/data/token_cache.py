"""On-disk cache of tokenized pairs.

An entry is one safetensors file named by a hash of everything that its ids
depend on: texts, tokenizer, rules and lengths. It is written atomically, so
that processes may share a directory, and holds a hash of its content, which is
checked when it is read.
"""

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

# Increase it when an entry's form changes; tokenization.VERSION is for its ids.
FORMAT = 2


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
  """`tokenization.tokenize`, from the cache if it has the same arguments.

  A damaged entry is named in a warning and written again; so is a directory
  that cannot be written, and nothing is kept.

  Args:
    directory: of the entries, created if it is missing; "" for no cache.
    tokenizer: the model's own.
    rows: comparisons in order.
    rules: as in `tokenization.tokenize`, like the lengths and `prompt_keeps`.

  Raises:
    ValueError: as `tokenization.tokenize`.
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
    "version": tokenization.VERSION,
    "tokenizer": tokenizer.fingerprint,
    "rows": _fingerprint(rows),
  }
  name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
  path = pathlib.Path(directory, f"tokens-{name[:32]}.safetensors").expanduser()
  if path.exists():
    try:
      return _read(path, key)
    except (OSError, ValueError) as error:
      _log.warning("%s: %s; it is written again", path, error)
  done = tokenization.tokenize(tokenizer, rows, **settings)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as temporary:
      _write(temporary, done, key)
  except OSError as error:
    _log.warning(
      "data.token_cache=%s cannot be written: %s; tokens are not kept",
      directory,
      error,
    )
  return done


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
  arrays = {
    "lengths": done.table.lengths,
    "tokens": done.table.tokens,
    "cut": done.cut.astype(np.uint8),
    "ids": np.frombuffer("\n".join(done.table.ids).encode(), np.uint8),
  }
  about = json.dumps({"key": key, "counts": done.counts})
  metadata = {"about": about, "sha256": _digest(about, arrays)}
  safetensors.write(path, arrays, arrays.values(), metadata)


def _read(path, key) -> tokenization.Tokenized:
  """An entry's content.

  Raises:
    ValueError: the file is truncated, changed, or of another key.
  """
  arrays, metadata = safetensors.read(path)
  about = metadata.get("about", "")
  if metadata.get("sha256") != _digest(about, arrays):
    raise ValueError("its content is not what was written")
  about = strict_json.parse(about.encode())
  if about["key"] != key:
    raise ValueError("it belongs to other rows, tokenizer or lengths")
  lengths = arrays["lengths"]
  ids = arrays["ids"].tobytes().decode().split("\n")
  table = token_table.Table(
    tuple(ids[: len(lengths)]),
    arrays["tokens"],
    token_table.contiguous_starts(lengths),
    lengths,
  )
  return tokenization.Tokenized(
    table, arrays["cut"].view(bool), about["counts"]
  )


def _digest(about: str, arrays) -> str:
  """A hash of names, types, shapes and values."""
  digest = hashlib.sha256(about.encode())
  for name, array in sorted(arrays.items()):
    digest.update(f"|{name} {array.dtype} {array.shape}|".encode())
    digest.update(np.ascontiguousarray(array))
  return digest.hexdigest()
