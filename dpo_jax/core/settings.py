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


# What must hold of fields: by their names, or as Class.field where a name has
# two meanings.
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
  (
    "not be negative",
    lambda x: x >= 0,
    """
    LoraSettings.rank vocab_tile max_train max_eval max_pairs_per_prompt
    max_turns min_response_chars max_response_chars max_prompt_chars skip_bad
    ScoreSettings.max_length ScoreSettings.max_prompt_length max_steps
    eval_every checkpoint_every keep_checkpoints keep_every keep_best
    max_skipped warmup_steps prompts every top_k SamplingSettings.batch_size
    Engine.batch_size span aa gold retests max_retries expected_reply_tokens
    examples
    """,
  ),
  (
    "be positive and finite",
    lambda x: 0 < x < math.inf,
    """
    LoraConfig.alpha weight grace_s beta learning_rate eps clip_norm cache_gib
    timeout_s batch_poll_s
    """,
  ),
  (
    "be finite and not negative",
    lambda x: 0 <= x < math.inf,
    """
    weight_decay ServerSettings.temperature retry_wait_s max_wait_s
    requests_per_minute tokens_per_minute budget_usd batch_price
    expected_reply_s
    """,
  ),
  ("be finite and at least 1", lambda x: 1 <= x < math.inf, "min_score_ratio"),
  ("be in [0, 1)", lambda x: 0 <= x < 1, "LoraConfig.dropout b1 b2"),
  ("be in [0, 1]", lambda x: 0 <= x <= 1, "aa_alpha gold_floor"),
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
)
RANGES = {
  name: (must, holds) for must, holds, names in _RULES for name in names.split()
}


def check(settings: Any, prefix: str = "") -> None:
  """Checks each field of a dataclass that `RANGES` names, in their order.

  Args:
    settings: the dataclass; every item of a tuple is checked.
    prefix: of the field's name in the message, such as "loss.".

  Raises:
    ValueError: naming the first field that is out of its range, and its value.
  """
  for name, value in vars(settings).items():
    own = f"{type(settings).__name__}.{name}"
    must, holds = RANGES.get(own) or RANGES.get(name) or ("", lambda x: True)
    for item in value if isinstance(value, tuple) else (value,):
      if not holds(item):
        raise ValueError(f"{prefix}{name}={item} must {must}")


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
