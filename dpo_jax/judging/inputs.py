"""What a judging run is given: responses, and the verdicts that are there.

A verdict that no report would count, or that a report would refuse, is found
here, before anything is asked and paid for.
"""

import pathlib
from collections.abc import Iterable

from dpo_jax import judging, records
from dpo_jax.judging import controls
from dpo_jax.storage import row_store


def refuse_leftovers(
  directory: pathlib.Path, files: Iterable[pathlib.Path]
) -> None:
  """ValueError where verdicts stand without a file of responses."""
  names = {path.name for path in files}
  if controls.FILE in names:
    raise ValueError(
      f"responses/{controls.FILE} has the name of the controls' verdicts:"
      " rename it"
    )
  extra = {path.name for path in directory.glob("*.jsonl")} - names
  extra -= {controls.FILE}
  if extra:
    raise ValueError(
      f"{directory} holds {sorted(extra)} without responses of that name: move"
      " these verdicts away, or use another --workdir"
    )


def read_responses(
  directory: pathlib.Path,
) -> dict[pathlib.Path, list[records.Response]]:
  """The responses of every file; ValueError unless each stands once."""
  files = {
    path: records.read(path, records.Response)
    for path in sorted(directory.glob("*.jsonl"))
  }
  if not any(files.values()):
    raise ValueError(
      f"{directory} holds no responses (*.jsonl): run sample.py with the same"
      " --workdir first"
    )
  seen: dict[tuple, pathlib.Path] = {}
  for path, responses in files.items():
    for response in responses:
      if response.unit in seen:
        raise ValueError(
          f"{path}: (prompt id, model, step, temperature, sample id) ="
          f" {response.unit} stands in {seen[response.unit]} already: keep one"
        )
      seen[response.unit] = path
  return files


def refuse_strangers(
  store: row_store.Store[records.Verdict], responses: list[records.Response]
) -> None:
  """Verdicts on responses that are gone would be counted as if they stood."""
  known = {response.unit for response in responses}
  strangers = [row for row in store.rows if row.unit[:5] not in known]
  if strangers:
    raise ValueError(
      f"{store.path} holds {len(strangers)} verdicts on responses that are not"
      f" in the responses file, such as {strangers[0].unit}: move the verdicts"
      " away, or use another --workdir"
    )


def refuse_other_judge(
  directory: pathlib.Path,
  judge: judging.Judge,
  stores: Iterable[row_store.Store[records.Verdict]],
) -> None:
  """One directory holds one judge's verdicts on one template's pages.

  A report refuses others, so that answers to pay for would be of no use. What
  a judge left that answered nothing may stay.

  Raises:
    ValueError: another one's answers are there.
  """
  rows = [
    row for store in stores for row in store.rows if row.verdict != "missing"
  ]
  for what, field in (("judge", "judge"), ("template", "template_hash")):
    own = {"judge": judge.name, "template": judge.template_hash}[what]
    others = {getattr(row, field) for row in rows} - {own}
    if others:
      raise ValueError(
        f"{directory} holds verdicts of another {what},"
        f" {', '.join(sorted(others))}, than {own}, and no report mixes them:"
        " give this one a directory of its own, --config.verdicts=verdicts-NAME"
        " (of replicate, with --config.report.verdicts), or move those away"
      )
