"""The page that is put to a judge, with fences that no text can forge.

Each text stands between two lines that carry a code. The code is a hash of
the prompt, both texts and the ask's number, so it differs from call to call,
is the same when the same call is repeated, and cannot be written into a text
beforehand: a text that held its own code would have to contain its own hash.
Inside the fences the texts are made harmless by `markers`.
"""

import dataclasses
import pathlib
import re

from dpo_jax import judging, records
from dpo_jax.judging import markers, templates

_PLACEHOLDER = re.compile(r"\{(prompt|first|second|fence|ending)\}")


@dataclasses.dataclass(frozen=True)
class Template:
  """A text with the places {prompt}, {first} and {second}, each once.

  Each place is filled with a fenced text; {fence}, where it is used, with the
  code of the fences, {ending} with how to answer. Other braces stay as they
  are.
  """

  text: str
  ending: str

  def __post_init__(self):
    names = _PLACEHOLDER.findall(self.text)
    for name in ("prompt", "first", "second"):
      if names.count(name) != 1:
        raise ValueError(
          f"the judge template holds {{{name}}} {names.count(name)} times;"
          " write {prompt}, {first} and {second} once each"
        )

  @property
  def hash(self) -> str:
    """Identifies the template and the way in which it is filled."""
    return records.content_hash("fenced template 2", self.text, self.ending)


def load(name: str, *, output: str, ties: bool) -> Template:
  """The built-in template of that name, else the one in the file `name`.

  Args:
    name: one of `templates.BUILT_IN`, or a path.
    output: "text", or "json_schema" for a server that holds to a schema.
    ties: whether the judge may call a tie.

  Raises:
    ValueError: there is no such template, or it lacks a place.
  """
  if name in templates.BUILT_IN:
    text, label = templates.BUILT_IN[name]
  else:
    text, label = _read(name), templates.FILE_LABEL
  if output == "json_schema":
    ending = templates.json_ending(ties=ties)
  else:
    ending = templates.text_ending(label, ties=ties)
  try:
    return Template(text, ending)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error


def _read(name: str) -> str:
  try:
    return pathlib.Path(name).read_bytes().decode()
  except OSError as error:
    known = ", ".join(templates.BUILT_IN)
    raise ValueError(
      f"template={name!r}: {error.strerror}; give a file, or one of {known}"
    ) from error
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error


def fill(template: Template, question: judging.Question, ask: int = 0) -> str:
  """The text of one call; a question that is asked again has another code."""
  fence = _fence(question, ask)
  texts = {
    "prompt": question.prompt,
    "first": question.first,
    "second": question.second,
  }
  parts = {
    name: f"<<<{fence}\n{markers.enclose(text)}\n{fence}>>>"
    for name, text in texts.items()
  }
  parts |= {"fence": fence, "ending": template.ending}
  # One pass: a placeholder inside a compared text stays what it is.
  return _PLACEHOLDER.sub(lambda match: parts[match[1]], template.text)


def _fence(question: judging.Question, ask: int) -> str:
  texts = (question.prompt, question.first, question.second)
  attempt = 0
  while True:
    code = records.content_hash(
      "fence", question.salt, str(ask), str(attempt), *texts
    )[:16]
    if not any(code in text for text in texts):
      return code
    attempt += 1
