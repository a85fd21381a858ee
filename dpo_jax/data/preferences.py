"""Preference pairs from decoded rows, and the checks that every pair passes.

Three row forms are read: HH's two transcripts, {"chosen", "rejected"}, which
share everything up to the last "\\n\\nAssistant:"; {"prompt", "chosen",
"rejected"}; and lists of messages, TRL's conversational form. A pair that
nothing can be learned from is quarantined and counted by its reason; a row of
another form is malformed, and an error unless `skip_bad` allows a number of
them. `sources` reads the rows.
"""

import dataclasses
import hashlib
import unicodedata
from collections.abc import Iterable
from typing import Any

from dpo_jax.io import strict_json

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

# A row of no known form; `reason` leaves out the row's values.
Malformed = strict_json.Refused


class Quarantined(ValueError):
  """A well-formed row that no preference can be learned from."""


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A prompt and two responses, of which people preferred `chosen`.

  Or one response, `chosen`, with a label, whose `rejected` is "".

  Attributes:
    id: hash of the three texts: the same row has it in any file.
    prompt: in HH's form it ends with "\\n\\nAssistant:".
    chosen: with its leading space, like `rejected`.
    rejected: see `chosen`.
    subset: part of the dataset, such as "harmless-base", or the row's own
      domain; "" for none.
    label: whether a single response is desirable; None of pairs.
  """

  id: str
  prompt: str
  chosen: str
  rejected: str
  subset: str = dataclasses.field(default="", compare=False)
  label: bool | None = None

  @property
  def responses(self) -> tuple[str, ...]:
    if self.label is None:
      return self.chosen, self.rejected
    return (self.chosen,)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Kept rows in file order; `counts` by reason, `fingerprint` of the rows."""

  rows: tuple[Comparison, ...]
  counts: dict[str, int]
  fingerprint: str


def parse(row: Any) -> Comparison:
  """The comparison of one decoded row of any of the three forms.

  Raises:
    Malformed: a field is missing or of another type.
    Quarantined: there is no common prompt, a response is empty, or both
      responses are the same.
  """
  return pair(*texts(row))


def pair(
  prompt: str, chosen: str, rejected: str, subset: str = ""
) -> Comparison:
  """The comparison of three texts.

  Raises:
    Quarantined: a text is empty, or both responses are the same.
  """
  if _is_blank(prompt):
    raise Quarantined("empty prompt")
  if _is_blank(chosen):
    raise Quarantined("empty chosen response")
  if _is_blank(rejected):
    raise Quarantined("empty rejected response")
  if chosen == rejected:
    raise Quarantined("identical responses")
  return Comparison(
    content_id(prompt, chosen, rejected), prompt, chosen, rejected, subset
  )


def labeled(row: Any, subset: str = "") -> Comparison:
  """The response of a row {"prompt", "completion", "label"}.

  Prompt and completion are texts or lists of messages.

  Raises:
    Malformed: a field is missing or of another type.
    Quarantined: a text is empty, or messages are no dialogue.
  """
  row = mapping(row)
  if not isinstance(label := row.get("label"), bool):
    raise Malformed("field 'label' is not true or false")
  if isinstance(row.get("completion"), list):
    both = {"chosen": row["completion"], "rejected": row["completion"]}
    prompt, response, _ = _from_messages(row | both)
  else:
    prompt, response = text(row, "prompt"), text(row, "completion")
  if _is_blank(prompt):
    raise Quarantined("empty prompt")
  if _is_blank(response):
    raise Quarantined("empty completion")
  name = content_id(prompt, response, str(label))
  return Comparison(name, prompt, response, "", subset, label)


def _is_blank(text: str) -> bool:
  """Whether nothing of a text is visible: white space and format characters,
  such as a zero-width space, alone.
  """
  return all(x.isspace() or unicodedata.category(x) == "Cf" for x in text)


def texts(row: Any) -> tuple[str, str, str]:
  """Prompt, chosen and rejected of a row, not yet checked by `pair`.

  Raises:
    Malformed: a field is missing or of another type.
    Quarantined: there is no common prompt, or messages are no dialogue.
  """
  row = mapping(row)
  if isinstance(row.get("chosen"), list):
    return _from_messages(row)
  if "prompt" in row:
    return text(row, "prompt"), text(row, "chosen"), text(row, "rejected")
  return split(text(row, "chosen"), text(row, "rejected"))


def split(chosen: str, rejected: str) -> tuple[str, str, str]:
  """Two transcripts' common prompt and last responses.

  Raises:
    Quarantined: there is no such prompt.
  """
  start = chosen.rfind(ASSISTANT)
  if start < 0:
    raise Quarantined(f"no {ASSISTANT!r} in chosen")
  end = start + len(ASSISTANT)
  prompt = chosen[:end]
  if not rejected.startswith(prompt):
    raise Quarantined("rejected does not share chosen's prompt")
  if ASSISTANT in rejected[end:]:
    raise Quarantined("rejected has more turns than chosen")
  return prompt, chosen[end:], rejected[end:]


_MARKS = {"user": HUMAN, "assistant": ASSISTANT}


def _from_messages(row: dict[str, Any]) -> tuple[str, str, str]:
  """Lists of messages as HH's turns, "\\n\\nHuman: " or "\\n\\nAssistant: ".

  The prompt is a list of its own, or what both lists share but for their last
  message; a text in its field must then be the first message.
  """
  chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
  given = row.get("prompt")
  if given is not None and not isinstance(given, str):
    prompt = _messages(row, "prompt")
    if len(chosen) != 1 or len(rejected) != 1:
      raise Quarantined("a response of several messages")
  else:
    prompt = chosen[:-1]
    if rejected[:-1] != prompt:
      raise Quarantined("rejected does not share chosen's prompt")
    chosen, rejected = chosen[-1:], rejected[-1:]
    if given is not None and prompt[:1] != [("user", given)]:
      raise Quarantined("the prompt is not the first message")
  if not all(content.strip() for _, content in prompt):
    raise Quarantined("empty message in the prompt")
  for conversation in (prompt + chosen, prompt + rejected):
    roles = [role for role, _ in conversation]
    if not _MARKS.keys() >= {*roles}:
      raise Quarantined("a role that HH's turns do not have")
    if roles != ["user", "assistant"] * (len(roles) // 2):
      raise Quarantined("user and assistant do not alternate")
    if any(mark in x for _, x in conversation for mark in _MARKS.values()):
      raise Quarantined("a message holds the mark of a turn")
  turns = "".join(f"{_MARKS[role]} {content}" for role, content in prompt)
  return turns + ASSISTANT, f" {chosen[0][1]}", f" {rejected[0][1]}"


def _messages(row: dict[str, Any], field: str) -> list[tuple[str, str]]:
  """(role, content) of each message of a field."""
  messages = row.get(field)
  if not isinstance(messages, list) or not messages:
    raise Malformed(f"field {field!r} is not a list of messages")
  pairs = []
  for number, message in enumerate(messages):
    name = f"{field}[{number}]"
    message = mapping(message, f"field {name!r}")
    role, content = (text(message, x, f"{name}.") for x in ("role", "content"))
    pairs.append((role, content))
  return pairs


def mapping(value: Any, name: str = "row") -> dict[str, Any]:
  """A JSON object; anything else is malformed."""
  if not isinstance(value, dict):
    raise Malformed(f"{name} is not an object", f": {type(value).__name__}")
  return value


def text(row: dict[str, Any], field: str, within: str = "") -> str:
  """The string in a row's field.

  Args:
    row: a decoded JSON object.
    field: its key.
    within: prefix of the key in messages, such as "info.".

  Raises:
    Malformed: there is none.
  """
  name = f"field {within + field!r}"
  if field not in row:
    raise Malformed(f"{name} is missing")
  value = row[field]
  if not isinstance(value, str):
    raise Malformed(f"{name} is not a string", f" but {type(value).__name__}")
  return value


def integer(row: dict[str, Any], field: str, within: str = "") -> int:
  """The integer in a row's field; arguments and errors as of `text`."""
  name = f"field {within + field!r}"
  if field not in row:
    raise Malformed(f"{name} is missing")
  value = row[field]
  if type(value) is not int:
    raise Malformed(f"{name} is not an integer", f" but {value!r:.40}")
  return value


def content_id(*texts: str) -> str:
  """Sixteen hex digits: hash of the texts and their borders."""
  digest = hashlib.sha256()
  for text in texts:
    data = text.encode()
    digest.update(len(data).to_bytes(8, "big") + data)
  return digest.hexdigest()[:16]


def fingerprint(rows: Iterable[Comparison]) -> str:
  """A hash of the rows and their order."""
  return content_id(*(row.id for row in rows))


def leaks(train: Iterable[Comparison], held_out: Iterable[Comparison]) -> int:
  """The number of held-out rows whose prompt is trained on."""
  prompts = {row.prompt for row in train}
  return sum(row.prompt in prompts for row in held_out)
