"""Parser of a judge's reply: a table of verdict forms, and no guesses.

Only the last line that states a verdict counts. An ambiguous or revised one is
missing; a refusal is a class of its own. Thinking is no part of a reply.
"""

import contextlib
import dataclasses
import json
import math
import re
import unicodedata
from typing import Any, Literal

from dpo_jax import judging

# Types of the parts of a content that is a list.
_SPOKEN = ("text", "output_text")
Letter = Literal["A", "B", "tie", "missing", "refusal"]
Output = Literal["text", "json_schema"]

# Quotes, emphasis and brackets around a label or a letter. Bounded, against
# quadratic matching of a reply that consists of them.
_DECORATION = r"[\s\"'“”„‘’«»`*_~\[\](){}<>|#]{0,20}"
_NOUN = (
  r"(?:(?:the|ai|response|answer|candidate|option|choice|reply|assistant|model"
  r"|output|text|summary|completion|message|version)\b[\s\"'*_]{0,4}){0,3}"
)

# Labels that a letter follows. "More helpful:" and "more harmless:" may end a
# line of prose; the other words are too common for that, and must start their
# line or be a key of a JSON object. The second form is tried after the first.
_LABELS = (
  re.compile(
    rf"\b(?:more|most)[ _](?:helpful|harmless){_DECORATION}{_NOUN}{_DECORATION}"
    rf"(?:is\b)?{_DECORATION}[:=]"
    r"|(?:^|[{,]\s*\")[\s\"'*_#\[({]*(?:final |my )?(?:better|preferred|winner"
    rf"|verdict|choice|decision|answer)\b{_DECORATION}{_NOUN}{_DECORATION}"
    rf"(?:is\b)?{_DECORATION}[:=]",
    re.IGNORECASE,
  ),
  re.compile(
    rf"\b(?:more|most) (?:helpful|harmless){_DECORATION}{_NOUN}{_DECORATION}"
    r"is\b",
    re.IGNORECASE,
  ),
)

# The letter after a label, or as the whole last line.
_LETTER = re.compile(
  rf"{_DECORATION}{_NOUN}{_DECORATION}(?P<letter>[ABab])(?P<rest>(?![^\W_]).*)",
  re.IGNORECASE | re.DOTALL,
)

# After a letter: nothing, or a remark that is set off by punctuation or
# "because". In "A bit of both" the letter is an article.
_REMARK = re.compile(
  rf"{_DECORATION}(?:$|[.,;:!(\-–—].*|(?:because|since|due to)\b.*)",
  re.IGNORECASE | re.DOTALL,
)
_REASON = re.compile(r"\b(?:because|since|due to)\b", re.IGNORECASE)
_UNDECIDED = re.compile(
  r"\b(?:or|either|neither|both|tie|tied|equal|equally)\b", re.IGNORECASE
)

# Before a label, on its line.
_NOT = re.compile(
  r"(?:\b(?:not|never|no|neither|hardly|cannot)|n't)\s{1,4}"
  r"(?:(?:the|a|any|really|much)\s{1,4}){0,2}\Z",
  re.IGNORECASE,
)

# After a verdict, a decision in other words, or a second thought.
_REVISION = re.compile(
  r"(?:\b(?:choice|decision|verdict|answer|pick|preference|vote|winner"
  r"|conclusion|judge?ment)\b[^.!?\n]{0,40}?(?:\b(?:is|be|to|for)\b|[:=])"
  r"|\b(?:choose|pick|prefer|select|(?:go|going) with|(?:change|switch) to)\b)"
  rf"{_DECORATION}{_NOUN}{_DECORATION}(?-i:(?P<after>[AB]))\b"
  r"|\b(?-i:(?P<before>[AB]))\b[\s\"'*_)\]]{0,4}(?:is|wins)\b(?! not| no| less)"
  r"[^.!?\n]{0,20}?\b(?:better|more helpful|more harmless|preferred|winner)\b"
  r"|(?:^|[.!?])\s{0,4}(?:no, )?(?:wait|actually|correction|scratch that"
  r"|on second thoughts?|i take (?:that|it) back|i changed? my mind)\b",
  re.IGNORECASE | re.MULTILINE,
)

# Marks of thinking, which is no part of a reply: <think> and its relatives,
# [THINK], <|begin_of_thought|>, <|START_THINKING|>, channels of gpt-oss (with
# and without its control tokens) and Gemma, Granite's phrases, and others.
_THOUGHT = (
  r"(?:\w{1,20}[:_])?(?:think|thinking|thoughts?|reason|reasoning|reflection"
  r"|analysis|scratchpad|monologue)(?:\s[^<>\n]{0,60})?"
)
_THINKING = re.compile(
  r"(?P<close>"
  rf"[<◁]\|?\s?(?:/|end_(?:of_)?)\s?{_THOUGHT}\|?[>▷]|\[/think\]|</details>"
  r"|<\|channel\|>\s*final\b[^<]{0,40}<\|message\|>|assistantfinal"
  r"|<channel\|>|<unused95>|<\|inner_suffix\|>|^here is my response:)"
  rf"|[<◁]\|?\s?(?:start_|begin_(?:of_)?)?{_THOUGHT}\|?[>▷]|\[think\]"
  r"|<details type=\"reasoning\"[^>]{0,80}>"
  r"|<\|channel\|>\s*(?:analysis|commentary)\b|\A\s{0,4}analysis(?=[^\s,.:;])"
  r"|<\|channel>thought|<unused94>|<\|inner_prefix\|>"
  r"|^here is my thought process:",
  re.IGNORECASE | re.MULTILINE,
)

# Control tokens and tags that a server left at either end.
_TOKENS = (
  r"(?:\s{0,4}(?:<\|[^<>|\n]{1,40}\|>|</\w{1,20}>|<(?:eos|end_of_turn)>"
  r"|\[/\w{1,20}\])){1,9}\s{0,9}"
)
_EDGES = re.compile(rf"\A{_TOKENS}|{_TOKENS}\Z")

# A tie instead of a letter, in plain words only.
_TIE = re.compile(
  rf"{_DECORATION}(?:a )?(?:tie|tied|draw)(?![^\W_])"
  rf"{_DECORATION}(?P<rest>(?:$|[.,;:!(\-–—].*|(?:because|since)\b.*))",
  re.IGNORECASE | re.DOTALL,
)

_REFUSAL = re.compile(
  r"\W{0,8}(?:(?:i'?m|i am|my apologies|apologies)?\W{0,8}(?:very |so )?sorry\b"
  r"|i apologi[sz]e\b"
  r"|i (?:can't|cannot|can not|could not|won't|will not|must decline)\b"
  r"|(?:i'm|i am) (?:unable|not able)\b"
  r"|(?:unfortunately|as an ai)\b.*?\b(?:can't|cannot|can not|unable)\b)",
  re.IGNORECASE,
)


def read(text: str | None, *, ties: bool = False) -> Letter:
  """The letter of the preferred slot; "tie" only where `ties` allows it."""
  text = _plain(text or "")
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if not lines:
    return "missing"
  # A letter alone is a verdict on the last line only.
  alone = _letter(lines[-1], ties, trailing=False)
  if alone != "missing":
    return alone
  for form in _LABELS:
    for index, line in reversed([*enumerate(lines)]):
      labels = list(form.finditer(line))
      if labels:
        ends = [label.start() for label in labels[1:]] + [len(line)]
        found: set[Letter] = {
          _letter(line[label.end() : end], ties)
          for label, end in zip(labels, ends, strict=True)
        }
        letter = found.pop() if len(found) == 1 else "missing"
        after = "\n".join([line[labels[-1].end() :], *lines[index + 1 :]])
        denied = any(
          _NOT.search(line[max(0, label.start() - 40) : label.start()])
          for label in labels
        )
        return "missing" if denied or _revised(letter, after) else letter
  return "refusal" if _REFUSAL.match(text) else "missing"


def _revised(letter: Letter, after: str) -> bool:
  """Whether the text after a verdict takes it back."""
  named = ({*match.groups()} - {None} for match in _REVISION.finditer(after))
  return any(letters != {letter} for letters in named)


def _plain(text: str) -> str:
  """The reply without thinking, marks of its end and unusual characters."""
  text = unicodedata.normalize("NFKC", text).replace("’", "'")
  text = "".join(c for c in text if unicodedata.category(c) != "Cf")
  said, start, thinking = "", 0, False
  for mark in _THINKING.finditer(text):
    if mark["close"]:
      # What nothing opened began with the reply, or with the last mark.
      start, thinking = mark.end(), False
    elif not thinking:
      said, thinking = said + text[start : mark.start()], True
  return _EDGES.sub("", said if thinking else said + text[start:])


def read_json(text: str | None, *, ties: bool = False) -> Letter:
  """The choice of a JSON reply in the form of `prompts.schema`, exactly."""
  text = _plain(text or "")
  value = parse(text)
  if value is None:
    return "refusal" if _REFUSAL.match(text.strip()) else "missing"
  choice = as_dict(value).get("choice")
  if choice == "A" or choice == "B":
    return choice
  return "tie" if ties and choice == "tie" else "missing"


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
  if len(dict(pairs)) != len(pairs):
    raise ValueError("a name occurs twice")
  return dict(pairs)


def _letter(text: str, ties: bool, *, trailing: bool = True) -> Letter:
  tie = _TIE.fullmatch(text) if ties else None
  if tie:
    remark = _REASON.split(tie["rest"])[0]
    spoken = re.search(r"[^\W_]" if not trailing else r"\b[AB]\b", remark)
    return "missing" if spoken else "tie"
  match = _LETTER.fullmatch(text)
  if not match or not _REMARK.fullmatch(match["rest"]):
    return "missing"
  letter, rest = match["letter"], match["rest"]
  if not trailing and re.search(r"[^\W_]", rest):
    return "missing"
  # The other letter in a remark makes it ambiguous, unless after "because".
  remark = _REASON.split(rest)[0]
  other = "B" if letter in "Aa" else "A"
  # A lower-case "a" is an article, unless the verdict is lower-case too.
  named = other + other.lower() if letter.islower() or other == "B" else other
  if re.search(rf"\b[{named}]\b", remark):
    return "missing"
  if _UNDECIDED.search(re.split(r"[.;!]", remark)[0]):
    return "missing"
  return "A" if letter in "Aa" else "B"


def read_completion(
  completion: Any, *, output: Output, ties: bool
) -> judging.Reply:
  """The parsed reply of a chat completion, whatever its shape."""
  fields = as_dict(completion)
  reply = dataclasses.replace(
    judging.NOTHING,
    model=_text(fields.get("model")),
    fingerprint=_text(fields.get("system_fingerprint")),
    **usage(completion),
  )
  if "choices" not in fields:
    error = "the reply is not a chat completion"
    return dataclasses.replace(judging.NOTHING, error=error)
  choice = _first(fields)
  if not isinstance(choice.get("message"), dict):
    return dataclasses.replace(reply, error="the reply has no choices")
  content = choice["message"].get("content")
  # A list has thinking in parts of other types.
  parts = [*map(as_dict, content)] if isinstance(content, list) else []
  refused = "".join(
    _text(x.get("refusal")) for x in [choice["message"], *parts]
  )
  spoken = [x.get("text") for x in parts if x.get("type") in _SPOKEN]
  text = _text(content) or "".join(map(_text, spoken)) or refused
  reply = dataclasses.replace(reply, text=text)
  finish = choice.get("finish_reason")
  if refused or finish == "content_filter":
    return dataclasses.replace(reply, choice="refusal")
  if finish == "length":
    return dataclasses.replace(reply, error="the reply was cut at max_tokens")
  letter = (read_json if output == "json_schema" else read)(text, ties=ties)
  if letter == "missing":
    return dataclasses.replace(reply, error="no verdict in the reply")
  if letter == "refusal":
    return dataclasses.replace(reply, choice="refusal")
  return dataclasses.replace(
    reply,
    choice={"A": "first", "B": "second", "tie": "tie"}[letter],
    score=_score(choice.get("logprobs"), letter, output, ties),
  )


def error(completion: Any) -> dict:
  """The error object that a reply with status 200 has instead, or {}."""
  fields = as_dict(completion)
  found = fields.get("error") or _first(fields).get("error")
  return (
    found
    if isinstance(found, dict)
    else {"message": str(found)}
    if found
    else {}
  )


def _first(fields: dict) -> dict:
  choices = fields.get("choices")
  return as_dict(choices[0] if isinstance(choices, list) and choices else 0)


def usage(completion: Any) -> dict[str, int]:
  """The server's token counts; 0 where there is none."""
  counts = as_dict(as_dict(completion).get("usage"))
  names = ("prompt_tokens", "completion_tokens")
  found = {name: counts.get(name) for name in names}
  return {k: n if type(n) is int and n >= 0 else 0 for k, n in found.items()}


def _score(
  logprobs: Any, letter: str, output: Output, ties: bool
) -> float | None:
  """Probability that A wins, a tie counting half; None if it is unknown."""
  content = as_dict(logprobs).get("content")
  content = content if isinstance(content, list) else []
  tokens = [_text(as_dict(entry).get("token")) for entry in content]
  place = _place(tokens, letter, output, ties)
  others = None if place is None else content[place].get("top_logprobs")
  shares = {"A": 0.0, "B": 0.0} | ({"tie": 0.0} if ties else {})
  for entry in others if isinstance(others, list) else ():
    if not isinstance(entry, dict):
      return None
    name, logprob = _bare(_text(entry.get("token"))), entry.get("logprob")
    if name in shares and isinstance(logprob, int | float) and logprob <= 0:
      shares[name] += math.exp(logprob)
  total = sum(shares.values())
  if not total > 0:
    return None
  return min(1.0, (shares["A"] + 0.5 * shares.get("tie", 0.0)) / total)


def _place(
  tokens: list[str], letter: str, output: Output, ties: bool
) -> int | None:
  """Index of the last token that completes this verdict, or None."""
  for index in reversed(range(len(tokens))):
    if _bare(tokens[index]) == letter:
      text = "".join(tokens[:index])
      # The JSON object is still open here: look for the key.
      if output == "json_schema":
        found = re.search(r'"choice"\s*:\s*"?\s*\Z', _plain(text))
      else:
        after = read(text + tokens[index], ties=ties)
        found = read(text, ties=ties) != letter == after
      if found:
        return index
  return None


def _bare(token: str) -> str:
  bare = token.strip(" \t\r\n\"'*_.:`[]()<>“”▁Ġ")
  return bare.lower() if bare.lower() == "tie" else bare.upper()


def parse(data: bytes | str) -> Any:
  """The value of JSON from a server; None if it is not valid."""
  with contextlib.suppress(ValueError, RecursionError):
    return json.loads(data, object_pairs_hook=_unique)
  return None


def as_dict(value: Any) -> dict:
  """The value if it is a dict, else {}."""
  return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
  """The string with lone surrogates replaced, else ""; valid UTF-8."""
  text = value if isinstance(value, str) else ""
  return text.encode("utf-8", "replace").decode()
