"""Reddit posts and two summaries each, of which people chose one.

The prompt is the query of Stiennon et al., without a space at its end; a
summary is an answer with one leading space:

  SUBREDDIT: r/<subreddit>

  TITLE: <title>

  POST: <post>

  TL;DR:

Two forms of rows are read: the published one (info, summaries, choice), and
prompt, chosen, rejected, where "TL;DR:" may also stand at the beginning of both
summaries instead.

References:
  Stiennon et al., Learning to summarize from human feedback, 2020
  (arXiv 2009.01325).
"""

from typing import Any

from dpo_jax.data import preferences

CUE = "TL;DR:"


def subreddit(row: dict[str, Any]) -> str:
  """Where a row that `texts` took was posted; "" of a flat row."""
  info = row.get("info")
  found = info.get("subreddit") if isinstance(info, dict) else None
  return found if isinstance(found, str) else ""


def texts(row: Any) -> tuple[str, str, str] | str:
  """Prompt, chosen and rejected of a row; or why it is left out.

  Raises:
    Malformed: a field is missing or of another type, or a flat row's prompt
      does not ask for a summary.
    Quarantined: the post or a summary is empty.
  """
  row = preferences.mapping(row)
  if "summaries" not in row:
    return _flat(*(preferences.text(row, name) for name in _FLAT))
  info = preferences.mapping(row.get("info"), "field 'info'")
  summaries = row["summaries"]
  if not isinstance(summaries, list) or len(summaries) != 2:
    raise preferences.Malformed("field 'summaries' is not a list of two")
  choice = preferences.integer(row, "choice")
  if choice not in (0, 1):
    raise preferences.Malformed(
      "field 'choice' is neither 0 nor 1", f": {choice}"
    )
  answers = [
    preferences.text(
      preferences.mapping(summary, f"field 'summaries[{number}]'"),
      "text",
      f"summaries[{number}].",
    )
    for number, summary in enumerate(summaries)
  ]
  if info.get("post") is None and isinstance(info.get("article"), str):
    return "a news article, not a post"
  subreddit, title, post = (
    preferences.text(info, name, "info.")
    for name in ("subreddit", "title", "post")
  )
  if not post.strip():
    raise preferences.Quarantined("empty prompt")
  prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}"
  return (
    f"{prompt}\n\n{CUE}",
    _answer(answers[choice]),
    _answer(answers[1 - choice]),
  )


_FLAT = ("prompt", "chosen", "rejected")


def _flat(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
  prompt = prompt.rstrip()
  if not prompt:
    raise preferences.Quarantined("empty prompt")
  if not prompt.endswith(CUE):
    answers = (chosen.lstrip(), rejected.lstrip())
    if not all(answer.startswith(CUE) for answer in answers):
      raise preferences.Malformed(
        f"neither the prompt ends nor both summaries begin with {CUE!r}"
      )
    prompt = f"{prompt}\n\n{CUE}"
    chosen, rejected = (answer.removeprefix(CUE) for answer in answers)
  return prompt, _answer(chosen), _answer(rejected)


def _answer(summary: str) -> str:
  return " " + summary.strip()
