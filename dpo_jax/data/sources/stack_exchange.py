"""StackExchange preferences: questions, their answers, and scores, as HTML.

As in DPO's official code, the question is one human turn, an answer has a
leading space, every two answers of a question are a pair, and code blocks keep
their <code> tags. Three things differ: answers of equal score are no pair,
where that code prefers the later one; all text is kept, where that code drops
links, emphasis, lists and headings; and SFT takes `chosen` of every pair, where
that code takes the best answer of each question.

References:
  Lambert et al., HuggingFace H4 Stack Exchange Preference Dataset, 2023.
  Askell et al., A General Language Assistant as a Laboratory for Alignment,
  2021, section 4.1 (arXiv 2112.00861): the scores.
"""

import itertools
import re
import urllib.parse
import warnings
from typing import Any

from dpo_jax.data import preferences

# Block elements; `pre` keeps its white space.
_BLOCKS = {
  *("address", "article", "blockquote", "dd", "div", "dl", "dt", "footer"),
  *("h1", "h2", "h3", "h4", "h5", "h6", "header", "li", "ol", "p", "pre"),
  *("section", "table", "td", "th", "tr", "ul"),
}
# White space of HTML; the no-break space, for one, is text.
_SPACE = re.compile(r"[ \t\n\r\f]+")


def site(row: dict[str, Any]) -> str:
  """The host of the question's URL, the first of a row's `metadata`, or ""."""
  metadata = row.get("metadata")
  address = metadata[0] if isinstance(metadata, list) and metadata else None
  if not isinstance(address, str):
    return ""
  try:
    return urllib.parse.urlsplit(address).hostname or ""
  except ValueError:
    return ""


def texts(row: Any) -> list[tuple[str, str, str] | str]:
  """Prompt, chosen and rejected of every two answers; or why they are no pair.

  Ordered by a hash of the texts, so that `max_pairs_per_prompt` takes a random
  sample that does not depend on the order of answers or rows.

  Raises:
    Malformed: a field is missing or of another type.
    Quarantined: the question is empty.
  """
  row = preferences.mapping(row)
  question = strip_html(preferences.text(row, "question"))
  answers = row.get("answers")
  if not isinstance(answers, list):
    raise preferences.Malformed("field 'answers' is not a list")
  scored = []
  for number, answer in enumerate(answers):
    name = f"answers[{number}]"
    answer = preferences.mapping(answer, f"field {name!r}")
    body = " " + strip_html(preferences.text(answer, "text", f"{name}."))
    score = preferences.integer(answer, "pm_score", f"{name}.")
    scored.append((score, body))
  if not question:
    raise preferences.Quarantined("empty prompt")
  prompt = f"{preferences.HUMAN} {question}{preferences.ASSISTANT}"
  pairs = []
  for two in itertools.combinations(scored, 2):
    (low, rejected), (high, chosen) = sorted(two, key=lambda one: one[0])
    texts = (prompt, chosen, rejected)
    pairs.append(texts if low < high else "answers of equal score")
  return sorted(pairs, key=lambda pair: preferences.content_id(*pair))


def strip_html(html: str) -> str:
  """The text of an HTML fragment, its blocks a blank line apart.

  Raises:
    Quarantined: the parser rejects it.
    ImportError: beautifulsoup4 is not installed.
  """
  try:
    import bs4
  except ImportError as error:
    raise ImportError(
      "kind='se' reads HTML with the package beautifulsoup4: pip install"
      " beautifulsoup4"
    ) from error
  with warnings.catch_warnings():
    # It warns of texts that look like a file name, a URL or XML.
    warnings.simplefilter("ignore", UserWarning)
    try:
      soup = bs4.BeautifulSoup(html, "html.parser")
    except bs4.ParserRejectedMarkup as error:
      raise preferences.Quarantined("HTML that cannot be parsed") from error
  blocks: list[tuple[Any, list[str]]] = []
  for node in soup.descendants:
    if isinstance(node, bs4.Tag):
      text = {"br": "\n", "hr": "\n\n"}.get(node.name)
    elif type(node) is bs4.NavigableString:
      text = str(node)
    else:
      text = None  # a comment, a declaration, a script
    if text is None:
      continue
    owner = next((p for p in node.parents if p.name in _BLOCKS), None)
    is_code = owner is not None and owner.name == "pre"
    if not is_code and isinstance(node, bs4.NavigableString):
      text = _SPACE.sub(" ", text)
    if not blocks or blocks[-1][0] is not owner:
      blocks.append((owner, []))
    blocks[-1][1].append(text)
  return "\n\n".join(filter(None, itertools.starmap(_block, blocks)))


def _block(owner: Any, texts: list[str]) -> str:
  text = "".join(texts)
  if owner is not None and owner.name == "pre":
    return f"<code>{text}</code>" if text.strip() else ""
  return re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", text)).strip(" \n")
