"""Names that become files or directories stay where they belong."""

import dataclasses
import json

import pytest
import reported
import sourcing
from test_judging_client import settings
from test_judging_runner import NO_CONTROLS, response, write

from dpo_jax.data.sources import hh_tfds
from dpo_jax.judging import batch_api, runner
from dpo_jax.sampling import jobs

OUTSIDE = ["../../x", "/etc/x", "a/../../x", "a\0b", "x" * 300, ".."]


def judge(name, server=None):
  kind = "server" if server else "oracle"
  return runner.JudgeSettings(kind, "both", 0, 8, name, NO_CONTROLS, server)


@pytest.mark.parametrize("name", [*OUTSIDE, "", ".hidden", "a\n", "a b"])
def test_a_name_of_a_file_is_one_plain_name(name):
  for make in (
    lambda: jobs.Policy(name, "path", "", "", (1.0,)),
    lambda: judge(name),
    lambda: dataclasses.replace(reported.SETTINGS, runs=(name,)),
    lambda: dataclasses.replace(reported.SETTINGS, verdicts=name),
  ):
    with pytest.raises(ValueError, match="must be"):
      make()


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_subset_stays_in_its_dataset(name):
  for field, value in (
    ("subsets", (name,)),
    ("train_split", name),
    ("eval_split", name),
  ):
    with pytest.raises(ValueError, match="within its dataset"):
      sourcing.source("somewhere", **{field: value})
  # Datasets have nested names.
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
  used = judge("verdicts", settings("http://127.0.0.1:9/v1", mode="batch"))
  with pytest.raises(ValueError, match=r"a\.json: .*has the mark"):
    runner.run(used, tmp_path)
  assert victim.read_text() == "{}"
