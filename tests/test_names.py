"""Names that become files or directories stay where they belong."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
import reported
import sourcing
from test_judging_client import settings
from test_judging_runner import NO_CONTROLS, response, write

from dpo_jax.data.sources import hh_tfds
from dpo_jax.judging import batch_api, runner
from dpo_jax.sampling import jobs

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTSIDE = ["../../x", "/etc/x", "a/../../x", "a\0b", "x" * 300, ".."]


def policy(name):
  return jobs.Policy(name, "path", "", "", (1.0,))


def judge(name):
  return runner.JudgeSettings("oracle", "both", 0, 8, name, NO_CONTROLS, None)


@pytest.mark.parametrize("name", [*OUTSIDE, "", ".hidden", "a\n", "a b"])
@pytest.mark.parametrize(
  "make",
  [
    policy,
    judge,
    lambda name: dataclasses.replace(reported.SETTINGS, runs=(name,)),
    lambda name: dataclasses.replace(reported.SETTINGS, verdicts=name),
  ],
  ids=["policy", "verdicts", "run", "report's verdicts"],
)
def test_a_name_of_a_file_is_one_plain_name(make, name):
  with pytest.raises(ValueError, match="must be"):
    make(name)


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
  "make",
  [
    lambda name: sourcing.source("somewhere", subsets=(name,)),
    lambda name: sourcing.source("somewhere", train_split=name),
    lambda name: sourcing.source("somewhere", eval_split=name),
  ],
  ids=["subset", "train_split", "eval_split"],
)
def test_a_subset_stays_in_its_dataset(make, name):
  with pytest.raises(ValueError, match="within its dataset"):
    make(name)
  # A part of a part is a name that datasets have.
  sourcing.source("somewhere", subsets=("data/helpful-base",))


@pytest.mark.parametrize("name", [*OUTSIDE, "", "a/b"])
def test_a_dataset_is_written_under_plain_names(tmp_path, name):
  inner = tmp_path / "a" / "b"
  inner.mkdir(parents=True)
  with pytest.raises(ValueError, match="names a directory"):
    hh_tfds.write("nowhere", inner, subsets=(name,))
  assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", inner]


@pytest.mark.parametrize("mark", ["../victim", "/tmp/victim", "b", ""])
def test_the_record_of_a_batch_cannot_name_another_file(tmp_path, mark):
  """It would be written to, and deleted once its batch is collected."""
  write(tmp_path, [response(0)])
  directory = tmp_path / "verdicts" / "batches"
  directory.mkdir(parents=True)
  victim = tmp_path / "verdicts" / "victim.json"
  victim.write_text("{}")
  record = batch_api.Batch(mark, "m", "", "", ())
  (directory / "a.json").write_text(json.dumps(dataclasses.asdict(record)))
  used = runner.JudgeSettings(
    "server",
    "both",
    0,
    8,
    "verdicts",
    NO_CONTROLS,
    settings("http://127.0.0.1:9/v1", mode="batch"),
  )
  with pytest.raises(ValueError, match=r"a\.json: .*has the mark"):
    runner.run(used, tmp_path)
  assert victim.read_text() == "{}"


def test_a_working_directory_that_cannot_be_is_refused(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "judge.py",
      "--config=configs/judge.py:oracle",
      f"--workdir={tmp_path / ('x' * 300)}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert "more than 255 bytes" in done.stderr
  assert list(tmp_path.iterdir()) == []
