"""From a server's completion, a plain dict, to what the judge said.

The dict comes from outside and may hold anything: what is not where it should
be makes a missing verdict with its cause, never an error and never a guess.
"""

import math
from typing import Any, Literal

from dpo_jax import judging
from dpo_jax.judging import verdicts

Output = Literal["text", "json_schema"]

_CHOICES: dict[verdicts.Letter, judging.Choice] = {
  "A": "first",
  "B": "second",
  "tie": "tie",
  "missing": "missing",
  "refusal": "refusal",
}


def read(completion: Any, *, output: Output, ties: bool) -> judging.Reply:
  """The reply of a completion; tokens are those of this completion alone."""
  if not isinstance(completion, dict) or "choices" not in completion:
    return _missing("the reply is not a chat completion")
  who = {
    "model": _text(completion.get("model")),
    "fingerprint": _text(completion.get("system_fingerprint")),
    **usage(completion),
  }
  choices = completion["choices"]
  if not (isinstance(choices, list) and choices and _is_choice(choices[0])):
    return _missing("the reply has no choices", **who)
  choice = choices[0]
  message = choice["message"]
  refused = _text(message.get("refusal"))
  text = _text(message.get("content")) or refused
  finish = choice.get("finish_reason")
  if refused or finish == "content_filter":
    return judging.Reply("refusal", text, error="", **who)
  if finish == "length":
    return _missing("the reply was cut at max_tokens", text, **who)
  letter = _letter(text, output, ties)
  score = None
  if letter in ("A", "B", "tie"):
    score = _score(choice.get("logprobs"), letter, output, ties)
  error = "no verdict in the reply" if letter == "missing" else ""
  return judging.Reply(_CHOICES[letter], text, error=error, score=score, **who)


def usage(completion: Any) -> dict[str, int]:
  """Tokens as the server counted them; 0 where it did not."""
  counts = completion.get("usage") if isinstance(completion, dict) else None
  counts = counts if isinstance(counts, dict) else {}
  names = ("prompt_tokens", "completion_tokens")
  return {
    name: counts[name]
    if type(counts.get(name)) is int and counts[name] >= 0
    else 0
    for name in names
  }


def _letter(text: str, output: Output, ties: bool) -> verdicts.Letter:
  read = verdicts.read_json if output == "json_schema" else verdicts.read
  return read(text, ties=ties)


def _score(
  logprobs: Any, letter: str, output: Output, ties: bool
) -> float | None:
  """Probability that A wins, among the choices, where the verdict stands.

  A tie counts half. None if the server gave no log-probabilities, or the
  verdict is not a token of its own.
  """
  content = logprobs.get("content") if isinstance(logprobs, dict) else None
  if not isinstance(content, list):
    return None
  tokens = [
    _text(c.get("token")) if isinstance(c, dict) else "" for c in content
  ]
  place = _place(tokens, letter, output, ties)
  if place is None:
    return None
  shares = {"A": 0.0, "B": 0.0, "tie": 0.0}
  others = content[place].get("top_logprobs")
  for entry in others if isinstance(others, list) else ():
    if not isinstance(entry, dict):
      return None
    name, logprob = _bare(_text(entry.get("token"))), entry.get("logprob")
    if name in shares and isinstance(logprob, int | float) and logprob <= 0:
      shares[name] += math.exp(logprob)
  if not ties:
    shares["tie"] = 0.0
  total = sum(shares.values())
  if not total > 0:
    return None
  return min(1.0, (shares["A"] + 0.5 * shares["tie"]) / total)


def _place(
  tokens: list[str], letter: str, output: Output, ties: bool
) -> int | None:
  """The last token that turns the text so far into one with this verdict."""
  text = "".join(tokens)
  end = len(text)
  for index in range(len(tokens) - 1, -1, -1):
    start = end - len(tokens[index])
    if _bare(tokens[index]) == letter:
      if output == "json_schema":
        # The object is not closed yet: the key before it must be the choice.
        key = text[:start].rstrip().removesuffix('"').rstrip()
        if key.endswith(":") and key[:-1].rstrip().endswith('"choice"'):
          return index
      else:
        before = verdicts.read(text[:start], ties=ties)
        if before != letter and verdicts.read(text[:end], ties=ties) == letter:
          return index
    end = start
  return None


def _bare(token: str) -> str:
  """A, B or tie, if the token says that and no more."""
  bare = token.strip(" \t\r\n\"'*_.:`[]()<>“”▁Ġ")
  return bare.lower() if bare.lower() == "tie" else bare.upper()


def _is_choice(value: Any) -> bool:
  return isinstance(value, dict) and isinstance(value.get("message"), dict)


def _text(value: Any) -> str:
  """The string as UTF-8 can carry it: halves of surrogates are replaced."""
  if not isinstance(value, str):
    return ""
  return value.encode("utf-8", "replace").decode()


def _missing(error: str, text: str = "", **who: Any) -> judging.Reply:
  return judging.Reply("missing", text, error=error, **({"model": ""} | who))
