"""Mutations of valid files that know the form of what they change.

A reader refuses random bytes at the first one. So a valid file is parsed, some
of its values, fields or bytes are changed, and it is written again. Every
choice comes from one random generator.
"""

import copy
import gzip
import json

# Values that no field expects, or that are near to what it expects.
VALUES = (
  *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**64), 10**30, 0.5),
  *(-0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "x", "\0", "0", "1e9"),
  *("../../x", "/etc/passwd", "a\x1b[31mb\x07", "\ud800", "\u202ea\u2028b"),
  *("A" * 3000, "<|endoftext|>", "<script>", "| # `*_[x](y)$\\", "nan"),
  *("\n\nAssistant:", [], {}, [[]], [None], {"": None}, [1] * 50, ["a", {}]),
)
INSERTED = (
  *(b"\0", b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"'),
  *(b"\\", b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"1e999", b"9" * 5000),
  *(b"-", b"\\ud800", b"\\u0000", b"[" * 40, b"[" * 5000, b'{"a":' * 1200),
  *(b" " * 70, b"null", b"true"),
  b"version https://git-lfs.github.com/spec/v1\n",
)


def mutate(form, data, rng):
  """Wrong `data` of a form: "json", "lines", "gzip", "tensors", "bytes"."""
  return _FORMS[form](data, rng)


def _bytes(data, rng):
  data = bytearray(data)
  for _ in range(rng.randint(1, 3)):
    at = rng.randint(0, len(data))
    end = min(len(data), at + rng.choice((1, 2, 8, 200)))
    match rng.randint(0, 5):
      case 0 if at < len(data):
        data[at] ^= 1 << rng.randint(0, 7)
      case 1:
        del data[at:]
      case 2:
        del data[at:end]
      case 3:
        data[at:at] = data[at:end] * rng.choice((1, 3))
      case _:
        data[at:at] = rng.choice(INSERTED)
  return bytes(data)


def _json(data, rng):
  try:
    value = json.loads(data)
  except (ValueError, RecursionError):
    return _bytes(data, rng)
  value = copy.deepcopy(value)
  for _ in range(rng.randint(1, 3)):
    value = _changed(value, rng)
  text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
  if rng.random() < 0.1:
    text = text.replace("{", '{"r": 1, "r": 2, ', 1)
  data = text.encode("utf-8", "surrogatepass")
  return _bytes(data, rng) if rng.random() < 0.15 else data


def _changed(value, rng):
  """The value with one of those within removed, renamed, moved or replaced."""
  places = _places(value)
  if not places:
    return rng.choice(VALUES)
  parent, key = rng.choice(places)
  old = parent[key]
  match rng.randint(0, 6):
    case 0:
      del parent[key]
    case 1 if isinstance(parent, dict):
      name = rng.choice(("x", "", "\0", "__metadata__", key * 2))
      parent[name] = parent.pop(key)
    case 2:
      other, name = rng.choice(places)
      parent[key] = copy.deepcopy(other[name])
    case 3 if isinstance(old, int | float):
      factor, more = rng.choice((-1, 2, 10**9)), rng.choice((-1, 0, 1))
      parent[key] = old * factor + more
    case 4 if isinstance(old, str):
      at = rng.randint(0, len(old))
      parent[key] = f"{old[:at]}{rng.choice(VALUES)}{old[at:]}"
    case 5:
      parent[key] = [old]
    case _:
      parent[key] = copy.deepcopy(rng.choice(VALUES))
  return value


def _places(value):
  """(container, key) of every value within, at most the first thousands."""
  found, waiting = [], [value]
  while waiting and len(found) < 5000:
    item = waiting.pop()
    if isinstance(item, dict | list):
      keys = list(item) if isinstance(item, dict) else range(len(item))
      found += [(item, key) for key in keys]
      waiting += [item[key] for key in keys]
  return found


def _lines(data, rng):
  lines = data.split(b"\n")
  at = rng.randrange(len(lines))
  match rng.randint(0, 5):
    case 0:
      return _bytes(data, rng)
    case 1:
      lines[at:at] = [lines[at]] * rng.choice((1, 3))
    case _:
      lines[at] = _json(lines[at], rng)
  return b"\n".join(lines)


def _gzip(data, rng):
  if rng.random() < 0.5:
    return gzip.compress(_lines(gzip.decompress(data), rng), 1)
  return _bytes(data, rng)


def _tensors(data, rng):
  """Of a safetensors file: its header's length, its header, its arrays."""
  length = int.from_bytes(data[:8], "little")
  header, body = data[8 : 8 + length], data[8 + length :]
  match rng.randint(0, 5):
    case 0:
      return _bytes(data, rng)
    case 1:
      near = (0, 1, length - 1, length + 1)
      length = rng.choice((*near, 2**32, 2**63, 2**64 - 1))
    case 2:
      body = _bytes(body, rng)
    case _:
      header = _json(header, rng)
      length = len(header)
  return length.to_bytes(8, "little") + header + body


_FORMS = {
  "bytes": _bytes,
  "json": _json,
  "lines": _lines,
  "gzip": _gzip,
  "tensors": _tensors,
}
