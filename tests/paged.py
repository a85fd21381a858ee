"""Pages for tests, and what a parser finds in one."""

import html.parser
import json

from dpo_jax.report import page
from dpo_jax.report.page import browse

# Each tries to leave its element, to run, to load, or to hide something.
HOSTILE = (
  "</script><script>window.hit = 1</script>",
  "<!-- ]]> </style></title> <img src=x onerror=window.hit=1>",
  "&lt;b&gt; &amp; &#60;script&#62; {{data}} {{script}} ${window.hit = 1}",
  "javascript:window.hit=1 \\u003cscript\\u003e \\",
  "line\u2028separator\u0085next\x0bvertical\x00nul\u202eto left\u200b",
  "日本語 🙂‍↔️ \u05e9\u05dc\u05d5\u05dd '\" onmouseover=window.hit=1 x='",
)


def prompt(name, text="", chosen="four", responses=(), subset=""):
  """A prompt of the response browser, with a text of one turn by default."""
  return {
    "id": name,
    "subset": subset,
    "text": text or f"\n\nHuman: {name}\n\nAssistant:",
    "chosen": chosen,
    "responses": [*responses],
  }


def response(cell, text, verdicts, chosen="four", reply="A is better."):
  """A response with a call for each verdict, that of model_first first."""
  model, step, temperature = cell
  return {
    "model": model,
    "step": step,
    "temperature": temperature,
    "sample": 0,
    "text": text,
    "tokens": 3,
    "finish": "eos",
    "outcome": browse.outcome(verdicts),
    "flags": browse.flags(text, chosen, verdicts),
    "calls": [
      {
        "order": order,
        "verdict": verdict,
        "score": None,
        "reply": reply,
        "error": "",
      }
      for order, verdict in zip(("model_first", "chosen_first"), verdicts)
    ],
  }


def render(prompts, title="A page", flags=(), sections=()):
  return page.render(title, flags, sections, prompts)


def data(text):
  """The JSON that a page holds."""
  (found,) = [s for a, s in Parsed(text).scripts if a.get("id") == "data"]
  return json.loads(found)


class Parsed(html.parser.HTMLParser):
  """The elements of a page as a browser finds them: (tag, attributes)."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.scripts, self.styles = [], [], []
    self._open = None
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    self._open = tag
    if tag == "script":
      self.scripts.append((dict(attributes), ""))
    if tag == "style":
      self.styles.append("")

  def handle_endtag(self, tag):
    self._open = None

  def handle_data(self, data):
    if self._open == "script":
      attributes, text = self.scripts[-1]
      self.scripts[-1] = (attributes, text + data)
    elif self._open == "style":
      self.styles[-1] += data
