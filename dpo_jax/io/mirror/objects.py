"""The objects of a bucket of Google Cloud Storage, read and written.

An object is there whole or not at all, and a write may ask that the object is
still the one that was read, which is all that the rest is built on: there are
neither locks nor renames. tensorstore speaks to the bucket; it takes
credentials from GOOGLE_APPLICATION_CREDENTIALS, from gcloud's own file, or
from the machine's service account, and tries again by itself what a server
answers with 429 or 5xx, and connections that break.

TENSORSTORE_GCS_HTTP_URL names another server than Google's.
"""

import re
from typing import Any

# An object that moves more slowly than this has failed.
_BYTES_PER_S = 2**20
_PATIENCE_S = 60


class Failed(Exception):
  """A bucket did not do what it was asked, after a few tries."""


def split(address: str) -> tuple[str, str]:
  """The bucket and the path of gs://bucket/path.

  Raises:
    ValueError: it is no such address.
  """
  found = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,220})/(.+)", address)
  path = found[2].rstrip("/") if found else ""
  plain = all(
    part not in ("", ".", "..") and part.isprintable()
    for part in path.split("/")
  )
  if not found or not plain or len(path.encode()) > 512:
    raise ValueError(f"{address!r} must be gs://bucket/path")
  return found[1], path


class Store:
  """The objects below gs://bucket/path, by their names there.

  Every method raises `Failed` when the bucket cannot be reached or refuses.
  """

  def __init__(self, address: str, tries: int = 4):
    """`tries`: how often a request is sent at most, at growing distances."""
    import tensorstore

    self.address = address.rstrip("/")
    bucket, path = split(address)
    self._kept = tensorstore.KvStore.open(
      {
        "driver": "gcs",
        "bucket": bucket,
        "path": f"{path}/",
        "context": {
          "gcs_request_retries": {
            "max_retries": tries,
            "initial_delay": "500ms",
            "max_delay": "8s",
          }
        },
      }
    ).result()

  def read(self, name: str) -> tuple[bytes | None, bytes]:
    """An object's content, None if there is none, and its generation."""
    found = self._wait(self._kept.read(name), name, 2**30)
    value = found.value if found.state == "value" else None
    return value, found.stamp.generation

  def write(self, name: str, content: bytes) -> None:
    """Puts an object, whatever is there."""
    self._wait(self._kept.write(name, content), name, len(content))

  def swap(
    self, name: str, content: bytes | None, generation: bytes
  ) -> bytes | None:
    """Puts an object, or deletes it, if it is still of a generation.

    Returns:
      Its new generation; None if it was another one, and nothing was done. A
      write whose answer was lost, and that was sent again, looks like that too.
    """
    made = self._wait(
      self._kept.write(name, content, if_equal=generation),
      name,
      len(content or b""),
    )
    return made.generation or None

  def delete(self, name: str) -> None:
    self._wait(self._kept.write(name, None), name, 0)

  def names(self, there: str = "") -> list[str]:
    """The names of all objects, among which `there`, if given, must be.

    Of a bucket that may not be listed tensorstore says that it is empty.
    """
    names = [name.decode() for name in self._wait(self._kept.list(), "", 0)]
    if there and there not in names:
      raise Failed(
        f"{self.address} holds {there} but its objects were not listed: they"
        " need the permission storage.objects.list"
      )
    return sorted(names)

  def _wait(self, future: Any, name: str, size: int) -> Any:
    try:
      return future.result(timeout=_PATIENCE_S + size / _BYTES_PER_S)
    # tensorstore raises ValueError, TimeoutError and others, as gRPC's codes.
    except Exception as error:
      why = str(error).partition("[")[0].strip() or type(error).__name__
      raise Failed(f"{self.address}/{name}: {why}") from error
