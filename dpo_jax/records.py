"""The rows that the stages hand to each other, one JSON object a line.

A row is committed when its line, newline included, is on disk. So an
interrupted append can only leave a last line without its newline, and
everything before that line is whole: this is what makes every stage
resumable. Lines are split on the byte 0x0a alone, because texts hold other
line separators (U+2028, U+0085, a carriage return) that belong to them.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from dpo_jax.storage import strict_json

Order = Literal["model_first", "chosen_first"]
Control = Literal["", "aa", "gold", "retest"]
Outcome = Literal["model", "chosen", "tie", "missing", "refusal"]
FinishReason = Literal["eos", "turn", "length"]


@dataclasses.dataclass(frozen=True)
class Response:
  """One sampled response beside the dataset's chosen one.

  Texts are kept as generated and as read, leading space included.
  `step` is None for a final model; `top_k` 0 and `top_p` 1.0 are off;
  `token_count` counts generated tokens. `mean_logp` is the mean log-prob of
  these under the model itself, in nats, at temperature 1 before top_k and
  top_p; `cut_prompt_tokens` counts those that the prompt lost at its start;
  `subset` is the part of the dataset that the prompt is of, "" if it has none.
  All three are None in files of versions that did not write them.
  """

  prompt_id: str
  prompt: str
  response: str
  chosen: str
  model: str
  step: int | None
  temperature: float
  top_k: int
  top_p: float
  max_new_tokens: int
  seed: int
  sample_id: int
  token_count: int
  finish_reason: FinishReason
  mean_logp: float | None = None
  cut_prompt_tokens: int | None = None
  subset: str | None = None

  @property
  def unit(self) -> tuple:
    """What the row is about: one sample of one model on one prompt."""
    return (
      self.prompt_id,
      self.model,
      self.step,
      self.temperature,
      self.sample_id,
    )


@dataclasses.dataclass(frozen=True)
class Verdict:
  """One judge call: which of two texts won, in which order they were shown.

  Attributes:
    key: hash of everything that the answer depends on.
    control: "" for an ordinary comparison, the only kind that a win rate
      counts. "aa" is a chosen text against itself, really asked; "gold" the
      prompt's chosen answer, in the model's place, against that of another
      prompt; "retest" an ordinary question asked once more.
    score: the judge's probability that the model's text wins, from its
      log-probabilities; None where it gave none.
    judge: as asked for; `judge_returned` and `judge_fingerprint` are what the
      server said it was, "" if it said nothing.
    prompt_tokens: as the server counted them, like `completion_tokens`; 0 if
      it did not.
    raw: the judge's own text.
    error: the cause of a missing verdict, else empty.
  """

  key: str
  prompt_id: str
  model: str
  step: int | None
  temperature: float
  sample_id: int
  order: Order
  control: Control
  verdict: Outcome
  score: float | None
  judge: str
  judge_returned: str
  judge_fingerprint: str
  template_hash: str
  response_chars: int
  chosen_chars: int
  prompt_tokens: int
  completion_tokens: int
  raw: str
  error: str

  @property
  def unit(self) -> tuple:
    """What the row is about: one response in one order, for one purpose."""
    return (
      self.prompt_id,
      self.model,
      self.step,
      self.temperature,
      self.sample_id,
      self.order,
      self.control,
    )


Row = TypeVar("Row", Response, Verdict)


def content_hash(*parts: str) -> str:
  """SHA-256 of the parts, hex. Length prefixes keep parts from running over."""
  digest = hashlib.sha256()
  for part in parts:
    data = part.encode()
    digest.update(b"%d:" % len(data))
    digest.update(data)
  return digest.hexdigest()


def encode(row: Response | Verdict) -> bytes:
  """The row's line, newline included.

  Raises:
    ValueError: a field has a wrong type, is not finite, or holds half of a
      surrogate pair, which UTF-8 cannot carry; or the line would be longer
      than what is read again.
  """
  values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
  values = _checked(type(row), values)
  line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
  if len(line) > strict_json.MAX_LINE_BYTES:
    raise ValueError(
      f"the row has {len(line)} bytes, more than the"
      f" {strict_json.MAX_LINE_BYTES} of a line; shorten its texts"
    )
  return line


def decode(line: bytes, cls: type[Row]) -> Row:
  """The row that a line holds; ValueError names the field that is wrong."""
  values = strict_json.parse_line(line)
  if not isinstance(values, dict):
    raise ValueError(f"expected a JSON object, got {type(values).__name__}")
  return cls(**_checked(cls, values))


def latest(rows: Iterable[Row]) -> list[Row]:
  """The last row of each unit: it replaces those before it.

  A judge that is asked again (after a missing verdict, an edited text, another
  template) appends a row and leaves the earlier one as it was.
  """
  last: dict[tuple, Row] = {}
  for row in rows:
    last.pop(row.unit, None)
    last[row.unit] = row
  return list(last.values())


def read(path: str | os.PathLike, cls: type[Row]) -> list[Row]:
  """The rows of a file; of verdicts, the `latest` of each unit.

  Raises:
    ValueError: a line is malformed, naming file, line and field. A last line
      that was cut is an error here; `row_store.Store` mends it.
  """
  rows, rest, _ = scan(path, cls)
  if rest:
    rows.append(_decode_at(path, len(rows) + 1, rest, cls))
  return latest(rows) if cls is Verdict else rows


def scan(
  path: str | os.PathLike, cls: type[Row]
) -> tuple[list[Row], bytes, int]:
  """The rows of whole lines, what follows the last one, their bytes."""
  rows, size = [], 0
  for number, line in strict_json.lines(path):
    # No append was ever that long: an interrupted one cannot have left it.
    if not line.endswith(b"\n") and len(line) <= strict_json.MAX_LINE_BYTES:
      return rows, line, size
    rows.append(_decode_at(path, number, line, cls))
    size += len(line)
  return rows, b"", size


def _decode_at(path, number: int, line: bytes, cls: type[Row]) -> Row:
  try:
    return decode(line, cls)
  except ValueError as error:
    raise ValueError(f"{path}:{number}: {error}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _checked(cls: type, values: dict[str, Any]) -> dict[str, Any]:
  """The values in field order with their declared types, or ValueError.

  Fields that have a default came later: older files do not have them.
  """
  hints = _hints(cls)
  later = {
    field.name: field.default
    for field in dataclasses.fields(cls)
    if field.default is not dataclasses.MISSING
  }
  values = later | values
  missing = sorted(hints.keys() - values.keys())
  unknown = sorted(values.keys() - hints.keys())
  if missing or unknown:
    raise ValueError(
      f"not a {cls.__name__} row: missing fields {missing}, unknown"
      f" {unknown!s:.200}"
    )
  return {name: _typed(name, values[name], hints[name]) for name in hints}


def _typed(name: str, value: Any, hint: Any) -> Any:
  if typing.get_origin(hint) is Literal:
    if value not in typing.get_args(hint):
      allowed = ", ".join(typing.get_args(hint))
      raise ValueError(
        f"field {name} is {value!r:.80}, must be one of {allowed}"
      )
    return value
  if isinstance(hint, types.UnionType):
    if value is None:
      return None
    (hint,) = (h for h in typing.get_args(hint) if h is not types.NoneType)
  if hint is float and type(value) is int:
    value = float(value)
  # `type` and not isinstance: True is an int, and np.float64 is a float.
  if type(value) is not hint:
    raise ValueError(
      f"field {name} is {value!r:.80}, a {type(value).__name__}; must be"
      f" {hint.__name__}"
    )
  if hint is float and not math.isfinite(value):
    raise ValueError(f"field {name} is {value}, must be finite")
  if hint is str:
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"field {name} holds half of a surrogate pair at character"
        f" {error.start}, which UTF-8 cannot carry"
      ) from None
  return value
