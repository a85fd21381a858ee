"""Plain dicts into typed dataclasses: settings, and rows of files.

A settings dataclass has no defaults: every value stands, with its comment, in
a file of configs/. `build` checks types. The dataclass's own `__post_init__`
calls `check`, which holds single fields to one table of ranges, and then checks
fields against each other.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

# Below this a float32 temperature only adds rounding to what greedy gives.
LOWEST_TEMPERATURE = 1e-4


@dataclasses.dataclass(frozen=True)
class _Range:
  must: str
  holds: Callable[[Any], bool]


_COUNT = _Range("be at least 1", lambda x: x >= 1)
_NATURAL = _Range("not be negative", lambda x: x >= 0)
_POSITIVE = _Range("be positive and finite", lambda x: 0 < x < math.inf)
_AMOUNT = _Range("be finite and not negative", lambda x: 0 <= x < math.inf)
_RATIO = _Range("be finite and at least 1", lambda x: 1 <= x < math.inf)
_BELOW_ONE = _Range("be in [0, 1)", lambda x: 0 <= x < 1)
_SHARE = _Range("be in [0, 1]", lambda x: 0 <= x <= 1)
# jax.random.key keeps 32 bits: 2**32 would be 0 again.
_UINT32 = _Range("be in [0, 2**32)", lambda x: 0 <= x < 2**32)
_TEMPERATURE = _Range(
  f"be finite and at least {LOWEST_TEMPERATURE}, or 0 for greedy decoding",
  lambda x: x == 0 or LOWEST_TEMPERATURE <= x < math.inf,
)

# By the field's name, or Class.field where a name has two meanings.
RANGES = {
  # Models.
  "LoraConfig.rank": _COUNT,
  "LoraSettings.rank": _NATURAL,
  "LoraConfig.alpha": _POSITIVE,
  "LoraConfig.dropout": _BELOW_ONE,
  "attention_block": _COUNT,
  "logit_chunk": _COUNT,
  "logit_words": _NATURAL,
  # Data.
  "max_train": _NATURAL,
  "max_eval": _NATURAL,
  "shapes": _COUNT,
  "weight": _POSITIVE,
  "min_score_ratio": _RATIO,
  "max_pairs_per_prompt": _NATURAL,
  "max_turns": _NATURAL,
  "min_response_chars": _NATURAL,
  "max_response_chars": _NATURAL,
  "max_prompt_chars": _NATURAL,
  "skip_bad": _NATURAL,
  "ScoreSettings.max_length": _NATURAL,
  "ScoreSettings.max_prompt_length": _NATURAL,
  # Training.
  "seed": _UINT32,
  "batch_size": _COUNT,
  "microbatches": _COUNT,
  "epochs": _COUNT,
  "max_steps": _NATURAL,
  "eval_every": _NATURAL,
  "eval_batch_size": _COUNT,
  "checkpoint_every": _NATURAL,
  "keep_checkpoints": _NATURAL,
  "keep_every": _NATURAL,
  "keep_best": _NATURAL,
  "grace_s": _POSITIVE,
  "heartbeat_s": _COUNT,
  "max_skipped": _NATURAL,
  "beta": _POSITIVE,
  "label_smoothing": _Range("be in [0, 0.5)", lambda x: 0 <= x < 0.5),
  "learning_rate": _POSITIVE,
  "warmup_steps": _NATURAL,
  "weight_decay": _AMOUNT,
  "b1": _BELOW_ONE,
  "b2": _BELOW_ONE,
  "eps": _POSITIVE,
  "clip_norm": _POSITIVE,
  # Sampling.
  "prompts": _NATURAL,
  "every": _NATURAL,
  "samples_per_prompt": _COUNT,
  "max_prompt_tokens": _COUNT,
  "max_new_tokens": _COUNT,
  "temperature": _TEMPERATURE,
  "temperatures": _TEMPERATURE,
  "top_k": _NATURAL,
  "top_p": _Range("be in (0, 1]", lambda x: 0 < x <= 1),
  "stream": _UINT32,
  "sample_id": _UINT32,
  "AnswerSettings.batch_size": _NATURAL,
  "Engine.batch_size": _NATURAL,
  "length_multiple": _COUNT,
  "prefill_tokens": _COUNT,
  "chunk": _COUNT,
  "span": _NATURAL,
  "cache_gib": _POSITIVE,
  # Judging.
  "concurrency": _COUNT,
  "aa": _NATURAL,
  "gold": _NATURAL,
  "retests": _NATURAL,
  "ServerSettings.temperature": _AMOUNT,
  "max_tokens": _COUNT,
  "top_logprobs": _Range("be 0 to 20", lambda x: 0 <= x <= 20),
  "timeout_s": _POSITIVE,
  "max_retries": _NATURAL,
  "retry_wait_s": _AMOUNT,
  "max_wait_s": _AMOUNT,
  "requests_per_minute": _AMOUNT,
  "tokens_per_minute": _AMOUNT,
  "budget_usd": _AMOUNT,
  "batch_price": _AMOUNT,
  "batch_poll_s": _POSITIVE,
  "expected_reply_tokens": _NATURAL,
  "expected_reply_s": _AMOUNT,
  # Report.
  "examples": _NATURAL,
  "aa_alpha": _SHARE,
  "first_slot_limit": _Range("be in [0.5, 1]", lambda x: 0.5 <= x <= 1),
  "gold_floor": _SHARE,
}


def check(settings: Any, prefix: str = "") -> None:
  """Checks each field of a dataclass that `RANGES` names, in their order.

  Args:
    settings: the dataclass; every item of a tuple is checked.
    prefix: of the field's name in the message, such as "loss.".

  Raises:
    ValueError: naming the first field that is out of its range, and its value.
  """
  for field in dataclasses.fields(settings):
    own = f"{type(settings).__name__}.{field.name}"
    allowed = RANGES.get(own) or RANGES.get(field.name)
    value = getattr(settings, field.name)
    for item in value if isinstance(value, tuple) else (value,):
      if allowed and not allowed.holds(item):
        raise ValueError(f"{prefix}{field.name}={item} must {allowed.must}")


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
