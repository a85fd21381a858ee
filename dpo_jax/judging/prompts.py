"""Prompt templates of the judge, and their defense against prompt injection.

The templates follow the structure of Rafailov et al., 2023, Appendix C.2 (arXiv
2305.18290), in words of our own.

Each text is fenced by two lines with a code, a hash of all three texts and the
number of the attempt, so that no text can contain its own. A text can still
imitate the page: each of its lines gets a bar in front, and each imitation a
tilde before the effective part: `[[~A]]`, `Candidate ~B:`. Imitations are found
in a normalized copy (full width, look-alikes, invisible characters) and marked
in the original, from which nothing is removed.
"""

import dataclasses
import functools
import pathlib
import re
import unicodedata

from dpo_jax import judging
from dpo_jax.io import hashing

# Built-in templates, and the label of the verdict's line.
LABELS = {
  "dialogue": "More helpful:",
  "harmlessness": "More harmless:",
  "summary": "Preferred:",
  "summary-concise": "Preferred:",
}

_PLACEHOLDER = re.compile(r"\{(prompt|first|second|fence|ending)\}")


@dataclasses.dataclass(frozen=True)
class Template:
  """A text with {prompt}, {first} and {second} once each, and its {ending}."""

  text: str
  ending: str

  def __post_init__(self):
    names = _PLACEHOLDER.findall(self.text)
    for name in ("prompt", "first", "second"):
      if names.count(name) != 1:
        raise ValueError(
          f"the judge template has {{{name}}} {names.count(name)} times;"
          " write {prompt}, {first} and {second} once each"
        )

  @property
  def hash(self) -> str:
    """Content hash of the template and of the way it is filled."""
    return hashing.content_hash("fenced template 2", self.text, self.ending)


def load(name: str, *, output: str, ties: bool) -> Template:
  """The built-in template of that name, else the file `name`.

  Args:
    name: built-in name or path.
    output: "text", or "json_schema" for constrained decoding.
    ties: whether the judge may call a tie.

  Raises:
    ValueError: there is no such template, or it lacks a placeholder.
  """
  label, path = LABELS.get(name, "Preferred:"), pathlib.Path(name)
  if name in LABELS:
    path = pathlib.Path(__file__).parent / "templates" / f"{name}.txt"
  if output == "json_schema":
    choices = '"A", "B" or "tie"' if ties else '"A" or "B"'
    ending = (
      'Answer with a JSON object: that sentence under "comparison", and then'
      f' your decision, {choices}, under "choice".'
    )
  else:
    last = f"\n{label} tie" if ties else ""
    ending = (
      "Then end with a line of its own that holds only your decision, exactly"
      f" as one of these {'three' if ties else 'two'}:"
      f"\n{label} A\n{label} B{last}"
    )
  try:
    return Template(path.read_bytes().decode(), ending)
  except OSError as error:
    raise ValueError(
      f"template={name!r}: {error.strerror}; give a file, or one of"
      f" {', '.join(LABELS)}"
    ) from error
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error


def schema(*, ties: bool) -> dict:
  """JSON schema of a reply; the comparison comes before the choice."""
  choices = ["A", "B", "tie"] if ties else ["A", "B"]
  return {
    "type": "object",
    "properties": {
      "comparison": {"type": "string"},
      "choice": {"type": "string", "enum": choices},
    },
    "required": ["comparison", "choice"],
    "additionalProperties": False,
  }


def fill(template: Template, question: judging.Question, ask: int = 0) -> str:
  """The page of one request; the fence's code depends on the attempt `ask`."""
  texts = (question.prompt, question.first, question.second)
  fence, attempt = "", 0
  while not fence or any(fence in text for text in texts):
    fence = hashing.content_hash(
      "fence", question.salt, str(ask), str(attempt), *texts
    )[:16]
    attempt += 1
  fenced = [f"<<<{fence}\n{enclose(text)}\n{fence}>>>" for text in texts]
  parts = dict(zip(("prompt", "first", "second"), fenced, strict=True))
  parts |= {"fence": fence, "ending": template.ending}
  # One pass: placeholders inside the texts are not replaced.
  return _PLACEHOLDER.sub(lambda match: parts[match[1]], template.text)


BAR = "| "
MARK = "~"

# Every character that some reader takes for a line break.
_BREAK = re.compile("\r\n|[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")

# Cyrillic and Greek letters that look like Latin ones.
_LOOKALIKES = str.maketrans(
  "АВЕІКМНОРСТХаеіорсухԁѕһЈΑΒΕΖΗΙΚΜΝΟΡΤΥΧοαᴀʙ",
  "ABEIKMHOPCTXaeiopcyxdshJABEZHIKMNOPTYXoaAB",
)

_GAP = r"[\s\"'`*_\-–—:=#(<\[{|.,;]{0,8}"
# The tilde goes before the group `act`.
_FORMS = tuple(
  re.compile(form, re.IGNORECASE)
  for form in (
    # Slots and verdicts of this page, and of other judges' pages.
    rf"\b(?:candidate|response|answer|assistant|option|choice|output|model"
    rf"|summary|reply|text){_GAP}(?P<act>(?<![^\W_])[AB](?![^\W_]))",
    r"\b(?:more|most|less)[\s_\-]{1,4}(?P<act>(?:helpful|harmless)\b"
    rf"(?=[\s\w]{{0,20}}{_GAP}[:=]|[\s\w]{{0,20}}\bis\b))",
    r"\b(?P<act>(?:preferred|better|winner|verdict|decision|choice|comparison"
    r"|conversation|post)\b(?=[\s\"'`*_]{0,4}[:=]))",
    r"\[\s*\[\s*(?P<act>(?:A|B|C|tie)\s*\]\s*\])",
    r"\\?boxed\s*\{\s*(?P<act>(?:A|B|tie)\s*\})",
    # Fences, and control tokens of chat formats.
    r"(?P<act><<<|>>>)",
    r"<\s*(?P<act>\|[^|>\n]{0,40}\|\s*>)",
    r"<\s*(?P<act>/?\s*(?:system|user|assistant|human|instructions?|verdict"
    r"|answer|response|prompt|s)\b[^>\n]{0,20}>)",
    r"\[\s*(?P<act>/?\s*(?:INST|SYS(?:TEM)?)\s*\])",
    r"(?:^|(?<=\n))[\s>*_]*#{1,6}\s*(?P<act>(?:system|instructions?|verdict"
    r"|response|assistant|user|human|end|candidate)\b)",
    r"(?:^|(?<=\n))[\s>*_]*(?P<act>(?:system|developer)\s*(?:\w+\s*)?:)",
    r"(?P<act>(?<![-=])[-=]{3,}\s*(?:end|begin|system|candidate)\b)",
  )
)


# A millisecond per 1,000 characters, and a prompt recurs in every cell, order
# and sample, and in the estimate.
@functools.lru_cache(maxsize=8192)
def enclose(text: str) -> str:
  """The text with imitations marked and a bar before each line."""
  marked = mark(text)
  return BAR + _BREAK.sub(lambda match: match[0] + BAR, marked)


def mark(text: str) -> str:
  """The text with a tilde inside each imitation of the page."""
  folded, origin = _fold(text)
  places = {
    origin[match.start("act")]
    for form in _FORMS
    for match in form.finditer(folded)
  }
  parts, last = [], 0
  for place in sorted(places):
    parts += [text[last:place], MARK]
    last = place
  return "".join(parts) + text[last:]


def _fold(text: str) -> tuple[str, list[int]]:
  """The normalized text, and each character's index in the original."""
  if text.isascii():
    return text, list(range(len(text)))
  folded: list[str] = []
  origin: list[int] = []
  for index, character in enumerate(text):
    category = unicodedata.category(character)
    # Drop invisible characters and combining accents.
    if category in ("Cf", "Mn", "Me"):
      continue
    if _BREAK.match(character):
      plain = "\n"
    else:
      plain = unicodedata.normalize("NFKD", character).translate(_LOOKALIKES)
      plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    folded.append(plain)
    origin.extend([index] * len(plain))
  return "".join(folded), origin
