"""Plain dicts into typed dataclasses: settings, and rows of files.

A settings dataclass has no defaults: every value stands, with its comment, in
a file of configs/. Types are checked here; what a type cannot say is checked
in the dataclass's own `__post_init__`.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


def build(cls, values: Mapping[str, Any], name: str = "config"):
  """A `cls` from a mapping, nested dataclasses included.

  Args:
    cls: a dataclass; fields may be bool, int, float, str, tuples of one type,
      `dict[str, X]`, literals, optional values and further dataclasses.
    values: one entry for each field.
    name: how error messages call the mapping, such as "config.data".

  Raises:
    ValueError: a field is unknown (the nearest name is given), missing, of
      another type, or not finite.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f"{name} must be a dict, not {values!r:.80}")
  hints = _hints(cls)
  for key in values:
    if key not in hints:
      near = difflib.get_close_matches(str(key)[:80], hints, n=1)
      hint = f"did you mean {near[0]!r}?" if near else f"known: {[*hints]}"
      raise ValueError(f"{name} has no field {key!r:.80}; {hint}")
  for field in hints:
    if field not in values:
      raise ValueError(f"{name} lacks the field {field!r}")
  return cls(
    **{
      field: _convert(hint, values[field], f"{name}.{field}")
      for field, hint in hints.items()
    }
  )


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  """The fields' types in their order."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def to_dict(settings: Any) -> dict[str, Any]:
  """The settings as a dict that JSON can hold; `build` reads it back."""
  return dataclasses.asdict(settings)


def differing(left: Any, right: Any, name: str = "config") -> list[str]:
  """Lines "config.a.b: 1 -> 2" for every value in which two dicts differ."""
  if isinstance(left, Mapping) and isinstance(right, Mapping):
    keys = sorted({*left, *right})
    return [
      line
      for key in keys
      for line in differing(left.get(key), right.get(key), f"{name}.{key}")
    ]
  if isinstance(left, list | tuple) and isinstance(right, list | tuple):
    same = list(left) == list(right)
  else:
    same = left == right
  return [] if same else [f"{name}: {left!r} -> {right!r}"]


def _convert(hint: Any, value: Any, name: str) -> Any:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    if value is None and types.NoneType in arguments:
      return None
    (hint,) = (a for a in arguments if a is not types.NoneType)
    return _convert(hint, value, name)
  if dataclasses.is_dataclass(hint):
    return build(hint, value, name)
  if origin is typing.Literal:
    if value not in arguments:
      raise ValueError(f"{name}={value!r:.80} must be one of {list(arguments)}")
    return value
  if origin is tuple:
    if isinstance(value, str) or not isinstance(value, list | tuple):
      raise ValueError(f"{name}={value!r:.80} must be a tuple")
    return tuple(
      _convert(arguments[0], item, f"{name}[{i}]")
      for i, item in enumerate(value)
    )
  if origin is dict:
    if not isinstance(value, Mapping):
      raise ValueError(f"{name}={value!r:.80} must be a dict")
    return {
      key: _convert(arguments[1], item, f"{name}.{key}")
      for key, item in value.items()
    }
  return _scalar(hint, value, name)


def _scalar(hint: type, value: Any, name: str) -> Any:
  # Beyond, `float` overflows.
  if hint is float and type(value) is int and abs(value) < 2**1023:
    value = float(value)
  # `type` and not isinstance: True is an int, and np.float64 is a float.
  if type(value) is not hint:
    raise ValueError(
      f"{name}={value!r:.80} must be {hint.__name__}, not"
      f" {type(value).__name__}"
    )
  if hint is float and not math.isfinite(value):
    raise ValueError(f"{name}={value} must be finite")
  return value
