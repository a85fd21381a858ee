"""The header of an eval_*.json file is recounted, and its replies parsed."""

import json
import re

import pytest
import reported

from dpo_jax.report import verify

# Rate and interval in per cent, as printed in the table of shared/design.
TABLE = """
base  22.0 [16,29]  27.3 [21,35]  29.3 [23,37]  29.3 [23,37]
sft   29.3 [23,37]  34.0 [27,42]  46.7 [39,55]  46.0 [38,54]
dpo   25.3 [19,33]  36.0 [29,44]  46.0 [38,54]  42.0 [34,50]
"""


def test_real_result_files(shared, capsys):
  code, text, found = reported.check(capsys, shared / "seed_results")
  assert code == 1
  assert TABLE in text
  files = {re.search(r"/(eval_.*?\.json):", line)[1] for line in found}
  assert {name.split("_")[1] for name in files} == {
    f"pythia-2.8b-dpo-{t}" for t in ("0.5", "0.75", "1.0")
  }
  assert "3 of 12 files disagree" in text
  # Published are 64.0, 52.7 and 58.0.
  for line in (
    "win_counts.Model is 96, its rows give 54",
    "win_counts.Chosen is 54, its rows give 96",
    "winrates.model_winrate is 64, its rows give 36",
    "win_counts.Model is 79, its rows give 69",
    "win_counts.Model is 87, its rows give 63",
  ):
    assert any(x.endswith(line) for x in found), line
  # Counted with jq: 13 ties, one of which begins with an apology.
  assert "12 verdicts that the judge's reply states were missed" in text


def content():
  """A result file of four rows: model, model (missed), chosen, refusal."""
  rows = [
    {
      "sample_id": 7,
      "presentation_order": "model_first",
      "verdict": verdict,
      "raw_gpt4_response": reply,
    }
    for verdict, reply in (
      ("Model", "More helpful: A"),
      ("Tie", 'More helpful: "A"'),
      ("Chosen", "More helpful: B"),
      ("Tie", "I'm sorry, I cannot."),
    )
  ]
  return {
    "metadata": {
      "run_name": "eval_tiny-dpo-0.7_20250101_000000",
      "temperature": 0.7,
      "total_samples_evaluated": 4,
    },
    "win_counts": {"Model": 1, "Chosen": 1, "Tie": 2, "Error": 0},
    "winrates": {
      "model_winrate": 25.0,
      "chosen_winrate": 25.0,
      "tie_rate": 50.0,
      "error_rate": 0.0,
    },
    "results": rows,
  }


def write(directory, value, name="eval_one.json"):
  path = directory / name
  path.write_text(json.dumps(value))
  return path


def test_a_consistent_file_passes(tmp_path, capsys):
  value = content()
  path = write(tmp_path, value)
  code, text, found = reported.check(capsys, path)
  assert (code, found) == (0, [])
  assert "dpo  25.0 [5,70]" in text
  assert "1 verdicts that the judge's reply states were missed" in text
  # A missing reply names no winner.
  value["results"][1]["raw_gpt4_response"] = None
  del value["results"][3]["raw_gpt4_response"]
  write(tmp_path, value)
  assert "0 verdicts that the judge's" in reported.check(capsys, path)[1]


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("win_counts.Model", 2, "Model is 2, its rows give 1"),
    ("winrates.tie_rate", 40.0, "winrates.tie_rate is 40, its rows give 50"),
    ("metadata.total_samples_evaluated", 5, "ted is 5, its rows give 4"),
    (
      "results.2.presentation_order",
      "chosen_first",
      "results[2].verdict is Chosen, its reply says Model",
    ),
  ],
)
def test_an_inconsistent_file_is_named(tmp_path, capsys, path, value, message):
  file = write(tmp_path, changed(path, value))
  code, _, (line,) = reported.check(capsys, file)
  assert code == 1
  assert line == f"{file}: {line.partition(': ')[2]}"
  assert message in line


def test_no_rows_are_no_crash(tmp_path, capsys):
  value = content()
  value["results"] = []
  value["win_counts"] = dict.fromkeys(value["win_counts"], 0)
  value["winrates"] = dict.fromkeys(value["winrates"], 0.0)
  value["metadata"]["total_samples_evaluated"] = 0
  write(tmp_path, value)
  code, text, _ = reported.check(capsys, tmp_path)
  assert code == 0
  assert "dpo  n/a [0,100]" in text


def test_files_of_one_model_and_checkpoints_have_names_of_their_own(
  tmp_path, capsys
):
  for name in ("eval_one.json", "eval_two.json"):
    write(tmp_path, content(), name)
  value = changed("metadata.run_name", "dpo-checkpoint-50")
  write(tmp_path, value, "eval_three.json")
  code, text, _ = reported.check(capsys, tmp_path)
  assert code == 0
  for name in ("eval_one", "eval_two", "dpo-checkpoint-50"):
    assert f"{name.ljust(17)}  25.0 [5,70]" in text


DELETED = object()


def changed(path, new):
  """`content` with the value at a path such as results.0.verdict changed."""
  value = found = content()
  *keys, last = (int(k) if k.isdigit() else k for k in path.split("."))
  for key in keys:
    found = found[key]
  if new is DELETED:
    del found[last]
  else:
    found[last] = new
  return value


@pytest.mark.parametrize(
  ("path", "new", "message"),
  [
    ("metadata", DELETED, "metadata must be a dict, not None"),
    ("metadata.temperature", "1", "temperature='1' must be float, not str"),
    ("metadata.temperature", 10**400, "must be float, not int"),
    ("win_counts.Tie", DELETED, "win_counts lacks the field 'Tie'"),
    ("win_counts.Model", True, "win_counts.Model=True must be int, not bool"),
    ("results", "x", "results must be a list, not 'x'"),
    ("results.1", 3, r"results\[1\] must be a dict, not 3"),
    ("results.2.verdict", DELETED, r"results\[2\] lacks the field 'verdict'"),
    ("results.1.verdict", "Both", r"\[1\].verdict='Both' must be one of"),
    ("results.0.raw_gpt4_response", 7, "response=7 must be str, not int"),
  ],
)
def test_malformed_files_are_refused_by_field(
  tmp_path, capsys, path, new, message
):
  file = write(tmp_path, changed(path, new))
  assert verify.main([str(file)]) == 2
  error = capsys.readouterr().err
  assert str(file) in error
  assert re.search(message, error), error
