"""SHA-256 of contents."""

import hashlib
import os


def content_hash(*parts: str) -> str:
  """Of texts, hex; a length prefix keeps each part from running into the next.

  Other prefixes are in use where ids and fingerprints are already on disk: in
  `preferences`, `token_table` and `token_cache`.
  """
  digest = hashlib.sha256()
  for part in parts:
    data = part.encode()
    digest.update(b"%d:" % len(data))
    digest.update(data)
  return digest.hexdigest()


def file_hash(path: str | os.PathLike) -> str:
  """Of a file's bytes, hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
