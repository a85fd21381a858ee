"""Safetensors: read slice by slice, written tensor by tensor.

Weights are read from no other format, since pickles can run code. The library's
`save_file` needs all tensors in memory, and our layout is a transpose of the
stored one, so that it would hold a model twice; `write` holds one tensor.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors

from dpo_jax.io import strict_json

# NumPy's types in a header; weights are of the first three.
_DTYPES = {
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
  "int64": "I64",
  "int32": "I32",
  "uint8": "U8",
}
WEIGHT_DTYPES = tuple(_DTYPES.values())[:3]


def open_file(path: pathlib.Path) -> Any:
  """A `safetensors.safe_open` of NumPy arrays.

  Raises:
    ValueError: the file is cut, its header does not describe it, or it is a
      Git LFS pointer.
  """
  strict_json.refuse_pointer(path)
  try:
    # The library checks every offset, shape and type against the file's size.
    return safetensors.safe_open(path, framework="np", backend="pread")
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f"{path} is not a whole safetensors file ({error}); fetch or export it"
      " again"
    ) from error


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """All arrays of a file by name, and its metadata; errors as `open_file`."""
  with open_file(path) as file:
    try:
      return file.get_tensors(), file.metadata() or {}
    # NumPy has no such type.
    except (safetensors.SafetensorError, TypeError, AttributeError) as error:
      raise ValueError(f"{path} cannot be read ({error})") from error


def find(directory: pathlib.Path, stem: str) -> dict[str, Any]:
  """Tensors of a directory by name, from one file or from shards.

  Args:
    directory: of `<stem>.safetensors` or `<stem>.safetensors.index.json`; with
      both, the single file is read, as by transformers.
    stem: "model" or "adapter_model".

  Returns:
    A slice of the safetensors library for each, read where it is indexed.

  Raises:
    ValueError: there are no safetensors, a file is cut, or index and shards
      name different tensors.
  """
  single = directory / f"{stem}.safetensors"
  index = directory / f"{stem}.safetensors.index.json"
  if single.is_file():
    return _slices(single)
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


def _slices(path: pathlib.Path) -> dict[str, Any]:
  file = open_file(path)
  return {name: file.get_slice(name) for name in file.offset_keys()}


def _sharded(index: pathlib.Path) -> dict[str, Any]:
  names = strict_json.read_object(index).get("weight_map")
  if not isinstance(names, dict) or not names:
    raise ValueError(f"{index} has no weight_map")
  tensors: dict[str, Any] = {}
  for shard in sorted(set(names.values()), key=str):
    if not isinstance(shard, str) or pathlib.Path(shard).name != shard:
      raise ValueError(f"{index} names {shard!r}, which is no file next to it")
    if not (index.parent / shard).is_file():
      raise ValueError(f"{index} names {shard}, which is missing; fetch it")
    found = _slices(index.parent / shard)
    listed = {name for name, file in names.items() if file == shard}
    if listed != set(found):
      raise ValueError(
        f"{index} and {shard} disagree about"
        f" {sorted(listed.symmetric_difference(found))}; fetch both again"
      )
    tensors |= found
  return tensors


def write(
  path: pathlib.Path,
  shapes: Mapping[str, Any],
  arrays: Iterable[np.ndarray],
  metadata: dict[str, str] | None = None,
) -> None:
  """Writes a file tensor by tensor; the caller syncs it.

  Args:
    path: the file.
    shapes: `dtype` and `shape` of each tensor by name.
    arrays: their values in the same order; one is held at a time.
    metadata: strings of the header.

  Raises:
    ValueError: an array has another shape or type, or holds NaN or infinity.
  """
  # transformers 4 reads only files that are marked as torch's.
  header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
  end = 0
  for name, leaf in shapes.items():
    dtype = np.dtype(leaf.dtype)
    start, end = end, end + dtype.itemsize * math.prod(leaf.shape)
    header[name] = {
      "dtype": _DTYPES[dtype.name],
      "shape": list(leaf.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, leaf), array in zip(shapes.items(), arrays, strict=True):
      if array.dtype != leaf.dtype or array.shape != tuple(leaf.shape):
        raise ValueError(
          f"{name} is {array.dtype}{array.shape}, not {leaf.dtype}{leaf.shape}"
        )
      if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity; it is not written")
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
