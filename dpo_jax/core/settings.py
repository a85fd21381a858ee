"""Typed dataclasses from plain dicts, for configs and for rows of files.

Settings dataclasses have no defaults: every value is in a file of configs/.
`build` checks types; a dataclass's `__post_init__` calls `check` for the ranges
of single fields, and then compares fields with each other.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

# Below it, a float32 temperature is greedy decoding with rounding errors.
LOWEST_TEMPERATURE = 1e-4

# Ranges by field name, or by Class.field where names have two meanings.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
  (
    "be at least 1",
    lambda x: x >= 1,
    """
    LoraConfig.rank attention_block logit_chunk shapes batch_size microbatches
    epochs eval_batch_size heartbeat_s samples_per_prompt max_prompt_tokens
    max_new_tokens length_multiple prefill_tokens chunk concurrency max_tokens
    """,
  ),
  # -1 is the base model.
  ("be at least -1", lambda x: x >= -1, "Request.adapter"),
  (
    "be positive and finite",
    lambda x: 0 < x < math.inf,
    """
    LoraConfig.alpha weight grace_s beta learning_rate eps clip_norm cache_gib
    timeout_s batch_poll_s
    """,
  ),
  ("be finite and at least 1", lambda x: 1 <= x < math.inf, "min_score_ratio"),
  (
    "be in [0, 1)",
    lambda x: 0 <= x < 1,
    "LoraConfig.dropout b1 b2 warmup_ratio",
  ),
  ("be in [0, 1]", lambda x: 0 <= x <= 1, "aa_alpha gold_floor ld_alpha"),
  ("be in (0, 1]", lambda x: 0 < x <= 1, "top_p"),
  ("be in [0, 0.5)", lambda x: 0 <= x < 0.5, "label_smoothing"),
  ("be in [0.5, 1]", lambda x: 0.5 <= x <= 1, "first_slot_limit"),
  ("be 0 to 20", lambda x: 0 <= x <= 20, "top_logprobs"),
  # jax.random.key keeps 32 bits: 2**32 would be 0 again.
  ("be in [0, 2**32)", lambda x: 0 <= x < 2**32, "seed stream sample_id"),
  (
    f"be finite and at least {LOWEST_TEMPERATURE}, or 0 for greedy decoding",
    lambda x: x == 0 or LOWEST_TEMPERATURE <= x < math.inf,
    "temperature temperatures",
  ),
  # All other numbers, by their type.
  (
    "not be negative",
    lambda x: x >= 0,
    "int SamplingSettings.batch_size Engine.batch_size",
  ),
  (
    "be finite and not negative",
    lambda x: 0 <= x < math.inf,
    "float ServerSettings.temperature",
  ),
)
RANGES = {
  name: (must, holds) for must, holds, names in _RULES for name in names.split()
}


def check(settings: Any, prefix: str = "") -> None:
  """Raises ValueError for the first number of a dataclass out of its range.

  `prefix`, such as "loss.", precedes the field's name in the message.
  """
  for name, value in vars(settings).items():
    own = f"{type(settings).__name__}.{name}"
    for item in value if isinstance(value, tuple) else (value,):
      kind = type(item).__name__
      rule = RANGES.get(own) or RANGES.get(name) or RANGES.get(kind)
      if rule and not rule[1](item):
        raise ValueError(f"{prefix}{name}={item} must {rule[0]}")


def build(cls, values: Mapping[str, Any], name: str = "config"):
  """Dataclass `cls` from a mapping called `name` in error messages.

  Fields may be bool, int, float, str, tuples of one type, `dict[str, X]`,
  literals, optional values and dataclasses.

  Raises:
    ValueError: a field is unknown (with the closest name), missing, of another
      type, or not finite.
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
  """Types of the fields in order."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def to_dict(settings: Any) -> dict[str, Any]:
  """Settings as a JSON-serializable dict, the inverse of `build`."""
  return dataclasses.asdict(settings)


def differing(left: Any, right: Any, name: str = "config") -> list[str]:
  """A line "config.a.b: 1 -> 2" for each value that differs in two dicts."""
  if isinstance(left, Mapping) and isinstance(right, Mapping):
    return [
      line
      for key in sorted({*left, *right})
      for line in differing(left.get(key), right.get(key), f"{name}.{key}")
    ]
  sequences = isinstance(left, list | tuple) and isinstance(right, list | tuple)
  same = [*left] == [*right] if sequences else left == right
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
  # float() overflows beyond.
  if hint is float and type(value) is int and abs(value) < 2**1023:
    value = float(value)
  # Not isinstance: True is an int, and np.float64 a float.
  if type(value) is not hint:
    raise ValueError(
      f"{name}={value!r:.80} must be {hint.__name__}, not"
      f" {type(value).__name__}"
    )
  if hint is float and not math.isfinite(value):
    raise ValueError(f"{name}={value} must be finite")
  return value
