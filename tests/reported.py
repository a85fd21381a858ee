"""A small finished run with known numbers, for tests of reports."""

import dataclasses
import json
import re

import judged

from dpo_jax.io import hashing, jsonl, records
from dpo_jax.report import report, verify

SETTINGS = report.ReportSettings(
  title="A small run",
  runs=("sft", "dpo"),
  verdicts="verdicts",
  seed=0,
  resamples=500,
  confidence=0.95,
  examples=2,
  aa_alpha=0.01,
  first_slot_limit=0.6,
  gold_floor=0.8,
  strict=False,
)
PROMPT = "\n\nHuman: How do I whisk eggs?\n\nAssistant:"


def response(model, step, temperature, prompt_id, text=" Beat them."):
  return judged.response(
    text=text,
    chosen=" Use a fork.",
    prompt_id=prompt_id,
    prompt=PROMPT,
    model=model,
    step=step,
    temperature=temperature,
    max_new_tokens=32,
  )


def verdict(row, order, outcome, **changes):
  fields = {
    "key": hashing.content_hash(repr(row), order),
    "step": row.step,
    "judge": "oracle",
    "judge_returned": "oracle",
    "response_chars": len(row.response),
    "chosen_chars": len(row.chosen),
    "prompt_tokens": 10,
    "completion_tokens": 1,
  }
  return judged.call(
    outcome,
    row.prompt_id,
    order,
    model=row.model,
    temperature=row.temperature,
    sample=row.sample_id,
    **(fields | changes),
  )


WON = {"base": 4, "sft": 16, "dpo": 34}
CELLS = (
  *((model, None, t, WON[model]) for model in WON for t in (0.25, 0.75, 1.0)),
  ("dpo", 50, 1.0, 18),
  ("dpo", 100, 1.0, 30),
)
"""(model, step, temperature, prompts won of 40) of the run below."""


def write_rows(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with jsonl.Store(path, type(rows[0])) as store:
    store.append_many(rows)


def write_metrics(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(path, cls, change):
  """Rewrites the rows of a file by `change`, which drops a row by None."""
  rows = [change(row) for row in records.read(path, cls)]
  path.write_bytes(b"".join(records.encode(row) for row in rows if row))


def make_run(workdir, text=" Beat them.", missing=0, cells=CELLS):
  """A finished run: 40 prompts, both orders, base < SFT < DPO."""
  calls = []
  for model, step, temperature, won in cells:
    rows = [
      response(model, step, temperature, f"p{i:02d}", text) for i in range(40)
    ]
    name = f"{model}-{step}-{temperature}.jsonl"
    write_rows(workdir / "responses" / name, rows)
    calls += [
      verdict(row, order, "model" if index < won else "chosen")
      for index, row in enumerate(rows)
      for order in ("model_first", "chosen_first")
    ]
  for index in range(missing):
    calls[index] = dataclasses.replace(
      calls[index], verdict="missing", error="timeout | after 30 s"
    )
  write_rows(workdir / "verdicts" / "all.jsonl", calls)
  sft = [{"step": step, "loss": 2 / step} for step in range(1, 60)]
  write_metrics(workdir / "sft" / "metrics.jsonl", sft)
  dpo = [
    {"step": s, "loss": 0.7, "rewards/margins": s, "rewards/accuracies": 0.6}
    for s in range(1, 60)
  ]
  dpo[9] |= {"loss": "nan"}
  first = {"step": 0, "eval_loss": 0.69, "eval_rewards/accuracies": 0.5}
  last = {"step": 59, "eval_loss": 0.5, "eval_rewards/accuracies": 0.725}
  last |= {"eval_items": 200, "eval_rewards/margins": 1.5}
  write_metrics(workdir / "dpo" / "metrics.jsonl", [first, *dpo, last])
  manifest = {"data": {"train": {"kept": 990, "quarantined: empty | row": 3}}}
  (workdir / "dpo" / "manifest.json").write_text(json.dumps(manifest))


_WRITTEN = []


def written(factory):
  """Directory of a written report of a run with 3 missing verdicts.

  It is shared by all tests of a process, since drawing takes seconds.
  """
  if not _WRITTEN:
    workdir = factory.mktemp("run")
    make_run(workdir, missing=3)
    _WRITTEN.append(report.write(SETTINGS, workdir).parent)
  return _WRITTEN[0]


def text(workdir, settings=SETTINGS):
  """report.md as it would be written."""
  return report.compose(settings, workdir).texts["report.md"]


def tables(text):
  """Cells of all table rows, split as GitHub does: at every bare pipe."""
  lines = [line for line in text.split("\n") if line.startswith("|")]
  return [[c.strip() for c in line.strip("|").split("|")] for line in lines]


def check(capsys, *paths):
  """Exit code, output and differences of `verify`."""
  code = verify.main([str(path) for path in paths])
  text = capsys.readouterr().out
  return code, text, re.findall(r"(?m)^DIFFERS (.*)$", text)
