"""Preference pairs from their rows: what each must hold, and what is bad.

Two row forms are read: HH's two transcripts, {"chosen", "rejected"}, which
share everything up to the last "\\n\\nAssistant:"; and {"prompt", "chosen",
"rejected"}. A pair that cannot be trained on is quarantined and counted by its
reason; a row that is not of either form is malformed, and an error unless the
settings of its source allow a number of them. `sources` reads the rows.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A prompt and two answers, of which people preferred `chosen`.

  A prompt of HH ends with "\\n\\nAssistant:"; answers keep their leading space.
  `id` is a hash of the three texts: the same row has it in any file. `subset`
  is the part of the dataset that it was read from, such as "harmless-base", or
  the row's own domain; "" if there is none. It is no part of what a pair is.
  """

  id: str
  prompt: str
  chosen: str
  rejected: str
  subset: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Kept rows in file order; `counts` by reason, `fingerprint` of the rows."""

  rows: tuple[Comparison, ...]
  counts: dict[str, int]
  fingerprint: str


class Malformed(ValueError):
  """A row that is of no known form; `reason` leaves out the row's values."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(reason + detail)
    self.reason = reason


class Quarantined(ValueError):
  """A well-formed row that no preference can be learned from."""


def parse(row: Any) -> Comparison:
  """The comparison of one decoded JSON row.

  Raises:
    Malformed: a field is missing or not a string.
    Quarantined: the transcripts share no prompt, or an answer is empty, or
      both answers are the same.
  """
  return pair(*texts(row))


def texts(row: Any) -> tuple[str, str, str]:
  """Prompt, chosen and rejected of a row of either form, not yet checked.

  Raises:
    Malformed: a field is missing or not a string.
    Quarantined: the transcripts share no prompt.
  """
  if "prompt" in mapping(row):
    prompt = text(row, "prompt")
    return prompt, text(row, "chosen"), text(row, "rejected")
  return split(text(row, "chosen"), text(row, "rejected"))


def pair(
  prompt: str, chosen: str, rejected: str, subset: str = ""
) -> Comparison:
  """The comparison of three texts, of a part of a dataset.

  Raises:
    Quarantined: a text is empty, or both answers are the same.
  """
  if not prompt.strip():
    raise Quarantined("empty prompt")
  if not chosen.strip():
    raise Quarantined("empty chosen response")
  if not rejected.strip():
    raise Quarantined("empty rejected response")
  if chosen == rejected:
    raise Quarantined("identical responses")
  return Comparison(
    content_id(prompt, chosen, rejected), prompt, chosen, rejected, subset
  )


def split(chosen: str, rejected: str) -> tuple[str, str, str]:
  """Two transcripts into the prompt that they share and their last answers.

  Raises:
    Quarantined: there is no such prompt.
  """
  at = chosen.rfind(ASSISTANT)
  if at < 0:
    raise Quarantined(f"no {ASSISTANT!r} in chosen")
  end = at + len(ASSISTANT)
  prompt = chosen[:end]
  if not rejected.startswith(prompt):
    raise Quarantined("rejected does not share chosen's prompt")
  if ASSISTANT in rejected[end:]:
    raise Quarantined("rejected goes on for more turns than chosen")
  return prompt, chosen[end:], rejected[end:]


def mapping(value: Any, name: str = "row") -> dict[str, Any]:
  """A JSON object as it is; anything else is malformed."""
  if not isinstance(value, dict):
    raise Malformed(f"{name} is not an object", f": {type(value).__name__}")
  return value


def text(row: dict[str, Any], field: str, within: str = "") -> str:
  """The string that a row holds in a field.

  Args:
    row: a decoded JSON object.
    field: its key.
    within: what stands before the key in messages, such as "info.".

  Raises:
    Malformed: there is none, or UTF-8 could not hold it.
  """
  name = f"field {within + field!r}"
  if field not in row:
    raise Malformed(f"{name} is missing")
  value = row[field]
  if not isinstance(value, str):
    raise Malformed(f"{name} is not a string", f" but {type(value).__name__}")
  try:
    value.encode()
  except UnicodeEncodeError:
    raise Malformed(f"{name} holds a lone surrogate") from None
  return value


def integer(row: dict[str, Any], field: str, within: str = "") -> int:
  """The integer that a row holds in a field.

  Raises:
    Malformed: there is none.
  """
  if field not in row:
    raise Malformed(f"field {within + field!r} is missing")
  value = row[field]
  if type(value) is not int:
    raise Malformed(
      f"field {within + field!r} is not an integer", f" but {value!r:.40}"
    )
  return value


def content_id(*texts: str) -> str:
  """Sixteen hex digits that depend on every text and on their borders."""
  digest = hashlib.sha256()
  for text in texts:
    data = text.encode()
    digest.update(len(data).to_bytes(8, "big") + data)
  return digest.hexdigest()[:16]


def fingerprint(rows: Iterable[Comparison]) -> str:
  """A hash of the rows and their order."""
  return content_id(*(row.id for row in rows))


def leaks(train: Iterable[Comparison], held_out: Iterable[Comparison]) -> int:
  """How many held-out rows have a prompt that is trained on."""
  prompts = {row.prompt for row in train}
  return sum(row.prompt in prompts for row in held_out)
