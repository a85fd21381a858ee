"""Stanford Human Preferences: two comments on a post, and their votes.

The form is the one of DPO's official code: the post is one human turn, a
comment is an answer with a leading space, and a pair is kept if the votes for
the one are at least `min_score_ratio` times those for the other (2 there).

That code fine-tunes on the comment with the most votes of each post, once a
post. Here SFT takes `chosen` of every kept pair, so that a post of several
pairs counts several times, and always with a comment that won its pair.

References:
  Ethayarajh et al., Understanding Dataset Difficulty with V-Usable
  Information, 2022 (arXiv 2110.08420).
"""

import re
from typing import Any

from dpo_jax.data import preferences


def domain(row: dict[str, Any]) -> str:
  """The subreddit of a row that `texts` took, "askculinary_train" without its
  split; "" if it has none."""
  found = row.get("domain")
  if not isinstance(found, str):
    return ""
  return re.sub("_(train|validation|test)$", "", found)


def texts(row: Any, min_score_ratio: float) -> tuple[str, str, str] | str:
  """Prompt, chosen and rejected of a row; or why the filter leaves it out.

  Raises:
    Malformed: a field is missing or of another type.
    Quarantined: the votes say nothing, or the opposite of the label.
  """
  row = preferences.mapping(row)
  history = preferences.text(row, "history")
  answers = [
    " " + preferences.text(row, name) for name in ("human_ref_A", "human_ref_B")
  ]
  scores = [preferences.integer(row, name) for name in ("score_A", "score_B")]
  label = preferences.integer(row, "labels")
  if label not in (0, 1):
    raise preferences.Malformed(
      "field 'labels' is neither 0 nor 1", f": {label}"
    )
  if not history.strip():
    raise preferences.Quarantined("empty prompt")
  if min(scores) < 1:
    raise preferences.Quarantined("a score below 1 has no ratio")
  first, second = scores if label else scores[::-1]
  if first < second:
    raise preferences.Quarantined("the label contradicts the scores")
  if first < min_score_ratio * second:
    return f"score ratio below {min_score_ratio:g}"
  chosen, rejected = answers if label else answers[::-1]
  prompt = f"{preferences.HUMAN} {history}{preferences.ASSISTANT}"
  return prompt, chosen, rejected
