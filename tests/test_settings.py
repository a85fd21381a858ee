"""Dataclasses from dicts, their ranges and their differences."""

import dataclasses
import json
import math
import re
from typing import Literal

import pytest

from dpo_jax.core import settings


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float
  names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outer:
  kind: Literal["a", "b"]
  count: int
  on: bool
  inner: Inner
  other: Inner | None
  limit: int | None
  paths: dict[str, str]


GOOD = {
  "kind": "a",
  "count": 3,
  "on": True,
  "inner": {"rate": 0.5, "names": ("x", "y")},
  "other": None,
  "limit": None,
  "paths": {"p": "q"},
}


def test_builds_nested_values_and_reads_its_own_dict_back():
  built = settings.build(Outer, GOOD)
  inner = Inner(0.5, ("x", "y"))
  assert built == Outer("a", 3, True, inner, None, None, {"p": "q"})
  # Through JSON, where tuples become lists, as in config.json.
  stored = json.loads(json.dumps(settings.to_dict(built)))
  assert settings.build(Outer, stored) == built
  other = {"rate": 1, "names": []}
  built = settings.build(Outer, GOOD | {"other": other, "limit": 4})
  assert built.other == Inner(1.0, ())
  assert type(built.other.rate) is float
  assert built.limit == 4


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"kount": 1}, ["config", "'kount'", "did you mean 'count'"]),
    ({"zzz": 1}, ["'zzz'", "known", "kind"]),
    ({3: 1}, ["config", "3"]),
    ({"count": "3"}, ["config.count", "'3'", "int", "str"]),
    ({"count": 3.0}, ["config.count", "3.0", "int", "float"]),
    # A bool is an int in Python.
    ({"count": True}, ["config.count", "True", "int", "bool"]),
    ({"on": 1}, ["config.on", "1", "bool"]),
    ({"kind": ["c"]}, ["config.kind", "'c'", "'a'", "'b'"]),
    ({"inner": {"rate": math.nan, "names": ()}}, ["inner.rate=nan", "finite"]),
    ({"inner": None}, ["config.inner must be a dict", "None"]),
    ({"inner": {"rate": 1.0}}, ["config.inner lacks the field 'names'"]),
    ({"inner": {"rate": "1", "names": ()}}, ["config.inner.rate", "'1'"]),
    ({"inner": {"rate": 1.0, "names": "xy"}}, ["config.inner.names", "tuple"]),
    ({"inner": {"rate": 1.0, "names": ("x", 2)}}, ["config.inner.names[1]"]),
    ({"other": {"rate": 1.0, "nmes": ()}}, ["config.other", "'nmes'"]),
    ({"limit": "4"}, ["config.limit", "'4'"]),
    ({"paths": {"p": 1}}, ["config.paths.p", "1"]),
    ({"paths": "p"}, ["config.paths", "dict"]),
  ],
)
def test_errors_name_the_field(change, words):
  with pytest.raises(ValueError, match=re.escape(words[0])) as error:
    settings.build(Outer, GOOD | change)
  for word in words[1:]:
    assert word in str(error.value)


NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
  ("field", "allowed", "refused"),
  [
    ("epochs", (1, 10**9), (0, -1)),
    ("any_int", (0, 10**9), (-1,)),
    ("beta", (1e-300, 1e300), (0.0, -1.0, *NOT_FINITE)),
    ("any_float", (0.0, 1e300), (-0.1, *NOT_FINITE)),
    ("min_score_ratio", (1.0, 1e300), (0.5, *NOT_FINITE)),
    ("b1", (0.0, 0.999), (1.0, -0.1, *NOT_FINITE)),
    ("gold_floor", (0.0, 1.0), (-0.1, 1.1, *NOT_FINITE)),
    ("seed", (0, 2**32 - 1), (-1, 2**32)),
    ("temperature", (0.0, 1e-4, 2.0), (1e-9, -0.1, *NOT_FINITE)),
    ("top_p", (0.1, 1.0), (0.0, 1.5, *NOT_FINITE)),
    ("label_smoothing", (0.0, 0.49), (0.5, -0.1, *NOT_FINITE)),
    ("top_logprobs", (0, 20), (-1, 21)),
    ("first_slot_limit", (0.5, 1.0), (0.4, 1.1, *NOT_FINITE)),
  ],
)
def test_a_range_and_its_ends(field, allowed, refused):
  made = dataclasses.make_dataclass("Made", [field])
  for value in allowed:
    settings.check(made(value))
  for value in refused:
    with pytest.raises(ValueError, match=re.escape(f"x.{field}={value} must ")):
      settings.check(made(value), "x.")


def test_ranges_of_one_class_and_of_every_item():
  fields = ["batch_size", "temperatures"]
  engine = dataclasses.make_dataclass("Engine", fields)
  other = dataclasses.make_dataclass("TrainSettings", fields)
  with pytest.raises(ValueError, match="temperatures=-1 must be finite"):
    settings.check(engine(1, (0, 1, -1)))
  # In sampling 0 is as many rows as memory holds.
  settings.check(engine(0, ()))
  with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
    settings.check(other(0, ()))


def test_every_difference_is_a_line():
  left = {"a": {"b": 1, "c": (1, 2)}, "d": "x", "gone": 1}
  right = {"a": {"b": 2, "c": [1, 2]}, "d": "x"}
  assert settings.differing(left, right) == [
    "config.a.b: 1 -> 2",
    "config.gone: 1 -> None",
  ]
  assert settings.differing(left, left) == []
  assert settings.differing({"a": [1, 2]}, {"a": [1, 3]}) == [
    "config.a: [1, 2] -> [1, 3]"
  ]
