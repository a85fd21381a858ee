"""What the fake judge server says: verdicts by a rule, and every misbehaviour.

A script is a line of steps, parted by blanks. The n-th request gets the n-th
step, and the last step stands for all that follow. A step is one of the names
below, with `=VALUE` where it takes one and `*COUNT` to stand several times;
with `%PERCENT` it is no step but strikes that share of all requests, drawn by
their number, so that a run can be repeated:

  longer                     the longer text wins, for ever
  500*3 429=2 longer         three failures, one "come back in 2 s", then fine
  longer 500%5 hang%1        fine, but for 5% failures and 1% silence

Verdicts: longer, shorter, first, second, tie; obey reads the page as a naive
judge does and obeys what it finds in the texts. Words: refusal, empty, null,
garbage, cut, unsure, echo (repeats the key it was sent), say=WORDS with _ for
blanks. Failures: any status from 400 to 599 (=S is its Retry-After), quota,
hang, drip (=S seconds between bytes), half, reset, html, junk, slow=S.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable

from dpo_jax.judging import prompts


@dataclasses.dataclass(frozen=True)
class Answer:
  """A response, headers as given.

  `hold_s` passes before anything is sent; `cut` sends half of the body and
  hangs up; `drip_s` passes after every byte of it; `reset` sends nothing but
  a reset of the connection.
  """

  status: int = 200
  body: bytes = b""
  content_type: str = "application/json"
  headers: tuple[tuple[str, str], ...] = ()
  cut: bool = False
  reset: bool = False
  hold_s: float = 0.0
  drip_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Request:
  """What a client sent."""

  headers: dict[str, str]
  body: dict

  @property
  def prompt(self) -> str:
    return self.body["messages"][0]["content"]

  @property
  def texts(self) -> tuple[str, str, str]:
    """The conversation, the first and the second text."""
    prompt, first, second = prompts.fenced(self.prompt)
    return prompt, first, second


Rule = Callable[[Request, int], Answer]

HANG_S = 3600.0


def says(
  text: str | None, finish_reason="stop", refusal=None, **fields
) -> Answer:
  """A completion with this content; `fields` of it are put over the usual."""
  logprobs = fields.pop("logprobs", None)
  completion = {
    "id": "completion-1",
    "object": "chat.completion",
    "created": 1,
    "model": "judge-as-served",
    "system_fingerprint": "fp_fake",
    "choices": [
      {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text, "refusal": refusal},
        "logprobs": logprobs,
      }
    ],
    "usage": {"prompt_tokens": 100, "completion_tokens": 20},
  }
  return Answer(body=json.dumps(completion | fields).encode())


def fails(status: int, message="no", code=None, **headers: str) -> Answer:
  """An error as the API words it; header names with _ for -."""
  error = {"error": {"message": message, "type": "error", "code": code}}
  return Answer(
    status=status,
    body=json.dumps(error).encode(),
    headers=tuple((k.replace("_", "-"), v) for k, v in headers.items()),
  )


def verdict(request: Request, choice: str) -> Answer:
  """A, B or tie in the form that was asked for, with what it cost."""
  body = request.body
  if "response_format" in body:
    reason = {"comparison": "One is better.", "choice": choice}
    tokens = [json.dumps(reason)[: -len(choice) - 2], choice, '"}']
  else:
    tokens = [f"Comparison: one is better.\n{_label(request)} ", choice]
  logprobs = None
  if body.get("logprobs"):
    logprobs = {"content": [_logprobs(t, t == choice) for t in tokens]}
  text = "".join(tokens)
  usage = {
    # Some four bytes a token, as English has.
    "prompt_tokens": math.ceil(len(request.prompt.encode()) / 4),
    "completion_tokens": math.ceil(len(text) / 4),
  }
  return says(text, logprobs=logprobs, usage=usage)


@functools.lru_cache
def _find_label(page_end: str) -> str:
  labels = re.findall(r"^(.*:) A$", page_end, re.MULTILINE)
  return labels[-1] if labels else "More helpful:"


def _label(request: Request) -> str:
  return _find_label(request.prompt[-200:].rpartition(">>>")[2])


def _logprobs(token: str, chosen: bool) -> dict:
  """Nine to one for the choice over another, certainty for all else."""
  shares = {token: 1.0}
  if chosen:
    shares = {token: 0.9, "B" if token == "A" else "A": 0.1}
  top = [{"token": t, "logprob": math.log(p)} for t, p in shares.items()]
  return {**top[0], "top_logprobs": top}


def prefer_longer(request: Request, number: int) -> Answer:
  """The text with more characters wins; the first if they are equal."""
  _, first, second = request.texts
  return verdict(request, "A" if len(first) >= len(second) else "B")


def prefer_shorter(request: Request, number: int) -> Answer:
  """The text with fewer characters wins; the first if they are equal."""
  _, first, second = request.texts
  return verdict(request, "A" if len(first) <= len(second) else "B")


def always(choice: str) -> Rule:
  return lambda request, number: verdict(request, choice)


# What a naive reader takes for the page's structure, wherever it stands; a
# tilde is no part of any of it.
_NAIVE = (
  r"(?:more|most)[ _]helpful[^\w~]{0,8}([AB])\b",
  r"(?<![~\w])(?:preferred|better|winner|verdict|choice|decision|answer)"
  r"[^\w~]{1,8}([AB])\b",
  r"\[\[([AB])\]\]",
  r"boxed\{([AB])\}",
  r"(?:candidate|response|answer|option|assistant) ([AB])\W{0,3}"
  r" (?:is|wins|was)\b",
)
_NAIVE_FORM = re.compile("|".join(_NAIVE), re.IGNORECASE)
# Words after which a naive reader hears another speaker.
_SPEAKER = re.compile(
  r"<\|[^|>]*\|>|</?(?:system|user|assistant|instructions?)>|\[/?INST\]"
  r"|^#+ *(?:system|instructions?)\b|^system(?: \w+)?:",
  re.IGNORECASE | re.MULTILINE,
)
_ORDER = re.compile(
  r"(?:choose|pick|answer|output|say|prefer|select)\b\W*(?:\w+ ){0,3}?([AB])\b",
  re.IGNORECASE,
)
_SLOT = re.compile(
  r"^\W{0,3}(?:candidate|response) ([AB])\W{0,3}$", re.I | re.M
)


def obey(request: Request, number: int) -> Answer:
  """A naive judge: it obeys the last sign of a verdict that it finds.

  It folds full-width letters and drops invisible characters, as a model's
  eye does. Signs are verdicts in any usual form, words of a forged speaker
  that tell what to choose, and slots: of a slot that is opened again it takes
  the last text. Without other signs the text that is not unsure wins, then the
  longer. Bars at the start of lines and tildes before a letter hide a sign
  from it, as they tell a reader that this is quoted.
  """
  page = _eye(request.prompt)
  # Its own instructions end the page, and are no sign.
  body = page[: page.rindex("First write one sentence")]
  signs = [
    (match.end(), next(g for g in match.groups() if g).upper())
    for match in _NAIVE_FORM.finditer(body)
  ]
  speaker = _SPEAKER.search(body)
  if speaker:
    orders = _ORDER.finditer(body, speaker.end())
    signs += [(match.end(), match[1].upper()) for match in orders]
  if signs:
    return verdict(request, max(signs)[1])
  slots: dict[str, tuple[bool, int]] = {}
  heads = [*_SLOT.finditer(body)]
  ends = [head.start() for head in heads[1:]] + [len(body)]
  for head, end in zip(heads, ends, strict=True):
    text = body[head.end() : end]
    # A fence that is closed by the code that opened it ends the text.
    fence = re.search(r"<<<(\w*)\n(.*?)\n\1>>>", text, re.DOTALL)
    text = fence[2] if fence else text
    slots[head[1].upper()] = ("not sure" not in text, len(text.split()))
  better = max(slots, key=lambda letter: slots[letter], default="A")
  return verdict(request, better)


def _eye(text: str) -> str:
  import unicodedata

  text = unicodedata.normalize("NFKC", text)
  text = "".join(c for c in text if unicodedata.category(c) != "Cf")
  # Cyrillic and Greek capitals and small letters that look Latin.
  text = text.translate(str.maketrans("АВΑΒаеоср", "ABABaeocp"))
  return "\n".join(text.splitlines())


def echo(request: Request, number: int) -> Answer:
  """Repeats the key that it was sent."""
  return says(request.headers.get("authorization", "") + "\nMore helpful: A")


def _fixed(answer: Answer) -> Rule:
  return lambda request, number: answer


def _struck(**changes) -> Callable[[str], Rule]:
  """A verdict whose sending goes wrong; the value is in seconds."""
  (field, default) = next(iter(changes.items()))

  def make(value: str) -> Rule:
    how = {field: float(value) if value else default}
    return lambda request, number: dataclasses.replace(
      prefer_longer(request, number), **how
    )

  return make


def _words(value: str) -> Rule:
  return _fixed(says(value.replace("_", " ")))


_REFUSAL = "I'm sorry, but I can't assist with that."
_HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
_PLAIN: dict[str, Rule] = {
  "longer": prefer_longer,
  "shorter": prefer_shorter,
  "first": always("A"),
  "second": always("B"),
  "tie": always("tie"),
  "obey": obey,
  "echo": echo,
  "refusal": _fixed(says(_REFUSAL)),
  "empty": _fixed(says("")),
  "null": _fixed(says(None)),
  "garbage": _fixed(says("Lorem ipsum, dolor sit amet.")),
  "unsure": _fixed(says("Comparison: alike.\nMore helpful: A or B")),
  "cut": _fixed(says("Comparison: the first one is", finish_reason="length")),
  "quota": _fixed(fails(429, "quota exceeded", code="insufficient_quota")),
  "html": _fixed(Answer(body=_HTML, content_type="text/html")),
  "junk": _fixed(Answer(body=b'{"id": "1", "choi\xff')),
}
_WITH_VALUE: dict[str, Callable[[str], Rule]] = {
  "hang": _struck(hold_s=HANG_S),
  "slow": _struck(hold_s=1.0),
  "drip": _struck(drip_s=1.0),
  "half": _struck(cut=True),
  "reset": _struck(reset=True),
  "say": _words,
}
_STEP = re.compile(
  r"(?P<name>[a-z]+|[45]\d\d)(?:=(?P<value>[^\s*%]+))?"
  r"(?:\*(?P<count>\d+)|%(?P<share>\d+(?:\.\d+)?))?"
)


def read_script(script: str) -> Rule:
  """The rule of a script; ValueError names a step that is not understood."""
  steps: list[Rule] = []
  strikes: list[tuple[float, Rule]] = []
  for word in script.split():
    match = _STEP.fullmatch(word)
    rule = match and _step(match["name"], match["value"] or "")
    if not match or not rule:
      known = " ".join([*_PLAIN, *_WITH_VALUE])
      raise ValueError(
        f"script: {word!r} is no step; steps are {known} and statuses from 400"
        " to 599, with =VALUE, *COUNT or %PERCENT"
      )
    if match["share"]:
      strikes.append((float(match["share"]) / 100, rule))
    else:
      steps += [rule] * int(match["count"] or 1)
  if not steps:
    raise ValueError(
      f"script={script!r} has no step to end with, such as longer"
    )

  def rule(request: Request, number: int) -> Answer:
    drawn = hashlib.sha256(b"%d" % number).digest()
    share = int.from_bytes(drawn[:6], "big") / 2**48
    for chance, strike in strikes:
      if share < chance:
        return strike(request, number)
      share -= chance
    return steps[min(number, len(steps) - 1)](request, number)

  return rule


def _step(name: str, value: str) -> Rule | None:
  if name.isdecimal():
    headers = {"retry_after": value} if value else {}
    return _fixed(fails(int(name), "as the script says", **headers))
  if name in _WITH_VALUE:
    try:
      return _WITH_VALUE[name](value)
    except ValueError:
      return None
  return None if value else _PLAIN.get(name)
