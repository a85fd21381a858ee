"""Stanford Human Preferences: two comments on a post, and their votes.

As in DPO's official code, the post is one human turn, a comment is a response
with a leading space, and a pair is kept if the votes for one comment are at
least `min_score_ratio` times those for the other (2 there). That code
fine-tunes once a post, on the comment with the most votes; here SFT takes
`chosen` of every kept pair.

References:
  Ethayarajh et al., Understanding Dataset Difficulty with V-Usable
  Information, 2022 (arXiv 2110.08420).
"""

import re
from typing import Any

from dpo_jax.data import preferences


def domain(row: dict[str, Any]) -> str:
  """The subreddit, without the split in "askculinary_train"; "" for none."""
  name = row.get("domain")
  if not isinstance(name, str):
    return ""
  return re.sub("_(train|validation|test)$", "", name)


def texts(row: Any, min_score_ratio: float) -> tuple[str, str, str] | str:
  """Prompt, chosen and rejected of a row; or the filter's reason.

  Raises:
    Malformed: a field is missing or of another type.
    Quarantined: the votes have no ratio, or contradict the label.
  """
  row = preferences.mapping(row)
  history = preferences.text(row, "history")
  comments = [
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
  chosen, rejected = comments if label else comments[::-1]
  prompt = f"{preferences.HUMAN} {history}{preferences.ASSISTANT}"
  return prompt, chosen, rejected
