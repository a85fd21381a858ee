"""TL;DR: Reddit posts and two summaries each, of which people chose one.

The prompt is the query of Stiennon et al., without a space at its end; a
summary is a response with one leading space:

  SUBREDDIT: r/<subreddit>

  TITLE: <title>

  POST: <post>

  TL;DR:

Two row forms are read: the published one (info, summaries, choice), and prompt,
chosen, rejected, where "TL;DR:" may also be the start of both summaries.

References:
  Stiennon et al., Learning to summarize from human feedback, 2020
  (arXiv 2009.01325).
"""

from typing import Any

from dpo_jax.data import preferences

CUE = "TL;DR:"


def subreddit(row: dict[str, Any]) -> str:
  """The post's subreddit; "" for a row of prompt, chosen, rejected."""
  info = row.get("info")
  name = info.get("subreddit") if isinstance(info, dict) else None
  return name if isinstance(name, str) else ""


def texts(row: Any) -> tuple[str, str, str] | str:
  """Prompt, chosen and rejected of a row; or the reason to leave it out.

  Raises:
    Malformed: a field is missing or of another type, or neither prompt nor
      summaries of a flat row have the cue.
    Quarantined: the post or a summary is empty.
  """
  row = preferences.mapping(row)
  if "summaries" not in row:
    fields = ("prompt", "chosen", "rejected")
    return _flat(*(preferences.text(row, name) for name in fields))
  info = preferences.mapping(row.get("info"), "field 'info'")
  summaries = row["summaries"]
  if not isinstance(summaries, list) or len(summaries) != 2:
    raise preferences.Malformed("field 'summaries' is not a list of two")
  choice = preferences.integer(row, "choice")
  if choice not in (0, 1):
    raise preferences.Malformed(
      "field 'choice' is neither 0 nor 1", f": {choice}"
    )
  summaries = [
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
    _response(summaries[choice]),
    _response(summaries[1 - choice]),
  )


def _flat(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
  prompt = prompt.rstrip()
  if not prompt:
    raise preferences.Quarantined("empty prompt")
  if not prompt.endswith(CUE):
    summaries = (chosen.lstrip(), rejected.lstrip())
    if not all(summary.startswith(CUE) for summary in summaries):
      raise preferences.Malformed(
        f"neither the prompt ends nor both summaries begin with {CUE!r}"
      )
    prompt = f"{prompt}\n\n{CUE}"
    chosen, rejected = (summary.removeprefix(CUE) for summary in summaries)
  return prompt, _response(chosen), _response(rejected)


def _response(summary: str) -> str:
  return " " + summary.strip()
