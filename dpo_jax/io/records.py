"""The rows that the stages hand to each other, one JSON object a line.

A row is committed when its line, newline included, is on disk; see
`strict_json.scan`.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from dpo_jax.core import settings
from dpo_jax.io import strict_json

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


def encode(row: Response | Verdict) -> bytes:
  """The row's line, newline included.

  Raises:
    ValueError: a field has a wrong type, is not finite, or holds half of a
      surrogate pair, which UTF-8 cannot carry; or the line would be longer
      than what is read again.
  """
  values = vars(_typed(type(row), vars(row)))
  strict_json.check_texts(values)
  line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
  if len(line) > strict_json.MAX_BYTES:
    raise ValueError(
      f"the row has {len(line)} bytes, more than the {strict_json.MAX_BYTES} of"
      " a line; shorten its texts"
    )
  return line


def decode(line: bytes, cls: type[Row]) -> Row:
  """The row that a line holds; ValueError names the field that is wrong."""
  return _typed(cls, strict_json.parse(line))


def _typed(cls: type[Row], values: Any) -> Row:
  # Fields that have a default came later: older files do not have them.
  if isinstance(values, dict):
    values = _later(cls) | values
  return settings.build(cls, values, "row")


@functools.cache
def _later(cls: type) -> dict[str, Any]:
  return {
    field.name: field.default
    for field in dataclasses.fields(cls)
    if field.default is not dataclasses.MISSING
  }


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
      that was cut is an error here; `jsonl.Store` mends it.
  """
  rows, rest, _ = scan(path, cls)
  if rest:
    try:
      rows.append(decode(rest, cls))
    except ValueError as error:
      raise ValueError(f"{path}:{len(rows) + 1}: {error}") from error
  return latest(rows) if cls is Verdict else rows


def scan(
  path: str | os.PathLike, cls: type[Row]
) -> tuple[list[Row], bytes, int]:
  """`strict_json.scan` of rows of one kind."""
  return strict_json.scan(path, lambda line: decode(line, cls))
