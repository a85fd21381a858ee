"""Mutations of valid files that know the form of what they change.

A reader refuses random bytes at the first one. So a valid file is parsed, some
of its values or fields are changed, and it is written again. Every choice comes
from one random generator.
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
NAMES = ("x", "", "\0", "__metadata__")
INSERTED = (
  *(b"", b"\0", b"\n", b"\r\n", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80"),
  *(b"\\", b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"1e999", b"9" * 5000),
  *(b'"', b"-", b"\\ud800", b"[" * 5000, b'{"a":' * 1200, b" " * 70, b"null"),
  b"version https://git-lfs.github.com/spec/v1\n",
)


def mutate(form, data, rng):
  """Wrong `data` of a form: "json", "lines", "gzip", "tensors", "bytes"."""
  if rng.random() < 0.25:
    return _bytes(data, rng)
  match form:
    case "json":
      return _json(data, rng)
    case "lines":
      lines = data.split(b"\n")
      at = rng.randrange(len(lines))
      lines[at : at + 1] = [_json(lines[at], rng)] * rng.choice((1, 2))
      return b"\n".join(lines)
    case "gzip":
      return gzip.compress(mutate("lines", gzip.decompress(data), rng), 1)
    case "tensors":
      end = 8 + int.from_bytes(data[:8], "little")
      header = _json(data[8:end], rng)
      length = rng.choice((len(header), len(header), end, 0, 2**32, 2**64 - 1))
      return length.to_bytes(8, "little") + header + data[end:]
  return _bytes(data, rng)


def _bytes(data, rng):
  """Some bytes replaced, removed, repeated or cut off."""
  at = rng.randint(0, len(data))
  end = min(len(data), at + rng.choice((0, 1, 8, 200, len(data))))
  new = rng.choice((data[at:end] * 2, bytes([rng.randrange(256)]), *INSERTED))
  return data[:at] + new + data[end:]


def _json(data, rng):
  """Some values within removed, renamed, moved or replaced."""
  try:
    value = json.loads(data)
  except (ValueError, RecursionError):
    return _bytes(data, rng)
  for _ in range(rng.randint(1, 3)):
    places = [*_places(value)]
    if not places:
      value = rng.choice(VALUES)
      continue
    (parent, key), (other, name) = rng.choice(places), rng.choice(places)
    match rng.randint(0, 4):
      case 0:
        del parent[key]
      case 1 if isinstance(parent, dict):
        parent[rng.choice(NAMES)] = parent.pop(key)
      case 2:
        parent[key] = copy.deepcopy(other[name])
      case 3:
        parent[key] = [parent[key]]
      case _:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
  text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
  return text.encode("utf-8", "surrogatepass")


def _places(value):
  """(container, key) of every value within."""
  if isinstance(value, dict | list):
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
      yield value, key
      yield from _places(value[key])
