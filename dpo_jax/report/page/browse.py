"""Data of the page's response browser: prompts, responses and judge calls."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from dpo_jax.io import records
from dpo_jax.report import load
from dpo_jax.winrates import calls as calls_lib


def prompts(
  responses: Iterable[records.Response],
  verdicts: Iterable[records.Verdict],
  contradicted: Iterable[records.Verdict] = (),
) -> list[dict[str, Any]]:
  """Prompts with their responses, and these with their judge calls.

  Args:
    responses: rows; prompts are in the order of their first one.
    verdicts: judge calls on the responses.
    contradicted: calls whose verdict is not what the judge's reply says.
  """
  calls: dict[tuple, list[records.Verdict]] = {}
  for call in verdicts:
    calls.setdefault(call.unit[:5], []).append(call)
  flagged = {call.unit for call in contradicted}
  groups: dict[str, list[records.Response]] = {}
  for row in responses:
    groups.setdefault(row.prompt_id, []).append(row)
  return [
    {
      "id": prompt_id,
      "subset": rows[0].subset or "",
      "text": rows[0].prompt,
      "chosen": rows[0].chosen,
      "responses": [
        _response(row, calls.get(row.unit, []), flagged)
        for row in sorted(rows, key=_order)
      ],
    }
    for prompt_id, rows in groups.items()
  ]


def _response(
  row: records.Response, calls: Sequence[records.Verdict], flagged: set[tuple]
) -> dict[str, Any]:
  calls = sorted(calls, key=lambda call: call.order != "model_first")
  verdicts = [call.verdict for call in calls]
  lengths = (len(row.response), len(row.chosen))
  notes = flags(row.response, row.chosen, verdicts)
  if any((c.response_chars, c.chosen_chars) != lengths for c in calls):
    notes.append("judged with other texts")
  if any(call.unit in flagged for call in calls):
    notes.append("verdict is not what the reply says")
  return {
    "model": load.NAMES.get(row.model, row.model),
    "step": row.step,
    "temperature": row.temperature,
    "sample": row.sample_id,
    "text": row.response,
    "tokens": row.token_count,
    "finish": row.finish_reason,
    "outcome": outcome(verdicts),
    "flags": notes,
    "calls": [
      {
        "order": call.order,
        "verdict": call.verdict,
        "score": call.score,
        "reply": call.raw,
        "error": call.error,
      }
      for call in calls
    ],
  }


def flags(text: str, chosen: str, verdicts: Sequence[str]) -> list[str]:
  """Reasons to look at a response, from its text and its verdicts."""
  reasons = (
    (outcome(verdicts) == "split", "orders disagree"),
    ("missing" in verdicts, "a call without a verdict"),
    ("refusal" in verdicts, "the judge refused"),
    (not verdicts and bool(chosen.strip()), "not judged"),
    (not text.strip(), "empty response"),
    (not chosen.strip(), "empty chosen response"),
    (text.strip() == chosen.strip(), "same text as chosen"),
  )
  return [reason for holds, reason in reasons if holds]


def outcome(verdicts: Sequence[str]) -> str:
  """Outcome of the calls on one response.

  "won" or "lost" if all decided calls agree, "split" if they do not, "tie" if
  any is a tie, "none" without a decided call.
  """
  decided = {verdict for verdict in verdicts if verdict in calls_lib.SCORES}
  if not decided:
    return "none"
  if "tie" in decided:
    return "tie"
  if len(decided) == 2:
    return "split"
  return "won" if "model" in decided else "lost"


def to_json(found: Sequence[dict[str, Any]]) -> str:
  """JSON for an HTML script element, one prompt a line.

  A difference between two pages then names a prompt. Characters that an HTML
  parser could take for a tag or comment are escaped; in JSON they occur in
  strings only, where the escape means the same.
  """
  lines = []
  for prompt in found:
    text = json.dumps(prompt, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
      text = text.replace(character, f"\\u{ord(character):04x}")
    lines.append(text)
  return "[\n" + ",\n".join(lines) + "\n]"


def _order(row: records.Response) -> tuple:
  """Final models before checkpoints, in the order of training stages."""
  known = row.model in calls_lib.MODELS
  rank = calls_lib.MODELS.index(row.model) if known else len(calls_lib.MODELS)
  return (
    *(row.step is not None, rank, row.model, row.step or 0),
    *(row.temperature, row.sample_id),
  )
