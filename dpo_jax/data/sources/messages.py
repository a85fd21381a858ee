"""Pairs as lists of messages, TRL's conversational form, in HH's turns.

A user's message becomes "\\n\\nHuman: " and its text, an assistant's
"\\n\\nAssistant: " and its text. What these turns cannot say exactly is left
out: a system message, a tool's message, and texts that hold a turn's mark.
"""

from collections.abc import Sequence
from typing import Any

from dpo_jax.data import preferences

_MARKS = {"user": preferences.HUMAN, "assistant": preferences.ASSISTANT}


def is_one(row: Any) -> bool:
  """Whether a row holds lists where others hold texts."""
  return isinstance(row, dict) and isinstance(row.get("chosen"), list)


def texts(row: dict[str, Any]) -> tuple[str, str, str]:
  """Prompt, chosen and rejected of a row.

  The prompt is either a list in its own field, or what both lists share but
  for their last message; a text in the field must then be the first message.

  Raises:
    Malformed: a field is missing or of another type.
    Quarantined: a role has no turn, roles do not take turns, or the lists
      share no prompt.
  """
  chosen = _messages(row, "chosen")
  rejected = _messages(row, "rejected")
  given = row.get("prompt")
  if given is not None and not isinstance(given, str):
    prompt = _messages(row, "prompt")
    if len(chosen) != 1 or len(rejected) != 1:
      raise preferences.Quarantined("an answer of several messages")
  else:
    prompt = chosen[:-1]
    if rejected[:-1] != prompt:
      raise preferences.Quarantined("rejected does not share chosen's prompt")
    chosen, rejected = chosen[-1:], rejected[-1:]
    if given is not None and prompt[:1] != [("user", given)]:
      raise preferences.Quarantined("the prompt is not the first message")
  if not all(content.strip() for _, content in prompt):
    raise preferences.Quarantined("empty message in the prompt")
  for conversation in (prompt + chosen, prompt + rejected):
    _check_turns(conversation)
  said = "".join(f"{_MARKS[role]} {content}" for role, content in prompt)
  return (
    said + preferences.ASSISTANT,
    f" {chosen[0][1]}",
    f" {rejected[0][1]}",
  )


def _messages(row: dict[str, Any], field: str) -> list[tuple[str, str]]:
  """(role, content) of each message of a field."""
  messages = row.get(field)
  if not isinstance(messages, list) or not messages:
    raise preferences.Malformed(f"field {field!r} is not a list of messages")
  found = []
  for number, message in enumerate(messages):
    name = f"{field}[{number}]"
    message = preferences.mapping(message, f"field {name!r}")
    found.append(
      (
        preferences.text(message, "role", f"{name}."),
        preferences.text(message, "content", f"{name}."),
      )
    )
  return found


def _check_turns(conversation: Sequence[tuple[str, str]]) -> None:
  for number, (role, content) in enumerate(conversation):
    if role not in _MARKS:
      raise preferences.Quarantined("a role that HH's turns do not have")
    if role != ("user", "assistant")[number % 2]:
      raise preferences.Quarantined("user and assistant do not take turns")
    if any(mark in content for mark in _MARKS.values()):
      raise preferences.Quarantined("a message holds the mark of a turn")
  if len(conversation) % 2:
    raise preferences.Quarantined("user and assistant do not take turns")
