"""Which steps are whole, and which are kept: faults made in real files."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from dpo_jax.cli import checkpoint
from dpo_jax.io import step_files


def make(directory, step, complete=True):
  path = directory / str(step)
  (path / "trainable" / "d").mkdir(parents=True)
  (path / "meta").mkdir()
  (path / "trainable" / "d" / "array").write_bytes(bytes(range(256)) * step)
  (path / "meta" / "metadata").write_text("{}")
  (path / "empty").write_bytes(b"")
  if complete:
    step_files.complete(directory, step)
  return path


@pytest.mark.parametrize(
  ("keep", "left"), [(0, "123456"), (1, "36"), (2, "356"), (9, "123456")]
)
def test_the_newest_are_kept(tmp_path, keep, left):
  for step in range(1, 7):
    make(tmp_path, step)
  step_files.prune(tmp_path, keep, {3})
  assert {path.name for path in tmp_path.iterdir()} == set(left)


def test_what_was_put_aside_goes_once_a_step_as_late_is_whole(tmp_path):
  for step in (1, 2, 3):
    make(tmp_path, step)
  (tmp_path / "2").rename(tmp_path / "2.rejected")
  (tmp_path / "3").rename(tmp_path / "4.rejected")
  step_files.prune(tmp_path, 0)
  assert {path.name for path in tmp_path.iterdir()} == {
    "1",
    "2.rejected",
    "4.rejected",
  }
  make(tmp_path, 3)
  step_files.prune(tmp_path, 0)
  assert {path.name for path in tmp_path.iterdir()} == {"1", "3", "4.rejected"}


def test_another_format_is_refused_and_no_damage(tmp_path):
  for step in (1, 2):
    make(tmp_path, step)
  path = tmp_path / "2" / step_files.MANIFEST
  values = json.loads(path.read_text())
  del values["sha256"]
  values |= {"format": values["format"] + 1, "shards": 4}
  path.write_text(json.dumps(values | {"sha256": step_files._own_hash(values)}))
  with pytest.raises(
    step_files.OtherFormat,
    match=r"2: a checkpoint of format \d+, .* the version",
  ):
    step_files.newest(tmp_path)
  assert step_files.steps(tmp_path) == [1, 2]


def test_a_temporary_of_the_manifest_is_no_damage(tmp_path):
  make(tmp_path, 4)
  (tmp_path / "4" / ".manifest.json.0123456789ab.tmp").write_text("{")
  assert step_files.newest(tmp_path) == (4, [])


def test_steps_that_were_never_completed_are_not_counted(tmp_path):
  for step in (1, 2):
    make(tmp_path, step)
  make(tmp_path, 3, complete=False)
  step_files.prune(tmp_path, 1)
  assert step_files.steps(tmp_path) == [2, 3]


def flip(path, bit=0):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1 << bit
  path.write_bytes(data)


FAULTS = {
  "a flipped bit": lambda path: flip(path / "trainable/d/array", 3),
  "a cut file": lambda path: os.truncate(path / "trainable/d/array", 100),
  "a file grown": lambda path: os.truncate(path / "empty", 1),
  "a missing file": lambda path: (path / "meta/metadata").unlink(),
  "a missing empty file": lambda path: (path / "empty").unlink(),
  "a missing directory": lambda path: shutil.rmtree(path / "trainable"),
  "a further file": lambda path: (path / "trainable/x").write_text(""),
  "no manifest": lambda path: (path / "manifest.json").unlink(),
  "an empty manifest": lambda path: os.truncate(path / "manifest.json", 0),
  "a cut manifest": lambda path: os.truncate(path / "manifest.json", 80),
  "an edited manifest": lambda path: flip(path / "manifest.json"),
  "a manifest of another step": lambda path: shutil.copy(
    path.parent / "1" / "manifest.json", path / "manifest.json"
  ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_step_is_not_used(tmp_path, fault):
  for step in (1, 2, 3):
    path = make(tmp_path, step)
    assert step_files.problem(tmp_path, step) == ""
  assert step_files.newest(tmp_path) == (3, [])
  FAULTS[fault](path)
  step, problems = step_files.newest(tmp_path)
  assert step == 2
  (problem,) = problems
  assert problem.startswith(f"{path} is not used: ")
  step_files.tidy(tmp_path, step)
  # Nothing is deleted: it may be looked at, but is no step any more.
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"1", "2", "3.rejected"}
  assert step_files.newest(tmp_path) == (2, [])


def test_hidden_files_of_the_system_are_passed_over(tmp_path, caplog):
  path = make(tmp_path, 1)
  strays = path / ".DS_Store", path / "trainable" / ".nfs0000", tmp_path / ".x"
  for stray in strays:
    stray.write_text("")
  assert step_files.newest(tmp_path) == (1, [])
  for stray in strays[:2]:
    assert f"{stray} is passed over" in caplog.text
  step_files.tidy(tmp_path, 1)
  assert all(stray.exists() for stray in strays)


def test_any_flipped_bit_of_a_manifest_is_found(tmp_path):
  path = make(tmp_path, 1) / "manifest.json"
  whole = path.read_bytes()
  for place in range(len(whole)):
    data = bytearray(whole)
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)
    # White space alone says nothing.
    if step_files.problem(tmp_path, 1) == "":
      assert json.loads(data) == json.loads(whole)


def test_a_first_save_that_was_interrupted_starts_over(tmp_path):
  make(tmp_path, 2, complete=False)
  step, (problem,) = step_files.newest(tmp_path)
  assert step is None
  assert "its save was interrupted" in problem
  step_files.tidy(tmp_path, step)
  assert [path.name for path in tmp_path.iterdir()] == ["2.rejected"]


def test_nothing_is_started_over_where_a_step_was_whole(tmp_path):
  for step in (1, 2):
    flip(make(tmp_path, step) / "trainable/d/array")
  make(tmp_path, 3, complete=False)
  with pytest.raises(ValueError, match="holds no whole checkpoint") as error:
    step_files.newest(tmp_path)
  assert str(error.value).count(" is not used: ") == 3
  assert step_files.steps(tmp_path) == [1, 2, 3]


def test_half_written_and_half_deleted_steps_are_removed(tmp_path):
  make(tmp_path, 2)
  make(tmp_path, 1).rename(tmp_path / "1.deleting")
  (tmp_path / "4.orbax-checkpoint-tmp" / "trainable").mkdir(parents=True)
  step_files.tidy(tmp_path, 2)
  assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_what_no_run_wrote_is_refused(tmp_path):
  make(tmp_path, 2)
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match=r"notes.txt is no checkpoint"):
    step_files.tidy(tmp_path, 2)
  assert (tmp_path / "notes.txt").exists()


def test_verify_and_list(tmp_path, capsys):
  def call(*arguments):
    code = checkpoint.main(list(arguments))
    return code, *capsys.readouterr()

  directory = tmp_path / "checkpoints"
  directory.mkdir()
  code, _, stderr = call("verify", str(tmp_path))
  assert (code, "holds no checkpoints" in stderr) == (2, True)
  make(directory, 1)
  path = make(directory, 2)
  code, stdout, _ = call("list", str(tmp_path))
  assert code == 0
  # 256 bytes of the array and 2 of the metadata.
  assert stdout.splitlines() == [
    "step 1: 258 bytes",
    "step 2: 514 bytes",
  ]
  flip(path / "trainable/d/array")
  code, stdout, _ = call("verify", str(directory))
  assert code == 1
  assert stdout.splitlines() == [
    "step 1: whole",
    "step 2: it differs from its manifest in trainable/d/array",
  ]
  command = [sys.executable, "-m", "dpo_jax", "checkpoint", "verify", tmp_path]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (1, stdout)
