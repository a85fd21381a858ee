"""Directories of runs that are reached by another path."""

import pathlib

import pytest

from dpo_jax.io import rundir


@pytest.mark.parametrize(
  ("value", "stored"),
  [
    ("/runs/a", "{workdir}"),
    ("/runs/a/sft/export", "{workdir}/sft/export"),
    ("/runs/ab/sft", "/runs/ab/sft"),
    ("runs/a", "runs/a"),
    ("/data/runs/a", "/data/runs/a"),
    (("/runs/a/x", 1), ("{workdir}/x", 1)),
    ({"path": ["/runs/a/x"]}, {"path": ["{workdir}/x"]}),
  ],
)
def test_paths_below_the_directory_are_stored_from_it(value, stored):
  assert rundir.portable(value, pathlib.Path("/runs/a")) == stored


def test_hidden_files_are_no_part_of_a_finished_run(tmp_path):
  (tmp_path / "export").mkdir()
  for name in ("metrics.jsonl", "export/model.safetensors", "export/.DS_Store"):
    (tmp_path / name).write_text(name)
  rundir.finish(tmp_path, 3)
  (tmp_path / "export" / ".DS_Store").unlink()
  rundir.refuse_damaged(tmp_path)
  assert rundir.finished(tmp_path).step == 3
  (tmp_path / "export" / "model.safetensors").write_text("other")
  rundir.refuse_damaged(tmp_path, "metrics.jsonl")
  with pytest.raises(
    ValueError, match=r"model\.safetensors is not what its run"
  ):
    rundir.refuse_damaged(tmp_path, "export/")


def test_a_moved_directory_has_the_same_config(tmp_path):
  begun, moved = tmp_path / "begun", tmp_path / "moved"

  def values(root, base):
    return rundir.portable({"model": {"path": f"{root}/{base}"}}, root)

  begun.mkdir()
  rundir.claim(begun, values(begun, "base"))
  begun.rename(moved)
  assert rundir.check(moved, values(moved, "base")) == []
  with pytest.raises(ValueError, match=r"model.path: '{workdir}/base' -> "):
    rundir.check(moved, values(moved, "other"))
