"""Compares what two runs of the pipeline left, value by value."""

import csv
import fnmatch
import hashlib
import json
import pathlib

import numpy as np
from safetensors import numpy as safetensors

TRAININGS = ("pretrain", "sft", "dpo")
# What differs between two runs, as (file pattern, field pattern): times, and
# hashes of images, which hold dates.
LEFT_OUT = (
  ("*/metrics.jsonl", "*_seconds"),
  ("*/metrics.jsonl", "*_per_second"),
  ("*/metrics.jsonl", "time"),
  ("report/numbers.json", "figures.*sha256"),
  ("report/numbers.json", "figures.training_curves.*"),
)


def collect(workdir: pathlib.Path) -> dict[str, list[dict]]:
  """Rows by file: each a flat mapping of field paths to values."""
  found = {}
  for name in TRAININGS:
    run = workdir / name
    if run.exists():
      found[f"{name}/metrics.jsonl"] = read_rows(run / "metrics.jsonl")
      found[f"{name}/weights"] = [weights(run / "export")]
  for folder in ("responses", "verdicts"):
    for path in sorted((workdir / folder).glob("*.jsonl")):
      found[f"{folder}/{path.name}"] = read_rows(path)
  report = workdir / "report"
  text = (report / "numbers.json").read_text("utf-8")
  text = text.replace(str(workdir), "WORKDIR")
  found["report/numbers.json"] = [json.loads(text)]
  with (report / "win_rates.csv").open(newline="") as file:
    found["report/win_rates.csv"] = list(csv.DictReader(file))
  return {
    file: [dict(flat(row)) for row in rows] for file, rows in found.items()
  }


def read_rows(path: pathlib.Path) -> list[dict]:
  data = path.read_text("utf-8")
  return [json.loads(line) for line in data.split("\n") if line]


def weights(directory: pathlib.Path) -> dict[str, str]:
  """A hash of each tensor of an exported model."""
  found = {}
  for path in sorted(directory.glob("*.safetensors")):
    for name, tensor in safetensors.load_file(path).items():
      data = np.ascontiguousarray(tensor)
      digest = hashlib.sha256(f"{data.dtype}{data.shape}".encode())
      digest.update(data.tobytes())
      found[name] = digest.hexdigest()
  if not found:
    raise RuntimeError(f"{directory} holds no weights")
  return found


def flat(value, path: str = ""):
  """(path, value) of each leaf of nested dicts and lists."""
  if isinstance(value, dict | list) and value:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
      yield from flat(item, f"{path}.{key}" if path else str(key))
  else:
    yield path, value


def compare(before: dict, after: dict) -> list[str]:
  """A line for each file or row that is not the same."""
  lines = []
  for file in sorted({*before, *after}):
    rows = [kept(file, found.get(file, [])) for found in (before, after)]
    if rows[0] != rows[1]:
      differ = [pair for pair in zip(*rows) if pair[0] != pair[1]]
      lines.append(f"{file}: {[*map(len, rows)]} rows; {differ[:1]}")
  return lines


def kept(file: str, rows: list[dict]) -> list[str]:
  """Each row's values but those left out, as text: NaN equals itself."""
  rules = [name for pattern, name in LEFT_OUT if fnmatch.fnmatch(file, pattern)]
  return [
    json.dumps(
      {
        field: row[field]
        for field in sorted(row)
        if not any(fnmatch.fnmatch(field, name) for name in rules)
      }
    )
    for row in rows
  ]
