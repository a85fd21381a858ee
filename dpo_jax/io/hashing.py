"""SHA-256 of contents."""

import hashlib
import os


def content_hash(*parts: str) -> str:
  """SHA-256 of texts, hex, each with a length prefix."""
  digest = hashlib.sha256()
  for part in parts:
    data = part.encode()
    digest.update(b"%d:" % len(data))
    digest.update(data)
  return digest.hexdigest()


def file_hash(path: str | os.PathLike) -> str:
  """SHA-256 of a file's bytes, hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
