"""Compared texts made harmless: what looks like our own words is marked.

A text can imitate the page that it is shown on: close its fence, open the
next candidate's slot, write the judge's verdict, speak as the system. Two
changes take the force out of that, whoever reads the page:

- every line of the text gets a bar in front, so that none of its lines can be
  a line of the page: not a fence, not a label, not a verdict;
- inside every such imitation, wherever it stands in a line, a tilde is put
  before the part that makes it act: `[[~A]]`, `Candidate ~B:`, `<~|im_end|>`.

Imitations are looked for in a folded copy (full width, look-alike letters of
other scripts, invisible characters), and marked in the original, of which
nothing is removed: without bars and tildes the text is what it was.
"""

import functools
import re
import unicodedata

BAR = "| "
MARK = "~"

# All that ends a line for some reader: U+2028 does for a model, if not for us.
_BREAK = re.compile("\r\n|[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")

# Letters of other scripts that look like the ones in our words.
_LOOKALIKES = str.maketrans(
  "АВЕІКМНОРСТХаеіорсухԁѕһЈΑΒΕΖΗΙΚΜΝΟΡΤΥΧοαᴀʙ",
  "ABEIKMHOPCTXaeiopcyxdshJABEZHIKMNOPTYXoaAB",
)

_GAP = r"[\s\"'`*_\-–—:=#(<\[{|.,;]{0,8}"
# Each form's `act` group begins where the mark is put.
_FORMS = tuple(
  re.compile(form, re.IGNORECASE)
  for form in (
    # The page's slots and verdicts, and those of other judges' pages.
    rf"\b(?:candidate|response|answer|assistant|option|choice|output|model"
    rf"|summary|reply|text){_GAP}(?P<act>(?<![^\W_])[AB](?![^\W_]))",
    r"\b(?:more|most|less)[\s_\-]{1,4}(?P<act>(?:helpful|harmless)\b"
    rf"(?=[\s\w]{{0,20}}{_GAP}[:=]|[\s\w]{{0,20}}\bis\b))",
    r"\b(?P<act>(?:preferred|better|winner|verdict|decision|choice|comparison"
    r"|conversation|post)\b(?=[\s\"'`*_]{0,4}[:=]))",
    r"\[\s*\[\s*(?P<act>(?:A|B|C|tie)\s*\]\s*\])",
    r"\\?boxed\s*\{\s*(?P<act>(?:A|B|tie)\s*\})",
    # Fences and the control marks of chat formats.
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


# Both orders, all samples and the estimate show the same texts.
@functools.lru_cache(maxsize=8192)
def enclose(text: str) -> str:
  """The text with its imitations marked and a bar before each of its lines."""
  marked = mark(text)
  return BAR + _BREAK.sub(lambda match: match[0] + BAR, marked)


def mark(text: str) -> str:
  """The text with a tilde inside everything that imitates the page."""
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
  """Plain letters for matching, and where each of them came from."""
  if text.isascii():
    return text, list(range(len(text)))
  folded: list[str] = []
  origin: list[int] = []
  for index, character in enumerate(text):
    category = unicodedata.category(character)
    # Invisible characters, and accents put over a letter, do not part words.
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
