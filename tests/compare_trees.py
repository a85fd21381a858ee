"""Compares what two checkouts compute, value by value.

  python tests/compare_trees.py BEFORE AFTER --work=DIR [--shared=DIR]

runs `configs/demo.py:tiny` and `configs/hh.py:smoke` in both checkouts and
compares metrics, responses, verdicts, the report's numbers and the weights
they trained, and the weights of a DPO run that lost its last checkpoint and was
resumed. Everything must be equal to the bit, except the fields that `REMOVED`,
`RENAMED` and `LEFT_OUT` name. What a checkout has finished in DIR is not run
again.

`smoke` gets one file of verdict rows in both checkouts, made from the responses
of BEFORE, so that replacing its judge changes no number.
"""

import argparse
import csv
import fnmatch
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
from safetensors import numpy as safetensors

HERE = pathlib.Path(__file__).resolve().parent
TRAININGS = ("pretrain", "sft", "dpo")
# Fields that AFTER no longer writes, as (file pattern, field pattern).
REMOVED: tuple[tuple[str, str], ...] = (("report/numbers.json", "ranking*"),)
# Fields that AFTER writes under another name: (file pattern, before, after).
RENAMED: tuple[tuple[str, str, str], ...] = ()
# Files that AFTER writes under another name: (before, after).
FILES: tuple[tuple[str, str], ...] = ()
# Times, paths, commits, and hashes of source code: (file pattern, field
# pattern).
LEFT_OUT = (
  ("*/metrics.jsonl", "*_seconds"),
  ("*/metrics.jsonl", "*_per_second"),
  ("*/metrics.jsonl", "time"),
  # Hashes of the oracle's source code, among others.
  ("verdicts/*", "key"),
  ("verdicts/*", "template_hash"),
  # Images hold dates, and training curves are drawn from rows with times.
  ("report/numbers.json", "figures.*sha256"),
  ("report/numbers.json", "figures.training_curves.*"),
)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("before", type=pathlib.Path)
  parser.add_argument("after", type=pathlib.Path)
  parser.add_argument("--work", type=pathlib.Path, required=True)
  parser.add_argument(
    "--shared", type=pathlib.Path, default=HERE.parent.parent / "shared"
  )
  flags = parser.parse_args()
  sides = {"before": flags.before.resolve(), "after": flags.after.resolve()}
  verdicts = flags.work.resolve() / "verdicts"
  found = {}
  for side, tree in sides.items():
    work = flags.work.resolve() / side
    run_demo(tree, work / "demo")
    run_smoke(tree, work / "smoke", flags.shared.resolve(), verdicts)
    found[side] = {
      f"{name}/{file}": rows
      for name in ("demo", "smoke")
      for file, rows in collect(work / name).items()
    }
    found[side]["resumed weights"] = [
      resumed(tree, work / "demo", work / "resumed")
    ]
  differences = compare(found["before"], found["after"])
  for line in differences[:100]:
    print(line)
  values = sum(len(row) for rows in found["before"].values() for row in rows)
  print(f"{values} values compared, {len(differences)} differ")
  return 1 if differences else 0


def command(tree: pathlib.Path, *words: str, status: int = 0) -> None:
  """Runs `python -m dpo_jax WORDS` in a checkout, on one CPU device."""
  done = subprocess.run(
    [sys.executable, "-m", "dpo_jax", *words],
    cwd=tree,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tree)},
    capture_output=True,
    text=True,
  )
  if done.returncode != status:
    raise RuntimeError(
      f"{tree}: {' '.join(words)} ended with {done.returncode}, not {status}:\n"
      + done.stderr[-4000:]
    )


def run_demo(tree: pathlib.Path, workdir: pathlib.Path) -> None:
  if not (workdir / "report" / "numbers.json").exists():
    command(
      tree, "replicate", "--config=configs/demo.py:tiny", f"--workdir={workdir}"
    )


def run_smoke(
  tree: pathlib.Path,
  workdir: pathlib.Path,
  shared: pathlib.Path,
  verdicts: pathlib.Path,
) -> None:
  """Trains and samples, takes the fixed verdicts, and writes the report."""
  if (workdir / "report" / "numbers.json").exists():
    return
  # A row that is no verdict, without responses: the judge stage refuses it.
  blocker = workdir / "verdicts" / "blocker.jsonl"
  blocker.parent.mkdir(parents=True, exist_ok=True)
  blocker.write_text("{}\n")
  flags = [
    f"--workdir={workdir}",
    f"--config.paths.data={shared / 'data' / 'hh-rlhf'}",
    f"--config.paths.tokenizer={shared / 'tokenizer' / 'pythia'}",
  ]
  command(tree, "replicate", "--config=configs/hh.py:smoke", *flags, status=2)
  if not verdicts.exists():
    write_verdicts(workdir / "responses", verdicts)
  shutil.rmtree(workdir / "verdicts")
  shutil.copytree(verdicts, workdir / "verdicts")
  command(tree, "report", str(workdir), "--runs", "sft", "dpo")


def write_verdicts(responses: pathlib.Path, verdicts: pathlib.Path) -> None:
  """Verdict rows that prefer the longer text, in both orders."""
  verdicts.mkdir(parents=True)
  for path in sorted(responses.glob("*.jsonl")):
    rows = []
    for response in read_rows(path):
      lengths = len(response["response"]), len(response["chosen"])
      same = lengths[0] == lengths[1]
      outcome = "model" if lengths[0] > lengths[1] else "chosen"
      for order in ("model_first", "chosen_first"):
        row = {
          name: response[name]
          for name in ("prompt_id", "model", "step", "temperature", "sample_id")
        }
        digest = hashlib.sha256(json.dumps([row, order]).encode())
        row |= {
          "key": digest.hexdigest(),
          "order": order,
          "control": "",
          "verdict": "tie" if same else outcome,
          "score": None,
          "judge": "longer",
          "judge_returned": "longer",
          "judge_fingerprint": "",
          "template_hash": "",
          "response_chars": lengths[0],
          "chosen_chars": lengths[1],
          "prompt_tokens": 0,
          "completion_tokens": 0,
          "raw": "",
          "error": "",
        }
        rows.append(json.dumps(row) + "\n")
    (verdicts / path.name).write_text("".join(rows), "utf-8")


def resumed(
  tree: pathlib.Path, done: pathlib.Path, workdir: pathlib.Path
) -> dict:
  """The weights of the demo's DPO run, resumed from its last but one step."""
  if not workdir.exists():
    # The config names the working directory: the copy takes its place.
    aside = done.with_name("aside")
    done.rename(aside)
    try:
      shutil.copytree(aside, done)
      run = done / "dpo"
      steps = sorted(
        (path for path in (run / "checkpoints").iterdir() if path.is_dir()),
        key=lambda path: int("0" + "".join(filter(str.isdigit, path.name))),
      )
      shutil.rmtree(steps[-1])
      shutil.rmtree(run / "export")
      (run / "finished.json").unlink()
      command(
        tree, "replicate", "--config=configs/demo.py:tiny", f"--workdir={done}"
      )
      starts = json.loads((run / "manifest.json").read_text())["starts"]
      if [start["step"] > 0 for start in starts] != [False, True]:
        raise RuntimeError(f"{run} was not resumed: {starts}")
      done.rename(workdir)
    finally:
      aside.rename(done)
  return weights(workdir / "dpo" / "export")


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
  """A line for each file, row or value that is not the same."""
  names = dict(FILES)
  lines = []
  expected = {names.get(file, file): (file, before[file]) for file in before}
  for file in sorted(set(expected) | set(after)):
    if file not in expected or file not in after:
      side = "AFTER" if file in after else "BEFORE"
      lines.append(f"{file}: only {side} has it")
      continue
    origin, rows = expected[file]
    if len(rows) != len(after[file]):
      lines.append(f"{file}: {len(rows)} rows, then {len(after[file])}")
      continue
    for number, (row, now) in enumerate(zip(rows, after[file], strict=True), 1):
      row = mapped(origin, row)
      now = kept(file, now, LEFT_OUT)
      for field in sorted(set(row) | set(now)):
        old, new = row.get(field, "(none)"), now.get(field, "(none)")
        # Through JSON: NaN equals itself, and 1 is not 1.0.
        if json.dumps(old) != json.dumps(new):
          lines.append(f"{file}:{number} {field}: {old!r} -> {new!r}")
  return lines


def kept(file: str, row: dict, rules) -> dict:
  """The fields of a row that no rule names."""
  path = file.partition("/")[2]
  return {
    field: value
    for field, value in row.items()
    if not any(
      fnmatch.fnmatch(path, pattern) and fnmatch.fnmatch(field, name)
      for pattern, name in rules
    )
  }


def mapped(file: str, row: dict) -> dict:
  """A row of BEFORE as AFTER would write it."""
  path = file.partition("/")[2]
  row = kept(file, row, LEFT_OUT + REMOVED)
  for pattern, old, new in RENAMED:
    if fnmatch.fnmatch(path, pattern) and old in row:
      row[new] = row.pop(old)
  return row


if __name__ == "__main__":
  sys.exit(main())
