"""Rows of responses.jsonl and verdicts.jsonl, one JSON object a line.

A row is committed when its line, newline included, is on disk; see
`strict_json.scan`.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Literal, TypeVar

from dpo_jax.core import settings
from dpo_jax.io import strict_json

Order = Literal["model_first", "chosen_first"]
Control = Literal["", "aa", "gold", "retest"]
Outcome = Literal["model", "chosen", "tie", "missing", "refusal"]
FinishReason = Literal["eos", "turn", "length"]


@dataclasses.dataclass(frozen=True)
class Response:
  """One sampled response, with the dataset's chosen one.

  Attributes:
    prompt: as in the dataset, like `chosen`, leading space included.
    step: of a checkpoint; None for a final model.
    top_k: 0 is off, like 1.0 of `top_p`.
    token_count: generated tokens.
    mean_logp: mean log-prob of the generated tokens under the model itself, in
      nats, at temperature 1 before top_k and top_p; None if unknown.
    cut_prompt_tokens: removed from the prompt's start; None if unknown.
    subset: the prompt's part of the dataset, "" without one; None if unknown.
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
    """Key of the row: one sample of one model for one prompt."""
    return (
      self.prompt_id,
      self.model,
      self.step,
      self.temperature,
      self.sample_id,
    )


@dataclasses.dataclass(frozen=True)
class Verdict:
  """One judge call: which of two texts won, in one order.

  Attributes:
    key: hash of everything that the reply depends on.
    control: "" for a comparison, the only kind that a win rate counts. "aa" is
      a chosen text against itself; "gold" the prompt's chosen response, in the
      model's place, against that of another prompt; "retest" a comparison
      that is asked again.
    score: the judge's probability that the model's text wins, from its
      log-probs; None without them.
    judge: as requested; `judge_returned` and `judge_fingerprint` are the
      server's own, "" if it sent none.
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
    """Key of the row: one response in one order, for one purpose."""
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
  """JSON line of a row, newline included.

  Raises:
    ValueError: a field has a wrong type, is not finite, or holds half of a
      surrogate pair; or the line would be too long to be read.
  """
  values = vars(settings.build(type(row), vars(row), "row"))
  strict_json.check_texts(values)
  line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
  if len(line) > strict_json.MAX_BYTES:
    raise ValueError(
      f"the row has {len(line)} bytes, more than the {strict_json.MAX_BYTES} of"
      " a line; shorten its texts"
    )
  return line


def decode(line: bytes, cls: type[Row]) -> Row:
  """Row of a line; ValueError names the field that is wrong."""
  values = strict_json.parse(line)
  if isinstance(values, dict):
    # Fields with a default, an attribute of the class, may be missing.
    for field in dataclasses.fields(cls):
      if hasattr(cls, field.name):
        values.setdefault(field.name, field.default)
  return settings.build(cls, values, "row")


def latest(rows: Iterable[Row]) -> list[Row]:
  """The last row of each unit, which replaces those before it.

  A comparison that is asked again (after a missing verdict, or with another
  text or template) appends a row.
  """
  last: dict[tuple, Row] = {}
  for row in rows:
    last.pop(row.unit, None)
    last[row.unit] = row
  return list(last.values())


def read(path: str | os.PathLike, cls: type[Row]) -> list[Row]:
  """Rows of a file; of verdicts, the `latest` of each unit.

  Raises:
    ValueError: a line is malformed, or the last one cut (`jsonl.Store` repairs
      that); file, line and field are named.
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
