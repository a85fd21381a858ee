"""Safetensors on disk: tensors that are mapped, not loaded.

A file is eight bytes of header length, a JSON header and the raw tensors, so a
tensor's values can be looked at in place, slice by slice, and a file can be
written tensor by tensor: neither way needs the whole model in memory. The
safetensors library checks every header before we believe it. Nothing else is
ever opened: pickled weights can run code.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from dpo_jax.io import strict_json

# Of a header; Pythia 12B's has 60 kB, and the library would take 100 MB.
MAX_HEADER_BYTES = 16 * 2**20

# The value types that weights come in, by their names in a header.
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
# What else is kept in this format: never weights.
INTEGERS = {
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor's values lie: a file and the first byte in it."""

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  def view(self) -> np.ndarray:
    """The values, read from the file only where they are touched."""
    dtype = (DTYPES | INTEGERS)[self.dtype]
    return np.memmap(self.file, dtype, "r", self.offset, self.shape)


def find(directory: pathlib.Path, stem: str) -> dict[str, Tensor]:
  """The tensors of a directory by name, from one file or from shards.

  Args:
    directory: where `<stem>.safetensors` or `<stem>.safetensors.index.json`
      is; the single file is taken if there are both, as transformers does.
    stem: "model" or "adapter_model".

  Raises:
    ValueError: there are no safetensors, a file is cut or its header lies, or
      the index and the shards do not name the same tensors.
  """
  single = directory / f"{stem}.safetensors"
  index = directory / f"{stem}.safetensors.index.json"
  if single.is_file():
    return header(single)[0]
  if index.is_file():
    return _sharded(index)
  pickled = sorted(
    path.name
    for path in directory.iterdir()
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
  )
  found = f" but {', '.join(pickled)}" if pickled else ""
  raise ValueError(
    f"{directory} holds no {single.name}{found}; only safetensors are read."
    " To convert other weights, where you trust them:"
    " transformers.AutoModelForCausalLM.from_pretrained(OLD)"
    ".save_pretrained(NEW)"
  )


def header(
  path: pathlib.Path,
) -> tuple[dict[str, Tensor], dict[str, str]]:
  """The tensors of one file by name, and its metadata.

  Raises:
    ValueError: the file is cut, its header does not describe it or is larger
      than `MAX_HEADER_BYTES`, or it is a pointer of git-LFS.
  """
  strict_json.refuse_pointer(path)
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
  if MAX_HEADER_BYTES < length < path.stat().st_size:
    raise ValueError(
      f"{path} has a header of {length} bytes, more than {MAX_HEADER_BYTES}:"
      " no model that is computed here needs one"
    )
  try:
    # The library compares the header's length, every offset, shape and type
    # with the file's size, and allocates nothing for the tensors.
    with safetensors.safe_open(path, framework="np") as file:
      metadata = file.metadata() or {}
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f"{path} is not a whole safetensors file ({error}); fetch or export it"
      " again"
    ) from error
  with open(path, "rb") as file:
    file.seek(8)
    entries = strict_json.parse(file.read(length))
  entries.pop("__metadata__", None)
  tensors = {
    name: Tensor(
      path,
      entry["dtype"],
      tuple(entry["shape"]),
      8 + length + entry["data_offsets"][0],
    )
    for name, entry in entries.items()
  }
  return tensors, metadata


def write(
  path: pathlib.Path,
  entries: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
  arrays: Iterable[np.ndarray],
  metadata: dict[str, str] | None = None,
) -> None:
  """Writes one file, a tensor at a time, and flushes it to the disk.

  Args:
    path: the file.
    entries: name, value type and shape of each tensor.
    arrays: their values in the same order; one is held at a time.
    metadata: strings kept in the header.

  Raises:
    ValueError: an array is not what its entry says, or holds NaN or infinity.
  """
  names = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()}
  # "pt" is how torch's own files are marked; transformers 4 insists on it.
  described: dict[str, Any] = {
    "__metadata__": {"format": "pt", **(metadata or {})}
  }
  end = 0
  for name, dtype, shape in entries:
    start, end = end, end + dtype.itemsize * int(np.prod(shape))
    described[name] = {
      "dtype": names[dtype],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(described, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, dtype, shape), array in zip(entries, arrays, strict=True):
      if array.dtype != dtype or array.shape != shape:
        raise ValueError(
          f"{name} is {array.dtype}{array.shape}, not {dtype}{shape}"
        )
      if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity; it is not written")
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    file.flush()
    os.fsync(file.fileno())


def _sharded(index: pathlib.Path) -> dict[str, Tensor]:
  names = strict_json.read_object(index).get("weight_map")
  if not isinstance(names, dict) or not names:
    raise ValueError(f"{index} has no weight_map")
  tensors: dict[str, Tensor] = {}
  for shard in sorted(set(names.values()), key=str):
    if not isinstance(shard, str) or pathlib.Path(shard).name != shard:
      raise ValueError(f"{index} names {shard!r}, which is no file beside it")
    if not (index.parent / shard).is_file():
      raise ValueError(f"{index} names {shard}, which is missing; fetch it")
    found = header(index.parent / shard)[0]
    listed = {name for name, file in names.items() if file == shard}
    if listed != set(found):
      raise ValueError(
        f"{index} and {shard} disagree about"
        f" {sorted(listed.symmetric_difference(found))}; fetch both again"
      )
    tensors |= found
  return tensors
